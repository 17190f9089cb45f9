//! Objects as bytes, in as few as possible: each is told by what sets it apart from the one before.
//!
//! An object is a byte of [`flags`], how far behind the last start it starts, and then what no flag
//! says is as before: its size, its cache, who allocated it, its redzone or who freed it, and its
//! age; numbers in 7 bits a byte, the lowest first. With [`flags::PREVIOUS`], a byte of [`was`]
//! follows, and what no flag of that says. Most objects lie in a slab among others like them, and
//! take 3 to 5 bytes; none takes more than [`MOST`].
//!
//! Whatever is told by "same" is told in full by the first one, so objects never take more bytes
//! when some of them go.

use umbra_shadow::codes::GRANULE;

use super::entry::{Entry, Previous, State};
use super::origins::Origin;

/// Most bytes of one object: flags, 48 bits of distance, size, cache, allocation, free, age; and
/// flags, distance, size, allocation and free of the previous one.
pub const MOST: usize = 1 + 7 + 5 + 3 + 4 + 4 + 1 + (1 + 5 + 5 + 4 + 4);
/// Most bytes by which objects take more if one is added or changed: itself, and what others shared
/// with it and have to tell now.
pub const MOST_MORE: usize = 2 * MOST;

/// What is so of an object. "Same" is as of the one before, or of the last one before of which it
/// is known.
mod flags {
    pub const FREED: u8 = 1;
    /// The distance is in bytes, because it is not in whole granules.
    pub const IN_BYTES: u8 = 2;
    pub const SAME_SIZE: u8 = 4;
    pub const SAME_CACHE: u8 = 8;
    pub const SAME_ALLOCATED: u8 = 16;
    /// The redzone of a live one, who freed a freed one.
    pub const SAME_STATE: u8 = 32;
    pub const SAME_AGE: u8 = 64;
    pub const PREVIOUS: u8 = 128;
}

/// What is so of the previous object in the same place.
mod was {
    pub const ELSEWHERE: u8 = 1;
    /// As of the object that has it.
    pub const SAME_SIZE: u8 = 2;
    /// As of the object that has it.
    pub const SAME_ALLOCATED: u8 = 4;
    /// As of the last previous object.
    pub const SAME_FREED: u8 = 8;
}

/// What is known when an object is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Last {
    start: u64,
    size: u32,
    cache: u16,
    allocated: Origin,
    redzone: u8,
    by: Origin,
    age: u8,
    /// Who freed the last previous object.
    was_by: Origin,
}

impl Last {
    /// Before the first one, which starts at `start`.
    fn new(start: u64) -> Self {
        let none = Origin::NONE;
        Self {
            start,
            size: 0,
            cache: 0,
            allocated: none,
            redzone: 0,
            by: none,
            age: 0,
            was_by: none,
        }
    }
}

/// Writes objects by rising address.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    len: usize,
    last: Option<Last>,
    first: u64,
}

impl Writer {
    /// Nothing, with room for so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), len: 0, last: None, first: 0 }
    }

    /// Nothing again.
    pub fn clear(&mut self) {
        self.bytes.clear();
        (self.len, self.last) = (0, None);
    }

    /// What was written.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many objects were written.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the first one starts, without which the bytes cannot be read.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Writes what was read of `all` until `rest` was left. Nothing was written before.
    pub fn copy_until(&mut self, all: &Reader<'_>, rest: &Reader<'_>) {
        let (bytes, len) = (all.bytes.len() - rest.bytes.len(), all.left - rest.left);
        self.bytes.extend_from_slice(&all.bytes[..bytes]);
        self.len = len;
        if len > 0 {
            (self.first, self.last) = (all.last.start, Some(rest.last));
        }
    }

    /// Writes all that is left.
    pub fn copy(&mut self, mut rest: Reader<'_>) {
        // What is told by the ones before stays as it is told once they are the same.
        while self.last != Some(rest.last) {
            let Some(entry) = rest.next() else { return };
            self.push(&entry);
        }
        self.bytes.extend_from_slice(rest.bytes);
        self.len += rest.left;
    }

    /// Writes an object that starts behind all others.
    pub fn push(&mut self, entry: &Entry) {
        if self.last.is_none() {
            self.first = entry.start;
        }
        let last = self.last.get_or_insert(Last::new(entry.start));
        let step = entry.start.wrapping_sub(last.start);
        let bytes = &mut self.bytes;
        let at = bytes.len();
        bytes.push(0);
        let mut same = 0;
        let mut told = |is: bool, flag: u8| {
            same |= if is { flag } else { 0 };
            !is
        };
        let in_bytes = !step.is_multiple_of(GRANULE);
        told(in_bytes, flags::IN_BYTES);
        put(bytes, if in_bytes { step } else { step / GRANULE });
        if told(entry.size == last.size, flags::SAME_SIZE) {
            put(bytes, entry.size.into());
        }
        if told(entry.cache == last.cache, flags::SAME_CACHE) {
            put(bytes, entry.cache.into());
        }
        if told(entry.allocated == last.allocated, flags::SAME_ALLOCATED) {
            put(bytes, entry.allocated.bits().into());
        }
        match entry.state {
            State::Live { redzone } => {
                if told(redzone == last.redzone, flags::SAME_STATE) {
                    bytes.push(redzone);
                }
                last.redzone = redzone;
            }
            State::Freed { by, age } => {
                told(true, flags::FREED);
                if told(by == last.by, flags::SAME_STATE) {
                    put(bytes, by.bits().into());
                }
                if told(age == last.age, flags::SAME_AGE) {
                    bytes.push(age);
                }
                (last.by, last.age) = (by, age);
            }
        }
        if let Some(previous) = entry.previous {
            told(true, flags::PREVIOUS);
            put_previous(bytes, previous, entry, last.was_by);
            last.was_by = previous.freed;
        }
        bytes[at] = same;
        (last.start, last.size) = (entry.start, entry.size);
        (last.cache, last.allocated) = (entry.cache, entry.allocated);
        self.len += 1;
    }
}

fn put_previous(
    bytes: &mut Vec<u8>,
    Previous { offset, size, allocated, freed }: Previous,
    entry: &Entry,
    by: Origin,
) {
    let at = bytes.len();
    bytes.push(0);
    let mut same = 0;
    if offset != 0 {
        same |= was::ELSEWHERE;
        let offset = i64::from(offset);
        put(bytes, (offset << 1 ^ offset >> 63).cast_unsigned());
    }
    if size == entry.size {
        same |= was::SAME_SIZE;
    } else {
        put(bytes, size.into());
    }
    if allocated == entry.allocated {
        same |= was::SAME_ALLOCATED;
    } else {
        put(bytes, allocated.bits().into());
    }
    if freed == by {
        same |= was::SAME_FREED;
    } else {
        put(bytes, freed.bits().into());
    }
    bytes[at] = same;
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[inline]
fn byte(bytes: &mut &[u8]) -> Option<u8> {
    let (byte, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(*byte)
}

#[inline]
fn number(bytes: &mut &[u8]) -> Option<u64> {
    // Most numbers are this short.
    if let [first @ ..0x80, rest @ ..] = *bytes {
        *bytes = rest;
        return Some(u64::from(*first));
    }
    if let [first, second @ ..0x80, rest @ ..] = *bytes {
        *bytes = rest;
        return Some(u64::from(first & 0x7f) | u64::from(*second) << 7);
    }
    long_number(bytes)
}

fn long_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let byte = byte(bytes)?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// How far behind the last start, in bytes.
fn step(flags: u8, number: u64) -> u64 {
    if flags & flags::IN_BYTES == 0 { number.wrapping_mul(GRANULE) } else { number }
}

/// Reads what a [`Writer`] wrote; other bytes are read as something, or not at all.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    /// How many objects are left.
    left: usize,
    last: Last,
}

impl<'a> Reader<'a> {
    /// Where the next object starts.
    pub fn next_start(&self) -> Option<u64> {
        let (flags, mut rest) = self.bytes.split_first().filter(|_| self.left > 0)?;
        Some(self.last.start.wrapping_add(step(*flags, number(&mut rest)?)))
    }

    /// Of so many objects, the first of which starts at `first`.
    pub fn new(first: u64, len: usize, bytes: &'a [u8]) -> Self {
        Self { bytes, left: len, last: Last::new(first) }
    }

    fn byte(&mut self) -> Option<u8> {
        byte(&mut self.bytes)
    }

    fn number(&mut self) -> Option<u64> {
        number(&mut self.bytes)
    }

    fn origin(&mut self) -> Option<Origin> {
        Some(Origin::from_bits(self.number()? as u32))
    }

    fn previous(&mut self) -> Option<Previous> {
        let flags = self.byte()?;
        let has = |flag| flags & flag != 0;
        let offset = if has(was::ELSEWHERE) { self.number()? } else { 0 };
        let offset = (offset >> 1).cast_signed() ^ -(offset & 1).cast_signed();
        let size = if has(was::SAME_SIZE) { self.last.size } else { self.number()? as u32 };
        let allocated = if has(was::SAME_ALLOCATED) { self.last.allocated } else { self.origin()? };
        if !has(was::SAME_FREED) {
            self.last.was_by = self.origin()?;
        }
        Some(Previous { offset: offset as i32, size, allocated, freed: self.last.was_by })
    }
}

impl Iterator for Reader<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        self.left = self.left.checked_sub(1)?;
        let flags = self.byte()?;
        let other = |flag| flags & flag == 0;
        self.last.start = self.last.start.wrapping_add(step(flags, self.number()?));
        if other(flags::SAME_SIZE) {
            self.last.size = self.number()? as u32;
        }
        if other(flags::SAME_CACHE) {
            self.last.cache = self.number()? as u16;
        }
        if other(flags::SAME_ALLOCATED) {
            self.last.allocated = self.origin()?;
        }
        let state = if other(flags::FREED) {
            if other(flags::SAME_STATE) {
                self.last.redzone = self.byte()?;
            }
            State::Live { redzone: self.last.redzone }
        } else {
            if other(flags::SAME_STATE) {
                self.last.by = self.origin()?;
            }
            if other(flags::SAME_AGE) {
                self.last.age = self.byte()?;
            }
            State::Freed { by: self.last.by, age: self.last.age }
        };
        let previous = if other(flags::PREVIOUS) { None } else { Some(self.previous()?) };
        let Last { start, size, cache, allocated, .. } = self.last;
        Some(Entry { start, size, cache, allocated, state, previous })
    }
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    fn origin() -> impl Strategy<Value = Origin> {
        let any = prop_oneof![
            Just(0),
            Just(1),
            Just(127),
            Just(128),
            Just(Origin::LOST.bits()),
            0..=Origin::LOST.bits()
        ];
        any.prop_map(Origin::from_bits)
    }

    fn size() -> impl Strategy<Value = u32> {
        prop_oneof![Just(0), Just(127), Just(128), Just(u32::MAX), any::<u32>()]
    }

    /// What may be known of an object.
    pub fn entry(start: impl Strategy<Value = u64>) -> impl Strategy<Value = Entry> {
        let live = prop_oneof![Just(0), any::<u8>()].prop_map(|redzone| State::Live { redzone });
        let freed = (origin(), any::<u8>()).prop_map(|(by, age)| State::Freed { by, age });
        let offset = prop_oneof![Just(0), Just(i32::MIN), Just(i32::MAX), any::<i32>()];
        let previous =
            (offset, size(), origin(), origin()).prop_map(|(offset, size, allocated, freed)| {
                Previous { offset, size, allocated, freed }
            });
        let cache = prop_oneof![Just(0), any::<u16>()];
        (start, size(), cache, origin(), prop_oneof![live, freed], prop::option::of(previous))
            .prop_map(|(start, size, cache, allocated, state, previous)| Entry {
                start,
                size,
                cache,
                allocated,
                state,
                previous,
            })
    }

    fn write(entries: &[Entry]) -> Writer {
        let mut writer = Writer::new(0);
        entries.iter().for_each(|entry| writer.push(entry));
        writer
    }

    fn read(writer: &Writer) -> Vec<Entry> {
        Reader::new(writer.first(), writer.len(), writer.bytes()).collect()
    }

    #[test]
    fn none_takes_more_than_the_most() {
        let lost = Origin::LOST;
        let previous = Previous {
            offset: i32::MIN,
            size: u32::MAX - 1,
            allocated: Origin::from_bits(1 << 21),
            freed: Origin::from_bits(1 << 21),
        };
        let first = Entry::live(0, 0, 0, Origin::NONE, 0).unwrap();
        let state = State::Freed { by: lost, age: 1 };
        let last = Entry {
            start: Entry::LAST_START,
            size: u32::MAX,
            cache: u16::MAX,
            allocated: lost,
            state,
            previous: Some(previous),
        };
        let both = write(&[first, last]);
        assert_eq!(both.bytes().len(), 2 + MOST);
        assert_eq!(read(&both), [first, last]);
    }

    #[test]
    fn objects_like_the_ones_before_take_few_bytes() {
        let like = |i: u64, state| Entry {
            start: 0x1000 + 96 * i,
            size: 64,
            cache: 3,
            allocated: Origin::from_bits(9),
            state,
            previous: None,
        };
        let live: Vec<_> = (0..9).map(|i| like(i, State::Live { redzone: 4 })).collect();
        // The first one in full: flags, distance, size, cache, origin, redzone.
        assert_eq!(write(&live).bytes().len(), 6 + 8 * 2);
        let freed: Vec<_> = (0..9)
            .map(|i| like(i, State::Freed { by: Origin::from_bits(200), age: i as u8 }))
            .collect();
        assert_eq!(write(&freed).bytes().len(), 7 + 8 * 3);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            mut entries in prop::collection::vec(entry(0..=Entry::LAST_START), 0..60),
            near: bool,
        ) {
            if near {
                entries.iter_mut().for_each(|entry| entry.start %= 2000);
            }
            entries.sort_by_key(|entry| entry.start);
            entries.dedup_by_key(|entry| entry.start);
            let writer = write(&entries);
            prop_assert_eq!(writer.len(), entries.len());
            prop_assert!(writer.bytes().len() <= entries.len() * MOST);
            prop_assert_eq!(&read(&writer), &entries);
            // Without one of them the others take no more than all; with another one they take
            // little more.
            for gone in 0..entries.len() {
                let mut others = entries.clone();
                others.remove(gone);
                let without = write(&others).bytes().len();
                prop_assert!(without <= writer.bytes().len());
                prop_assert!(writer.bytes().len() <= without + MOST_MORE);
            }
        }

        #[test]
        fn any_bytes_are_read_as_something(first: u64, bytes: Vec<u8>) {
            prop_assert!(Reader::new(first, 100, &bytes).count() <= 100);
        }
    }
}
