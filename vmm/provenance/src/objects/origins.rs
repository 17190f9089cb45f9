//! Who did something, and where: tasks with call stacks, each pair once, and each stack once.

use std::collections::HashMap;

use crate::heap;
use crate::stacks::{MAX_FRAMES, StackId, Stacks};

/// A task and a stack in [`Origins`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Origin(u32);

impl Origin {
    /// None is known.
    pub const NONE: Self = Self(0);
    /// There was one, but there was no room for it.
    pub const LOST: Self = Self((1 << Self::BITS) - 1);
    /// It fits into so many bits.
    pub const BITS: u32 = 22;

    /// Its bits.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The one with these bits.
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

/// The most pairs, so that each has an [`Origin`] of its own.
const MOST_PAIRS: usize = Origin::LOST.0 as usize - 1;

/// Bytes of a pair, with its share of the index.
const PAIR_BYTES: usize = 9 + heap::of_value::<(StackId, u32), Origin>();
/// Bytes that may be taken beside: what allocations of few values have too much.
const BESIDE: usize = 384;

/// A bounded table of them.
#[derive(Debug, Default)]
pub struct Origins {
    stacks: Stacks,
    pairs: Vec<(StackId, u32)>,
    index: HashMap<(StackId, u32), Origin>,
    /// The most bytes.
    most: usize,
    most_pairs: usize,
    lost: u64,
}

impl Origins {
    /// A table of at most so many bytes.
    pub fn new(most: usize) -> Self {
        Self { most: most.saturating_sub(BESIDE), most_pairs: MOST_PAIRS, ..Self::default() }
    }

    fn room(&self) -> usize {
        if self.pairs.len() >= self.most_pairs {
            return 0;
        }
        self.most.saturating_sub(self.stacks.used() + self.pairs.len() * PAIR_BYTES)
    }

    /// Whether a new pair with the longest stack finds no room.
    pub fn is_full(&self) -> bool {
        self.room() < Stacks::cost(MAX_FRAMES) + PAIR_BYTES
    }

    /// Whether that is so soon.
    pub fn is_crowded(&self) -> bool {
        self.room() < (Stacks::cost(MAX_FRAMES) + PAIR_BYTES).max(self.most / 8)
    }

    /// How many stacks found no room.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The task that did something, and its stack. Without room the stack is lost, or both.
    pub fn intern(&mut self, task: u32, frames: &[u64]) -> Origin {
        let stack = self.stacks.intern(frames, self.room());
        let origin = self.intern_pair(stack, task);
        if stack == StackId::LOST || origin == Origin::LOST {
            self.lost = self.lost.saturating_add(1);
        }
        origin
    }

    fn intern_pair(&mut self, stack: StackId, task: u32) -> Origin {
        if let Some(known) = self.index.get(&(stack, task)) {
            return *known;
        }
        if self.room() < PAIR_BYTES {
            return Origin::LOST;
        }
        heap::reserve_little(&mut self.pairs, 1);
        self.pairs.push((stack, task));
        let origin = Origin(self.pairs.len() as u32);
        self.index.insert((stack, task), origin);
        origin
    }

    /// The task and its stack.
    pub fn get(&self, origin: Origin) -> (u32, StackId) {
        let pair = (origin.0 as usize).checked_sub(1).and_then(|at| self.pairs.get(at));
        match pair {
            Some((stack, task)) => (*task, *stack),
            None if origin == Origin::NONE => (0, StackId::NONE),
            None => (0, StackId::LOST),
        }
    }

    /// The frames of a stack; none if it was lost.
    pub fn frames(&self, stack: StackId) -> &[u64] {
        self.stacks.get(stack)
    }

    /// Distinct stacks.
    pub fn stacks(&self) -> usize {
        self.stacks.len()
    }

    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.stacks.bytes() + heap::of_vec(&self.pairs) + heap::of_map(&self.index)
    }

    /// Keeps only what `visit` shows to the function that it gets. It is called once more, to
    /// change each origin to what it is called from now on: none gets more bits, and different ones
    /// stay different.
    pub fn keep(&mut self, mut visit: impl FnMut(&mut dyn FnMut(&mut Origin))) {
        let Self { most, most_pairs, lost, .. } = *self;
        let empty = Self { most, most_pairs, lost, ..Self::default() };
        let mut old = std::mem::replace(self, empty);
        // Not needed any more, and not small.
        old.index = HashMap::new();
        let mut names: Vec<_> = vec![None; old.pairs.len()];
        let at = |origin: &Origin| (origin.0 as usize).wrapping_sub(1);
        visit(&mut |origin| {
            if let Some(name) = names.get_mut(at(origin)) {
                *name = Some(*origin);
            }
        });
        for ((stack, task), name) in old.pairs.iter().zip(&mut names) {
            if name.is_some() {
                // What is lost stays lost. Nothing else is: there was room for it before.
                let stack = match *stack {
                    StackId::LOST => StackId::LOST,
                    stack => self.stacks.intern(old.stacks.get(stack), self.room()),
                };
                *name = Some(self.intern_pair(stack, *task));
            }
        }
        visit(&mut |origin| {
            if let Some(Some(name)) = names.get(at(origin)) {
                *origin = *name;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_keeps_its_meaning() {
        let mut origins = Origins::new(1 << 20);
        let mut all: Vec<_> =
            (0..100u32).map(|i| origins.intern(i % 10, &[u64::from(i / 10), 7])).collect();
        assert_eq!((origins.len(), origins.stacks()), (100, 10));
        assert_eq!(origins.intern(3, &[4, 7]), all[43]);
        let mut kept = all.split_off(95);
        kept.push(Origin::NONE);
        kept.push(Origin::LOST);
        origins.keep(|keep| kept.iter_mut().for_each(keep));
        assert_eq!((origins.len(), origins.stacks()), (5, 1));
        assert!(kept[..5].iter().map(|origin| origin.bits()).eq(1..6));
        for (i, origin) in (95..100u32).zip(&kept) {
            let (task, stack) = origins.get(*origin);
            assert_eq!((task, origins.frames(stack)), (i % 10, &[9u64, 7] as &[u64]));
        }
        assert_eq!(kept[5..], [Origin::NONE, Origin::LOST]);
        assert_eq!(origins.get(Origin::LOST), (0, StackId::LOST));
    }

    #[test]
    fn there_are_no_more_pairs_than_origins() {
        let mut origins = Origins { most_pairs: 10, ..Origins::new(1 << 20) };
        let mut all: Vec<_> = (0..12).map(|task| origins.intern(task, &[])).collect();
        assert_eq!((all[9] == Origin::LOST, &all[10..]), (false, &[Origin::LOST; 2] as &[_]));
        assert!(origins.is_full() && origins.is_crowded() && origins.lost() == 2);
        all.truncate(5);
        origins.keep(|keep| all.iter_mut().for_each(keep));
        assert!(
            (0..5).all(|task| origins.intern(task, &[]) == all[task as usize])
                && !origins.is_full()
        );
        // The last one is another than the one that says that it is lost.
        assert_eq!(MOST_PAIRS + 1, Origin::LOST.bits() as usize);
        assert_eq!(Origin::LOST.bits(), u32::MAX >> (32 - Origin::BITS));
    }

    #[test]
    fn without_room_stacks_are_lost() {
        let mut origins = Origins::new(1000);
        let all: Vec<_> = (0..100).map(|i| origins.intern(i, &[i.into()])).collect();
        assert!(origins.is_full() && all.contains(&Origin::LOST) && all[0] != Origin::LOST);
        assert!(origins.bytes() <= 1000, "{}", origins.bytes());
    }
}
