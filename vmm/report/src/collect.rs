//! All findings of a run: equal ones are counted, and a flood of different ones is bounded.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::{AccessKind, Finding, Names};

/// Most different findings by default.
pub const DEFAULT_LIMIT: usize = 1000;

/// The identity of a bug: kind, place and caller. The caller distinguishes bugs of several
/// functions that show in one, such as double frees.
#[derive(PartialEq, Eq, Hash)]
struct Identity {
    headline: String,
    access: AccessKind,
    caller: Option<String>,
    /// Without symbols all headlines of a kind are equal, and only the address distinguishes two
    /// bugs.
    ip: Option<u64>,
}

impl Identity {
    fn of(finding: &Finding) -> Self {
        let named = finding.culprit().is_some_and(|frame| frame.symbol.is_some());
        let functions = finding.frames.iter().filter(|frame| !frame.inlined);
        let caller = functions.skip_while(|frame| frame.ip != finding.ip).nth(1);
        Self {
            headline: finding.headline(Names::Linkage),
            access: finding.access,
            caller: caller.and_then(|frame| frame.name(Names::Linkage).map(str::to_owned)),
            ip: (!named).then_some(finding.ip),
        }
    }
}

/// The result of [`Findings::add`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is the first of its kind, and is kept at this index: print it.
    New(usize),
    /// An equal one is kept at this index; with this one it was seen so often.
    Repeat(usize, u64),
    /// The limit of different findings was reached; this one is only counted.
    Dropped,
}

/// The findings of a run, in the order of their first appearance.
pub struct Findings {
    kept: Vec<(Finding, u64)>,
    index: HashMap<Identity, usize>,
    limit: usize,
    dropped: u64,
}

impl Default for Findings {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl Findings {
    /// No findings yet; at most `limit` different ones will be kept.
    pub fn new(limit: usize) -> Self {
        Self { kept: Vec::new(), index: HashMap::new(), limit, dropped: 0 }
    }

    /// Adds a finding.
    pub fn add(&mut self, finding: Finding) -> Added {
        match self.index.entry(Identity::of(&finding)) {
            Entry::Occupied(entry) => {
                let at = *entry.get();
                let Some((_, seen)) = self.kept.get_mut(at) else { return Added::Dropped };
                *seen = seen.saturating_add(1);
                Added::Repeat(at, *seen)
            }
            Entry::Vacant(entry) if self.kept.len() < self.limit => {
                let at = self.kept.len();
                entry.insert(at);
                self.kept.push((finding, 1));
                Added::New(at)
            }
            Entry::Vacant(_) => {
                self.dropped = self.dropped.saturating_add(1);
                Added::Dropped
            }
        }
    }

    /// The finding at an index from [`Findings::add`], and how often it was seen.
    pub fn get(&self, index: usize) -> Option<(&Finding, u64)> {
        self.kept.get(index).map(|(finding, seen)| (finding, *seen))
    }

    /// The different findings, each with how often it was seen.
    pub fn iter(&self) -> impl Iterator<Item = (&Finding, u64)> {
        self.kept.iter().map(|(finding, seen)| (finding, *seen))
    }

    /// The number of different findings that are kept.
    pub fn distinct(&self) -> usize {
        self.kept.len()
    }

    /// The number of findings after the limit that equal none of the kept ones.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The number of all findings.
    pub fn total(&self) -> u64 {
        self.kept.iter().fold(self.dropped, |sum, (_, seen)| sum.saturating_add(*seen))
    }

    /// Whether there are no findings.
    pub fn is_empty(&self) -> bool {
        self.total() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::tests::finding;
    use super::*;

    #[test]
    fn equal_bugs_are_counted_wherever_they_happen() {
        let mut findings = Findings::default();
        assert_eq!(findings.add(finding()), Added::New(0));
        let mut again = finding();
        (again.address, again.cpu, again.task.id, again.size) = (0x1234, 3, 99, 8);
        assert_eq!(findings.add(again.clone()), Added::Repeat(0, 2));
        again.access = AccessKind::Read;
        assert_eq!(findings.add(again.clone()), Added::New(1));
        again.kind = "slab-use-after-free";
        assert_eq!(findings.add(again), Added::New(2));
        let mut elsewhere = finding();
        elsewhere.frames[1].offset += 4;
        assert_eq!(findings.add(elsewhere), Added::New(3));
        assert_eq!((findings.distinct(), findings.total()), (4, 5));
        assert_eq!(findings.get(0).map(|(f, n)| (f.address, n)), Some((finding().address, 2)));
    }

    #[test]
    fn the_caller_tells_apart_what_is_wrong_in_one_function() {
        let called_by = |name: &str| {
            let mut called = finding();
            let at = called.frames.iter().rposition(|frame| !frame.inlined).expect("a caller");
            (called.frames[at].symbol, called.frames[at].linkage) = (Some(name.into()), None);
            called
        };
        let mut findings = Findings::default();
        assert_eq!(findings.add(called_by("one")), Added::New(0));
        assert_eq!(findings.add(called_by("other")), Added::New(1));
        assert_eq!(findings.add(called_by("one")), Added::Repeat(0, 2));
    }

    #[test]
    fn without_symbols_the_address_tells_bugs_apart() {
        let bare = |ip| {
            let mut bare = finding();
            (bare.ip, bare.frames) = (ip, vec![super::super::Frame::unknown(ip)]);
            bare
        };
        let mut findings = Findings::default();
        assert_eq!(findings.add(bare(1)), Added::New(0));
        assert_eq!(findings.add(bare(2)), Added::New(1));
        assert_eq!(findings.add(bare(1)), Added::Repeat(0, 2));
        assert_eq!(bare(1).headline(Names::Demangled), bare(2).headline(Names::Demangled));
    }

    #[test]
    fn a_flood_is_bounded_and_counted() {
        let mut findings = Findings::new(2);
        for offset in 0..10 {
            let mut one = finding();
            one.frames[1].offset = offset;
            findings.add(one);
        }
        let mut known = finding();
        known.frames[1].offset = 1;
        assert_eq!(findings.add(known), Added::Repeat(1, 2));
        assert_eq!((findings.distinct(), findings.dropped(), findings.total()), (2, 8, 11));
    }
}
