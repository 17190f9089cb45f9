//! Linux that is checked by Umbra: the patched kernel of `cargo xtask linux`, and its own tests of KASAN in it.
//!
//! What each case has to come to is what it comes to with Linux's own KASAN, in `data/kasan-suite.txt`
//! (`cargo xtask linux expected` makes that list anew).

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use umbra_tests::ktap::{self, Case, Verdict};
use umbra_tests::linux::{kernel, need};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::Suite;

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// The kernel.
const KERNEL: &str = "umbra/vmlinux";
/// The same with `CONFIG_KASAN_VMALLOC`.
const VMALLOC: &str = "umbra-vmalloc/vmlinux";
/// Where ring 0 is emulated and the machine is shared, the suite takes minutes.
const LIMIT: Duration = Duration::from_secs(1500);
/// What Linux's own KASAN makes of its suite.
const EXPECTED: &str = include_str!("../data/kasan-suite.txt");

/// A kernel with a command line of its own.
fn linux(file: &str, options: &str, cmdline: &str) -> Umbra {
    let umbra = Umbra::new(PROGRAM, "run").patience(LIMIT).arg(kernel(file)).args(options);
    umbra
        .args("--memory 128M --keep-going --timeout")
        .arg(format!("{}s", LIMIT.as_secs()))
        .arg("--cmdline")
        .arg(cmdline)
}

/// The words that end the run after the suite, or instead of it.
const SUITE: &str = "kunit_shutdown=reboot";
const NO_SUITE: &str = "kunit.enable=0";

fn console(run: &Run) -> String {
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// Whether one of a finding's stacks goes through a function.
fn goes_through(finding: &Value, function: &str) -> bool {
    finding["frames"].as_array().is_some_and(|frames| {
        frames.iter().any(|frame| frame["symbol"].as_str().is_some_and(|symbol| symbol == function))
    })
}

/// What Linux's own KASAN makes of its suite.
fn expected() -> Vec<Case> {
    ktap::parse_list(EXPECTED)
}

/// Runs the suite, and holds each case against what it has to come to.
fn suite(file: &str, options: &str, expected: &[Case]) -> Run {
    let run = linux(file, options, SUITE).collect().run();
    run.expect(1);
    assert_eq!(run.outcome(), "reset");
    let console = console(&run);
    let cases = ktap::cases(&console);
    assert!(expected.len() > 50, "a list of {} cases", expected.len());
    let list = |cases: &[Case]| cases.iter().map(|case| format!("{case}\n")).collect::<String>();
    assert_eq!(list(&cases), list(expected), "\n{}", run.tail());
    // Each case that had KASAN report on the console has Umbra's finding, too.
    let missing: Vec<_> = expected
        .iter()
        .filter(|case| case.verdict == Verdict::Pass && case.reports > 0)
        .filter(|case| !run.findings.iter().any(|finding| goes_through(finding, &case.name)))
        .map(|case| case.name.as_str())
        .collect();
    assert!(missing.is_empty(), "no finding for {missing:?}\n{}", run.tail());
    run
}

fn suite_with_rings() {
    let run = suite(KERNEL, "--notify ring", &expected());
    // Who allocated and who freed comes from the rings.
    let finding = |function: &str| {
        let found = run.findings.iter().find(|finding| goes_through(finding, function));
        found.unwrap_or_else(|| panic!("no finding in {function}"))
    };
    let uaf = finding("kmalloc_uaf");
    for event in ["allocated", "freed"] {
        let through = uaf[event]["frames"]
            .as_array()
            .is_some_and(|frames| frames.iter().any(|frame| frame["symbol"].as_str() == Some("kmalloc_uaf")));
        assert!(through, "{event}: {uaf}");
    }
    assert_eq!(uaf["kind"], "slab-use-after-free");
    assert_eq!(finding("kmalloc_oob_right")["object"]["cache"], "kmalloc-128");
    assert!(run.figure("/events/ring_drains") > 0);
}

fn suite_in_sync_mode() {
    let run = suite(KERNEL, "--notify sync", &expected());
    assert!(!run.findings.iter().any(|finding| finding["kind"] == "shadow-tampering"), "{}", run.tail());
}

fn suite_with_virtual_memory() {
    let mut expected = expected();
    for case in &mut expected {
        // One bad access at each end of an object that has pages of its own.
        if case.name == "vmalloc_oob" {
            (case.verdict, case.reports) = (Verdict::Pass, 2);
        }
    }
    let run = suite(VMALLOC, "", &expected);
    let kinds = run.findings.iter().filter(|finding| finding["kind"] == "vmalloc-out-of-bounds");
    assert!(kinds.count() > 0, "{}", run.tail());
}

fn boots_without_a_finding() {
    // Without a first program Linux panics at the end.
    let run = linux(KERNEL, "", NO_SUITE).collect().run();
    run.expect(3);
    assert_eq!(run.figure("/findings"), 0, "{}", run.tail());
    let console = console(&run);
    assert!(console.contains("KernelAddressSanitizer initialized (per-page shadow, in the sandbox, ring)"));
    assert!(!console.contains("BUG: "), "{console}");
    assert!(console.contains("Kernel panic - not syncing: No working init found"));
}

fn boots_unchecked_where_there_is_no_shadow() {
    let run = linux(KERNEL, "--shadow off", NO_SUITE).collect().run();
    run.expect(3);
    let console = console(&run);
    let line = "kasan: umbra: memory is NOT checked: Umbra keeps no shadow for this run";
    assert!(console.contains(line), "{console}");
    assert!(console.contains("Kernel panic - not syncing: No working init found"));
}

fn main() -> ExitCode {
    let need = need(KERNEL);
    let mut suite = Suite::default();
    suite.add("linux_kasan::boots_without_a_finding", &need, boots_without_a_finding);
    suite.add(
        "linux_kasan::boots_unchecked_where_there_is_no_shadow",
        &need,
        boots_unchecked_where_there_is_no_shadow,
    );
    suite.add("linux_kasan::suite_with_rings", &need, suite_with_rings);
    suite.add("linux_kasan::suite_in_sync_mode", &need, suite_in_sync_mode);
    let vmalloc = umbra_tests::linux::need(VMALLOC);
    suite.add("linux_kasan::suite_with_virtual_memory", &vmalloc, suite_with_virtual_memory);
    suite.run()
}
