//! The rings in which a guest records its allocations and frees: one for each CPU, drained all at
//! once.
//!
//! Each record has a stamp: the CPU's time stamp counter, or a number of a counter that all CPUs
//! share (`umbra_shadow::abi`). A CPU completes a record before its event can affect another CPU: a
//! free is recorded before the memory can be handed out again. So merging a drain's records by
//! their stamps puts the events of any piece of memory in their true order, if all records that led
//! to one of them are in this drain or in an earlier one.
//!
//! **Other CPUs run meanwhile.** A drain that a CPU asks for looks at all rings twice. The first
//! time it finds the latest stamp; the second time it takes what is there up to that stamp. What
//! led to such a record was complete before the record got its stamp, so before the first look, and
//! the second one sees it. What was complete when the CPU asked is taken, too. The collector, which
//! drains while all CPUs run, does the same.
//!
//! An NMI in the middle of a record is the exception: its own records become visible with the one
//! that it interrupted, whose stamp is later.
//!
//! A CPU may be anywhere, also between reading its ring's count and storing the incremented one. So
//! only the CPU itself changes that count, and the drain that it asks for. Other drains remember
//! here how far they have read. A CPU whose ring is full waits in its own request, so no record is
//! overwritten while it is read.

use std::cell::Cell;
use std::num::NonZeroU32;
use std::ops::Range;

use thiserror::Error;
use umbra_shadow::abi::{
    self, BadRecord, RECORD_BYTES, RING_MAX_RECORDS, RING_SPARE, Record, RecordKind,
};
use umbra_shadow::codes::PAGE_SIZE;

use crate::Moment;

/// Most CPUs that may have a ring.
const CPUS: usize = 64;
/// Most records in all rings: all of them may be drained at one exit.
const RECORDS: u64 = 4 * RING_MAX_RECORDS;
/// Most records of a drain by the collector: a CPU that makes an exit meanwhile waits for it.
pub const COLLECTED: u64 = 512;

/// Guest memory, as far as rings need it.
pub trait RingMemory {
    /// Copies guest memory out. False if not all of it is RAM.
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool;

    /// Copies into guest memory. False, and nothing is written, if not all of it is RAM.
    fn write(&self, gpa: u64, from: &[u8]) -> bool;

    /// Loads the number at `gpa`, a multiple of 8. What its writer wrote before it, later reads see
    /// (acquire). None if it is not RAM.
    fn load(&self, gpa: u64) -> Option<u64>;
}

/// Why there is no ring in a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// A table is full.
    #[error("more than {max} {what}")]
    Limit {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        max: u64,
    },
    /// Another CPU's ring is there.
    #[error("another ring is at guest-physical {gpa:#x}")]
    Overlap {
        /// The start of the new one.
        gpa: u64,
    },
}

/// Who drains the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainBy {
    /// A CPU asked for the drain. It is in no record of its own, so its ring is emptied. The others
    /// may run.
    Cpu(u16),
    /// The VMM's collector, while all CPUs may run. It takes at most [`COLLECTED`] records.
    Collector,
    /// The VMM itself, for a finding or at the end of a run. Every CPU stands still, perhaps inside
    /// a record.
    Vmm,
}

/// One CPU's ring.
#[derive(Clone, Copy, Debug)]
struct Ring {
    gpa: u64,
    records: u64,
    text_base: u64,
    /// Records that were already drained.
    drained: u64,
}

impl Ring {
    /// How many records there are, at most as many as there is room for: the guest may have written
    /// anything. They are complete.
    fn count(&self, ram: &dyn RingMemory) -> Option<u64> {
        // Its CPU wrote them before the count.
        Some(ram.load(self.gpa)?.min(self.records))
    }

    /// Where a record is, counted from the first.
    fn at(&self, record: u64) -> u64 {
        self.gpa + (1 + record) * RECORD_BYTES
    }

    /// The stamp of the latest record, if there is one that was not drained.
    fn latest_stamp(&self, ram: &dyn RingMemory) -> Option<u64> {
        let last = self.count(ram)?.checked_sub(1).filter(|last| *last >= self.drained)?;
        let mut bytes = [0; RECORD_BYTES as usize];
        ram.read(self.at(last), &mut bytes).then(|| Record::stamp(&bytes))
    }
}

/// A record of a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingRecord<'a> {
    /// The CPU that wrote it, and when.
    pub at: Moment,
    /// The base of its return addresses.
    pub text_base: u64,
    bytes: &'a RawBytes,
}

impl<'a> RingRecord<'a> {
    /// What the guest wrote. The addresses in it have not been checked.
    ///
    /// # Errors
    /// It makes no sense.
    #[inline]
    pub fn decode(&self) -> Result<Record<'a>, BadRecord> {
        Record::decode(self.bytes)
    }

    /// Its return addresses, innermost first, as distances from the text base, if it is one of an
    /// event; 0 is one that is not known.
    #[inline]
    pub fn frames(&self) -> &'a [[u8; 4]] {
        abi::record_frames(self.bytes)
    }
}

/// What stamps say about time.
#[derive(Debug, Default)]
pub struct Clock {
    /// Ticks of a millisecond, if they are the guest's time stamp counters. Else they are numbers.
    khz: Option<NonZeroU32>,
    /// The host's own counter when the run began.
    host: u64,
    /// The guest's counter when the run began, once there is a stamp.
    begin: Cell<Option<u64>>,
}

impl Clock {
    /// That of time stamp counters of so many kHz, or none if that is 0. The host's counter is
    /// `host` when the run begins.
    pub fn tsc(khz: u32, host: u64) -> Self {
        Self { khz: NonZeroU32::new(khz), host, begin: Cell::new(None) }
    }

    /// Microseconds since the run began.
    #[inline]
    fn micros(&self, stamp: u64) -> Option<u64> {
        let khz = u64::from(self.khz?.get());
        let begin = self.begin.get().unwrap_or_else(|| {
            // A guest's counter begins with 0, but a host that emulates ring 0 shows it its own.
            let begin = if stamp < self.host { 0 } else { self.host };
            self.begin.set(Some(begin));
            begin
        });
        let ticks = stamp.saturating_sub(begin);
        Some((ticks / khz).saturating_mul(1000).saturating_add(ticks % khz * 1000 / khz))
    }
}

/// A record in guest memory.
type RawBytes = [u8; RECORD_BYTES as usize];

/// Bytes of a ring's header that a drain by its CPU sets to 0: `count` and `claimed`.
const EMPTIED: usize = 16;

/// Where `claimed` is in the header.
const CLAIMED: u64 = 8;

/// Records that are read at a time: a page of them.
const BLOCK: usize = 64;

/// The records of one ring in a drain, in the order in which they were written.
struct Reader<'a> {
    ring: &'a mut Ring,
    cpu: u16,
    clock: &'a Clock,
    /// The CPU asked for the drain: its ring is empty already.
    emptied: bool,
    /// Records drained or in `block`, also in earlier drains; and the number of all records.
    read: u64,
    count: u64,
    block: Vec<u8>,
    /// The next in `block`.
    next: usize,
}

impl<'a> Reader<'a> {
    /// Reads how many records there are. If the ring's CPU asked for the drain, its ring is
    /// emptied. Without new records there is no reader.
    fn new(
        cpu: u16,
        ring: &'a mut Ring,
        clock: &'a Clock,
        by: DrainBy,
        ram: &dyn RingMemory,
    ) -> Option<Self> {
        let count = ring.count(ram)?;
        // A count that is less than it was is the guest's own doing.
        let read = ring.drained.min(count);
        ring.drained = read;
        let emptied = by == DrainBy::Cpu(cpu);
        if emptied {
            ring.drained = 0;
            // It was readable, so it is RAM, and the write succeeds.
            let _ = ram.write(ring.gpa, &[0; EMPTIED]);
        }
        let mut reader = Self { ring, cpu, clock, emptied, read, count, block: vec![], next: 0 };
        reader.refill(ram).then_some(reader)
    }

    /// Reads the next records; false if there are none.
    fn refill(&mut self, ram: &dyn RingMemory) -> bool {
        let some = (self.count - self.read).min(BLOCK as u64);
        self.block.resize(some as usize * RECORD_BYTES as usize, 0);
        let at = self.ring.at(self.read);
        self.read += some;
        self.next = 0;
        some > 0 && ram.read(at, &mut self.block)
    }

    /// The next record's place among those of all CPUs.
    fn order(&self) -> Order {
        self.block.as_chunks().0.get(self.next).map_or(LAST, order)
    }

    /// Passes records to `take` until one is not before `until`, or later than `latest`, or `left`
    /// were taken. A ring that is emptied is taken as a whole.
    #[inline]
    fn take_until(
        &mut self,
        until: Order,
        latest: u64,
        left: &mut u64,
        ram: &dyn RingMemory,
        take: &mut impl FnMut(&RingRecord),
    ) -> Stopped {
        let latest = if self.emptied { u64::MAX } else { latest };
        let text_base = self.ring.text_base;
        loop {
            let block = self.block.as_chunks().0;
            let first = self.next;
            let mut stopped = None;
            for bytes in block.get(first..).unwrap_or_default() {
                let stamp = Record::stamp(bytes);
                if stamp > latest {
                    stopped = Some(Stopped::AtEnd);
                } else if order(bytes) > until {
                    stopped = Some(Stopped::AtOther);
                } else if *left == 0 {
                    stopped = Some(Stopped::Full);
                }
                if stopped.is_some() {
                    break;
                }
                *left -= 1;
                self.next += 1;
                let at = Moment { cpu: self.cpu, micros: self.clock.micros(stamp) };
                take(&RingRecord { at, text_base, bytes });
            }
            if !self.emptied {
                self.ring.drained += (self.next - first) as u64;
            }
            match stopped {
                Some(stopped) => return stopped,
                None if !self.refill(ram) => return Stopped::AtEnd,
                None => {}
            }
        }
    }
}

/// A record's place among those of all CPUs: its stamp, and a free comes before other records with
/// that stamp.
type Order = (u64, bool);

/// Behind all others.
const LAST: Order = (u64::MAX, true);

#[inline]
fn order(bytes: &RawBytes) -> Order {
    (Record::stamp(bytes), bytes[0] != RecordKind::Freed.into())
}

/// What a drain has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// How many records.
    pub records: u64,
    /// These were all that the collector may take in one drain.
    pub more: bool,
}

/// Why [`Reader::take_until`] stopped.
enum Stopped {
    /// The next record is one of another CPU.
    AtOther,
    /// There is no more in this drain.
    AtEnd,
    /// As many were taken as may be.
    Full,
}

/// All rings of a guest.
#[derive(Debug, Default)]
pub struct Rings {
    rings: Vec<Option<Ring>>,
    clock: Clock,
}

impl Rings {
    /// No rings yet; `clock` says what their stamps mean.
    pub fn new(clock: Clock) -> Self {
        Self { rings: Vec::new(), clock }
    }

    /// Sets up a CPU's ring: a header at `gpa` and `records` records behind it, all of which is RAM
    /// (the caller has checked that).
    ///
    /// # Errors
    /// There are no rings for CPUs with such a number, too many records in all rings, or another
    /// ring in that place.
    pub fn set_up(
        &mut self,
        cpu: u16,
        gpa: u64,
        records: u64,
        text_base: u64,
    ) -> Result<(), RingError> {
        let at = usize::from(cpu);
        if at >= CPUS {
            return Err(RingError::Limit { what: "rings", max: CPUS as u64 });
        }
        let bytes = |records: u64| (records + 1) * RECORD_BYTES;
        let mut all = records;
        let others = self.rings.iter().enumerate().filter(|(other, _)| *other != at);
        for ring in others.filter_map(|(_, ring)| ring.as_ref()) {
            if gpa < ring.gpa + bytes(ring.records) && ring.gpa < gpa + bytes(records) {
                return Err(RingError::Overlap { gpa });
            }
            all += ring.records;
        }
        if all > RECORDS {
            return Err(RingError::Limit { what: "records in all rings", max: RECORDS });
        }
        if self.rings.len() <= at {
            self.rings.resize(at + 1, None);
        }
        self.rings[at] = Some(Ring { gpa, records, text_base, drained: 0 });
        Ok(())
    }

    /// Whether no CPU has a ring.
    pub fn is_empty(&self) -> bool {
        self.rings.is_empty()
    }

    /// Whether a CPU has a ring.
    pub fn has(&self, cpu: u16) -> bool {
        matches!(self.rings.get(usize::from(cpu)), Some(Some(_)))
    }

    /// The pages of rings in which there are no records, by guest-physical address. While every CPU
    /// stands still, perhaps in the middle of its next records, they stay so.
    pub fn unused_pages(&self, ram: &dyn RingMemory) -> impl Iterator<Item = Range<u64>> {
        self.rings.iter().flatten().filter_map(|ring| {
            let count = ring.count(ram)?;
            let end = ring.at(ring.records);
            // Behind the records that it may be in the middle of: those of NMIs may be many.
            let claimed = ram.load(ring.gpa + CLAIMED)?.min(ring.records);
            let begun = claimed.max(count + 1) + RING_SPARE;
            let start = ring.at(begun).next_multiple_of(PAGE_SIZE);
            let end = end / PAGE_SIZE * PAGE_SIZE;
            (start < end).then_some(start..end)
        })
    }

    /// Drains all rings: passes their new records to `take` in the order of their stamps. If a
    /// CPU asked for the drain, its ring is empty afterwards; later records of the others wait for
    /// the next drain. Wild stamps only change the order of the guest's own events.
    pub fn drain(
        &mut self,
        by: DrainBy,
        ram: &dyn RingMemory,
        mut take: impl FnMut(&RingRecord),
    ) -> Taken {
        let rings = self.rings.iter().flatten();
        let latest = match by {
            DrainBy::Cpu(_) | DrainBy::Collector => {
                rings.filter_map(|ring| ring.latest_stamp(ram)).max().unwrap_or(0)
            }
            DrainBy::Vmm => u64::MAX,
        };
        let most = if by == DrainBy::Collector { COLLECTED } else { u64::MAX };
        let (mut left, mut more) = (most, false);
        let clock = &self.clock;
        let rings =
            (0..).zip(&mut self.rings).filter_map(|(cpu, ring)| Some((cpu, ring.as_mut()?)));
        let mut readers: Vec<_> =
            rings.filter_map(|(cpu, ring)| Reader::new(cpu, ring, clock, by, ram)).collect();
        while let Some(first) = (0..readers.len()).min_by_key(|at| readers[*at].order()) {
            // All of one CPU up to the next record of another.
            let others = readers.iter().enumerate().filter(|(at, _)| *at != first);
            let until = others.map(|(_, reader)| reader.order()).min().unwrap_or(LAST);
            match readers[first].take_until(until, latest, &mut left, ram, &mut take) {
                Stopped::AtOther => {}
                Stopped::AtEnd => drop(readers.remove(first)),
                // All up to here came in their order, so this is as good an end as any.
                Stopped::Full => {
                    more = true;
                    break;
                }
            }
        }
        Taken { records: most - left, more }
    }
}

#[cfg(test)]
pub(crate) mod tests;
