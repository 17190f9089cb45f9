//! Interns call stacks: most allocations share a few of them.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
};

use super::heap;

/// Most frames kept of one stack; the innermost ones.
pub const MAX_FRAMES: usize = 16;

/// A stack in a [`Stacks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct StackId(u32);

impl StackId {
    /// There is none.
    pub const NONE: Self = Self(0);
    /// There was one, but the table was full.
    pub const LOST: Self = Self(u32::MAX);
}

/// A table of stacks.
#[derive(Debug, Default)]
pub struct Stacks {
    /// The frames of all stacks, one after the other.
    frames: Vec<u64>,
    /// End of stack `id - 1` in `frames`; it starts where the previous one ends.
    ends: Vec<u32>,
    /// Stack by hash. The hash has a random key, so a guest cannot aim for equal ones.
    index: HashMap<u64, StackId>,
    hash: RandomState,
    /// Bytes of its stacks, without spare capacity.
    used: usize,
}

/// Bytes of a stack without its frames: its end, and its share of the index.
const STACK_BYTES: usize = 5 + heap::of_value::<u64, StackId>();
/// Bytes of a frame, with an eighth of spare capacity.
const FRAME_BYTES: usize = size_of::<u64>() * 9 / 8;

impl Stacks {
    /// Bytes of a stack of `frames` frames.
    pub const fn cost(frames: usize) -> usize {
        STACK_BYTES + frames * FRAME_BYTES
    }

    /// Bytes of its stacks, by [`Stacks::cost`].
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        heap::of_vec(&self.frames) + heap::of_vec(&self.ends) + heap::of_map(&self.index)
    }

    /// The id of the stack with these return addresses, innermost first. A new one may take up to
    /// `room` bytes, or is lost.
    pub fn intern(&mut self, frames: &[u64], room: usize) -> StackId {
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
        let Ok(end) = u32::try_from(self.frames.len() + frames.len()) else { return StackId::LOST };
        if Self::cost(frames.len()) > room {
            return StackId::LOST;
        }
        self.used += Self::cost(frames.len());
        heap::reserve_little(&mut self.frames, frames.len());
        self.frames.extend_from_slice(frames);
        heap::reserve_little(&mut self.ends, 1);
        self.ends.push(end);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_stacks_are_one() {
        let mut stacks = Stacks::default();
        let ids: Vec<_> =
            (1..=50u64).map(|depth| stacks.intern(&(0..depth).collect::<Vec<_>>(), 1000)).collect();
        // Beyond 16 frames they are all alike.
        assert_eq!(stacks.len(), MAX_FRAMES);
        for depth in 1..=50usize {
            let frames: Vec<u64> = (0..depth.min(MAX_FRAMES) as u64).collect();
            assert_eq!(stacks.get(ids[depth - 1]), frames);
            assert_eq!(stacks.intern(&frames, 0), ids[depth - 1]);
        }
        assert_eq!(stacks.intern(&[], 0), StackId::NONE);
        assert!(stacks.get(StackId::NONE).is_empty() && stacks.get(StackId::LOST).is_empty());
    }

    #[test]
    fn without_room_only_new_stacks_are_lost() {
        let mut stacks = Stacks::default();
        let max = 2 * Stacks::cost(1) + 5;
        let ids = [1, 2, 3].map(|frame| stacks.intern(&[frame], max - stacks.used()));
        assert_eq!(ids[2], StackId::LOST);
        assert_eq!(stacks.intern(&[2], 0), ids[1]);
        assert_eq!((stacks.len(), stacks.used()), (2, max - 5));
    }
}
