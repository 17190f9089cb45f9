use proptest::prelude::*;

use super::*;

const DIRECT: u64 = 0xffff_8000_0000_0000;
const IMAGE: u64 = 0xffff_ffff_8000_0000;

fn ok(number: CallNumber, rdi: u64, rsi: u64, rdx: u64, rcx: u64) -> Call {
    Call::decode(number.into(), rdi, rsi, rdx, rcx).unwrap()
}

fn error(number: impl Into<u32>, rdi: u64, rsi: u64, rdx: u64, rcx: u64) -> u64 {
    Call::decode(number.into(), rdi, rsi, rdx, rcx).unwrap_err().result()
}

#[test]
fn calls_are_decoded() {
    let actor = Actor { cpu: 0x5678, task: 0x9abc_def0 };
    let who = 0x9abc_def0_5678_0000;
    assert_eq!(
        ok(CallNumber::Hello, abi::VERSION.into(), 5, 0, 0),
        Call::Hello { flags: GuestFlags::from_bits(5) }
    );
    let Call::RegionAdd(region) = ok(CallNumber::RegionAdd, DIRECT, 1 << 28, 0x1000, 0) else {
        panic!()
    };
    assert_eq!((region.va(), region.bytes(), region.key()), (DIRECT, 1 << 28, 0x1000));
    assert_eq!(
        ok(CallNumber::RingSetup, IMAGE, 64 * 65, 3, IMAGE),
        Call::RingSetup(RingPlace { va: IMAGE, records: 64, cpu: 3, text_base: IMAGE })
    );
    assert_eq!(
        ok(CallNumber::RingDrain, 0xffff, 0, 0, 0),
        Call::RingDrain { cpu: 0xffff, released: None }
    );
    assert_eq!(
        ok(CallNumber::Poison, u64::MAX, 1, 0xfc, 0),
        Call::Poison { va: u64::MAX, len: 1, code: 0xfc }
    );
    assert_eq!(ok(CallNumber::Unpoison, 5, 0, 0, 0), Call::Unpoison { va: 5, len: 0, stack: None });
    assert_eq!(
        ok(CallNumber::Unpoison, DIRECT, 4096, MemoryUse::Stack.into(), 0),
        Call::Unpoison { va: DIRECT, len: 4096, stack: Some(true) }
    );
    assert_eq!(
        ok(CallNumber::Allocated, DIRECT, 50, who | 0x1234, 0),
        Call::Allocated { va: DIRECT, size: 50, cache: 0x1234, actor, slot: None }
    );
    let slot = Some(Slot { bytes: 64, code: 0xfc });
    let owner = Owner { allocator: 2, note: 7 };
    assert_eq!(
        ok(CallNumber::Allocated, DIRECT, 50, who, Slot { bytes: 64, code: 0xfc }.to_register()),
        Call::Allocated { va: DIRECT, size: 50, cache: 0, actor, slot }
    );
    assert_eq!(
        ok(CallNumber::Freed, DIRECT, 0, who, 0),
        Call::Freed { va: DIRECT, actor, slot: None, owner: None }
    );
    assert_eq!(
        ok(
            CallNumber::Freed,
            DIRECT,
            0,
            who | u64::from(owner.to_bits()),
            Slot { bytes: 64, code: 0xfc }.to_register()
        ),
        Call::Freed { va: DIRECT, actor, slot, owner: Some(owner) }
    );
    for (va, bad) in [
        (DIRECT, 64),
        (DIRECT, Slot { bytes: 64, code: 0x7f }.to_register()),
        (DIRECT, Slot { bytes: 0, code: 0xfc }.to_register()),
    ] {
        assert_eq!(error(CallNumber::Allocated, va, 1, who, bad), abi::ERR_ARGUMENT);
        assert_eq!(error(CallNumber::Freed, va, 0, who, bad), abi::ERR_ARGUMENT);
    }
    assert_eq!(
        error(
            CallNumber::Freed,
            u64::MAX - 8,
            0,
            who,
            Slot { bytes: 10, code: 0xfc }.to_register()
        ),
        abi::ERR_ARGUMENT
    );
    // A size that wraps is a finding, not a mistake of the call.
    let report = Call::Report(BadAccess {
        address: 7,
        size: u64::MAX,
        access: Access::Write,
        actor,
        ip: IMAGE,
    });
    assert_eq!(ok(CallNumber::Report, 7, u64::MAX, who | 1, IMAGE), report);
    assert_eq!(
        ok(CallNumber::Name, NameKind::Cache.into(), DIRECT, 7 << 32 | 64, 96),
        Call::Name { what: Named::Cache { id: 7, object_size: 96 }, va: DIRECT, len: 64 }
    );
    assert_eq!(
        ok(CallNumber::Name, NameKind::Task.into(), DIRECT, 0xffff_ffff << 32, 0),
        Call::Name { what: Named::Task { id: u32::MAX }, va: DIRECT, len: 0 }
    );
    let to = EvictionBuffer { va: DIRECT, count: 1 << 16 };
    assert_eq!(
        ok(CallNumber::Quarantine, 1, DIRECT, abi::RELEASED_MAX, 0),
        Call::Quarantine { to, all: true }
    );
    assert_eq!(
        ok(CallNumber::RingDrain, 3, DIRECT, abi::RELEASED_MAX, 0),
        Call::RingDrain { cpu: 3, released: Some(to) }
    );
    for number in [CallNumber::Quarantine, CallNumber::RingDrain] {
        assert_eq!(error(number, 0, DIRECT, abi::RELEASED_MAX + 1, 0), abi::ERR_ARGUMENT);
        assert_eq!(error(number, 0, u64::MAX - 30, 2, 0), abi::ERR_ARGUMENT);
    }
    assert_eq!(ok(CallNumber::Related, DIRECT, 0, who, 0), Call::Related { va: DIRECT, actor });
    assert_eq!(
        ok(CallNumber::Exit, ExitReason::Done.into(), 0, 0, 0),
        Call::Exit(Exit::Done { failed: false })
    );
    assert_eq!(
        ok(CallNumber::Exit, ExitReason::Done.into(), 1 << 40, 0, 0),
        Call::Exit(Exit::Done { failed: true })
    );
    assert_eq!(ok(CallNumber::Exit, ExitReason::Panic.into(), 0, 0, 0), Call::Exit(Exit::Panic));
    assert_eq!(
        ok(CallNumber::Exit, ExitReason::Fault.into(), 2 << 32 | 14, IMAGE, DIRECT),
        Call::Exit(Exit::Fault { vector: 14, error: 2, rip: IMAGE, address: DIRECT })
    );
}

#[test]
fn wrong_arguments_are_refused() {
    for number in [0, 19, 255, u32::MAX] {
        assert_eq!(error(number, 0, 0, 0, 0), abi::ERR_CALL);
    }
    for version in [0, 1, 3, u64::MAX, 1 << 32 | 2] {
        assert_eq!(error(CallNumber::Hello, version, 0, 0, 0), abi::ERR_VERSION);
    }
    for (number, rdi, rsi, rdx) in [
        (CallNumber::RegionAdd, 1, 0x1000, 0),
        (CallNumber::RegionAdd, 0, 0x1001, 0),
        (CallNumber::RegionAdd, 0, 0x1000, 0x800),
        (CallNumber::RegionAdd, 0, 0, 0),
        (CallNumber::RegionAdd, IMAGE, (2 << 30) + 0x1000, 0),
        (CallNumber::RegionAdd, 0, 0x2000, 0u64.wrapping_sub(0x1000)),
        (CallNumber::RingSetup, 32, 128, 0),
        (CallNumber::RingSetup, 0, 0, 0),
        (CallNumber::RingSetup, 0, 64, 0),
        (CallNumber::RingSetup, 0, 129, 0),
        (CallNumber::RingSetup, 0, 64 * (abi::RING_MAX_RECORDS + 2), 0),
        (CallNumber::RingSetup, 0, 128, 0x1_0000),
        (CallNumber::RingSetup, u64::MAX - 63, 128, 0),
        (CallNumber::RingDrain, 0x1_0000, 0, 0),
        (CallNumber::Poison, u64::MAX, 2, 0xff),
        (CallNumber::Poison, 0, 8, 0),
        (CallNumber::Poison, 0, 8, 0x7f),
        (CallNumber::Poison, 0, 8, 0x1ff),
        (CallNumber::Unpoison, 1 << 63, (1 << 63) + 1, 0),
        (CallNumber::Allocated, 16, u64::MAX, 0),
        (CallNumber::Report, 0, 1, 4),
        (CallNumber::Name, 2, 0, 0),
        (CallNumber::Name, NameKind::Task.into(), 0, 65),
        (CallNumber::Name, NameKind::Task.into(), u64::MAX, 2),
        (CallNumber::Name, NameKind::Cache.into(), 0, 1 << 48),
        (CallNumber::Exit, 3, 0, 0),
        (CallNumber::Globals, 0, 0, 0),
        (CallNumber::Globals, 0, abi::GLOBALS_MAX + 1, 0),
        (CallNumber::Globals, u64::MAX - 62, 1, 0),
    ] {
        assert_eq!(
            error(number, rdi, rsi, rdx, 0),
            abi::ERR_ARGUMENT,
            "{number:?} {rdi:#x} {rsi:#x} {rdx:#x}"
        );
    }
    assert_eq!(error(CallNumber::Unpoison, DIRECT, 4096, 3, 0), abi::ERR_ARGUMENT);
    assert_eq!(CallError::Mode(5).result(), abi::ERR_MODE);
}

/// Values around all checked limits.
fn wild() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..300u64,
        (0..64u32, -2..3i64).prop_map(|(bit, more)| (1u64 << bit).wrapping_add_signed(more)),
        (0..1000u64).prop_map(|less| u64::MAX - less),
        any::<u64>().prop_map(|value| value & !0xfff),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    /// Every call with wild values is an error of the ABI, or a call that keeps its promises.
    #[test]
    fn wild_values_never_get_through(
        number in 0..20u32,
        rdi in wild(),
        rsi in wild(),
        rdx in wild(),
        rcx in wild(),
    ) {
        let holds = |va: u64, len: u64| len == 0 || va.checked_add(len - 1).is_some();
        match Call::decode(number, rdi, rsi, rdx, rcx) {
            Err(error) => {
                prop_assert!(error.result() >= abi::ERR_MIN);
                prop_assert!(!error.to_string().contains('\n'));
                prop_assert_eq!(error.result() == abi::ERR_CALL, !(1..=18).contains(&number));
                let is_hello = number == u32::from(CallNumber::Hello);
                prop_assert_eq!(error.result() == abi::ERR_VERSION, is_hello);
            }
            Ok(Call::RegionAdd(region)) => {
                let mut regions = Regions::default();
                if regions.add(region, 1 << 32).is_ok() {
                    prop_assert!(region.bytes() > 0 && region.key() + region.bytes() <= 1 << 32);
                    let key = regions.key_of(region.va(), region.bytes());
                    prop_assert_eq!(key, Some(region.key()));
                    prop_assert_eq!(regions.key_of(region.va(), region.bytes() + 1), None);
                    prop_assert_eq!(regions.to_va(region.key()), Some(region.va()));
                }
                regions.key_of(rcx, rdx);
                regions.to_va(rcx);
            }
            Ok(Call::RingSetup(RingPlace { va, records, .. })) => {
                prop_assert!(va.is_multiple_of(64));
                prop_assert!((1..=abi::RING_MAX_RECORDS).contains(&records));
                prop_assert!(holds(va, 64 + records * 64));
            }
            Ok(Call::Poison { va, len, code }) => prop_assert!(code >= 0x80 && holds(va, len)),
            Ok(Call::Unpoison { va, len, .. } | Call::Allocated { va, size: len, .. }) => {
                prop_assert!(holds(va, len));
            }
            Ok(Call::Globals { va, count }) => {
                prop_assert!((1..=abi::GLOBALS_MAX).contains(&count) && holds(va, count * 64));
            }
            Ok(Call::Quarantine { to: EvictionBuffer { va, count }, .. }) => {
                prop_assert!(count <= abi::RELEASED_MAX && holds(va, count * abi::RELEASED_BYTES));
            }
            Ok(Call::Module { va }) => prop_assert!(holds(va, abi::MODULE_INFO_BYTES)),
            Ok(Call::Name { va, len, .. }) => prop_assert!(len <= abi::NAME_MAX && holds(va, len)),
            Ok(_) => {}
        }
    }
}
