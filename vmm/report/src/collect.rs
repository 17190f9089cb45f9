//! All findings of a run: equal ones are counted, and a flood of different ones is bounded.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::headline::place;
use super::identity::Fingerprint;
use super::{AccessKind, Finding, Names};

/// Most different findings by default.
pub const DEFAULT_LIMIT: usize = 1000;

/// Which findings count as different.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Distinct {
    /// Those of different bugs, by their [fingerprints](Finding::fingerprint).
    #[default]
    Bugs,
    /// Those of different places in the code, or called from different functions. This is for
    /// tests that expect a finding of each statement.
    Places,
}

/// What equal findings have in common.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    Bug(Fingerprint),
    Place {
        kind: &'static str,
        access: AccessKind,
        /// The function with the offset in it, as the ELF has it.
        place: Option<String>,
        caller: Option<String>,
        /// Only the address distinguishes two places without a symbol.
        ip: Option<u64>,
    },
}

impl Key {
    fn of(finding: &Finding, distinct: Distinct) -> Self {
        if distinct == Distinct::Bugs {
            return Self::Bug(finding.fingerprint());
        }
        let place = finding.culprit().and_then(|frame| place(frame, Names::Linkage));
        let functions = finding.frames.iter().filter(|frame| !frame.inlined);
        let caller = functions.skip_while(|frame| frame.ip != finding.ip).nth(1);
        Self::Place {
            kind: finding.kind,
            access: finding.access,
            caller: caller.and_then(|frame| frame.name(Names::Linkage).map(str::to_owned)),
            ip: place.is_none().then_some(finding.ip),
            place,
        }
    }
}

/// Freed objects that are remembered for each finding that may be kept.
const OBJECTS_PER_FINDING: usize = 4;

/// A freed object: where it was, and who freed it.
#[derive(PartialEq, Eq, Hash)]
struct FreedObject {
    start: u64,
    task: u32,
    ips: Vec<u64>,
}

impl FreedObject {
    /// The freed object that a finding is a use of, if it is one.
    fn of(finding: &Finding) -> Option<Self> {
        if finding.access == AccessKind::Free {
            return None;
        }
        let (object, freed) = (finding.object.as_ref()?, finding.freed.as_ref()?);
        let ips = freed.frames.iter().filter(|frame| !frame.inlined).map(|frame| frame.ip);
        Some(Self { start: object.start, task: freed.task.id, ips: ips.collect() })
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
    index: HashMap<Key, usize>,
    /// The findings that are uses of freed objects.
    uses: HashMap<FreedObject, usize>,
    distinct: Distinct,
    limit: usize,
    dropped: u64,
}

impl Default for Findings {
    fn default() -> Self {
        Self::new(Distinct::Bugs, DEFAULT_LIMIT)
    }
}

impl Findings {
    /// No findings yet; at most `limit` different ones will be kept.
    pub fn new(distinct: Distinct, limit: usize) -> Self {
        let (kept, index, uses) = (Vec::new(), HashMap::new(), HashMap::new());
        Self { kept, index, uses, distinct, limit, dropped: 0 }
    }

    /// Adds a finding. Its texts are made printable, they and its stacks are shortened to bounded
    /// sizes, and a note says so.
    ///
    /// Where bugs count, all uses of one freed object are one bug: what is wrong is that it was
    /// freed.
    pub fn add(&mut self, finding: Finding) -> Added {
        let finding = finding.bounded();
        let freed = match self.distinct {
            Distinct::Bugs => FreedObject::of(&finding),
            Distinct::Places => None,
        };
        if let Some(at) = freed.as_ref().and_then(|object| self.uses.get(object)).copied() {
            return self.seen_again(at);
        }
        let added = self.add_by_key(finding);
        if let (Some(object), Added::New(at) | Added::Repeat(at, _)) = (freed, added)
            && self.uses.len() < self.limit.saturating_mul(OBJECTS_PER_FINDING)
        {
            self.uses.insert(object, at);
        }
        added
    }

    fn seen_again(&mut self, at: usize) -> Added {
        let Some((_, seen)) = self.kept.get_mut(at) else { return Added::Dropped };
        *seen = seen.saturating_add(1);
        Added::Repeat(at, *seen)
    }

    fn add_by_key(&mut self, finding: Finding) -> Added {
        match self.index.entry(Key::of(&finding, self.distinct)) {
            Entry::Occupied(entry) => {
                let at = *entry.get();
                self.seen_again(at)
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
    use super::super::{Frame, Names};
    use super::*;

    #[test]
    fn equal_bugs_are_counted_wherever_they_happen() {
        let mut findings = Findings::default();
        assert_eq!(findings.add(finding()), Added::New(0));
        let mut again = finding();
        (again.address, again.cpu, again.task.id, again.size) = (0x1234, 3, 99, 8);
        // Another statement of the same function.
        again.frames[1].offset += 4;
        assert_eq!(findings.add(again.clone()), Added::Repeat(0, 2));
        again.access = AccessKind::Read;
        assert_eq!(findings.add(again.clone()), Added::New(1));
        again.kind = "slab-use-after-free";
        assert_eq!(findings.add(again), Added::New(2));
        assert_eq!((findings.distinct(), findings.total()), (3, 4));
        assert_eq!(findings.get(0).map(|(f, n)| (f.address, n)), Some((finding().address, 2)));
    }

    #[test]
    fn all_uses_of_one_freed_object_are_one_bug() {
        let used = |function: &str, freed_by: u64| {
            let mut finding = finding();
            finding.kind = "slab-use-after-free";
            finding.frames[1].symbol = Some(function.into());
            finding.frames[1].linkage = None;
            let mut track = finding.allocated.clone().expect("it has one");
            track.frames[0].ip = freed_by;
            finding.freed = Some(track);
            finding
        };
        let mut findings = Findings::default();
        assert_eq!(findings.add(used("timer", 1)), Added::New(0));
        assert_eq!(findings.add(used("queue", 1)), Added::Repeat(0, 2));
        // Freed by other code: another bug.
        assert_eq!(findings.add(used("queue", 2)), Added::New(1));
        // A double free is another one, too.
        let mut twice = used("queue", 1);
        (twice.kind, twice.access) = ("double-free", AccessKind::Free);
        assert_eq!(findings.add(twice), Added::New(2));
        let mut places = Findings::new(Distinct::Places, 10);
        assert_eq!(places.add(used("timer", 1)), Added::New(0));
        assert_eq!(places.add(used("queue", 1)), Added::New(1));
    }

    #[test]
    fn places_are_told_apart_if_that_is_wanted() {
        let mut findings = Findings::new(Distinct::Places, 10);
        assert_eq!(findings.add(finding()), Added::New(0));
        assert_eq!(findings.add(finding()), Added::Repeat(0, 2));
        let mut elsewhere = finding();
        elsewhere.frames[1].offset += 4;
        assert_eq!(findings.add(elsewhere), Added::New(1));
        let mut called_by_another = finding();
        called_by_another.frames[2].symbol = Some("other".into());
        assert_eq!(findings.add(called_by_another), Added::New(2));
        assert_eq!(findings.add(Finding { access: AccessKind::Read, ..finding() }), Added::New(3));
    }

    #[test]
    fn without_symbols_the_address_tells_bugs_apart() {
        let bare = |ip| {
            let mut bare = finding();
            (bare.ip, bare.frames) = (ip, vec![Frame::unknown(ip)]);
            bare
        };
        for distinct in [Distinct::Bugs, Distinct::Places] {
            let mut findings = Findings::new(distinct, 10);
            assert_eq!(findings.add(bare(1)), Added::New(0));
            assert_eq!(findings.add(bare(2)), Added::New(1));
            assert_eq!(findings.add(bare(1)), Added::Repeat(0, 2));
        }
        assert_eq!(bare(1).headline(Names::Demangled), bare(2).headline(Names::Demangled));
    }

    #[test]
    fn a_flood_is_bounded_and_counted() {
        let mut findings = Findings::new(Distinct::Bugs, 2);
        let called_by = |number: u32| {
            let mut one = finding();
            one.frames[2].symbol = Some(format!("caller{number}").into());
            one
        };
        for number in 0..10 {
            findings.add(called_by(number));
        }
        assert_eq!(findings.add(called_by(1)), Added::Repeat(1, 2));
        assert_eq!((findings.distinct(), findings.dropped(), findings.total()), (2, 8, 11));
    }
}
