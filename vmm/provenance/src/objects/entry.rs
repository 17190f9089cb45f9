//! What is kept of one object.

use super::origins::Origin;

/// One object. [`coding`](super::coding) says in how few bytes it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// At most [`Entry::LAST_START`].
    pub start: u64,
    /// Saturated: 4 GiB stands for that and more.
    pub size: u32,
    pub cache: u16,
    /// [`Origin::NONE`] if only its free is known.
    pub allocated: Origin,
    pub state: State,
    /// What was freed before this one took its place, if that is known.
    pub previous: Option<Previous>,
}

/// What the crate's first page compares with.
const _: () = assert!(size_of::<Entry>() == 48);

/// Whether an object is allocated, and what is only known then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// With so many granules of redzone in its slot; saturated.
    Live { redzone: u8 },
    /// By whom, and in which of the [`Ages`](super::ages::Ages).
    Freed { by: Origin, age: u8 },
}

/// What was freed before another object took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous {
    /// Its start, as distance from that of the one that took its place.
    pub offset: i32,
    pub size: u32,
    pub allocated: Origin,
    pub freed: Origin,
}

impl Entry {
    /// The last address at which an object may start.
    pub const LAST_START: u64 = u64::MAX >> 16;

    /// A live object with so many granules of redzone. None if it starts behind the last address
    /// where one may.
    pub fn live(start: u64, size: u64, cache: u16, allocated: Origin, redzone: u8) -> Option<Self> {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let state = State::Live { redzone };
        (start <= Self::LAST_START).then_some(Self {
            start,
            size,
            cache,
            allocated,
            state,
            previous: None,
        })
    }

    /// The first address behind it. An object of no bytes still has a place of its own.
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.size.max(1))
    }

    /// Redzone in its slot, in granules; saturated. Freed objects have none.
    pub fn redzone(&self) -> u8 {
        match self.state {
            State::Live { redzone } => redzone,
            State::Freed { .. } => 0,
        }
    }

    /// Who freed it, if it was freed.
    pub fn freed(&self) -> Option<Origin> {
        match self.state {
            State::Live { .. } => None,
            State::Freed { by, .. } => Some(by),
        }
    }

    /// Whether it was freed.
    pub fn is_freed(&self) -> bool {
        self.freed().is_some()
    }

    /// For a live one: takes note of an object that it takes the place of. If that was freed, it is
    /// the previous one; else this one is what became of it, and the previous one is the same.
    pub fn follows(&mut self, old: &Self) {
        if let Some(freed) = old.freed() {
            let offset = old.start.wrapping_sub(self.start).cast_signed();
            // An object that starts so far away was of another kind, and does not help.
            let Ok(offset) = i32::try_from(offset) else { return };
            self.previous =
                Some(Previous { offset, size: old.size, allocated: old.allocated, freed });
        } else if old.start == self.start {
            self.previous = old.previous;
        }
    }

    /// Shows each of its origins, which may change it.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&mut Origin)) {
        visitor(&mut self.allocated);
        if let State::Freed { by, .. } = &mut self.state {
            visitor(by);
        }
        if let Some(previous) = &mut self.previous {
            visitor(&mut previous.allocated);
            visitor(&mut previous.freed);
        }
    }
}
