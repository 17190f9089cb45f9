//! Hypercalls: what each changes, and which are refused.

use kvm_bindings::kvm_regs;
use umbra_machine::vcpu::{Data, VmExit};
use umbra_shadow::Shadow as _;
use umbra_shadow::abi::{self, CallNumber, DOORBELL_PORT, ExitReason, Features, PORT, Slot};
use umbra_shadow::codes::SLAB_FREE;
use vm_memory::GuestAddress;

use super::RAM;
use super::bench::*;
use crate::sandbox::discovery::{Settings, leaves};
use crate::sandbox::{Outcome, ShadowMode};
use crate::shadow::{Mode, Notify};

#[test]
fn hello_tells_the_features_that_cpuid_tells() {
    let modes = [
        (Some(Mode::PerPage), ShadowMode::PerPage, Features::PER_PAGE),
        (Some(Mode::Full), ShadowMode::Full, Features::FULL),
        (None, ShadowMode::Off, Features::default()),
    ];
    for (mode, shadow, bit) in modes {
        let ring = Features::RING | Features::DOORBELL;
        for (notify, how) in [(Notify::Ring, ring), (Notify::Sync, Features::SYNC)] {
            let mut bench = Bench::new(mode, notify, None, None);
            let off = bit == Features::default();
            let expected = if off { 0 } else { (bit | how).bits() };
            assert_eq!(
                bench.call(CallNumber::Hello, [abi::VERSION.into(), 0, 0, 0]),
                u64::from(expected)
            );
            assert_eq!(bench.call(CallNumber::Hello, [9, 0, 0, 0]), abi::ERR_VERSION);
            let settings =
                Settings { quarantine: 5 << 32 | 7, quarantine_batch: 9, ..Settings::default() };
            let leaves = leaves(shadow, notify, settings, &bench.layout);
            let told = if off { (0, 0, 0) } else { (9, 7, 5) };
            assert_eq!((leaves[5].eax, leaves[5].ecx, leaves[5].edx), told);
            assert_eq!(
                (leaves[1].eax, leaves[1].ebx, leaves[1].ecx),
                (abi::VERSION, PORT.into(), expected)
            );
            assert_eq!([leaves[0].ebx, leaves[0].ecx, leaves[0].edx], abi::CPUID_SIGNATURE);
        }
    }
}

#[test]
fn a_call_changes_rax_and_nothing_else() {
    let mut bench = Bench::ring();
    (bench.cpu.regs.rbx, bench.cpu.regs.rdx, bench.cpu.regs.rflags) = (1, 2, 3);
    assert_eq!(bench.call(99u32, [4, 5, 6, 7]), abi::ERR_CALL);
    let expected = kvm_regs {
        rax: abi::ERR_CALL,
        rbx: 1,
        rdx: 2,
        rflags: 3,
        rdi: 4,
        rsi: 5,
        rcx: 6,
        r8: 7,
        rip: 0x10_0000,
        rsp: 0x20_0000,
        ..kvm_regs::default()
    };
    assert_eq!(bench.cpu.regs, expected);
    assert_eq!((bench.exits().total, bench.exits().hypercall, bench.events().refused), (2, 2, 1));
}

#[test]
fn only_32_bits_to_the_port_are_a_call() {
    let mut bench = Bench::ring();
    for data in [&[11u8][..], &[11, 0], &[11, 0, 0, 0, 0, 0, 0, 0]] {
        goes_on(bench.exit(VmExit::IoOut { port: PORT, data: Data::new(data) }));
    }
    goes_on(bench.exit(VmExit::IoOut { port: PORT + 1, data: Data::new(&[11, 0, 0, 0]) }));
    assert_eq!((bench.exits().hypercall, bench.exits().io), (1, 4));
}

#[test]
fn a_doorbell_that_is_an_exit_reads_the_rings() {
    let ring = VmExit::IoOut { port: DOORBELL_PORT, data: Data::new(&[0]) };
    let mut bench = Bench::ring();
    assert_eq!(bench.call(CallNumber::RingSetup, [0x8000, 64 * 5, 0, 0]), 0);
    bench.ram.write(GuestAddress(0x8000), &3u64.to_le_bytes()).unwrap();
    goes_on(bench.exit(ring));
    let events = bench.events();
    assert_eq!((events.collected, events.refused, events.ring_drains), (3, 3, 0));
    assert_eq!(bench.ram.read_u64(GuestAddress(0x8000)).unwrap(), 3, "its CPU may count on");
    // Where there are no rings it is a port like any other.
    let mut bench = Bench::sync();
    goes_on(bench.exit(ring));
    assert_eq!((bench.exits().hypercall, bench.exits().io), (1, 1));
}

#[test]
fn calls_of_the_other_mode_are_refused() {
    let sync = [CallNumber::Poison, CallNumber::Unpoison, CallNumber::Allocated, CallNumber::Freed];
    let ring = [CallNumber::RingSetup, CallNumber::RingDrain];
    let arguments = |number| match number {
        CallNumber::RingSetup => [0x1000, 128, 0, 0],
        CallNumber::Poison => [0x1000, 8, 0xfc, 0],
        CallNumber::RingDrain => [0; 4],
        _ => [0x1000, 8, 0, 0],
    };
    for (notify, fits, others) in
        [(Notify::Ring, &ring[..], &sync[..]), (Notify::Sync, &sync, &ring)]
    {
        for mode in [Mode::PerPage, Mode::Full] {
            let mut bench = Bench::new(Some(mode), notify, None, None).with_region();
            for number in fits {
                assert_eq!(bench.call(*number, arguments(*number)), 0, "{number:?} in {notify:?}");
            }
            for number in others {
                assert_eq!(
                    bench.call(*number, arguments(*number)),
                    abi::ERR_MODE,
                    "{number:?} in {notify:?}"
                );
            }
        }
    }
    let mut off = Bench::new(None, Notify::Ring, None, None).with_region();
    for number in ring.iter().chain(&sync).chain(&[CallNumber::Report]) {
        assert_eq!(
            off.call(*number, arguments(*number)),
            abi::ERR_MODE,
            "{number:?} with shadow off"
        );
    }
}

#[test]
fn exits_of_the_guest_end_the_run() {
    let end = |arguments| ended(Bench::ring().hypercall(CallNumber::Exit, arguments));
    assert!(matches!(end([ExitReason::Done.into(), 0, 0, 0]), Outcome::Done));
    assert!(matches!(end([ExitReason::Done.into(), 1 << 63, 0, 0]), Outcome::Failed));
    assert!(matches!(end([ExitReason::Panic.into(), 0, 0, 0]), Outcome::Panic));
    let fault = end([ExitReason::Fault.into(), 14 | 2 << 32, 0xabc, 0xdef]);
    let text = fault.to_string();
    assert!(
        matches!(fault, Outcome::Fault { vector: 14, error: 2, address: 0xdef, .. }),
        "{fault:?}"
    );
    assert!(text.contains("page fault") && text.contains("rip 0xabc"), "{text}");
    assert_eq!(Bench::ring().call(CallNumber::Exit, [3, 0, 0, 0]), abi::ERR_ARGUMENT);
}

#[test]
fn sync_calls_write_the_shadow() {
    let mut bench = Bench::sync();
    assert_eq!(bench.call(CallNumber::Poison, [0x3000, 0x1008, SLAB_FREE.into(), 0]), 0);
    let bad = |bench: &Bench, at| bench.state.shadow.model().unwrap().first_bad(at, 1).is_some();
    assert_eq!(
        [0x2fff, 0x3000, 0x4007, 0x4008].map(|at| bad(&bench, at)),
        [false, true, true, false]
    );
    assert_eq!(bench.call(CallNumber::Unpoison, [0x3000, 5, 0, 0]), 0);
    assert_eq!([0x3000, 0x3004, 0x3005].map(|at| bad(&bench, at)), [false, false, true]);
    for (va, len) in [(RAM, 1), (RAM - 8, 9), (u64::MAX, 1), (0, RAM + 1)] {
        assert_eq!(
            bench.call(CallNumber::Poison, [va, len, SLAB_FREE.into(), 0]),
            abi::ERR_ARGUMENT,
            "{va:#x}+{len:#x}"
        );
    }
}

#[test]
fn one_call_allocates_and_one_frees() {
    let mut bench = Bench::sync();
    let state = |bench: &Bench, at| bench.state.shadow.model().map(|model| model.state(at));
    assert_eq!(bench.call(CallNumber::Poison, [0x5000, 4096, 0xff, 0]), 0);
    assert_eq!(
        bench.call(
            CallNumber::Allocated,
            [0x5000, 50, 0, Slot { bytes: 64, code: 0xfc }.to_register()]
        ),
        0
    );
    let states: Vec<_> = [0x5000, 0x5030, 0x5038, 0x5040].map(|at| state(&bench, at)).into();
    assert_eq!(states, [Some(0), Some(2), Some(0xfc), Some(0xff)]);
    assert_eq!(
        bench.call(CallNumber::Freed, [0x5000, 0, 0, Slot { bytes: 64, code: 0xfb }.to_register()]),
        0
    );
    let states: Vec<_> = [0x5000, 0x5030, 0x5038, 0x5040].map(|at| state(&bench, at)).into();
    assert_eq!(states, [Some(0xfb), Some(0xfb), Some(0xfb), Some(0xff)]);
    assert_eq!((bench.events().allocations, bench.events().frees), (1, 1));
    // Past the end of memory nothing changes and nothing is counted.
    let end = bench.ram.end() - 64;
    assert_eq!(
        bench.call(
            CallNumber::Allocated,
            [end, 50, 0, Slot { bytes: 128, code: 0xfc }.to_register()]
        ),
        abi::ERR_ARGUMENT
    );
    assert_eq!(
        bench.call(CallNumber::Freed, [end, 0, 0, Slot { bytes: 128, code: 0xfc }.to_register()]),
        abi::ERR_ARGUMENT
    );
    assert_eq!((bench.events().allocations, bench.events().frees), (1, 1));
}
