//! The bytes of a DWARF section, with a limit on the work on them.
//!
//! gimli and addr2line refuse malformed input, but a well-formed file of a few kilobytes can still
//! ask for unbounded time, memory or recursion: thousands of units that share one line table,
//! abbreviations with endless empty attributes, inlined functions nested a million deep. So each
//! read is charged to a budget that grows with the file, a lookup has a deadline, and reads fail
//! once too much of the stack is used.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gimli::{Error, LittleEndian, ReaderOffsetId};

use super::contents::Blocks;

/// Charged reads of every file's budget, beside [`READS_PER_BYTE`].
const READS_BASE: u64 = 1 << 20;
/// Charged reads for each byte of the file. To look up every function of a program takes about a
/// quarter.
const READS_PER_BYTE: u64 = 2;
/// Most charged reads of a file.
const READS_MAX: u64 = 256 << 20;
/// Bytes of a string that count as one read.
const STRING_BYTES_PER_READ: usize = 4;
/// Bytes searched for a string's end that count as one read.
const SEARCH_BYTES_PER_READ: usize = 64;
/// Stack that one lookup may use. addr2line takes some hundred bytes for each level of inlining.
const STACK_MAX: usize = 512 << 10;
/// Reads between two looks at the clock.
const READS_PER_TICK: u64 = 256;

/// State that all readers of a file share.
pub(super) struct Limits {
    file: Arc<Blocks>,
    reads: u64,
    reads_left: AtomicU64,
    /// An address on the stack of the function that began the lookup.
    stack: AtomicUsize,
    epoch: Instant,
    /// Nanoseconds after `epoch` at which the lookup must be done.
    deadline: AtomicU64,
    /// A part of the file could not be read.
    unreadable: AtomicBool,
}

impl Limits {
    pub(super) fn new(file: Arc<Blocks>) -> Self {
        let reads = (file.len() as u64).saturating_mul(READS_PER_BYTE).saturating_add(READS_BASE);
        let reads = reads.min(READS_MAX);
        Self {
            file,
            reads,
            reads_left: AtomicU64::new(reads),
            stack: AtomicUsize::new(0),
            epoch: Instant::now(),
            deadline: AtomicU64::new(0),
            unreadable: AtomicBool::new(false),
        }
    }

    /// Begins a lookup: its limits of time and stack count from here.
    pub(super) fn start(&self, time: Duration) {
        let marker = 0u8;
        self.stack.store((&raw const marker).addr(), Relaxed);
        self.deadline.store(nanoseconds(self.epoch.elapsed().saturating_add(time)), Relaxed);
    }

    /// Whether the budget of the file is used up, or a lookup took too long: then no read works any
    /// more.
    pub(super) fn exhausted(&self) -> bool {
        self.reads_left.load(Relaxed) == 0
    }

    /// Whether more than half of the file's budget is left.
    pub(super) fn plenty(&self) -> bool {
        self.reads_left.load(Relaxed) > self.reads / 2
    }

    /// Whether the file, or a part of it, could not be read.
    pub(super) fn unreadable(&self) -> bool {
        self.unreadable.load(Relaxed)
    }

    /// Reads a range that is in the file.
    fn read(&self, range: Range<usize>, part: impl FnMut(&[u8]) -> bool) -> Result<(), Error> {
        self.file.read(range, part).map_err(|_| {
            self.unreadable.store(true, Relaxed);
            Error::Io
        })
    }

    fn charge(&self, reads: usize) -> Result<(), Error> {
        let marker = 0u8;
        if (&raw const marker).addr().abs_diff(self.stack.load(Relaxed)) > STACK_MAX {
            return Err(Error::Io);
        }
        let left = self.reads_left.load(Relaxed);
        let mut next = left.saturating_sub(reads as u64);
        if left / READS_PER_TICK != next / READS_PER_TICK
            && nanoseconds(self.epoch.elapsed()) > self.deadline.load(Relaxed)
        {
            next = 0;
        }
        self.reads_left.store(next, Relaxed);
        if next == 0 { Err(Error::Io) } else { Ok(()) }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A part of the file.
#[derive(Clone)]
pub(super) struct Reader {
    limits: Arc<Limits>,
    start: usize,
    end: usize,
}

impl Reader {
    /// The bytes of the file at `range`; none where that reaches out of it.
    pub(super) fn new(limits: &Arc<Limits>, range: Range<usize>) -> Self {
        let inside = range.start <= range.end && range.end <= limits.file.len();
        let Range { start, end } = if inside { range } else { 0..0 };
        Self { limits: limits.clone(), start, end }
    }

    /// All its bytes.
    fn bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(self.end - self.start);
        let take = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            true
        };
        self.limits.read(self.start..self.end, take)?;
        Ok(bytes)
    }

    /// The position `len` bytes further on.
    fn ahead(&self, len: usize) -> Result<usize, Error> {
        let at = self.start.checked_add(len).filter(|at| *at <= self.end);
        at.ok_or_else(|| Error::UnexpectedEof(gimli::Reader::offset_id(self)))
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({:?})", self.start..self.end)
    }
}

impl gimli::Reader for Reader {
    type Endian = LittleEndian;
    type Offset = usize;

    fn endian(&self) -> LittleEndian {
        LittleEndian
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    fn empty(&mut self) {
        self.end = self.start;
    }

    fn truncate(&mut self, len: usize) -> Result<(), Error> {
        self.end = self.ahead(len)?;
        Ok(())
    }

    fn offset_from(&self, base: &Self) -> usize {
        self.start.saturating_sub(base.start)
    }

    fn offset_id(&self) -> ReaderOffsetId {
        ReaderOffsetId(self.start as u64)
    }

    fn lookup_offset_id(&self, id: ReaderOffsetId) -> Option<usize> {
        let at = usize::try_from(id.0).ok()?;
        (self.start..=self.end).contains(&at).then(|| at - self.start)
    }

    fn find(&self, byte: u8) -> Result<usize, Error> {
        let (mut searched, mut found) = (0, false);
        let mut charged = Ok(());
        self.limits.read(self.start..self.end, |piece| {
            let at = piece.iter().position(|b| *b == byte);
            let len = at.unwrap_or(piece.len());
            charged = self.limits.charge(1 + len / SEARCH_BYTES_PER_READ);
            searched += len;
            found = at.is_some();
            !found && charged.is_ok()
        })?;
        charged?;
        if found { Ok(searched) } else { Err(Error::UnexpectedEof(self.offset_id())) }
    }

    fn skip(&mut self, len: usize) -> Result<(), Error> {
        self.limits.charge(1)?;
        self.start = self.ahead(len)?;
        Ok(())
    }

    fn split(&mut self, len: usize) -> Result<Self, Error> {
        self.limits.charge(1)?;
        let end = self.ahead(len)?;
        let first = Self { limits: self.limits.clone(), start: self.start, end };
        self.start = end;
        Ok(first)
    }

    fn to_slice(&self) -> Result<Cow<'_, [u8]>, Error> {
        self.limits.charge(1 + self.len() / STRING_BYTES_PER_READ)?;
        Ok(self.bytes()?.into())
    }

    fn to_string(&self) -> Result<Cow<'_, str>, Error> {
        self.limits.charge(1 + self.len() / STRING_BYTES_PER_READ)?;
        String::from_utf8(self.bytes()?).map(Cow::from).map_err(|_| Error::BadUtf8)
    }

    fn to_string_lossy(&self) -> Result<Cow<'_, str>, Error> {
        self.limits.charge(1 + self.len() / STRING_BYTES_PER_READ)?;
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned().into())
    }

    fn read_slice(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        self.limits.charge(1)?;
        let next = self.ahead(buffer.len())?;
        let mut at = 0;
        self.limits.read(self.start..next, |piece| {
            let part = buffer.get_mut(at..at + piece.len());
            at += piece.len();
            part.map(|part| part.copy_from_slice(piece)).is_some()
        })?;
        self.start = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use gimli::Reader as _;

    use super::*;

    fn reader(bytes: usize, time: Duration) -> Reader {
        let file = Blocks::new(Arc::new(vec![7; bytes].into()));
        let limits = Arc::new(Limits::new(Arc::new(file)));
        limits.start(time);
        Reader::new(&limits, 0..bytes)
    }

    #[test]
    fn reads_what_is_there_and_no_more() {
        let mut reader = reader(10, Duration::MAX);
        assert_eq!(reader.read_u16(), Ok(0x0707));
        let mut head = reader.split(3).unwrap();
        assert_eq!((head.len(), reader.len(), reader.offset_from(&head)), (3, 5, 3));
        assert!(head.read_u32().is_err() && head.skip(4).is_err() && head.truncate(4).is_err());
        assert!(head.skip(usize::MAX).is_err() && head.find(1).is_err());
        assert_eq!((head.skip(3), head.read_u8().is_err()), (Ok(()), true));
        assert_eq!(Reader::new(&reader.limits, 5..11).len(), 0);
    }

    #[test]
    fn work_ends_with_the_budget_or_the_time() {
        let reads = |reader: Reader| (0..u64::MAX).find(|_| reader.clone().read_u8().is_err());
        let budget = READS_BASE + READS_PER_BYTE * 8;
        assert_eq!(reads(reader(8, Duration::MAX)), Some(budget - 1));
        let late = reader(8, Duration::ZERO);
        assert!(reads(late.clone()).is_some_and(|reads| reads <= READS_PER_TICK));
        late.limits.start(Duration::MAX);
        assert!(late.limits.exhausted() && late.clone().read_u8().is_err(), "it works no more");
    }
}
