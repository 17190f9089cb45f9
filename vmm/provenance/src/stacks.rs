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

/// The return addresses of a stack, innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames<'a> {
    /// The addresses.
    Addresses(&'a [u64]),
    /// As in a record: little-endian distances from `base`; 0 is an address that is not known.
    Distances {
        /// The text base of the ring.
        base: u64,
        /// The distances.
        words: &'a [[u8; 4]],
    },
}

impl Default for Frames<'_> {
    fn default() -> Self {
        Self::Addresses(&[])
    }
}

impl<'a> From<&'a [u64]> for Frames<'a> {
    fn from(addresses: &'a [u64]) -> Self {
        Self::Addresses(addresses)
    }
}

/// Room for the bytes of all frames that are kept, if they are addresses.
type Buffer = [u8; 8 * MAX_FRAMES];

impl<'a> Frames<'a> {
    /// The addresses; 0 is one that is not known.
    pub fn to_vec(self) -> Vec<u64> {
        self.with_key(|key| key.addresses())
    }

    /// Calls `f` with what is kept of the frames.
    #[inline]
    pub(crate) fn with_key<T>(self, f: impl FnOnce(Key<'_>) -> T) -> T {
        match self {
            // No stack is the same one, whatever the base.
            Self::Distances { words: [], .. } => f(Key::NONE),
            Self::Distances { base, words } => {
                let words = words.get(..MAX_FRAMES).unwrap_or(words);
                f(Key { base: Some(base), bytes: words.as_flattened() })
            }
            Self::Addresses(addresses) => {
                let mut buffer: Buffer = [0; _];
                let (words, _) = buffer.as_chunks_mut();
                let kept = words.iter_mut().zip(addresses);
                let count = kept.map(|(to, from)| *to = from.to_le_bytes()).count();
                f(Key { base: None, bytes: &buffer[..8 * count] })
            }
        }
    }
}

/// What is kept of the frames of a stack, and tells it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key<'a> {
    /// The frames are distances from it, of 4 bytes; else addresses, of 8.
    pub base: Option<u64>,
    pub bytes: &'a [u8],
}

impl Key<'_> {
    /// The key of no stack.
    pub const NONE: Key<'static> = Key { base: None, bytes: &[] };

    /// The addresses.
    pub fn addresses(self) -> Vec<u64> {
        let Some(base) = self.base else {
            return self.bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        };
        let distances = self.bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
        let address = |distance| match distance {
            0 => 0,
            distance => base.wrapping_add(u64::from(distance)),
        };
        distances.map(address).collect()
    }
}

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
    base: Option<u64>,
    bytes: Box<[u8]>,
    uses: u32,
}

impl Stack {
    fn key(&self) -> Key<'_> {
        Key { base: self.base, bytes: &self.bytes }
    }
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

    /// The stack with these frames, for one more use. A new one may take up to `room` bytes, or is
    /// lost.
    pub fn intern(&mut self, key: Key<'_>, room: usize) -> StackId {
        if key.bytes.is_empty() {
            return StackId::NONE;
        }
        let hash = self.hash.hash_one(key);
        let stacks = &mut self.stacks;
        let is_it = |at: &u32| stacks.get(*at).is_some_and(|stack| stack.key() == key);
        if let Some(at) = self.index.find(hash, is_it).copied() {
            if let Some(stack) = stacks.get_mut(at) {
                stack.uses = stack.uses.saturating_add(1);
            }
            return StackId(at + 1);
        }
        let bytes = heap::taken(key.bytes.len());
        let growth = stacks.growth().map(|growth| growth + heap::growth_of_table(&self.index));
        if growth.is_none_or(|growth| growth + bytes > room) {
            return StackId::LOST;
        }
        self.frames += bytes;
        let at = stacks.insert(Stack { base: key.base, bytes: key.bytes.into(), uses: 1 });
        let hash_of = |at: &u32| self.hash.hash_one(stacks.get(*at).map_or(Key::NONE, Stack::key));
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
        let hash = self.hash.hash_one(stack.key());
        match self.index.find_entry(hash, |other| *other == at) {
            Ok(entry) => drop(entry.remove()),
            Err(_) => debug_assert!(false, "stack {at} is not in the index"),
        }
        if let Some(stack) = self.stacks.remove(at) {
            self.frames -= heap::taken(stack.bytes.len());
        }
    }

    /// What is kept of a stack; nothing if it was lost.
    #[inline]
    pub fn get(&self, id: StackId) -> Key<'_> {
        let at = id.0.checked_sub(1);
        at.and_then(|at| self.stacks.get(at)).map_or(Key::NONE, Stack::key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1 << 20;

    fn intern(stacks: &mut Stacks, frames: &[u64], room: usize) -> StackId {
        Frames::from(frames).with_key(|key| stacks.intern(key, room))
    }

    fn get(stacks: &Stacks, id: StackId) -> Vec<u64> {
        stacks.get(id).addresses()
    }

    #[test]
    fn equal_stacks_are_one() {
        let mut stacks = Stacks::default();
        let ids: Vec<_> = (1..=50u64)
            .map(|depth| intern(&mut stacks, &(0..depth).collect::<Vec<_>>(), ROOM))
            .collect();
        // Beyond 16 frames they are all alike.
        assert_eq!(stacks.len(), MAX_FRAMES);
        for depth in 1..=50usize {
            let frames: Vec<u64> = (0..depth.min(MAX_FRAMES) as u64).collect();
            assert_eq!(get(&stacks, ids[depth - 1]), frames);
            assert_eq!(intern(&mut stacks, &frames, 0), ids[depth - 1]);
        }
        assert_eq!(intern(&mut stacks, &[], 0), StackId::NONE);
        assert!(get(&stacks, StackId::NONE).is_empty() && get(&stacks, StackId::LOST).is_empty());
    }

    #[test]
    fn distances_are_kept_as_they_are() {
        let words = [[0x10, 0, 0, 0], [0; 4], [0xff; 4]];
        let near = |base| Frames::Distances { base, words: &words };
        let mut stacks = Stacks::default();
        let bases = [0u64, 0xffff_ffff_8000_0000, u64::MAX];
        let ids = bases.map(|base| near(base).with_key(|key| stacks.intern(key, ROOM)));
        assert_eq!(stacks.len(), 3, "the same distances are other addresses");
        for (base, id) in bases.into_iter().zip(ids) {
            let far = base.wrapping_add(0xffff_ffff);
            assert_eq!(get(&stacks, id), [base.wrapping_add(16), 0, far]);
            assert_eq!(near(base).to_vec(), get(&stacks, id));
        }
        assert_eq!(stacks.bytes(), {
            let table = heap::of_table(&stacks.index) + stacks.stacks.bytes();
            table + 3 * heap::taken(12)
        });
    }

    #[test]
    fn a_stack_goes_with_its_last_use() {
        let mut stacks = Stacks::default();
        let ids = [1, 2, 3].map(|frame| intern(&mut stacks, &[frame], ROOM));
        assert_eq!(intern(&mut stacks, &[2], 0), ids[1]);
        let bytes = stacks.bytes();
        stacks.release(ids[1]);
        assert_eq!((get(&stacks, ids[1]), stacks.len()), (vec![2], 3));
        stacks.release(ids[1]);
        assert_eq!((get(&stacks, ids[1]), stacks.len()), (vec![], 2));
        assert_eq!(bytes - stacks.bytes(), heap::taken(8));
        for id in [ids[1], StackId::NONE, StackId::LOST] {
            stacks.release(id);
        }
        // Its place serves the next one.
        assert_eq!(intern(&mut stacks, &[4], ROOM), ids[1]);
        assert_eq!((get(&stacks, ids[0]), get(&stacks, ids[1])), (vec![1], vec![4]));
    }

    #[test]
    fn without_room_only_new_stacks_are_lost() {
        let mut stacks = Stacks::default();
        let known = intern(&mut stacks, &[1], ROOM);
        assert_eq!(intern(&mut stacks, &[2], heap::taken(8) - 1), StackId::LOST);
        assert_eq!((intern(&mut stacks, &[1], 0), stacks.len()), (known, 1));
    }
}
