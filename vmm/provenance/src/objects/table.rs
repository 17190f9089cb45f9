//! The objects themselves, by address. Made for little memory: an object takes about 4 bytes as
//! [`coding`](super::coding) tells it, and 2 for its share of what finds it.

use super::Origin;
use super::ages::Ages;
use super::chunk::{ADD_MOST, CHANGE_MOST, Chunk};
use super::entry::{Entry, State};
use crate::heap;

/// How many chunks room is made for at a time.
const STEP: usize = 8;

/// Most bytes by which the table grows if an object in it is replaced or freed.
pub const EDIT_MOST: usize = CHANGE_MOST;
/// Most bytes by which it grows if one is added.
pub const INSERT_MOST: usize = ADD_MOST + STEP * size_of::<Chunk>() + 32;

/// All objects. No two start at the same address.
#[derive(Debug, Default)]
pub struct Table {
    /// None is empty.
    chunks: Vec<Chunk>,
    /// Bytes of the chunks on the heap.
    bytes: usize,
    len: usize,
    /// Of those that were freed.
    ages: Ages,
}

impl Table {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many of them are freed.
    pub fn freed(&self) -> usize {
        self.ages.freed()
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.bytes + heap::of_vec(&self.chunks)
    }

    /// The chunk that an object which starts at `start` belongs to.
    fn find(&self, start: u64) -> usize {
        self.chunks.partition_point(|chunk| chunk.first() <= start).saturating_sub(1)
    }

    /// The last object that starts at `start` or before.
    pub fn up_to(&self, start: u64) -> Option<Entry> {
        self.chunks.get(self.find(start))?.up_to(start)
    }

    /// The first object that starts at `start` or later.
    pub fn from(&self, start: u64) -> Option<Entry> {
        self.chunks.get(self.find(start)..)?.iter().take(2).find_map(|chunk| chunk.from(start))
    }

    /// Puts what `change` makes of the object that starts at `start` in its place. Returns what was
    /// there.
    fn edit(
        &mut self,
        start: u64,
        change: impl FnOnce(Option<Entry>) -> Option<Entry>,
    ) -> Option<Entry> {
        let at = self.find(start);
        let Some(chunk) = self.chunks.get_mut(at) else {
            let first = change(None)?;
            let mut chunk = Chunk::default();
            chunk.edit(start, |_| Some(first));
            (self.bytes, self.len) = (chunk.heap(), 1);
            self.insert(0, chunk);
            return None;
        };
        let (mut was, mut is) = (None, None);
        self.bytes -= chunk.heap();
        chunk.edit(start, |known| {
            was = known;
            is = change(known);
            is
        });
        let half = chunk.halve();
        self.bytes += chunk.heap();
        let is_empty = chunk.is_empty();
        if let Some(half) = half {
            self.bytes += half.heap();
            self.insert(at + 1, half);
        }
        if is_empty {
            self.bytes -= self.chunks.remove(at).heap();
        }
        self.len += usize::from(is.is_some());
        if was.is_some() {
            self.len -= 1;
            self.join(at);
            self.join(at.wrapping_sub(1));
        }
        was
    }

    fn insert(&mut self, at: usize, chunk: Chunk) {
        if self.chunks.len() == self.chunks.capacity() {
            self.chunks.reserve_exact(STEP);
        }
        self.chunks.insert(at, chunk);
    }

    /// Makes a chunk and the next one into one, if they are small.
    fn join(&mut self, at: usize) {
        let next = at.wrapping_add(1);
        if self
            .chunks
            .get(at)
            .zip(self.chunks.get(next))
            .is_some_and(|(left, right)| left.fits(right))
        {
            let right = self.chunks.remove(next);
            let left = &mut self.chunks[at];
            self.bytes -= left.heap() + right.heap();
            left.append(right);
            self.bytes += left.heap();
        }
        self.shrink();
    }

    fn shrink(&mut self) {
        if self.chunks.capacity() >= self.chunks.len() + 2 * STEP {
            self.chunks.shrink_to(self.chunks.len() + STEP);
        }
    }

    /// Shows all objects, which may change but for their starts. Those that are not to be kept go.
    fn rewrite(&mut self, change: &mut dyn FnMut(&mut Entry) -> bool) {
        self.chunks.iter_mut().for_each(|chunk| chunk.rewrite(change));
        self.chunks.retain(|chunk| !chunk.is_empty());
        self.chunks.dedup_by(|right, left| {
            let fits = left.fits(right);
            if fits {
                left.append(std::mem::take(right));
            }
            fits
        });
        self.shrink();
        self.bytes = self.chunks.iter().map(Chunk::heap).sum();
    }

    /// Shows each origin of all objects, which may change it. What it becomes takes no more bytes,
    /// and is another one for each.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&mut Origin)) {
        self.rewrite(&mut |entry| {
            entry.visit(visitor);
            true
        });
    }

    /// Adds a live object, or puts it in the place of the one that starts at the same address.
    pub fn put(&mut self, entry: Entry) {
        let was = self.edit(entry.start, |_| Some(entry));
        self.forgotten(was);
    }

    /// Makes a live object a freed one, or forgets it if it is not to be kept. Returns what was
    /// there.
    pub fn free(&mut self, start: u64, by: Origin, keep: bool) -> Option<Entry> {
        if self.ages.is_full(self.len) {
            let names = self.ages.merge();
            self.rewrite(&mut |entry| {
                if let State::Freed { age, .. } = &mut entry.state {
                    *age = names.get(usize::from(*age)).copied().unwrap_or(*age);
                }
                true
            });
        }
        let age = self.ages.add(self.len);
        let state = State::Freed { by, age };
        let was = self.edit(start, |entry| match entry {
            Some(entry) if entry.is_freed() => Some(entry),
            Some(entry) if keep => Some(Entry { state, ..entry }),
            _ => None,
        });
        if !keep || was.is_none_or(|entry| entry.is_freed()) {
            self.ages.remove(age);
        }
        was
    }

    /// Forgets the object that starts at `start`.
    pub fn remove(&mut self, start: u64) {
        let was = self.edit(start, |_| None);
        self.forgotten(was);
    }

    fn forgotten(&mut self, was: Option<Entry>) {
        if let Some(Entry { state: State::Freed { age, .. }, .. }) = was {
            self.ages.remove(age);
        }
    }

    /// Forgets the `most` oldest freed objects. `gone` is told where each started. Returns how many
    /// there were.
    pub fn forget_oldest(&mut self, most: usize, gone: &mut dyn FnMut(u64)) -> usize {
        let before = self.len;
        let (last, mut of_last) = self.ages.oldest(most);
        let (mut ages, mut len) = (std::mem::take(&mut self.ages), self.len);
        self.rewrite(&mut |entry| {
            let State::Freed { age, .. } = entry.state else { return true };
            if age > last || age == last && of_last == 0 {
                return true;
            }
            of_last -= usize::from(age == last);
            ages.remove(age);
            len -= 1;
            gone(entry.start);
            false
        });
        (self.ages, self.len) = (ages, len);
        before - self.len
    }
}

#[cfg(test)]
impl Table {
    /// All objects, once it is seen that the table is as it should be.
    pub fn checked(&self) -> Vec<Entry> {
        let all: Vec<_> = self.chunks.iter().flat_map(Chunk::checked).collect();
        assert!(all.is_sorted_by(|a, b| a.start < b.start));
        assert_eq!(self.bytes, self.chunks.iter().map(Chunk::heap).sum::<usize>());
        assert!(self.chunks.capacity() < self.chunks.len() + 3 * STEP);
        assert_eq!(
            (all.len(), self.ages.freed()),
            (self.len, all.iter().filter(|e| e.is_freed()).count())
        );
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::iter::successors;

    use proptest::prelude::*;

    use super::super::coding::tests::entry;
    use super::*;

    fn live(start: u64) -> Entry {
        Entry::live(start, 64, 3, Origin::from_bits(200), 4).unwrap()
    }

    #[test]
    fn many_objects_take_few_bytes() {
        let rising = |i: u64| i * 96;
        // Each number below 2^16 once, in a scattered order.
        let scattered = |i: u64| (i * 40_503 % 65_536) * 96;
        for (how, most, start) in
            [("rising", 4.0, &rising as &dyn Fn(u64) -> u64), ("scattered", 6.0, &scattered)]
        {
            let mut table = Table::default();
            for i in 0..65_536 {
                table.put(live(start(i)));
            }
            let each = table.bytes() as f64 / 65_536.0;
            assert!(each < most, "{how}: {each} bytes each");
            assert!(table.checked().iter().map(|entry| entry.start).eq((0..65_536).map(rising)));
            // Freed, in any order, they take two bytes more: who freed them, and when.
            for i in 0..65_536 {
                table.free(scattered(i), Origin::from_bits(i as u32 % 2 + 1), true);
            }
            let each = table.bytes() as f64 / 65_536.0;
            assert!(each < most + 2.5, "{how}: {each} bytes each");
            table.checked();
        }
    }

    #[test]
    fn the_oldest_go_first() {
        for objects in [40, 1000, 20_000u64] {
            let mut table = Table::default();
            (0..objects).for_each(|i| table.put(live(i * 64)));
            // Freed and used again a few times, so that ages are merged.
            for round in 0..5 {
                for i in 0..objects {
                    let start = (i * 7919 % objects) * 64;
                    table.free(start, Origin::NONE, true);
                    if round < 4 {
                        table.put(live(start));
                    }
                }
            }
            let nth: BTreeMap<_, _> =
                (0..objects).map(|i| ((i * 7919 % objects) * 64, i)).collect();
            let (mut gone, mut last) = (0, 0);
            while table.len() > 0 {
                let some = table
                    .forget_oldest(objects as usize / 8, &mut |start| last = last.max(nth[&start]))
                    as u64;
                gone += some;
                assert!(
                    last < gone + objects / 16,
                    "{objects}: {last} is not among the {gone} oldest"
                );
            }
            assert_eq!((gone, table.bytes()), (objects, heap::of_vec(&table.chunks)));
        }
    }

    /// What a step does.
    #[derive(Clone, Debug)]
    enum Step {
        Put(Entry),
        Free { start: u64, by: u32, keep: bool },
        Remove(u64),
        Forget(usize),
        Visit,
    }

    fn step(last: u64) -> impl Strategy<Value = Step> {
        let start = move || 0..=last;
        prop_oneof![
            8 => entry(start()).prop_map(Step::Put),
            4 => (start(), 0..1u32 << Origin::BITS, prop::bool::weighted(0.9))
                .prop_map(|(start, by, keep)| Step::Free { start, by, keep }),
            2 => start().prop_map(Step::Remove),
            1 => (0..40usize).prop_map(Step::Forget),
            1 => Just(Step::Visit),
        ]
    }

    /// Without its age, which only the table knows.
    fn ageless(mut entry: Entry) -> Entry {
        if let State::Freed { age, .. } = &mut entry.state {
            *age = 0;
        }
        entry
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_knows_what_a_tree_knows(
            steps in prop_oneof![
                prop::collection::vec(step(60), 1..300),
                prop::collection::vec(step(9000), 1..2000),
                prop::collection::vec(step(Entry::LAST_START), 1..500),
            ],
        ) {
            let (mut table, mut tree) = (Table::default(), BTreeMap::<u64, Entry>::new());
            for step in steps {
                let bytes = table.bytes();
                let most = match step {
                    Step::Put(mut entry) => {
                        // Objects are put in as live ones.
                        entry.state = State::Live { redzone: entry.redzone() };
                        table.put(entry);
                        let edited = tree.insert(entry.start, entry).is_some();
                        if edited { EDIT_MOST } else { INSERT_MOST }
                    }
                    Step::Free { start, by, keep } => {
                        let by = Origin::from_bits(by);
                        let was = table.free(start, by, keep).map(ageless);
                        prop_assert_eq!(was, tree.get(&start).copied());
                        match tree.get_mut(&start) {
                            Some(entry) if entry.is_freed() => 0,
                            Some(entry) if keep => {
                                entry.state = State::Freed { by, age: 0 };
                                EDIT_MOST
                            }
                            _ => {
                                tree.remove(&start);
                                0
                            }
                        }
                    }
                    Step::Remove(start) => {
                        table.remove(start);
                        tree.remove(&start);
                        0
                    }
                    Step::Forget(some) => {
                        let before = table.checked();
                        let mut gone = Vec::new();
                        let forgotten = table.forget_oldest(some, &mut |start| gone.push(start));
                        let freed = before.iter().filter(|entry| entry.is_freed()).count();
                        prop_assert_eq!(forgotten, freed.min(some));
                        prop_assert_eq!(forgotten, gone.len());
                        let ages = |went: bool| {
                            before.iter().filter_map(|entry| match entry.state {
                                State::Freed { age, .. }
                                    if gone.contains(&entry.start) == went => Some(age),
                                _ => None,
                            }).collect::<Vec<_>>()
                        };
                        let (went, stayed) = (ages(true), ages(false));
                        let edge = went.iter().max().zip(stayed.iter().min());
                        prop_assert!(edge.is_none_or(|(went, stayed)| went <= stayed));
                        tree.retain(|start, _| !gone.contains(start));
                        0
                    }
                    Step::Visit => {
                        let halve = &mut |origin: &mut Origin| {
                            let bits = origin.bits();
                            *origin = Origin::from_bits(bits.min(1 << 20) - bits.min(1));
                        };
                        // Not different for each, but never longer.
                        table.visit(halve);
                        tree.values_mut().for_each(|entry| entry.visit(halve));
                        0
                    }
                };
                prop_assert!(
                    table.bytes() <= bytes + most,
                    "{} and {most}: {}", bytes, table.bytes()
                );
            }
            let all: Vec<_> = table.checked().into_iter().map(ageless).collect();
            prop_assert_eq!(&all, &tree.values().copied().collect::<Vec<_>>());
            let last = tree.keys().next_back().copied().unwrap_or(0);
            for start in (0..=64).map(|i| last / 64 * i + i % 3) {
                let before = successors(table.up_to(start), |entry| {
                    table.up_to(entry.start.checked_sub(1)?)
                });
                let expected = tree.range(..=start).rev().map(|(_, e)| *e);
                prop_assert!(before.map(ageless).take(70).eq(expected.take(70)));
                let behind = successors(table.from(start), |entry| table.from(entry.start + 1));
                let expected = tree.range(start..).map(|(_, e)| *e);
                prop_assert!(behind.map(ageless).take(70).eq(expected.take(70)));
            }
            tree.keys().for_each(|start| table.remove(*start));
            prop_assert!(table.chunks.is_empty() && table.bytes == 0 && table.from(0).is_none());
        }
    }
}
