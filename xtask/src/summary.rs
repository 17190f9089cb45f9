//! Sums what test harnesses print: libtest's, rustdoc's, libtest-mimic's.

use std::fmt;

/// What came of all tests and checks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Those that did what they should.
    pub passed: usize,
    /// Those that did not.
    pub failed: usize,
    /// Those that could not run here.
    pub skipped: usize,
    /// What else nobody may miss, each in a line: it is printed before the counts.
    pub notices: Vec<String>,
    harness: Option<Harness>,
}

/// The harness that is running.
#[derive(Debug, Default, PartialEq, Eq)]
struct Harness {
    /// Tests that it counts as ignored.
    ignored: Vec<String>,
    /// Tests that said themselves that they could not run.
    skipped: Vec<String>,
    /// In the part that tells what passing tests printed.
    passing: bool,
}

impl Summary {
    /// Takes a line. True if it is worth showing: what passing tests print is not, but for the
    /// reason of a skip.
    pub fn line(&mut self, line: &str) -> bool {
        if line.starts_with("running ") && (line.ends_with(" tests") || line == "running 1 test") {
            self.end_harness();
            self.harness = Some(Harness::default());
            return true;
        }
        let Some(harness) = &mut self.harness else {
            return true;
        };
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |what: &str| count(result, what);
            // A test that skipped itself passed, for libtest. One of libtest-mimic may be ignored
            // besides.
            let own = harness.skipped.iter().filter(|name| !harness.has_ignored(name)).count();
            self.passed += count("passed").saturating_sub(own);
            self.failed += count("failed");
            self.skipped += count("ignored") + own;
            self.harness = None;
            return true;
        }
        if let Some((_, skip)) = line.split_once("SKIPPED: ") {
            let name = skip.split(": ").next().unwrap_or(skip).trim().to_owned();
            let new = !harness.skipped.contains(&name);
            if new {
                harness.skipped.push(name);
            }
            return new;
        }
        if let Some(name) = ignored(line) {
            harness.ignored.push(name.to_owned());
        }
        match line {
            "successes:" => harness.passing = true,
            "failures:" => harness.passing = false,
            _ => {}
        }
        !harness.passing
    }

    /// After the last line; `success` tells whether the program that ran the harnesses said all was
    /// well.
    pub fn end(&mut self, success: bool) {
        let before = self.failed;
        self.end_harness();
        if !success && before == 0 && self.failed == 0 {
            self.failed = 1;
        }
    }

    /// A harness that ended without its result has failed.
    fn end_harness(&mut self) {
        self.failed += usize::from(self.harness.take().is_some());
    }
}

impl Harness {
    fn has_ignored(&self, name: &str) -> bool {
        self.ignored
            .iter()
            .any(|ignored| ignored == name || ignored.ends_with(&format!("::{name}")))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The number before a word: `2 passed`.
fn count(result: &str, what: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
    let pair = words.windows(2).find(|pair| pair[1] == what);
    pair.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

/// The name in `test NAME ... ignored`, with or without a reason, which libtest-mimic pads.
fn ignored(line: &str) -> Option<&str> {
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    result.starts_with("ignored").then_some(name.trim())
}

#[cfg(test)]
mod tests {
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
             SKIPPED: two: there is no /dev/kvm
             successes:
             a::one
             test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
             running 2 tests
             SKIPPED: boots: there is no /dev/kvm
             SKIPPED: boots: there is no /dev/kvm
             test boots    ... ignored
             test decodes  ... ok
             test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            true,
        );
        assert_eq!(counts, "3 passed, 0 failed, 3 skipped");
        assert!(shown.contains(&"SKIPPED: two: there is no /dev/kvm"));
        assert!(!shown.contains(&"chatter") && !shown.contains(&"a::one"));
        assert_eq!(shown.iter().filter(|line| line.contains("boots:")).count(), 1);
    }

    #[test]
    fn failures_are_counted_shown_and_never_lost() {
        let (counts, shown) = sum(
            "running 2 tests
             successes:
             chatter
             failures:
             ---- bad stdout ----
             thread 'bad' panicked
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
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
}
