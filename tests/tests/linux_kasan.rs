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
/// Where ring 0 is emulated and the machine is shared, the suite takes minutes.
const LIMIT: Duration = Duration::from_secs(1500);
/// What Linux's own KASAN makes of its suite.
const EXPECTED: &str = include_str!("../data/kasan-suite.txt");

/// The kernel with a command line of its own.
fn linux(options: &str, cmdline: &str) -> Umbra {
    let umbra = Umbra::new(PROGRAM, "run").patience(LIMIT).arg(kernel(KERNEL)).args(options);
    umbra
        .args("--memory 128M --keep-going --timeout")
        .arg(format!("{}s", LIMIT.as_secs()))
        .arg("--cmdline")
        .arg(format!("{SLOW_CLOCK} {cmdline}"))
}

/// The guest is told that its TSC counts ten times as quickly as it may do, so that a second of the guest is several of the
/// host's. Else ticks of its timer, at 100 Hz, would take most of the time where ring 0 is emulated and the machine is shared.
const SLOW_CLOCK: &str = "no-kvmclock tsc=reliable tsc_early_khz=26000000";
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

/// Runs the suite, and holds each case against what it has to come to.
fn suite(options: &str) -> Run {
    let run = linux(options, SUITE).collect().run();
    run.expect(1);
    assert_eq!(run.outcome(), "reset");
    let console = console(&run);
    let cases = ktap::cases(&console);
    let expected = ktap::parse_list(EXPECTED);
    assert!(expected.len() > 50, "a list of {} cases", expected.len());
    let list = |cases: &[Case]| cases.iter().map(|case| format!("{case}\n")).collect::<String>();
    assert_eq!(list(&cases), list(&expected), "\n{}", run.tail());
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
    let run = suite("--notify ring");
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
    let run = suite("--notify sync");
    assert!(!run.findings.iter().any(|finding| finding["kind"] == "shadow-tampering"), "{}", run.tail());
}

fn boots_without_a_finding() {
    // Without a first program Linux panics at the end.
    let run = linux("", NO_SUITE).collect().run();
    run.expect(3);
    assert_eq!(run.figure("/findings"), 0, "{}", run.tail());
    let console = console(&run);
    assert!(console.contains("KernelAddressSanitizer initialized (per-page shadow, in the sandbox, ring)"));
    assert!(!console.contains("BUG: "), "{console}");
    assert!(console.contains("Kernel panic - not syncing: No working init found"));
}

fn boots_unchecked_where_there_is_no_shadow() {
    let run = linux("--shadow off", NO_SUITE).collect().run();
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
    suite.run()
}
