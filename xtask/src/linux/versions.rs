//! Versions of Debian's package with Linux's sources, and which of them is built.

use std::cmp::Ordering;

use anyhow::Result;

/// Which of two versions is the newer one, as Debian compares them (deb-version(7)).
pub fn compare(one: &str, other: &str) -> Ordering {
    let parts = |version| {
        let (epoch, rest) = str::split_once(version, ':').unwrap_or(("", version));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
        [epoch, upstream, revision]
    };
    let mut pairs = parts(one).into_iter().zip(parts(other));
    pairs
        .find_map(|(one, other)| Some(compare_part(one, other)).filter(|found| found.is_ne()))
        .unwrap_or(Ordering::Equal)
}

/// The same for a part of a version: text and numbers in turn.
fn compare_part(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one.as_bytes(), other.as_bytes());
    let is_text = |byte: &u8| !byte.is_ascii_digit();
    while !one.is_empty() || !other.is_empty() {
        let by_text = compare_text(take(&mut one, is_text), take(&mut other, is_text));
        let (one, other) =
            (take(&mut one, u8::is_ascii_digit), take(&mut other, u8::is_ascii_digit));
        let order = by_text.then_with(|| compare_number(one, other));
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// Removes the leading bytes of a kind from a text.
fn take<'a>(text: &mut &'a [u8], is: impl Fn(&u8) -> bool) -> &'a [u8] {
    let end = text.iter().position(|byte| !is(byte)).unwrap_or(text.len());
    let (taken, rest) = text.split_at(end);
    *text = rest;
    taken
}

/// A tilde comes before the end of the text, letters after it, all else after letters.
fn compare_text(one: &[u8], other: &[u8]) -> Ordering {
    const END: i16 = 0;
    let rank = |byte: &u8| match *byte {
        b'~' => END - 1,
        byte if byte.is_ascii_alphabetic() => byte.into(),
        byte => i16::from(byte) + 256,
    };
    let ranks = |text: &[u8]| text.iter().map(rank).chain([END]).collect::<Vec<_>>();
    ranks(one).cmp(&ranks(other))
}

/// Compares numbers of any length, with leading zeros.
fn compare_number(one: &[u8], other: &[u8]) -> Ordering {
    let significant = |digits: &[u8]| {
        digits.iter().copied().skip_while(|digit| *digit == b'0').collect::<Vec<_>>()
    };
    let (one, other) = (significant(one), significant(other));
    one.len().cmp(&other.len()).then(one.cmp(&other))
}

/// The versions of a package in the output of `apt-cache madison`, the newest first.
pub fn offered(madison: &str, package: &str) -> Vec<String> {
    let version = |line: &str| {
        let columns: Vec<_> = line.split('|').map(str::trim).collect();
        match columns[..] {
            // Lines that end in `Sources` are about source packages.
            [name, version, from] if name == package && from.ends_with("Packages") => {
                Some(version.to_owned())
            }
            _ => None,
        }
    };
    let mut versions: Vec<_> = madison.lines().filter_map(version).collect();
    versions.sort_by(|one, other| compare(other, one));
    versions.dedup();
    versions
}

/// The versions in a list: one per line, `#` begins a comment.
pub fn list(text: &str) -> Vec<String> {
    let version = |line: &str| line.split('#').next().unwrap_or("").trim().to_owned();
    text.lines().map(version).filter(|version| !version.is_empty()).collect()
}

/// The result of testing a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It works.
    Works,
    /// It does not, for a reason.
    Refused(String),
    /// Apt offers it, but it cannot be downloaded.
    Gone,
}

impl Verdict {
    /// Why the version does not work.
    pub fn fault(&self) -> &str {
        match self {
            Self::Works => "",
            Self::Refused(reason) => reason,
            Self::Gone => "cannot be downloaded",
        }
    }
}

/// The version to build.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The version that works, if any.
    pub version: Option<String>,
    /// The versions that were tested before it, and their results.
    pub passed_over: Vec<(String, Verdict)>,
}

/// Chooses among the versions `offered`, which are ordered from the newest one: the newest if it
/// works, else the newest of those `known` to work. `try_out` tests a version.
pub fn choose(
    offered: &[String],
    known: &[String],
    mut try_out: impl FnMut(&str) -> Result<Verdict>,
) -> Result<Choice> {
    let mut passed_over = Vec::new();
    let older = offered.iter().skip(1).filter(|version| known.contains(version));
    for version in offered.first().into_iter().chain(older) {
        match try_out(version)? {
            Verdict::Works => {
                return Ok(Choice { version: Some(version.clone()), passed_over });
            }
            verdict => passed_over.push((version.clone(), verdict)),
        }
    }
    Ok(Choice { version: None, passed_over })
}

impl Choice {
    /// A notice in one line, if the newest version is not built, or none is.
    pub fn notice(&self, package: &str) -> Option<String> {
        let newest = self.passed_over.first().map(|(newest, verdict)| (newest, verdict.fault()));
        match (&self.version, newest) {
            (Some(_), None) => None,
            (Some(version), Some((newest, fault))) => Some(format!(
                "NOT THE NEWEST LINUX: {package} {version} instead of {newest} ({fault})"
            )),
            (None, Some((newest, fault))) => Some(format!(
                "NO PATCHED LINUX: {package} {newest} does not work ({fault}), nor does any that \
                 is known to and still offered: `cargo xtask linux status` has them"
            )),
            (None, None) => {
                Some(format!("NO LINUX: apt does not offer {package}, a package of Debian 12"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGE: &str = "linux-source-6.1";

    fn versions(list: &str) -> Vec<String> {
        list.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn versions_are_ordered_as_debian_orders_them() {
        // `dpkg --compare-versions` agrees for each pair of neighbours.
        let ascending = [
            "6.1~rc7-1",
            "6.1",
            "6.1-1~bpo1",
            "6.1-1",
            "6.1-1+b1",
            "6.1-2",
            "6.1-10",
            "6.1a-1",
            "6.1+a-1",
            "6.1.9-1",
            "6.1.170-3",
            "6.1.176-1",
            "6.1.192-1",
            "6.1.192-1a",
            "6.1.192-3",
            "6.1.1000-1",
            "6.12-1",
            "1:6.1-1",
        ];
        for (at, one) in ascending.iter().enumerate() {
            for (other_at, other) in ascending.iter().enumerate() {
                assert_eq!(compare(one, other), at.cmp(&other_at), "{one} and {other}");
            }
        }
        assert_eq!(compare("6.01-1", "6.1-1"), Ordering::Equal);
        assert_eq!(compare("0:6.1-0", "6.1"), Ordering::Equal);
        assert_eq!(compare("6.99999999999999999999999-1", "6.1-1"), Ordering::Greater);
    }

    #[test]
    fn what_apt_offers_is_read_and_ordered() {
        let madison = "linux-source-6.1 |  6.1.9-1 | http://a bookworm/main amd64 Packages\n\
                       linux-source-6.1 | 6.1.10-1 | http://b security/main amd64 Packages\n\
                       linux-source-6.1 | 6.1.10-1 | http://c bookworm/main amd64 Packages\n\
                       linux-source-6.1 | 6.1.11-1 | http://c bookworm/main Sources\n\
                       linux-source-6.12 | 6.12.1-1 | http://c bookworm/main amd64 Packages\n\
                       N: Unable to locate package\n";
        assert_eq!(offered(madison, PACKAGE), ["6.1.10-1", "6.1.9-1"]);
        assert!(offered("", PACKAGE).is_empty());
    }

    #[test]
    fn the_list_of_known_versions_is_read() {
        assert_eq!(list("# Comment\n\n6.1.2-1\n 6.1.1-1 # why\n"), ["6.1.2-1", "6.1.1-1"]);
    }

    #[test]
    fn the_projects_list_is_ordered() {
        let known = list(include_str!("../../../guest/linux/versions"));
        assert!(known.len() > 1, "one is not enough: the newest one changes");
        assert!(known.is_sorted_by(|one, next| compare(one, next).is_gt()), "{known:?}");
    }

    /// Chooses when the versions in `works` work, those in `gone` are gone, and all others are
    /// refused. Also returns the notice, and the tested versions.
    fn chosen(
        offered: &str,
        known: &str,
        works: &str,
        gone: &str,
    ) -> (Option<String>, Option<String>, Vec<String>) {
        let (works, gone) = (versions(works), versions(gone));
        let mut tried = Vec::new();
        let choice = choose(&versions(offered), &versions(known), |version| {
            tried.push(version.to_owned());
            let is_in = |list: &[String]| list.iter().any(|one| one == version);
            Ok(match () {
                () if is_in(&works) => Verdict::Works,
                () if is_in(&gone) => Verdict::Gone,
                () => Verdict::Refused("patch 0002 does not apply".into()),
            })
        });
        let choice = choice.unwrap();
        let notice = choice.notice(PACKAGE);
        (choice.version, notice, tried)
    }

    #[test]
    fn the_newest_version_is_taken_if_it_works_known_or_not() {
        for known in ["", "2-1", "4-1", "9-1"] {
            let (version, notice, tried) = chosen("4-1 3-1 2-1", known, "4-1 3-1 2-1", "");
            assert_eq!((version.as_deref(), notice), (Some("4-1"), None));
            assert_eq!(tried, ["4-1"], "nothing else is downloaded");
        }
    }

    #[test]
    fn the_newest_known_one_that_is_offered_stands_in_and_that_is_told() {
        // 5-1 is known but no longer offered; 3-1 would work, but is not known.
        let (version, notice, tried) = chosen("4-1 3-1 2-1 1-1", "1-1 2-1 5-1", "3-1 2-1 1-1", "");
        assert_eq!(version.as_deref(), Some("2-1"));
        let notice = notice.unwrap();
        assert!(notice.contains("linux-source-6.1 2-1 instead of 4-1 (patch 0002 does not apply)"));
        assert_eq!(tried, ["4-1", "2-1"]);

        let (version, notice, _) = chosen("4-1 3-1 2-1 1-1", "3-1 2-1", "2-1", "4-1 3-1");
        assert_eq!(version.as_deref(), Some("2-1"), "those that are gone are passed over");
        assert!(notice.unwrap().contains("instead of 4-1 (cannot be downloaded)"));
    }

    #[test]
    fn nothing_is_taken_where_nothing_works() {
        let (version, notice, tried) = chosen("4-1 3-1 2-1", "3-1 4-1", "2-1", "");
        assert_eq!((version, tried), (None, versions("4-1 3-1")), "each is tried once");
        let notice = notice.unwrap();
        assert!(notice.starts_with("NO PATCHED LINUX"), "{notice}");
        assert!(notice.contains("4-1 does not work (patch 0002 does not apply)"), "{notice}");

        let (version, notice, tried) = chosen("", "3-1", "3-1", "");
        assert_eq!((version, tried), (None, vec![]));
        assert!(notice.unwrap().contains("apt does not offer linux-source-6.1"));
    }

    #[test]
    fn a_fault_of_the_machine_is_not_one_of_the_version() {
        let outcome =
            choose(&versions("2-1 1-1"), &versions("1-1"), |_| anyhow::bail!("disk full"));
        assert_eq!(outcome.unwrap_err().to_string(), "disk full");
    }
}
