//! Texts as harnesses print them, and the output of a harness itself.

use std::process::Command;

use umbra_skip::{need, skip, skip_part};

use super::*;

fn sum(text: &str, success: bool) -> (String, Vec<&str>) {
    let mut summary = Summary::default();
    let shown = text.lines().map(str::trim).filter(|line| summary.line(line)).collect();
    summary.end(success);
    (summary.to_string(), shown)
}

#[test]
fn harnesses_are_summed_and_skips_are_not_passes() {
    let (counts, shown) = sum(
        "Running unittests src/lib.rs
         running 4 tests
         test a::one ... ok
         test a::two ... ok
         test a::three ... ignored, takes long
         test a::four ... ok
         successes:
         ---- a::two stdout ----
         chatter
         SKIPPED: a::two: there is no /dev/kvm
         successes:
         a::one
         test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; \
         finished in 0.00s
         SKIPPED: c: boots: there is no /dev/kvm
         SKIPPED: c: boots: there is no /dev/kvm
         running 2 tests
         test c: boots ... ignored
         test decodes  ... ok
         test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; \
         finished in 0.01s",
        true,
    );
    assert_eq!(counts, "3 passed, 0 failed, 3 skipped");
    assert!(shown.contains(&"SKIPPED: a::two: there is no /dev/kvm"));
    assert!(!shown.contains(&"chatter") && !shown.contains(&"a::one"));
    assert_eq!(shown.iter().filter(|line| line.contains("boots: there")).count(), 1);
}

#[test]
fn a_part_is_skipped_beside_a_test_that_passed() {
    let (counts, shown) = sum(
        "running 3 tests
         test a ... ok
         test a/b ... ok
         test a::c ... ok
         successes:
         ---- a stdout ----
         SKIPPED: a/popcnt: the CPU lacks it
         SKIPPED: a/bmi: 1: the CPU lacks it
         SKIPPED: a/popcnt: the CPU lacks that, too
         ---- a/b stdout ----
         SKIPPED: a/b: no KVM
         SKIPPED: a/b: there is really none
         SKIPPED: nobody: has this name
         successes:
         a
         test result: ok. 3 passed; 0 failed; 0 ignored",
        true,
    );
    assert_eq!(counts, "2 passed, 0 failed, 4 skipped", "a/popcnt, a/bmi, a/b, nobody");
    assert!(shown.contains(&"SKIPPED: nobody: has this name"));
}

#[test]
fn who_fails_after_a_skip_has_failed() {
    let text = "running 2 tests
         test a ... FAILED
         test b ... ok
         successes:
         ---- b stdout ----
         SKIPPED: b: no KVM
         successes:
         b
         failures:
         ---- a stdout ----
         SKIPPED: a: no KVM
         SKIPPED: a/part: no KVM
         failures:
         a
         test result: FAILED. 1 passed; 1 failed; 0 ignored";
    let (counts, shown) = sum(text, false);
    assert_eq!(counts, "0 passed, 1 failed, 1 skipped");
    assert!(shown.contains(&"SKIPPED: a/part: no KVM"));
    // A harness with one thread that captures nothing.
    let text = "running 3 tests
         test a ... SKIPPED: a/part: no KVM
         thread 'main' panicked
         FAILED
         test b ... SKIPPED: b/part: no KVM
         ok
         test c ... ok
         failures:
         ---- a ----
         test panicked
         failures:
         a
         test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; \
         finished in 0.01s";
    assert_eq!(sum(text, false).0, "2 passed, 1 failed, 1 skipped");
}

#[test]
fn harnesses_in_what_tests_print_are_theirs() {
    let text = "running 2 tests
         test a ... ok
         test b ... FAILED
         successes:
         ---- a stdout ----
         running 3 tests
         test b ... ok
         SKIPPED: a: said by another a
         successes:
         ---- b stdout ----
         running 2 tests
         successes:
         SKIPPED: a: said by another a
         successes:
         test result: ok. 2 passed; 0 failed; 0 ignored
         successes:
         test result: ok. 1 passed; 0 failed; 2 ignored
         test result: ok. 2 passed; 0 failed; 0 ignored
         SKIPPED: a/part: its own
         running 5 tests, of which nothing more is heard
         running 5 tests
         successes:
         a
         failures:
         ---- b stdout ----
         running 1 test
         SKIPPED: b: said by another b
         test result: ok. 1 passed; 0 failed; 0 ignored
         failures:
         b
         test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured
         running 1 test
         test c ... ok
         test result: ok. 1 passed; 0 failed; 0 ignored";
    assert_eq!(sum(text, false).0, "2 passed, 1 failed, 1 skipped");
}

#[test]
fn failures_are_counted_shown_and_never_lost() {
    let (counts, shown) = sum(
        "running 2 tests
         test good ... ok
         test bad ... FAILED
         successes:
         chatter
         successes:
         good
         failures:
         ---- bad stdout ----
         thread 'bad' panicked
         failures:
         bad
         test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; \
         finished in 0.00s",
        false,
    );
    assert_eq!(counts, "1 passed, 1 failed, 0 skipped");
    assert!(shown.contains(&"thread 'bad' panicked") && !shown.contains(&"chatter"));

    let died = "running 1 test\nrunning 1 test\ntest result: ok. 1 passed; 0 failed; 0 ignored";
    assert_eq!(sum(died, false).0, "1 passed, 1 failed, 0 skipped", "a harness that died");
    assert_eq!(
        sum("running 1 test", false).0,
        "0 passed, 1 failed, 0 skipped",
        "the last one died"
    );
    assert_eq!(sum("error: could not compile", false).0, "0 passed, 1 failed, 0 skipped");
}

/// The variable that tells a test what to do in its own harness, another run of this program.
const DO: &str = "UMBRA_SUMMARY_TEST";

/// Runs the test of this name in such a harness, doing `what`, and sums the output.
fn summed(name: &str, what: &str, threads: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output =
        command.args(["--exact", name, "--show-output", threads]).env(DO, what).output().unwrap();
    let mut summary = Summary::default();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        summary.line(line);
    }
    summary.end(output.status.success());
    summary.to_string()
}

#[test]
fn what_libtest_prints_is_counted() {
    match std::env::var(DO).as_deref() {
        Ok("skip") => skip!("for {}", "a reason"),
        Ok("need") => need!(Err::<(), _>("it is missing")),
        Ok("part") => {
            skip_part!("one", "for a reason");
            skip_part!("two", "for a reason");
            skip_part!("one", "for another reason");
        }
        Ok("fail") => {
            skip_part!("one", "for a reason");
            panic!("after a skip");
        }
        Ok("nest") => println!(
            "running 1 test\nsuccesses:\n{}\ntest result: ok. 1 passed; 0 failed; 0 ignored",
            umbra_skip::line(umbra_skip::test_name!(), "in another harness")
        ),
        Ok("pass") => {}
        _ => {
            let name = umbra_skip::test_name!();
            for threads in ["--test-threads=1", "--test-threads=2"] {
                for (what, counts) in [
                    ("skip", "0 passed, 0 failed, 1 skipped"),
                    ("need", "0 passed, 0 failed, 1 skipped"),
                    ("part", "1 passed, 0 failed, 2 skipped"),
                    ("fail", "0 passed, 1 failed, 0 skipped"),
                    ("nest", "1 passed, 0 failed, 0 skipped"),
                    ("pass", "1 passed, 0 failed, 0 skipped"),
                ] {
                    assert_eq!(summed(name, what, threads), counts, "{what}, {threads}");
                }
            }
        }
    }
}
