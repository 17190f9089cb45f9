//! Who did something, and where: tasks with call stacks, each pair once, and each stack once.
//!
//! A pair stays as long as an object refers to it.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::heap;
use crate::pool::{NO_PLACE, Pool};
use crate::stacks::{MAX_FRAMES, StackId, Stacks};

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

/// A bounded table of them.
#[derive(Debug)]
pub struct Origins {
    stacks: Stacks,
    pairs: Pool<Pair>,
    index: HashTable<u32>,
    hash: RandomState,
    /// Places of pairs that may be what is looked for: most events share a few of them.
    recent: [u32; RECENT],
    /// The most bytes.
    most: usize,
    lost: u64,
}

/// Where a pair is among the recent ones.
#[inline]
fn recent_place(task: u32, frames: &[u64]) -> usize {
    // An odd number without structure: 2^64 divided by the golden ratio.
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |hash: u64, frame: &u64| (hash.rotate_left(5) ^ frame).wrapping_mul(MIX);
    frames.iter().fold(task.into(), mix) as usize >> 56
}

/// Whether two stacks are equal. They are short: calling `memcmp` would take longer.
#[inline]
fn is_same(one: &[u64], other: &[u64]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one == other)
}

impl Origins {
    /// A table of at most so many bytes.
    pub fn new(most: usize) -> Self {
        Self {
            stacks: Stacks::default(),
            pairs: Pool::default(),
            index: HashTable::new(),
            hash: RandomState::default(),
            recent: [NO_PLACE; RECENT],
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

    /// The task that did something, and its stack, for one more use, if they are known.
    #[inline]
    pub fn find(&mut self, task: u32, frames: &[u64]) -> Option<Origin> {
        let frames = &frames[..frames.len().min(MAX_FRAMES)];
        let recent = recent_place(task, frames);
        let (pairs, stacks) = (&mut self.pairs, &self.stacks);
        let is_it = |at: &u32| {
            let pair = pairs.get(*at).filter(|pair| pair.task == task);
            pair.is_some_and(|pair| is_same(stacks.get(pair.stack), frames))
        };
        let at = match self.recent.get(recent) {
            Some(at) if is_it(at) => *at,
            _ => *self.index.find(self.hash.hash_one((task, frames)), is_it)?,
        };
        if let Some(recent) = self.recent.get_mut(recent) {
            *recent = at;
        }
        let pair = pairs.get_mut(at)?;
        pair.uses = pair.uses.saturating_add(1);
        Some(Origin(at + 1))
    }

    /// The task that did something, and its stack, for one more use. None if there is no room.
    pub fn intern(&mut self, task: u32, frames: &[u64]) -> Option<Origin> {
        if let Some(known) = self.find(task, frames) {
            return Some(known);
        }
        let frames = &frames[..frames.len().min(MAX_FRAMES)];
        let growth = self.pairs.growth()? + heap::growth_of_table(&self.index);
        let room = self.most.checked_sub(self.bytes() + growth)?;
        let stack = self.stacks.intern(frames, room);
        if stack == StackId::LOST {
            return None;
        }
        let hash = self.hash.hash_one((task, frames));
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
    fn remove(&mut self, at: u32) {
        let Some(Pair { task, stack, .. }) = self.pairs.get(at) else { return };
        let (task, stack) = (*task, *stack);
        let hash = self.hash.hash_one((task, self.stacks.get(stack)));
        if let Ok(entry) = self.index.find_entry(hash, |other| *other == at) {
            entry.remove();
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

    /// The frames of a stack; none if it was lost.
    pub fn frames(&self, stack: StackId) -> &[u64] {
        self.stacks.get(stack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_keeps_its_meaning() {
        let mut origins = Origins::new(1 << 20);
        let all: Vec<_> = (0..100u32)
            .map(|i| origins.intern(i % 10, &[u64::from(i / 10), 7]).expect("room"))
            .collect();
        assert_eq!((origins.pairs.len(), origins.stacks()), (100, 10));
        assert_eq!(origins.intern(3, &[4, 7]), Some(all[43]));
        origins.release(all[43]);
        for origin in &all[..95] {
            origins.release(*origin);
        }
        assert_eq!((origins.pairs.len(), origins.stacks()), (5, 1));
        for (i, origin) in (95..100u32).zip(&all[95..]) {
            let (task, stack) = origins.get(*origin);
            assert_eq!((task, origins.frames(stack)), (i % 10, &[9u64, 7] as &[u64]));
            assert_eq!(origins.find(task, &[9, 7]), Some(*origin));
        }
        for origin in [Origin::NONE, Origin::LOST] {
            origins.release(origin);
        }
        assert_eq!(origins.get(Origin::NONE), (0, StackId::NONE));
        assert_eq!(origins.get(Origin::LOST), (0, StackId::LOST));
    }

    #[test]
    fn its_bytes_are_bounded() {
        for most in [0, 40, 100, 1000, 1001, 5000, 65536] {
            let mut origins = Origins::new(most);
            let mut kept = Vec::new();
            for i in 0..2000u32 {
                let frames: Vec<u64> = (0..u64::from(i % 17)).map(|n| n + u64::from(i)).collect();
                kept.extend(origins.intern(i % 50, &frames));
                assert!(origins.bytes() <= most, "{i} {most}: {}", origins.bytes());
                if i % 3 == 0 && !kept.is_empty() {
                    origins.release(kept.swap_remove((i as usize * 7) % kept.len()));
                }
            }
            assert!(most < 1000 || kept.len() > most / 400, "{most}: {}", kept.len());
            kept.into_iter().for_each(|origin| origins.release(origin));
            assert_eq!((origins.pairs.len(), origins.stacks()), (0, 0));
        }
    }
}
