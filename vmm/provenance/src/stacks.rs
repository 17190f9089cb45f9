//! Call stacks, each once: most events share a few of them.
//!
//! A stack stays as long as something uses it.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::heap;
use crate::pool::Pool;

/// Most frames kept of one stack; the innermost ones.
pub const MAX_FRAMES: usize = 16;

/// A stack in [`Stacks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StackId(u32);

impl StackId {
    /// There is none.
    pub const NONE: Self = Self(0);
    /// There was one, but there was no room for it.
    pub const LOST: Self = Self(u32::MAX);
}

#[derive(Debug)]
struct Stack {
    frames: Box<[u64]>,
    uses: u32,
}

/// A bounded table of stacks.
#[derive(Debug, Default)]
pub struct Stacks {
    stacks: Pool<Stack>,
    /// By a hash with a random key, so that a guest cannot aim for equal ones.
    index: HashTable<u32>,
    hash: RandomState,
    /// Bytes of all frames.
    frames: usize,
}

impl Stacks {
    /// Distinct stacks.
    pub fn len(&self) -> usize {
        self.stacks.len()
    }

    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.stacks.bytes() + heap::of_table(&self.index) + self.frames
    }

    /// The stack with these return addresses, innermost first, for one more use. A new one may take
    /// up to `room` bytes, or is lost.
    pub fn intern(&mut self, frames: &[u64], room: usize) -> StackId {
        let frames = &frames[..frames.len().min(MAX_FRAMES)];
        if frames.is_empty() {
            return StackId::NONE;
        }
        let hash = self.hash.hash_one(frames);
        let stacks = &mut self.stacks;
        let is_it = |at: &u32| stacks.get(*at).is_some_and(|stack| *stack.frames == *frames);
        if let Some(at) = self.index.find(hash, is_it).copied() {
            if let Some(stack) = stacks.get_mut(at) {
                stack.uses = stack.uses.saturating_add(1);
            }
            return StackId(at + 1);
        }
        let bytes = heap::taken(size_of_val(frames));
        let growth = stacks.growth().map(|growth| growth + heap::growth_of_table(&self.index));
        if growth.is_none_or(|growth| growth + bytes > room) {
            return StackId::LOST;
        }
        self.frames += bytes;
        let at = stacks.insert(Stack { frames: frames.into(), uses: 1 });
        let hash_of = |at: &u32| {
            let frames = stacks.get(*at).map_or(&[] as &[u64], |stack| &stack.frames);
            self.hash.hash_one(frames)
        };
        self.index.insert_unique(hash, at, hash_of);
        StackId(at + 1)
    }

    /// Ends a use.
    pub fn release(&mut self, id: StackId) {
        let Some(at) = id.0.checked_sub(1) else { return };
        let Some(stack) = self.stacks.get_mut(at) else { return };
        stack.uses -= 1;
        if stack.uses > 0 {
            return;
        }
        let hash = self.hash.hash_one(&*stack.frames);
        if let Ok(entry) = self.index.find_entry(hash, |other| *other == at) {
            entry.remove();
        }
        if let Some(stack) = self.stacks.remove(at) {
            self.frames -= heap::taken(size_of_val(&*stack.frames));
        }
    }

    /// The frames of a stack; none if it was lost.
    pub fn get(&self, id: StackId) -> &[u64] {
        let at = id.0.checked_sub(1);
        at.and_then(|at| self.stacks.get(at)).map_or(&[], |stack| &stack.frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1 << 20;

    #[test]
    fn equal_stacks_are_one() {
        let mut stacks = Stacks::default();
        let ids: Vec<_> =
            (1..=50u64).map(|depth| stacks.intern(&(0..depth).collect::<Vec<_>>(), ROOM)).collect();
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
    fn a_stack_goes_with_its_last_use() {
        let mut stacks = Stacks::default();
        let ids = [1, 2, 3].map(|frame| stacks.intern(&[frame], ROOM));
        assert_eq!(stacks.intern(&[2], 0), ids[1]);
        let bytes = stacks.bytes();
        stacks.release(ids[1]);
        assert_eq!((stacks.get(ids[1]), stacks.len()), (&[2u64] as &[u64], 3));
        stacks.release(ids[1]);
        assert_eq!((stacks.get(ids[1]), stacks.len()), (&[] as &[u64], 2));
        assert_eq!(bytes - stacks.bytes(), heap::taken(8));
        for id in [ids[1], StackId::NONE, StackId::LOST] {
            stacks.release(id);
        }
        // Its place serves the next one.
        assert_eq!(stacks.intern(&[4], ROOM), ids[1]);
        assert_eq!(
            (stacks.get(ids[0]), stacks.get(ids[1])),
            (&[1u64] as &[u64], &[4u64] as &[u64])
        );
    }

    #[test]
    fn without_room_only_new_stacks_are_lost() {
        let mut stacks = Stacks::default();
        let known = stacks.intern(&[1], ROOM);
        assert_eq!(stacks.intern(&[2], heap::taken(8) - 1), StackId::LOST);
        assert_eq!((stacks.intern(&[1], 0), stacks.len()), (known, 1));
    }
}
