//! What is kept of one object, in 32 bytes.

use super::origins::Origin;
use super::slab::Slot;
use super::table::{END, Place};

/// One object, or a vacant place. Live objects and freed ones keep different things in the same words: [`Previous`] and
/// [`Freed`].
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The start, and in the last 16 bits the cache.
    head: u64,
    /// Saturated: 4 GiB stands for that and more.
    size: u32,
    /// The origin of the allocation, the redzone in 8 bits, the state in the last 2.
    tail: u32,
    words: [u32; 4],
}

const _: () = assert!(size_of::<Entry>() == 32 && size_of::<Previous>() == 16);

const CACHE_BITS: u32 = u16::BITS;
const STATE_BITS: u32 = 2;
const REDZONE_BITS: u32 = u8::BITS;
const _: () = assert!(Origin::BITS + REDZONE_BITS + STATE_BITS == u32::BITS);

const VACANT: u32 = 0;
const LIVE: u32 = 1;
const FREED: u32 = 2;

/// What was freed before another object took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous {
    /// Its start, as distance from that of the one that took its place.
    pub offset: i32,
    pub size: u32,
    pub allocated: Origin,
    /// [`Origin::NONE`]: nothing is known of any, and the rest is 0.
    pub freed: Origin,
}

impl Previous {
    /// Nothing is known of any.
    pub const NONE: Self = Self { offset: 0, size: 0, allocated: Origin::NONE, freed: Origin::NONE };

    /// Whether something is known.
    pub fn is_some(&self) -> bool {
        self.freed != Origin::NONE
    }

    fn to_words(self) -> [u32; 4] {
        [self.offset.cast_unsigned(), self.size, self.allocated.bits(), self.freed.bits()]
    }

    fn from_words([offset, size, allocated, freed]: [u32; 4]) -> Self {
        let (allocated, freed) = (Origin::from_bits(allocated), Origin::from_bits(freed));
        Self { offset: offset.cast_signed(), size, allocated, freed }
    }
}

impl Slot for Previous {
    fn vacant(next: Place) -> Self {
        Self { size: next, ..Self::NONE }
    }

    fn next(&self) -> Option<Place> {
        (!self.is_some()).then_some(self.size)
    }
}

/// What is kept of a freed object beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    pub by: Origin,
    /// Neighbours in the list of freed objects.
    pub older: Place,
    pub newer: Place,
    /// Where its [`Previous`] is, if it has one.
    pub previous: Place,
}

impl Freed {
    fn to_words(self) -> [u32; 4] {
        [self.by.bits(), self.older, self.newer, self.previous]
    }

    fn from_words([by, older, newer, previous]: [u32; 4]) -> Self {
        Self { by: Origin::from_bits(by), older, newer, previous }
    }
}

impl Entry {
    /// The last address at which an object may start.
    pub const LAST_START: u64 = u64::MAX >> CACHE_BITS;

    /// A live object with so many granules of redzone. None if it starts behind the last address where one may.
    pub fn live(start: u64, size: u64, cache: u16, allocated: Origin, redzone: u8) -> Option<Self> {
        let mut entry = Self {
            head: start << CACHE_BITS | u64::from(cache),
            size: u32::try_from(size).unwrap_or(u32::MAX),
            tail: LIVE | u32::from(redzone) << STATE_BITS,
            words: Previous::NONE.to_words(),
        };
        entry.set_allocated(allocated);
        (start <= Self::LAST_START).then_some(entry)
    }

    pub fn start(&self) -> u64 {
        self.head >> CACHE_BITS
    }

    pub fn size(&self) -> u32 {
        self.size
    }

    /// The first address behind it. An object of no bytes still has a place of its own.
    pub fn end(&self) -> u64 {
        self.start() + u64::from(self.size.max(1))
    }

    pub fn cache(&self) -> u16 {
        self.head as u16
    }

    /// Redzone in its slot, in granules; saturated. Freed objects have none.
    pub fn redzone(&self) -> u8 {
        (self.tail >> STATE_BITS) as u8
    }

    /// Who allocated it; [`Origin::NONE`] if only its free is known.
    pub fn allocated(&self) -> Origin {
        Origin::from_bits(self.tail >> (STATE_BITS + REDZONE_BITS))
    }

    fn set_allocated(&mut self, origin: Origin) {
        let shift = STATE_BITS + REDZONE_BITS;
        self.tail = self.tail & ((1 << shift) - 1) | origin.bits() << shift;
    }

    fn state(&self) -> u32 {
        self.tail & ((1 << STATE_BITS) - 1)
    }

    /// Whether it is in the list of freed objects.
    pub fn is_freed(&self) -> bool {
        self.state() == FREED
    }

    /// What is kept of a freed object beside; none of a live one.
    pub fn freed(&self) -> Option<Freed> {
        self.is_freed().then(|| Freed::from_words(self.words))
    }

    /// What a live object keeps of the one before; none of a freed one, whose [`Freed`] tells where that is.
    pub fn previous(&self) -> Previous {
        if self.state() == LIVE { Previous::from_words(self.words) } else { Previous::NONE }
    }

    /// Makes it a freed object, or changes what is kept of that.
    pub fn set_freed(&mut self, freed: Freed) {
        self.tail &= !((1 << (STATE_BITS + REDZONE_BITS)) - 1);
        self.tail |= FREED;
        self.words = freed.to_words();
    }

    /// For a live one: takes note of an object that it takes the place of. If that was freed, it is the previous one; else this one is
    /// what became of it, and the previous one is the same.
    pub fn follows(&mut self, old: &Self) {
        if let Some(freed) = old.freed() {
            let offset = old.start().wrapping_sub(self.start()).cast_signed();
            // An object that starts so far away was of another kind, and does not help.
            let Ok(offset) = i32::try_from(offset) else { return };
            let (allocated, freed) = (old.allocated(), freed.by);
            self.words = Previous { offset, size: old.size, allocated, freed }.to_words();
        } else if old.start() == self.start() {
            self.words = old.words;
        }
    }

    /// Shows each of its origins, which may change it.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&mut Origin)) {
        let mut allocated = self.allocated();
        visitor(&mut allocated);
        self.set_allocated(allocated);
        if let Some(mut freed) = self.freed() {
            visitor(&mut freed.by);
            self.words = freed.to_words();
        } else {
            let mut previous = self.previous();
            previous.visit(visitor);
            self.words = previous.to_words();
        }
    }
}

impl Previous {
    /// Shows each of its origins, which may change it.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&mut Origin)) {
        visitor(&mut self.allocated);
        visitor(&mut self.freed);
    }
}

impl Slot for Entry {
    fn vacant(next: Place) -> Self {
        Self { head: 0, size: 0, tail: VACANT, words: [next, END, END, END] }
    }

    fn next(&self) -> Option<Place> {
        (self.state() == VACANT).then_some(self.words[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_it_touches_anything_else() {
        let (origin, last) = (Origin::from_bits(7), Entry::LAST_START);
        for (start, cache, allocated, redzone) in [
            (last, 0, Origin::NONE, 0),
            (0, u16::MAX, Origin::NONE, 0),
            (0, 0, Origin::LOST, 0),
            (0, 0, Origin::NONE, u8::MAX),
            (last, u16::MAX, Origin::LOST, u8::MAX),
        ] {
            let mut entry = Entry::live(start, u64::MAX, cache, allocated, redzone).unwrap();
            let told = |entry: &Entry| (entry.start(), entry.size(), entry.cache(), entry.allocated());
            assert_eq!(told(&entry), (start, u32::MAX, cache, allocated));
            assert_eq!((entry.redzone(), entry.freed(), entry.next()), (redzone, None, None));
            assert_eq!(entry.previous(), Previous::NONE);
            let freed = Freed { by: origin, older: 1, newer: END, previous: 3 };
            entry.set_freed(freed);
            assert_eq!(told(&entry), (start, u32::MAX, cache, allocated));
            assert_eq!((entry.redzone(), entry.freed(), entry.next()), (0, Some(freed), None));
            let mut next = Entry::live(start, 1, 0, origin, 0).unwrap();
            next.follows(&entry);
            let previous = Previous { offset: 0, size: u32::MAX, allocated, freed: origin };
            assert_eq!((next.previous(), next.freed(), next.allocated()), (previous, None, origin));
        }
        assert!(
            Entry::live(last + 1, 1, 0, origin, 0).is_none()
                && Entry::live(u64::MAX, 1, 0, origin, 0).is_none()
        );
        assert_eq!(Entry::vacant(5).next(), Some(5));
    }
}
