//! Programs in Linux guests: system calls, signals, processes, and one that has its kernel
//! misbehave. They run where a guest's ring 3 reaches its ring 0, as on hardware.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use umbra_tests::linux::{first_program, kernel, need, need_first_program, with_program};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::Suite;

/// The program `umbra`.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// Time limit of every guest here.
const LIMIT: Duration = Duration::from_secs(600);
/// The parts of the guests' first program (`programs/init.c`) that provoke no bug.
const GOOD: &str = "files signals processes";

/// Boots a kernel whose first program runs these parts.
fn run(file: &str, options: &str, what: &str) -> Run {
    let program = fs::read(first_program()).expect("the program");
    Umbra::new(PROGRAM, "run")
        .patience(LIMIT)
        .arg(kernel(file))
        .args(options)
        .args("--keep-going --timeout 500s")
        .arg(format!("--cmdline=kunit.enable=0 -- {what}"))
        .arg("--initrd")
        .file(&with_program(&program))
        .collect()
        .run()
}

/// Panics unless the program printed that these parts are done and then restarted the machine.
#[track_caller]
fn is_done(run: &Run, parts: &str) {
    let console = String::from_utf8_lossy(&run.stdout);
    for part in parts.split(' ') {
        assert!(
            console.contains(&format!("program: {part} done")),
            "{part} is not done:\n{console}\n{}",
            run.tail()
        );
    }
    assert_eq!(run.outcome(), "reset");
}

/// All parts without bugs, on a kernel that is not checked.
#[track_caller]
fn unchecked(file: &str, options: &str) {
    let run = run(file, &format!("--shadow off {options}"), GOOD);
    run.expect(0);
    is_done(&run, GOOD);
}

/// All parts without bugs, on a checked kernel: nothing is found.
fn checked(options: &str) {
    let run = run("umbra/vmlinux", &format!("--memory 128M {options}"), GOOD);
    run.expect(0);
    is_done(&run, GOOD);
    assert!(run.findings.is_empty(), "{:?}", run.findings);
}

/// What the program has Linux's module for bugs do, and the kind of what is found.
const BUGS: [(&str, &str); 4] = [
    ("WRITE_AFTER_FREE", "slab-use-after-free"),
    ("READ_AFTER_FREE", "slab-use-after-free"),
    ("READ_BUDDY_AFTER_FREE", "use-after-free"),
    ("SLAB_LINEAR_OVERFLOW", "slab-out-of-bounds"),
];

/// The program uses Linux's module for bugs on purpose: each bug is found, with the right kind and
/// the program's task, and nothing else. An access at either edge of good memory is no bug.
fn misbehaves() {
    let all = BUGS.map(|(what, _)| what).join(" ");
    let run = run("umbra/vmlinux", "--memory 128M", &all);
    run.expect(1);
    is_done(&run, &all);
    let mut found = [0; BUGS.len()];
    for finding in &run.findings {
        assert_eq!(finding["task"]["name"], "init", "{finding}");
        let goes_through =
            |(what, _): &(&str, &str)| goes_through(finding, &format!("lkdtm_{what}"));
        let bug = BUGS.iter().position(goes_through);
        let bug = bug.unwrap_or_else(|| panic!("not through a function for bugs: {finding}"));
        assert_eq!(finding["kind"], BUGS[bug].1, "{finding}");
        found[bug] += 1;
    }
    assert!(found.iter().all(|count| *count > 0), "{found:?} of {BUGS:?}");
}

/// Whether one of a finding's frames is of a function.
fn goes_through(finding: &Value, function: &str) -> bool {
    finding["frames"]
        .as_array()
        .is_some_and(|frames| frames.iter().any(|frame| frame["symbol"].as_str() == Some(function)))
}

/// The program makes the kernel panic.
fn panics() {
    let run = run("umbra/vmlinux", "--memory 128M", "PANIC");
    run.expect(3);
    assert_eq!(run.outcome(), "panic");
    assert!(run.stderr.contains("the guest panicked: dumptest"), "{}", run.tail());
}

fn main() -> ExitCode {
    let programs = need_first_program();
    let small = need("small/vmlinux").and(&programs);
    let umbra = need("umbra/vmlinux").and(&programs);
    let debian = need("debian/bzImage").and(&programs);
    let mut suite = Suite::default();
    suite.add("programs::run_on_linux", &small, || {
        unchecked("small/vmlinux", "--memory 128M");
    });
    suite.add("programs::run_on_two_cpus", &small, || {
        unchecked("small/vmlinux", "--memory 128M --cpus 2");
    });
    suite.add("programs::run_on_debians_kernel", &debian, || {
        unchecked("debian/bzImage", "--memory 256M");
    });
    suite.add("programs::run_on_checked_linux", &umbra, || checked(""));
    suite.add("programs::run_on_two_checked_cpus", &umbra, || checked("--cpus 2"));
    suite.add("programs::bugs_that_a_program_provokes_are_found", &umbra, misbehaves);
    suite.add("programs::a_panic_that_a_program_provokes_is_told", &umbra, panics);
    suite.run()
}
