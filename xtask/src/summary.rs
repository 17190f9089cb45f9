//! Sums the results in the output of test harnesses: libtest, rustdoc, libtest-mimic.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Results of all tests and checks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Passed.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
    /// Tests that could not run here, and parts of others.
    pub skipped: usize,
    /// Notices, one line each: printed before the counts.
    pub notices: Vec<String>,
    harness: Option<Harness>,
    /// Skips (`what: why`) since the last harness ended.
    said: BTreeSet<String>,
}

/// The harness that is running.
#[derive(Debug, Default, PartialEq, Eq)]
struct Harness {
    /// Number of tests that it announced; then those of the harnesses in the output of its tests,
    /// the innermost last.
    announced: Vec<usize>,
    section: Section,
    ended: BTreeMap<String, Verdict>,
    /// The test whose name is printed, but not its verdict yet.
    current: Option<String>,
}

/// Section of the output of a harness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Section {
    /// Verdicts of tests.
    #[default]
    Running,
    /// Output of passing tests.
    Passing,
    /// List of passing tests.
    Passed,
    /// Output of failing tests.
    Failing,
    /// List of failing tests.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Ignored,
}

/// Meaning of a line.
enum Event {
    /// A harness begins.
    Begin,
    /// This harness ended.
    End(Harness),
    /// Something is skipped.
    Skip(String),
    /// Nothing.
    Other,
}

impl Summary {
    /// Takes a line. Returns whether to show it: the output of passing tests is hidden, except what
    /// they skip.
    pub fn line(&mut self, line: &str) -> bool {
        let event = match &mut self.harness {
            Some(harness) => harness.read(line),
            None if announced(line).is_some() => Event::Begin,
            None => said(line),
        };
        match event {
            Event::Begin => {
                self.end_harness();
                self.harness = announced(line).map(Harness::new);
                true
            }
            Event::End(harness) => {
                self.harness = None;
                self.sum(&harness, line);
                true
            }
            Event::Skip(said) => self.said.insert(said),
            Event::Other => self.harness.as_ref().is_none_or(Harness::is_shown),
        }
    }

    /// Counts of things that are not tests.
    pub fn of(passed: usize, failed: usize, skipped: usize) -> Self {
        Self { passed, failed, skipped, ..Self::default() }
    }

    /// Adds the counts of another.
    pub fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// After the last line; `success`: the program that ran the harnesses succeeded.
    pub fn end(&mut self, success: bool) {
        let before = self.failed;
        self.end_harness();
        self.skipped += std::mem::take(&mut self.said).len();
        if !success && before == 0 && self.failed == 0 {
            self.failed = 1;
        }
    }

    /// A harness that ended without its result has failed.
    fn end_harness(&mut self) {
        if self.harness.take().is_some() {
            self.failed += 1;
            self.said.clear();
        }
    }

    /// Adds the result of a harness.
    fn sum(&mut self, harness: &Harness, result: &str) {
        let (mut tests, mut parts) = (BTreeSet::new(), BTreeSet::new());
        for said in std::mem::take(&mut self.said) {
            match harness.test_of(&said) {
                // It is counted already.
                Some((_, Verdict::Failed | Verdict::Ignored, _)) => {}
                Some((test, Verdict::Passed, None)) => drop(tests.insert(test)),
                Some((test, Verdict::Passed, Some(part))) => {
                    parts.insert((test, part.to_owned()));
                }
                // Count it under a wrong name rather than as passed.
                None => drop(parts.insert(("", said))),
            }
        }
        // A test that skipped itself has passed for its harness.
        self.passed += count(result, "passed").saturating_sub(tests.len());
        self.failed += count(result, "failed");
        self.skipped += count(result, "ignored") + tests.len() + parts.len();
    }
}

impl Harness {
    fn new(tests: usize) -> Self {
        Self { announced: vec![tests], ..Self::default() }
    }

    /// Takes a line.
    fn read(&mut self, line: &str) -> Event {
        use Section::{Failed, Failing, Passed, Passing, Running};
        if let Some(tests) = announced(line) {
            if self.section == Running {
                return Event::Begin;
            }
            self.announced.push(tests);
        } else if line.starts_with("test result: ") {
            return self.end(line);
        }
        if self.announced.len() > 1 {
            return Event::Other;
        }
        match (line, self.section) {
            ("successes:", Running) => self.section = Passing,
            ("successes:", Passing) => self.section = Passed,
            ("failures:", Running | Passed) => self.section = Failing,
            ("failures:", Failing) => self.section = Failed,
            (_, Running) => self.verdict(line),
            _ => {}
        }
        if matches!(self.section, Running | Passing) { said(line) } else { Event::Other }
    }

    /// Takes a line with a result: of this harness, or of one in the output of a test.
    fn end(&mut self, result: &str) -> Event {
        let tests = ["passed", "failed", "ignored", "measured"].map(|what| count(result, what));
        let tests: usize = tests.iter().sum();
        let outputs = matches!(self.section, Section::Passing | Section::Failing);
        match self.announced.iter().rposition(|announced| *announced == tests) {
            Some(0) if self.announced.len() > 1 || !outputs => Event::End(std::mem::take(self)),
            Some(0) | None => Event::Other,
            Some(inner) => {
                self.announced.truncate(inner);
                Event::Other
            }
        }
    }

    /// Takes a line that may have the verdict of a test: `test NAME ... ok`. A test that prints has
    /// its name and its verdict on two lines, if it is the only one at that time. libtest-mimic
    /// pads names.
    fn verdict(&mut self, line: &str) {
        let test = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
        if let Some((name, _)) = test {
            self.current = Some(name.trim().to_owned());
        }
        let said = test.map_or(line, |(_, said)| said);
        let verdict = match said.split([',', ' ']).next() {
            Some("ok") => Verdict::Passed,
            Some("FAILED") => Verdict::Failed,
            Some("ignored") => Verdict::Ignored,
            _ => return,
        };
        if let Some(name) = self.current.take() {
            self.ended.insert(name, verdict);
        }
    }

    /// The test that `said` is about (`TEST: why` or `TEST/PART: why`), how it ended, and the part.
    fn test_of<'a>(&self, said: &'a str) -> Option<(&str, Verdict, Option<&'a str>)> {
        // The last match is the longest.
        self.ended.iter().rev().find_map(|(test, verdict)| {
            let rest = said.strip_prefix(test.as_str())?;
            let part = match rest.strip_prefix('/') {
                Some(rest) => Some(rest.split(": ").next().unwrap_or(rest)),
                None => rest.starts_with(": ").then_some(None)?,
            };
            Some((test.as_str(), *verdict, part))
        })
    }

    /// Whether to show its output in this section.
    fn is_shown(&self) -> bool {
        !matches!(self.section, Section::Passing | Section::Passed)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The number in `running 2 tests`, with which a harness begins.
fn announced(line: &str) -> Option<usize> {
    let (number, tests) = line.strip_prefix("running ")?.split_once(' ')?;
    matches!(tests, "test" | "tests").then(|| number.parse().ok())?
}

/// A line outside of a harness's own.
fn said(line: &str) -> Event {
    umbra_skip::said(line).map_or(Event::Other, |said| Event::Skip(said.to_owned()))
}

/// The number before a word: `2 passed`.
fn count(result: &str, what: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
    let pair = words.windows(2).find(|pair| pair[1] == what);
    pair.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;
