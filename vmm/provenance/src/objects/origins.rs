//! Who did something, and where: tasks with call stacks, each pair once, and each stack once.
//!
//! A pair stays as long as an object refers to it.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use umbra_shadow::abi::RECORD_FRAMES;

use crate::heap;
use crate::pool::{NO_PLACE, Pool};
use crate::stacks::{Frames, Key, StackId, Stacks};

/// A task and a stack in [`Origins`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Origin(u32);

impl Origin {
    /// None is known.
    pub const NONE: Self = Self(0);
    /// There was one, but there was no room for it.
    pub const LOST: Self = Self(u32::MAX);
}

#[derive(Debug)]
struct Pair {
    task: u32,
    stack: StackId,
    uses: u32,
}

/// Pairs that were found last, by a hash.
const RECENT: usize = 256;

/// A pair that was found last: most events share a few of them.
#[derive(Clone, Copy, Debug)]
struct Recent {
    /// Its place, or none.
    at: u32,
    task: u32,
    base: u64,
    /// As many frames as there are, then zeros.
    count: u8,
    frames: [[u8; 4]; RECORD_FRAMES],
}

impl Recent {
    const NONE: Self =
        Self { at: NO_PLACE, task: 0, base: 0, count: 0, frames: [[0; 4]; RECORD_FRAMES] };

    /// Whether it is this pair.
    #[inline]
    fn is(&self, task: u32, base: u64, words: &[[u8; 4]]) -> bool {
        if (self.task, self.base, usize::from(self.count)) != (task, base, words.len()) {
            return false;
        }
        let (pairs, rest) = pairs_of(words);
        let (others, _) = pairs_of(&self.frames);
        let last = self.frames.get(words.len().wrapping_sub(1));
        pairs.iter().zip(others).all(|(one, other)| one == other)
            && (rest.is_empty() || rest.first() == last)
    }
}

/// Frames by two, and the last one of an odd number.
#[inline]
fn pairs_of(words: &[[u8; 4]]) -> (&[[u8; 8]], &[[u8; 4]]) {
    let (pairs, rest) = words.as_flattened().as_chunks();
    (pairs, rest.as_chunks().0)
}

/// A bounded table of them.
#[derive(Debug)]
pub struct Origins {
    stacks: Stacks,
    pairs: Pool<Pair>,
    index: HashTable<u32>,
    hash: RandomState,
    recent: Box<[Recent; RECENT]>,
    /// The most bytes.
    most: usize,
    lost: u64,
}

/// Where a pair is among the recent ones.
#[inline]
fn recent_place(task: u32, words: &[[u8; 4]]) -> usize {
    // An odd number without structure: 2^64 divided by the golden ratio.
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |hash: u64, pair: u64| (hash ^ pair).wrapping_mul(MIX).rotate_left(32);
    let (pairs, rest) = pairs_of(words);
    let hash = pairs.iter().map(|pair| u64::from_le_bytes(*pair)).fold(task.into(), mix);
    let last = rest.first().map_or(0, |word| u32::from_le_bytes(*word));
    mix(hash, last.into()) as usize % RECENT
}

impl Origins {
    /// A table of at most so many bytes.
    pub fn new(most: usize) -> Self {
        Self {
            stacks: Stacks::default(),
            pairs: Pool::default(),
            index: HashTable::new(),
            hash: RandomState::default(),
            recent: Box::new([Recent::NONE; RECENT]),
            most,
            lost: 0,
        }
    }

    /// How many stacks found no room.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Distinct stacks.
    pub fn stacks(&self) -> usize {
        self.stacks.len()
    }

    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.stacks.bytes() + self.pairs.bytes() + heap::of_table(&self.index)
    }

    /// The task that did something, and its stack, for one more use, if they were found lately.
    #[inline(always)]
    pub fn recent(&mut self, task: u32, frames: Frames<'_>) -> Option<Origin> {
        let Frames::Distances { base, words } = frames else { return None };
        let recent = self.recent.get(recent_place(task, words))?;
        if !recent.is(task, base, words) {
            return None;
        }
        let at = recent.at;
        let pair = self.pairs.get_mut(at)?;
        pair.uses = pair.uses.saturating_add(1);
        Some(Origin(at + 1))
    }

    /// The task that did something, and its stack, for one more use. None if there is no room.
    pub fn intern(&mut self, task: u32, frames: Frames<'_>) -> Option<Origin> {
        let origin =
            frames.with_key(|stack| self.find(task, stack).or_else(|| self.insert(task, stack)))?;
        if let Frames::Distances { base, words } = frames
            && words.len() <= RECORD_FRAMES
            && let Some(recent) = self.recent.get_mut(recent_place(task, words))
        {
            *recent = Recent { at: origin.0 - 1, task, base, ..Recent::NONE };
            recent.count = words.len() as u8;
            recent.frames.iter_mut().zip(words).for_each(|(to, word)| *to = *word);
        }
        Some(origin)
    }

    /// A pair that is known.
    fn find(&mut self, task: u32, stack: Key<'_>) -> Option<Origin> {
        let (pairs, stacks) = (&mut self.pairs, &self.stacks);
        let is_it = |at: &u32| {
            let pair = pairs.get(*at).filter(|pair| pair.task == task);
            pair.is_some_and(|pair| stacks.get(pair.stack) == stack)
        };
        let at = *self.index.find(self.hash.hash_one((task, stack)), is_it)?;
        let pair = pairs.get_mut(at)?;
        pair.uses = pair.uses.saturating_add(1);
        Some(Origin(at + 1))
    }

    /// A pair that is new.
    fn insert(&mut self, task: u32, key: Key<'_>) -> Option<Origin> {
        let growth = self.pairs.growth()? + heap::growth_of_table(&self.index);
        let room = self.most.checked_sub(self.bytes() + growth)?;
        let stack = self.stacks.intern(key, room);
        if stack == StackId::LOST {
            return None;
        }
        let hash = self.hash.hash_one((task, key));
        let at = self.pairs.insert(Pair { task, stack, uses: 1 });
        let (pairs, stacks, state) = (&self.pairs, &self.stacks, &self.hash);
        let hash_of = |at: &u32| {
            let pair = pairs.get(*at);
            pair.map_or(0, |pair| state.hash_one((pair.task, stacks.get(pair.stack))))
        };
        self.index.insert_unique(hash, at, hash_of);
        Some(Origin(at + 1))
    }

    /// Counts a stack that found no room.
    pub fn lose(&mut self) -> Origin {
        self.lost = self.lost.saturating_add(1);
        Origin::LOST
    }

    /// Ends a use.
    #[inline]
    pub fn release(&mut self, origin: Origin) {
        let Some(at) = origin.0.checked_sub(1) else { return };
        let Some(pair) = self.pairs.get_mut(at) else { return };
        pair.uses -= 1;
        if pair.uses == 0 {
            self.remove(at);
        }
    }

    /// Takes a pair out that nothing refers to any more.
    #[cold]
    fn remove(&mut self, at: u32) {
        let Some(Pair { task, stack, .. }) = self.pairs.get(at) else { return };
        let (task, stack) = (*task, *stack);
        if let (words, []) = self.stacks.get(stack).bytes.as_chunks()
            && let Some(recent) = self.recent.get_mut(recent_place(task, words))
            && recent.at == at
        {
            *recent = Recent::NONE;
        }
        let hash = self.hash.hash_one((task, self.stacks.get(stack)));
        match self.index.find_entry(hash, |other| *other == at) {
            Ok(entry) => drop(entry.remove()),
            Err(_) => debug_assert!(false, "pair {at} is not in the index"),
        }
        self.pairs.remove(at);
        self.stacks.release(stack);
    }

    /// The task and its stack.
    pub fn get(&self, origin: Origin) -> (u32, StackId) {
        match origin.0.checked_sub(1).and_then(|at| self.pairs.get(at)) {
            Some(pair) => (pair.task, pair.stack),
            None if origin == Origin::NONE => (0, StackId::NONE),
            None => (0, StackId::LOST),
        }
    }

    /// The addresses of a stack's frames; none if it was lost.
    pub fn frames(&self, stack: StackId) -> Vec<u64> {
        self.stacks.get(stack).addresses()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_keeps_its_meaning() {
        let mut origins = Origins::new(1 << 20);
        let all: Vec<_> = (0..100u32)
            .map(|i| origins.intern(i % 10, (&[u64::from(i / 10), 7][..]).into()).expect("room"))
            .collect();
        assert_eq!((origins.pairs.len(), origins.stacks()), (100, 10));
        let known = |origins: &mut Origins, task, frames: &[u64]| {
            Frames::from(frames).with_key(|key| origins.find(task, key))
        };
        assert_eq!(known(&mut origins, 3, &[4, 7]), Some(all[43]));
        origins.release(all[43]);
        for origin in &all[..95] {
            origins.release(*origin);
        }
        assert_eq!((origins.pairs.len(), origins.stacks()), (5, 1));
        for (i, origin) in (95..100u32).zip(&all[95..]) {
            let (task, stack) = origins.get(*origin);
            assert_eq!((task, origins.frames(stack)), (i % 10, vec![9u64, 7]));
            assert_eq!(known(&mut origins, task, &[9, 7]), Some(*origin));
        }
        for origin in [Origin::NONE, Origin::LOST] {
            origins.release(origin);
        }
        assert_eq!(origins.get(Origin::NONE), (0, StackId::NONE));
        assert_eq!(origins.get(Origin::LOST), (0, StackId::LOST));
    }

    #[test]
    fn what_is_gone_is_not_recent() {
        let mut origins = Origins::new(1 << 20);
        let words = |i: u32| [i, 7, 8].map(u32::to_le_bytes);
        let (one, other) = (words(1), words(2));
        let frames = |base, words| Frames::Distances { base, words };
        assert_eq!(origins.recent(5, frames(0, &one)), None);
        let first = origins.intern(5, frames(0, &one)).expect("room");
        assert_eq!(origins.recent(5, frames(0, &one)), Some(first));
        for (task, base, words) in [(6, 0, &one), (5, 1, &one), (5, 0, &other)] {
            assert_eq!(origins.recent(task, frames(base, words)), None);
        }
        assert_eq!(origins.recent(5, frames(0, &one[..2])), None, "it is shorter");
        origins.release(first);
        assert_eq!(origins.recent(5, frames(0, &one)), Some(first));
        origins.release(first);
        origins.release(first);
        // Its place serves another one.
        assert_eq!(origins.intern(5, frames(0, &other)), Some(first));
        assert_eq!(origins.recent(5, frames(0, &one)), None);
        assert_eq!(origins.recent(5, frames(0, &other)), Some(first));
        // Longer than any record's.
        let long = [[1; 4]; RECORD_FRAMES + 1];
        let longest = origins.intern(5, frames(0, &long)).expect("room");
        assert_eq!(origins.recent(5, frames(0, &long)), None);
        assert_eq!(origins.intern(5, frames(0, &long)), Some(longest));
    }

    #[test]
    fn its_bytes_are_bounded() {
        for most in [0, 40, 100, 1000, 1001, 5000, 65536] {
            let mut origins = Origins::new(most);
            let mut kept = Vec::new();
            for i in 0..2000u32 {
                let frames: Vec<u64> = (0..u64::from(i % 17)).map(|n| n + u64::from(i)).collect();
                let words: Vec<_> = frames.iter().map(|n| (*n as u32).to_le_bytes()).collect();
                let frames = match i % 2 {
                    0 => Frames::from(frames.as_slice()),
                    _ => Frames::Distances { base: u64::from(i % 3), words: &words },
                };
                kept.extend(origins.intern(i % 50, frames));
                assert!(origins.bytes() <= most, "{i} {most}: {}", origins.bytes());
                if i % 3 == 0 && !kept.is_empty() {
                    origins.release(kept.swap_remove((i as usize * 7) % kept.len()));
                }
            }
            assert!(most < 1000 || kept.len() > most / 400, "{most}: {}", kept.len());
            kept.into_iter().for_each(|origin| origins.release(origin));
            assert_eq!((origins.pairs.len(), origins.stacks()), (0, 0));
            assert!(origins.index.is_empty());
        }
    }

    #[test]
    fn a_task_without_a_stack_is_one_pair() {
        let mut origins = Origins::new(1 << 20);
        let none = |base| Frames::Distances { base, words: &[] };
        for task in 0..1000 {
            let origin = origins.intern(task, none(5)).expect("room");
            origins.recent.fill(Recent::NONE);
            assert_eq!(origins.intern(task, none(6)), Some(origin));
            assert_eq!(origins.intern(task, Frames::default()), Some(origin));
            assert_eq!(origins.get(origin), (task, StackId::NONE));
            for _ in 0..3 {
                origins.release(origin);
            }
        }
        assert_eq!((origins.pairs.len(), origins.index.len()), (0, 0));
    }
}
