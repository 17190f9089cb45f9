//! The objects themselves, by address: each keeps its place for as long as it is remembered, and a sorted list of places finds
//! it. Made for little memory: 48 bytes and about 5 for the list, where a tree of the standard library takes over 20.

use super::Origin;

/// Place of an object; [`END`] is none.
pub type Place = u32;
/// No place.
pub const END: Place = u32::MAX;

/// The allocation is known.
pub const ALLOCATED: u8 = 1;
/// It was freed. Such objects are in the list of freed ones.
pub const FREED: u8 = 2;

/// One object.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub start: u64,
    /// Saturated: 4 GiB stands for that and more.
    pub size: u32,
    pub allocated: Origin,
    pub freed: Origin,
    /// Neighbours in the list of freed objects; `newer` links vacant places, too.
    pub older: Place,
    pub newer: Place,
    /// What was here before and was freed, if that is known: its start, as distance from this one's.
    pub previous_offset: i32,
    pub previous_size: u32,
    pub previous_allocated: Origin,
    pub previous_freed: Origin,
    pub cache: u16,
    pub state: u8,
    /// Redzone in its slot, in granules; saturated.
    pub redzone: u8,
}

const _: () = assert!(size_of::<Entry>() == 48);

impl Entry {
    /// An object of which nothing is known but whether it is [`ALLOCATED`] or [`FREED`].
    pub fn new(state: u8) -> Self {
        Self {
            start: 0,
            size: 0,
            allocated: Origin::NONE,
            freed: Origin::NONE,
            older: END,
            newer: END,
            previous_offset: 0,
            previous_size: 0,
            previous_allocated: Origin::NONE,
            previous_freed: Origin::NONE,
            cache: 0,
            state,
            redzone: 0,
        }
    }

    /// Takes note of an object that it takes the place of. If that was freed, it is the previous one; else this one is what became of
    /// it, and the previous one is the same.
    pub fn follows(&mut self, old: &Self) {
        if old.is_freed() && old.freed != Origin::NONE {
            let offset = old.start.wrapping_sub(self.start).cast_signed();
            // An object that starts so far away was of another kind, and does not help.
            let Ok(offset) = i32::try_from(offset) else { return };
            self.previous_offset = offset;
            self.previous_size = old.size;
            (self.previous_allocated, self.previous_freed) = (old.allocated, old.freed);
        } else if old.start == self.start {
            (self.previous_offset, self.previous_size) = (old.previous_offset, old.previous_size);
            (self.previous_allocated, self.previous_freed) = (old.previous_allocated, old.previous_freed);
        }
    }

    /// The first address behind it. An object of no bytes still has a place of its own.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(u64::from(self.size.max(1)))
    }

    /// Whether it is in the list of freed objects.
    pub fn is_freed(&self) -> bool {
        self.state & FREED != 0
    }
}

/// Entries that are allocated at a time.
const CHUNK: usize = 128;
/// Most places in a leaf, and how many room is made for at a time.
const LEAF: usize = 128;
const STEP: usize = 16;

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
#[derive(Debug, Default)]
pub struct Table {
    chunks: Vec<Box<[Entry; CHUNK]>>,
    /// Places that were ever used.
    used: usize,
    vacant: Option<Place>,
    leaves: Vec<Leaf>,
    len: usize,
}

impl Table {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of host memory that it takes.
    pub fn bytes(&self) -> usize {
        let places: usize = self.leaves.iter().map(|leaf| leaf.places.capacity()).sum();
        self.chunks.len() * size_of::<[Entry; CHUNK]>()
            + self.chunks.capacity() * size_of::<Box<[Entry; CHUNK]>>()
            + self.leaves.capacity() * size_of::<Leaf>()
            + places * size_of::<Place>()
    }

    /// The object at a place, if that is one.
    pub fn get(&self, place: Place) -> Option<&Entry> {
        self.chunks.get(place as usize / CHUNK).map(|chunk| &chunk[place as usize % CHUNK])
    }

    /// [`Table::get`].
    pub fn get_mut(&mut self, place: Place) -> Option<&mut Entry> {
        self.chunks.get_mut(place as usize / CHUNK).map(|chunk| &mut chunk[place as usize % CHUNK])
    }

    fn start(&self, place: Place) -> u64 {
        self.get(place).map_or(u64::MAX, |entry| entry.start)
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

    /// All of them, in no order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        let Self { chunks, used, .. } = self;
        // Vacant ones have no state.
        chunks.iter_mut().flat_map(|chunk| chunk.iter_mut()).take(*used).filter(|entry| entry.state != 0)
    }

    /// Adds an object, whose state is not 0. None starts at the same address.
    pub fn insert(&mut self, entry: Entry) -> Place {
        let place = match self.vacant.and_then(|place| Some((place, self.get_mut(place)?))) {
            Some((place, vacant)) => {
                let next = std::mem::replace(vacant, entry).newer;
                self.vacant = (next != END).then_some(next);
                place
            }
            None => {
                if self.used == self.chunks.len() * CHUNK {
                    self.chunks.push(Box::new([entry; CHUNK]));
                }
                let place = self.used as Place;
                self.used += 1;
                if let Some(new) = self.get_mut(place) {
                    *new = entry;
                }
                place
            }
        };
        self.len += 1;
        let At(leaf, at) = self.lower(entry.start);
        let Some(within) = self.leaves.get_mut(leaf) else {
            self.leaves.push(Leaf { first: entry.start, places: vec![place] });
            return place;
        };
        let places = &mut within.places;
        if places.len() == places.capacity() {
            places.reserve_exact(STEP);
        }
        places.insert(at, place);
        if at == 0 {
            within.first = entry.start;
        }
        if places.len() > LEAF {
            // Objects often come by rising address: then the left part stays as it is.
            let keep = if at == LEAF { LEAF } else { LEAF / 2 };
            let rest = places[keep..].to_vec();
            places.truncate(keep);
            places.shrink_to(keep);
            let first = rest.first().map_or(u64::MAX, |place| self.start(*place));
            self.leaves.insert(leaf + 1, Leaf { first, places: rest });
        }
        place
    }

    /// Forgets the object at a place.
    pub fn remove(&mut self, place: Place) {
        let start = self.start(place);
        let At(leaf, at) = self.lower(start);
        if self.place(At(leaf, at)) != Some(place) {
            return;
        }
        let next = self.vacant.unwrap_or(END);
        if let Some(entry) = self.get_mut(place) {
            (entry.state, entry.newer) = (0, next);
        }
        self.vacant = Some(place);
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
        let len = places.len();
        self.leaves[leaf].first = self.start(first);
        if len < LEAF / 4
            && let Some(next) = self.leaves.get(leaf + 1)
            && len + next.places.len() < LEAF * 3 / 4
        {
            let next = self.leaves.remove(leaf + 1);
            let places = &mut self.leaves[leaf].places;
            places.reserve_exact(next.places.len() + STEP);
            places.extend(next.places);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn entry(start: u64) -> Entry {
        Entry { start, size: 1, ..Entry::new(ALLOCATED) }
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
            assert!(each < size_of::<Entry>() as f64 + 7.0, "{how}: {each} bytes each");
            assert_eq!(
                table.from(0).map(|at| table.start(at)).collect::<Vec<_>>(),
                (0..65_536).map(rising).collect::<Vec<_>>()
            );
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
            prop_assert_eq!(table.iter_mut().count(), tree.len());
            // Emptied, it keeps its places for what comes.
            tree.values().for_each(|place| table.remove(*place));
            prop_assert!(table.leaves.is_empty() && table.from(0).next().is_none());
        }
    }
}
