//! Parses KUnit's results on the console (KTAP; Linux, Documentation/dev-tools/ktap.rst), as far as
//! the tests need them.

use std::fmt;

/// The result of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It failed.
    Fail,
    /// It does not apply to this kernel.
    Skip,
}

/// One case of a suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its name, which is that of a function.
    pub name: String,
    /// Its result.
    pub verdict: Verdict,
    /// The number of KASAN's reports on the console since the case before.
    pub reports: usize,
}

/// A line of a list of cases; [`parse_list`] reads it.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "fail",
            Verdict::Skip => "skip",
        };
        write!(f, "{} {verdict} {}", self.name, self.reports)
    }
}

/// The cases of one suite, in the order in which they ended.
pub fn cases(console: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut reports = 0;
    for line in console.lines() {
        if line.contains("BUG: KASAN: ") {
            reports += 1;
        }
        // A suite's cases are indented once; its own verdict is not.
        let Some(line) = line.strip_prefix("    ").filter(|line| !line.starts_with(' ')) else {
            continue;
        };
        let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => continue,
        };
        let mut words = rest.split_ascii_whitespace();
        let number = words.next().and_then(|word| word.parse::<u32>().ok());
        let Some(name) = words.find(|word| *word != "-").filter(|_| number.is_some()) else {
            continue;
        };
        let verdict = match (passed, rest.contains("# SKIP")) {
            (_, true) => Verdict::Skip,
            (true, _) => Verdict::Pass,
            (false, _) => Verdict::Fail,
        };
        cases.push(Case { name: name.to_owned(), verdict, reports: std::mem::take(&mut reports) });
    }
    cases
}

/// Parses a list of cases, one on each line. Lines that begin with `#` are comments.
pub fn parse_list(list: &str) -> Vec<Case> {
    let case = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (name, verdict, reports) = (words.next()?, words.next()?, words.next()?);
        let verdict = match verdict {
            "pass" => Verdict::Pass,
            "fail" => Verdict::Fail,
            "skip" => Verdict::Skip,
            _ => return None,
        };
        Some(Case { name: name.to_owned(), verdict, reports: reports.parse().ok()? })
    };
    list.lines().filter(|line| !line.starts_with('#')).filter_map(case).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_have_verdicts_and_reports() {
        let console = "TAP version 14\n1..1\n    # Subtest: kasan\n    1..3\n\
                       BUG: KASAN: slab-out-of-bounds in a+0x1/0x2\n\
                       BUG: KASAN: slab-out-of-bounds in a+0x3/0x4\n    ok 1 - a\n    \
                       # b: EXPECTATION FAILED at mm/kasan/kasan_test.c:1\n    not ok 2 b\n    \
                       ok 3 - c # SKIP Test requires X\n\
                       # kasan: pass:1 fail:1 skip:1 total:3\nnot ok 1 - kasan\n";
        let found = cases(console);
        let list: String = found.iter().map(|case| format!("{case}\n")).collect();
        assert_eq!(list, "a pass 2\nb fail 0\nc skip 0\n");
        assert_eq!(parse_list(&format!("# of a kernel\n{list}")), found);
    }
}
