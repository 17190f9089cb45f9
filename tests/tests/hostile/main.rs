//! Hostile guests: whatever a guest does, the program reports the outcome of the run, within
//! bounded time, memory and output.

mod calls;
mod crash;
mod files;
mod guest;
mod linux;
mod smp;
mod tables;
mod windows;

use std::process::ExitCode;
use std::time::Duration;

use guest::{Guest, RAM};
use umbra::machine::Kvm;
use umbra::machine::stats::emulates_ring0;
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");

/// Most bytes of memory that the program uses beside the guest's.
const OVERHEAD: u64 = 32 << 20;

/// Most bytes that a run with few findings prints.
const OUTPUT: usize = 64 << 10;

/// Longer than the time limit of any guest here.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs a guest with these arguments, and a time limit if they have none. Whatever the guest does,
/// the program ends regularly, needs little memory, and passes no escape sequence of the guest to
/// standard error.
#[track_caller]
fn run(mut guest: Guest, args: &str) -> Run {
    run_file(&guest.elf(), args)
}

/// As [`run`], for a kernel's file.
#[track_caller]
fn run_file(kernel: &[u8], args: &str) -> Run {
    let mut umbra = Umbra::new(PROGRAM, "run")
        .patience(PATIENCE)
        .file(kernel)
        .arg("--memory")
        .arg(RAM.to_string())
        .args(args)
        .collect();
    if !args.contains("--timeout") {
        umbra = umbra.args("--timeout 240s");
    }
    let run = umbra.run();
    run.assert_no_panic();
    assert!(run.code().is_some(), "killed by a signal: {}", run.tail());
    if !run.stats.is_null() {
        let peak = run.figure("/host/rss_peak_bytes");
        assert!(peak < RAM + OVERHEAD, "{} MiB", peak >> 20);
    }
    assert!(!run.stderr.contains('\x1b'), "an escape sequence: {}", run.tail());
    run
}

/// As [`run`], for a guest with few findings.
#[track_caller]
fn quiet(guest: Guest, args: &str) -> Run {
    let run = run(guest, args);
    assert!(run.stderr.len() < OUTPUT, "{} bytes of output: {}", run.stderr.len(), run.tail());
    run
}

/// Whether this host's KVM emulates ring 0 instruction by instruction.
fn ring0_is_emulated() -> bool {
    let kvm = Kvm::open().expect("checked before");
    emulates_ring0(&kvm).expect("a probe guest runs")
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let kvm = Need::kvm().and(&Need::machine());
    let all = [calls::ALL, crash::ALL, files::ALL, linux::ALL, windows::ALL, tables::ALL, smp::ALL];
    for (name, test) in all.into_iter().flatten() {
        suite.add(*name, &kvm, test);
    }
    suite.run()
}
