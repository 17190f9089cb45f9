//! Exits that are neither hypercalls nor shadow: ports, the console, instructions, and the end of a
//! run.

use std::time::Duration;

use umbra_machine::devices::COM1;
use umbra_machine::vcpu::{Data, VmExit};
use umbra_shadow::abi::{self, CallNumber};

use super::bench::*;
use crate::sandbox::Outcome;
use crate::shadow::{Mode, Notify};

#[test]
fn reset_ports_end_the_run() {
    for (port, data, word) in
        [(0x64, &[0xfe][..], "reset"), (0xcf9, &[6], "reset"), (0x604, &[0, 0x20], "power-off")]
    {
        let outcome = ended(Bench::ring().exit(VmExit::IoOut { port, data: Data::new(data) }));
        assert_eq!((outcome.word(), outcome.status(false)), (word, 0), "{outcome:?}");
    }
    for (port, data) in [(0x64, &[0xf0][..]), (0xcf9, &[2]), (0x604, &[0, 0x10])] {
        goes_on(Bench::ring().exit(VmExit::IoOut { port, data: Data::new(data) }));
    }
}

#[test]
fn a_lowered_task_priority_goes_on_and_system_management_does_not() {
    goes_on(Bench::ring().exit(VmExit::TaskPriority));
    let outcome = ended(Bench::ring().exit(VmExit::SystemManagement));
    assert_eq!((outcome.word(), outcome.status(false)), ("stuck", 3));
    assert!(outcome.to_string().contains("system management mode"), "{outcome}");
}

/// Prints a line on the console. Returns what its last exit returns.
fn prints(bench: &mut Bench, line: &str) -> Result<(), Outcome> {
    let byte = |byte: u8| VmExit::IoOut { port: COM1, data: Data::new(&[byte]) };
    for b in line.bytes() {
        goes_on(bench.exit(byte(b)));
    }
    bench.exit(byte(b'\n'))
}

#[test]
fn a_linux_console_tells_how_the_run_ends() {
    let linux = || Bench::with(Mode::PerPage, Notify::Ring, 0, true).with_region();
    assert_eq!(ended(prints(&mut linux(), "[    1.0] reboot: Power down\r")).word(), "power-off");
    assert_eq!(ended(prints(&mut linux(), "reboot: System halted")).status(false), 0);
    goes_on(prints(&mut linux(), "reboot: Restarting system"));

    let mut bench = linux();
    goes_on(prints(&mut bench, "[    1.0] Kernel panic - not syncing: why"));
    for end in [Outcome::Reset, Outcome::TimeLimit(Duration::from_secs(1)), Outcome::Halted] {
        let outcome = bench.state.watch().correct(end);
        assert_eq!((outcome.word(), outcome.status(false)), ("panic", 3));
        assert_eq!(outcome.to_string(), "the guest panicked: why");
    }
    assert_eq!(bench.state.watch().correct(Outcome::Interrupted).word(), "interrupted");
    let end = ended(prints(&mut bench, "[    1.0] ---[ end Kernel panic - not syncing: why ]---"));
    assert_eq!(bench.state.watch().correct(end).to_string(), "the guest panicked: why");

    let mut bench = linux();
    goes_on(prints(&mut bench, "[    1.0] Oops: 0002 [#1] PREEMPT SMP"));
    assert_eq!(bench.state.watch().correct(Outcome::Interrupted).word(), "interrupted");
    let outcome = bench.state.watch().correct(Outcome::Reset);
    assert_eq!((outcome.word(), outcome.status(false), outcome.status(true)), ("oops", 6, 6));
    goes_on(prints(&mut bench, "[    1.0] Kernel panic - not syncing: why"));
    assert_eq!(bench.state.watch().correct(Outcome::Reset).word(), "panic");

    let halted = || Outcome::HaltedForGood { place: "rip 0x0".into() };
    assert_eq!(linux().state.watch().correct(halted()).status(false), 3);
    assert_eq!(Bench::ring().state.watch().correct(halted()).word(), "halted");
    goes_on(prints(&mut Bench::ring(), "reboot: Power down"));
}

#[test]
fn port_reads_are_answered() {
    let mut bench = Bench::ring();
    for (port, len, expected) in
        [(0x1234, 4, vec![0xff; 4]), (0x64, 1, vec![0]), (0xfff0, 255, vec![0xff; 8])]
    {
        goes_on(bench.exit(VmExit::IoIn { port, len }));
        assert_eq!(bench.cpu.read.take(), Some(expected));
    }
    assert_eq!(bench.exits().io, 3);
}

#[test]
fn known_instructions_are_completed_and_others_end_the_run() {
    let mut bench = Bench::ring();
    let failed = |bytes: &[u8]| {
        let mut padded = [0; 15];
        padded[..bytes.len()].copy_from_slice(bytes);
        VmExit::EmulationFailed { bytes: padded, len: bytes.len() as u8 }
    };
    bench.cpu.regs.rcx = 0xff;
    goes_on(bench.exit(failed(&[0xf3, 0x48, 0x0f, 0xb8, 0xc1]))); // popcnt rax, rcx
    assert_eq!((bench.cpu.regs.rax, bench.cpu.regs.rip), (8, 0x10_0005));
    goes_on(bench.exit(failed(&[0xcc])));
    assert_eq!(bench.cpu.injected, [3]);
    assert_eq!(bench.exits().completed.get("popcnt"), Some(&1));
    let outcome = ended(bench.exit(failed(&[0x0f, 0xa2])));
    assert!(matches!(outcome, Outcome::Instruction { .. }), "{outcome:?}");
    let text = outcome.to_string();
    assert!(text.contains("cpuid (0f a2) at rip 0x100006"), "{text}");
    // The bytes are read from memory if KVM gave none; that may be impossible.
    bench.cpu.regs.rip = 0xffff_0000_0000;
    let outcome = ended(bench.exit(failed(&[])));
    assert_eq!(outcome.word(), "unknown-instruction");
    // A length beyond the array: no panic, whatever comes of it.
    let long = VmExit::EmulationFailed { bytes: [0x90; 15], len: 255 };
    bench.cpu.regs.rip = 0;
    let _ = bench.exit(long);
}

#[test]
fn every_other_exit_has_an_outcome() {
    let end = |exit| {
        let outcome = ended(Bench::ring().exit(exit));
        (outcome.word(), outcome.status(true), outcome.to_string())
    };
    assert_eq!(end(VmExit::Hlt).0, "halted");
    let (word, status, text) = end(VmExit::Shutdown);
    assert_eq!((word, status), ("triple-fault", 3));
    assert!(text.contains("rip 0x100000"), "{text}");
    assert_eq!(end(VmExit::SystemEvent { kind: 2 }).0, "reset");
    for (exit, part) in [
        (VmExit::FailEntry { reason: 0x8000_0021 }, "0x80000021"),
        (VmExit::InternalError { suberror: 3 }, "internal error 3"),
        (VmExit::Unsupported { reason: 44 }, "exit 44"),
    ] {
        let (word, status, text) = end(exit);
        assert_eq!((word, status), ("stuck", 3));
        assert!(text.contains(part) && text.contains("rip 0x100000"), "{text}");
    }
    goes_on(Bench::ring().exit(VmExit::Interrupted));
}

#[test]
fn a_vcpu_that_fails_is_a_host_error() {
    let mut bench = Bench::sync();
    bench.cpu.broken = true;
    let byte = bench.layout.byte.gpa;
    for handled in [
        bench.hypercall(CallNumber::Hello, [abi::VERSION.into(), 0, 0, 0]),
        bench.write(byte, &[1]),
        bench.exit(VmExit::EmulationFailed { bytes: [0xcc; 15], len: 1 }),
    ] {
        let outcome = ended(handled);
        assert!(matches!(outcome, Outcome::Host(_)), "{outcome:?}");
    }
    // If only the place in the message is missing, the outcome stays the same.
    assert!(matches!(ended(bench.exit(VmExit::Shutdown)), Outcome::TripleFault { .. }));
}
