//! Each distinct call stack once: most allocations share a few of them.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
};

/// Most frames kept of one stack; the innermost ones.
pub const MAX_FRAMES: usize = 16;

/// A stack in a [`Stacks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StackId(u32);

impl StackId {
    /// There is none.
    pub const NONE: Self = Self(0);
    /// There was one, but the table was full.
    pub const LOST: Self = Self(u32::MAX);
}

/// A bounded table of stacks.
#[derive(Debug)]
pub struct Stacks {
    /// The frames of all stacks, one after the other.
    frames: Vec<u64>,
    /// Where in `frames` stack `id - 1` ends; it starts where the one before ends.
    ends: Vec<u32>,
    /// Stack by hash. The hash has a random key, so a guest cannot aim for equal ones.
    index: HashMap<u64, StackId>,
    hash: RandomState,
    most: usize,
    lost: u64,
}

impl Stacks {
    /// A table of at most `most` stacks.
    pub fn new(most: u32) -> Self {
        Self {
            frames: Vec::new(),
            ends: Vec::new(),
            index: HashMap::new(),
            hash: RandomState::new(),
            // So that all positions fit.
            most: most.min(u32::MAX / MAX_FRAMES as u32 - 1) as usize,
            lost: 0,
        }
    }

    /// The id of the stack with these return addresses, innermost first.
    pub fn intern(&mut self, frames: &[u64]) -> StackId {
        let frames = &frames[..frames.len().min(MAX_FRAMES)];
        if frames.is_empty() {
            return StackId::NONE;
        }
        let mut hash = self.hash.hash_one(frames);
        while let Some(id) = self.index.get(&hash) {
            if self.get(*id) == frames {
                return *id;
            }
            hash = hash.wrapping_add(1);
        }
        if self.ends.len() >= self.most {
            self.lost = self.lost.saturating_add(1);
            return StackId::LOST;
        }
        self.frames.extend_from_slice(frames);
        self.ends.push(self.frames.len() as u32);
        let id = StackId(self.ends.len() as u32);
        self.index.insert(hash, id);
        id
    }

    /// The frames of a stack; none if it was lost.
    pub fn get(&self, id: StackId) -> &[u64] {
        let end = |index: usize| self.ends.get(index).map(|end| *end as usize);
        let Some(index) = (id.0 as usize).checked_sub(1) else { return &[] };
        let Some(last) = end(index) else { return &[] };
        let first = index.checked_sub(1).and_then(end).unwrap_or(0);
        self.frames.get(first..last).unwrap_or(&[])
    }

    /// Distinct stacks.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// How many stacks found the table full.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_stacks_are_one() {
        let mut stacks = Stacks::new(100);
        let ids: Vec<_> = (1..=50u64).map(|depth| stacks.intern(&(0..depth).collect::<Vec<_>>())).collect();
        // Beyond 16 frames they are all alike.
        assert_eq!(stacks.len(), MAX_FRAMES);
        for depth in 1..=50usize {
            let frames: Vec<u64> = (0..depth.min(MAX_FRAMES) as u64).collect();
            assert_eq!(stacks.get(ids[depth - 1]), frames);
            assert_eq!(stacks.intern(&frames), ids[depth - 1]);
        }
        assert_eq!(stacks.intern(&[]), StackId::NONE);
        assert!(stacks.get(StackId::NONE).is_empty() && stacks.get(StackId::LOST).is_empty());
    }

    #[test]
    fn a_full_table_loses_only_new_stacks() {
        let mut stacks = Stacks::new(2);
        let ids = [1, 2, 3].map(|frame| stacks.intern(&[frame]));
        assert_eq!(ids[2], StackId::LOST);
        assert_eq!(stacks.intern(&[2]), ids[1]);
        assert_eq!((stacks.len(), stacks.lost()), (2, 1));
    }
}
