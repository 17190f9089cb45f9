use proptest::prelude::*;

use super::*;

const DIRECT: u64 = 0xffff_8000_0000_0000;
const IMAGE: u64 = 0xffff_ffff_8000_0000;

fn ok(number: u32, rdi: u64, rsi: u64, rdx: u64, rcx: u64) -> Call {
    Call::decode(number, rdi, rsi, rdx, rcx).unwrap()
}

fn error(number: u32, rdi: u64, rsi: u64, rdx: u64, rcx: u64) -> u64 {
    Call::decode(number, rdi, rsi, rdx, rcx).unwrap_err().result()
}

#[test]
fn calls_are_decoded() {
    let actor = Actor { cpu: 0x5678, task: 0x9abc_def0 };
    let who = 0x9abc_def0_5678_0000;
    assert_eq!(ok(call::HELLO, abi::VERSION.into(), 5, 0, 0), Call::Hello { flags: 5 });
    let Call::RegionAdd(region) = ok(call::REGION_ADD, DIRECT, 1 << 28, 0x1000, 0) else {
        panic!()
    };
    assert_eq!((region.va(), region.bytes(), region.gpa()), (DIRECT, 1 << 28, 0x1000));
    assert_eq!(
        ok(call::RING_SETUP, IMAGE, 64 * 65, 3, IMAGE),
        Call::RingSetup(RingPlace { va: IMAGE, records: 64, cpu: 3, text_base: IMAGE })
    );
    assert_eq!(
        ok(call::RING_DRAIN, 0xffff, 0, 0, 0),
        Call::RingDrain { cpu: 0xffff, released: None }
    );
    assert_eq!(
        ok(call::POISON, u64::MAX, 1, 0xfc, 0),
        Call::Poison { va: u64::MAX, len: 1, code: 0xfc }
    );
    assert_eq!(ok(call::UNPOISON, 5, 0, 0, 0), Call::Unpoison { va: 5, len: 0, stack: None });
    assert_eq!(
        ok(call::UNPOISON, DIRECT, 4096, memory::STACK, 0),
        Call::Unpoison { va: DIRECT, len: 4096, stack: Some(true) }
    );
    assert_eq!(
        ok(call::ALLOCATED, DIRECT, 50, who | 0x1234, 0),
        Call::Allocated { va: DIRECT, size: 50, cache: 0x1234, actor, slot: None }
    );
    let slot = Some(Slot { bytes: 64, code: 0xfc });
    assert_eq!(
        ok(call::ALLOCATED, DIRECT, 50, who, abi::slot(64, 0xfc)),
        Call::Allocated { va: DIRECT, size: 50, cache: 0, actor, slot }
    );
    assert_eq!(
        ok(call::FREED, DIRECT, 0, who, 0),
        Call::Freed { va: DIRECT, actor, slot: None, wait: 0 }
    );
    assert_eq!(
        ok(call::FREED, DIRECT, 0, who | u64::from(abi::wait(2, 7)), abi::slot(64, 0xfc)),
        Call::Freed { va: DIRECT, actor, slot, wait: 0x702 }
    );
    for (va, bad) in [(DIRECT, 64), (DIRECT, abi::slot(64, 0x7f)), (DIRECT, abi::slot(0, 0xfc))] {
        assert_eq!(error(call::ALLOCATED, va, 1, who, bad), abi::ERR_ARGUMENT);
        assert_eq!(error(call::FREED, va, 0, who, bad), abi::ERR_ARGUMENT);
    }
    assert_eq!(error(call::FREED, u64::MAX - 8, 0, who, abi::slot(10, 0xfc)), abi::ERR_ARGUMENT);
    // A size that wraps is a finding, not a mistake of the call.
    let report = Call::Report(BadAccess {
        address: 7,
        size: u64::MAX,
        access: Access::Write,
        actor,
        ip: IMAGE,
    });
    assert_eq!(ok(call::REPORT, 7, u64::MAX, who | 1, IMAGE), report);
    assert_eq!(
        ok(call::NAME, name::CACHE, DIRECT, 7 << 32 | 64, 96),
        Call::Name { what: Named::Cache { id: 7, object_size: 96 }, va: DIRECT, len: 64 }
    );
    assert_eq!(
        ok(call::NAME, name::TASK, DIRECT, 0xffff_ffff << 32, 0),
        Call::Name { what: Named::Task { id: u32::MAX }, va: DIRECT, len: 0 }
    );
    let to = Array { va: DIRECT, count: 1 << 16 };
    assert_eq!(
        ok(call::QUARANTINE, 1, DIRECT, abi::RELEASED_MAX, 0),
        Call::Quarantine { to, all: true }
    );
    assert_eq!(
        ok(call::RING_DRAIN, 3, DIRECT, abi::RELEASED_MAX, 0),
        Call::RingDrain { cpu: 3, released: Some(to) }
    );
    for number in [call::QUARANTINE, call::RING_DRAIN] {
        assert_eq!(error(number, 0, DIRECT, abi::RELEASED_MAX + 1, 0), abi::ERR_ARGUMENT);
        assert_eq!(error(number, 0, u64::MAX - 30, 2, 0), abi::ERR_ARGUMENT);
    }
    assert_eq!(ok(call::RELATED, DIRECT, 0, who, 0), Call::Related { va: DIRECT, actor });
    assert_eq!(ok(call::EXIT, exit::DONE, 0, 0, 0), Call::Exit(Exit::Done { failed: false }));
    assert_eq!(ok(call::EXIT, exit::DONE, 1 << 40, 0, 0), Call::Exit(Exit::Done { failed: true }));
    assert_eq!(ok(call::EXIT, exit::PANIC, 0, 0, 0), Call::Exit(Exit::Panic));
    assert_eq!(
        ok(call::EXIT, exit::FAULT, 2 << 32 | 14, IMAGE, DIRECT),
        Call::Exit(Exit::Fault { vector: 14, error: 2, rip: IMAGE, address: DIRECT })
    );
}

#[test]
fn wrong_arguments_are_refused() {
    for number in [0, 16, 255, u32::MAX] {
        assert_eq!(error(number, 0, 0, 0, 0), abi::ERR_CALL);
    }
    for version in [0, 2, u64::MAX, 1 << 32 | 1] {
        assert_eq!(error(call::HELLO, version, 0, 0, 0), abi::ERR_VERSION);
    }
    for (number, rdi, rsi, rdx) in [
        (call::REGION_ADD, 1, 0x1000, 0),
        (call::REGION_ADD, 0, 0x1001, 0),
        (call::REGION_ADD, 0, 0x1000, 0x800),
        (call::REGION_ADD, 0, 0, 0),
        (call::REGION_ADD, IMAGE, (2 << 30) + 0x1000, 0),
        (call::REGION_ADD, 0, 0x2000, 0u64.wrapping_sub(0x1000)),
        (call::RING_SETUP, 32, 128, 0),
        (call::RING_SETUP, 0, 0, 0),
        (call::RING_SETUP, 0, 64, 0),
        (call::RING_SETUP, 0, 129, 0),
        (call::RING_SETUP, 0, 64 * (abi::RING_MAX_RECORDS + 2), 0),
        (call::RING_SETUP, 0, 128, 0x1_0000),
        (call::RING_SETUP, u64::MAX - 63, 128, 0),
        (call::RING_DRAIN, 0x1_0000, 0, 0),
        (call::POISON, u64::MAX, 2, 0xff),
        (call::POISON, 0, 8, 0),
        (call::POISON, 0, 8, 0x7f),
        (call::POISON, 0, 8, 0x1ff),
        (call::UNPOISON, 1 << 63, (1 << 63) + 1, 0),
        (call::ALLOCATED, 16, u64::MAX, 0),
        (call::REPORT, 0, 1, 4),
        (call::NAME, 2, 0, 0),
        (call::NAME, name::TASK, 0, 65),
        (call::NAME, name::TASK, u64::MAX, 2),
        (call::NAME, name::CACHE, 0, 1 << 48),
        (call::EXIT, 3, 0, 0),
        (call::GLOBALS, 0, 0, 0),
        (call::GLOBALS, 0, abi::GLOBALS_MAX + 1, 0),
        (call::GLOBALS, u64::MAX - 62, 1, 0),
    ] {
        assert_eq!(
            error(number, rdi, rsi, rdx, 0),
            abi::ERR_ARGUMENT,
            "{number} {rdi:#x} {rsi:#x} {rdx:#x}"
        );
    }
    assert_eq!(error(call::UNPOISON, DIRECT, 4096, 3, 0), abi::ERR_ARGUMENT);
    assert_eq!(CallError::Mode(5).result(), abi::ERR_MODE);
}

/// Values around all that is checked.
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
    fn wild_values_never_get_through(number in 0..17u32, rdi in wild(), rsi in wild(), rdx in wild(), rcx in wild()) {
        let holds = |va: u64, len: u64| len == 0 || va.checked_add(len - 1).is_some();
        match Call::decode(number, rdi, rsi, rdx, rcx) {
            Err(error) => {
                prop_assert!(error.result() >= abi::ERR_MIN);
                prop_assert!(!error.to_string().contains('\n'));
                prop_assert_eq!(error.result() == abi::ERR_CALL, !(1..=15).contains(&number));
                prop_assert_eq!(error.result() == abi::ERR_VERSION, number == call::HELLO);
            }
            Ok(Call::RegionAdd(region)) => {
                let mut regions = Regions::default();
                if regions.add(region, 1 << 32).is_ok() {
                    prop_assert!(region.bytes() > 0 && region.gpa() + region.bytes() <= 1 << 32);
                    prop_assert_eq!(regions.to_gpa(region.va(), region.bytes()), Some(region.gpa()));
                    prop_assert_eq!(regions.to_gpa(region.va(), region.bytes() + 1), None);
                    prop_assert_eq!(regions.to_va(region.gpa()), Some(region.va()));
                }
                regions.to_gpa(rcx, rdx);
                regions.to_va(rcx);
            }
            Ok(Call::RingSetup(RingPlace { va, records, .. })) => {
                prop_assert!(va.is_multiple_of(64) && (1..=abi::RING_MAX_RECORDS).contains(&records));
                prop_assert!(holds(va, 64 + records * 64));
            }
            Ok(Call::Poison { va, len, code }) => prop_assert!(code >= 0x80 && holds(va, len)),
            Ok(Call::Unpoison { va, len, .. } | Call::Allocated { va, size: len, .. }) => {
                prop_assert!(holds(va, len));
            }
            Ok(Call::Globals { va, count }) => {
                prop_assert!((1..=abi::GLOBALS_MAX).contains(&count) && holds(va, count * 64));
            }
            Ok(Call::Quarantine { to: Array { va, count }, .. }) => {
                prop_assert!(count <= abi::RELEASED_MAX && holds(va, count * abi::RELEASED_BYTES));
            }
            Ok(Call::Name { va, len, .. }) => prop_assert!(len <= abi::NAME_MAX && holds(va, len)),
            Ok(_) => {}
        }
    }
}
