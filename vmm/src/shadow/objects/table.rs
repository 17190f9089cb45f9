//! The objects themselves, by address: each keeps its place for as long as it is remembered, and a sorted list of places finds
//! it. Made for little memory: 32 bytes, 16 more for a freed one with another one before it, and about 5 for the list.

use super::Origin;
use super::entry::{Entry, Freed, Previous};
use super::slab::{Slab, reserve_little};

/// Place of an object; [`END`] is none.
pub type Place = u32;
/// No place.
pub const END: Place = u32::MAX;

/// Bytes that the sorted list and the pointers to chunks take at most for each object. No two leaves beside each other have
/// less than half of [`LEAF`] together, but for those that a split left.
pub const LIST_BYTES: usize = 7;

/// Most places in a leaf, and how many room is made for at a time.
const LEAF: usize = 128;
const STEP: usize = 8;
/// Two leaves that have no more are made one.
const JOINED: usize = LEAF * 3 / 4;

/// A part of the sorted list. None is empty.
#[derive(Debug)]
struct Leaf {
    /// The start of its first object.
    first: u64,
    places: Vec<Place>,
}

/// Where in the sorted list: leaf, and place in it. It may be the leaf's end, which is where the next one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At(usize, usize);

/// All objects. No two start at the same address.
#[derive(Debug)]
pub struct Table {
    entries: Slab<Entry>,
    /// Of freed objects; live ones keep it themselves.
    previous: Slab<Previous>,
    leaves: Vec<Leaf>,
    len: usize,
    /// The list of freed objects.
    oldest: Place,
    newest: Place,
    freed: usize,
}

impl Default for Table {
    fn default() -> Self {
        let (entries, previous) = (Slab::default(), Slab::default());
        Self { entries, previous, leaves: Vec::new(), len: 0, oldest: END, newest: END, freed: 0 }
    }
}

impl Table {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many of them are freed.
    pub fn freed(&self) -> usize {
        self.freed
    }

    /// The one that was freed first.
    pub fn oldest_freed(&self) -> Option<Place> {
        (self.oldest != END).then_some(self.oldest)
    }

    /// Bytes of host memory that it takes.
    pub fn bytes(&self) -> usize {
        let places: usize = self.leaves.iter().map(|leaf| leaf.places.capacity()).sum();
        let leaves = self.leaves.capacity() * size_of::<Leaf>() + places * size_of::<Place>();
        self.entries.bytes() + self.previous.bytes() + leaves
    }

    /// The object at a place, if that is one.
    pub fn get(&self, place: Place) -> Option<&Entry> {
        self.entries.get(place)
    }

    /// What was freed before the object at a place took its place; [`Previous::NONE`] if that is not known.
    pub fn previous(&self, place: Place) -> Previous {
        let previous = self.get(place).map(|entry| match entry.freed() {
            Some(freed) => self.previous.get(freed.previous).copied().unwrap_or(Previous::NONE),
            None => entry.previous(),
        });
        previous.unwrap_or(Previous::NONE)
    }

    fn start(&self, place: Place) -> u64 {
        self.get(place).map_or(u64::MAX, Entry::start)
    }

    /// Where objects begin that start at `start` or later.
    fn lower(&self, start: u64) -> At {
        let leaf = self.leaves.partition_point(|leaf| leaf.first <= start).saturating_sub(1);
        let at = match self.leaves.get(leaf) {
            Some(leaf) => leaf.places.partition_point(|place| self.start(*place) < start),
            None => 0,
        };
        At(leaf, at)
    }

    fn place(&self, At(leaf, at): At) -> Option<Place> {
        self.leaves.get(leaf)?.places.get(at).copied()
    }

    /// The object that starts at `start`.
    pub fn at(&self, start: u64) -> Option<Place> {
        self.from(start).next().filter(|place| self.start(*place) == start)
    }

    /// Those that start at `start` or later, by rising address.
    pub fn from(&self, start: u64) -> impl Iterator<Item = Place> {
        let mut at = self.lower(start);
        std::iter::from_fn(move || {
            let place = self.place(at).or_else(|| {
                at = At(at.0 + 1, 0);
                self.place(at)
            });
            at.1 += 1;
            place
        })
    }

    /// Those that start before `start`, by falling address.
    pub fn before(&self, start: u64) -> impl Iterator<Item = Place> {
        let mut at = self.lower(start);
        std::iter::from_fn(move || {
            if at.1 == 0 {
                let leaf = at.0.checked_sub(1)?;
                at = At(leaf, self.leaves.get(leaf)?.places.len());
            }
            at.1 -= 1;
            self.place(at)
        })
    }

    /// The last one that starts before `start`.
    pub fn last_before(&self, start: u64) -> Option<(Place, Entry)> {
        let place = self.before(start).next()?;
        Some((place, *self.get(place)?))
    }

    /// Shows each origin of all objects, which may change it.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&mut Origin)) {
        self.entries.iter_mut().for_each(|entry| entry.visit(visitor));
        self.previous.iter_mut().for_each(|previous| previous.visit(visitor));
    }

    /// Adds a live object. None starts at the same address.
    pub fn insert(&mut self, entry: Entry) -> Place {
        let place = self.entries.insert(entry);
        self.len += 1;
        let At(leaf, at) = self.lower(entry.start());
        let Some(within) = self.leaves.get_mut(leaf) else {
            self.leaves.push(Leaf { first: entry.start(), places: vec![place] });
            return place;
        };
        let places = &mut within.places;
        if places.len() == places.capacity() {
            places.reserve_exact(STEP);
        }
        places.insert(at, place);
        if at == 0 {
            within.first = entry.start();
        }
        if places.len() > LEAF {
            // Objects often come by rising address: then the left part stays as it is.
            let keep = if at == LEAF { LEAF } else { LEAF / 2 };
            let rest = places[keep..].to_vec();
            places.truncate(keep);
            places.shrink_to(keep);
            let first = rest.first().map_or(u64::MAX, |place| self.start(*place));
            reserve_little(&mut self.leaves);
            self.leaves.insert(leaf + 1, Leaf { first, places: rest });
        }
        place
    }

    /// Puts a live object in the place of one that starts at the same address.
    pub fn replace(&mut self, place: Place, entry: Entry) {
        self.revive(place);
        if let Some(old) = self.entries.get_mut(place) {
            *old = entry;
        }
    }

    /// Makes a live object the newest freed one.
    pub fn free(&mut self, place: Place, by: Origin) {
        let Some(entry) = self.entries.get_mut(place).filter(|entry| !entry.is_freed()) else { return };
        let previous = match entry.previous() {
            previous if previous.is_some() => self.previous.insert(previous),
            _ => END,
        };
        let older = self.newest;
        entry.set_freed(Freed { by, older, newer: END, previous });
        if !self.link(older, |freed| freed.newer = place) {
            self.oldest = place;
        }
        self.newest = place;
        self.freed += 1;
    }

    /// Changes what is kept of a freed object, if there is one.
    fn link(&mut self, place: Place, change: impl FnOnce(&mut Freed)) -> bool {
        let Some(entry) = self.entries.get_mut(place) else { return false };
        let Some(mut freed) = entry.freed() else { return false };
        change(&mut freed);
        entry.set_freed(freed);
        true
    }

    /// Gives up what is kept of an object because it is freed, if it is.
    fn revive(&mut self, place: Place) {
        let Some(Freed { older, newer, previous, .. }) = self.get(place).and_then(Entry::freed) else {
            return;
        };
        self.previous.remove(previous);
        if !self.link(older, |freed| freed.newer = newer) {
            self.oldest = newer;
        }
        if !self.link(newer, |freed| freed.older = older) {
            self.newest = older;
        }
        self.freed -= 1;
    }

    /// Forgets the object at a place.
    pub fn remove(&mut self, place: Place) {
        let At(leaf, at) = self.lower(self.start(place));
        if self.place(At(leaf, at)) != Some(place) {
            return;
        }
        self.revive(place);
        self.entries.remove(place);
        self.len -= 1;
        let places = &mut self.leaves[leaf].places;
        places.remove(at);
        let Some(first) = places.first().copied() else {
            self.leaves.remove(leaf);
            return;
        };
        if places.capacity() > places.len() + 2 * STEP {
            places.shrink_to(places.len() + STEP);
        }
        self.leaves[leaf].first = self.start(first);
        self.join(leaf);
        self.join(leaf.wrapping_sub(1));
    }

    /// Makes a leaf and the next one into one, if they are small.
    fn join(&mut self, leaf: usize) {
        let both = self.leaves.get(leaf).zip(self.leaves.get(leaf.wrapping_add(1)));
        if both.is_some_and(|(left, right)| left.places.len() + right.places.len() <= JOINED) {
            let right = self.leaves.remove(leaf + 1);
            let places = &mut self.leaves[leaf].places;
            places.reserve_exact(right.places.len());
            places.extend(right.places);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn entry(start: u64) -> Entry {
        Entry::live(start, 1, 0, Origin::NONE, 0).unwrap()
    }

    #[test]
    fn many_objects_need_little_more_than_their_entries() {
        let rising = |i: u64| i * 64;
        // Each number below 2^16 once, in a scattered order.
        let scattered = |i: u64| (i * 40_503 % 65_536) * 64;
        for (how, start) in [("rising", &rising as &dyn Fn(u64) -> u64), ("scattered", &scattered)] {
            let mut table = Table::default();
            for i in 0..65_536 {
                table.insert(entry(start(i)));
            }
            let each = table.bytes() as f64 / 65_536.0;
            assert!(each < size_of::<Entry>() as f64 + 6.0, "{how}: {each} bytes each");
            assert_eq!(
                table.from(0).map(|at| table.start(at)).collect::<Vec<_>>(),
                (0..65_536).map(rising).collect::<Vec<_>>()
            );
        }
    }

    impl Table {
        /// The list of freed objects has all of them and no others, in both directions, and nothing of what was before is left over.
        pub fn assert_whole(&mut self) {
            let all: Vec<Entry> = self.entries.iter_mut().map(|entry| *entry).collect();
            let freed: Vec<Freed> = all.iter().filter_map(Entry::freed).collect();
            assert_eq!((all.len(), freed.len()), (self.len, self.freed));
            let (mut at, mut older, mut listed) = (self.oldest, END, 0);
            while at != END {
                let entry = self.get(at).and_then(Entry::freed).expect("a freed object");
                assert_eq!(entry.older, older);
                (older, at) = (at, entry.newer);
                listed += 1;
                assert!(listed <= freed.len(), "a loop");
            }
            assert_eq!((older, listed), (self.newest, freed.len()));
            let previous = freed.iter().filter(|freed| freed.previous != END).count();
            assert_eq!(self.previous.iter_mut().count(), previous);
        }
    }

    proptest! {
        #[test]
        fn it_finds_what_a_tree_finds(steps in proptest::collection::vec((0..3000u64, 0..3u8), 1..4000)) {
            let (mut table, mut tree) = (Table::default(), BTreeMap::new());
            for (start, what) in &steps {
                match (tree.get(start).copied(), what) {
                    (Some(place), 0) => {
                        table.remove(place);
                        tree.remove(start);
                    }
                    (None, 1 | 2) => drop(tree.insert(*start, table.insert(entry(*start)))),
                    _ => {}
                }
            }
            prop_assert_eq!(table.len(), tree.len());
            for start in (0..3002).step_by(7) {
                prop_assert_eq!(table.at(start), tree.get(&start).copied());
                let (left, right) = (tree.range(..start).rev(), tree.range(start..));
                prop_assert!(table.before(start).take(5).eq(left.map(|(_, place)| *place).take(5)));
                prop_assert!(table.from(start).take(5).eq(right.map(|(_, place)| *place).take(5)));
            }
            prop_assert!(table.from(0).eq(tree.values().copied()));
            prop_assert_eq!(table.entries.iter_mut().count(), tree.len());
            // Emptied, it keeps its places for what comes.
            tree.values().for_each(|place| table.remove(*place));
            prop_assert!(table.leaves.is_empty() && table.from(0).next().is_none());
        }
    }
}
