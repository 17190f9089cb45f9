//! The rings in which a guest records its allocations and frees: one for each CPU, drained all at
//! once.
//!
//! Each record has a stamp: the CPU's time stamp counter, or a number of a counter that all CPUs
//! share (`umbra_shadow::abi`). A CPU completes a record before its event can affect another CPU: a
//! free is recorded before the memory can be handed out again. So all records that led to a record
//! are in the same drain or in an earlier one, and merging a drain's records by their stamps puts
//! the events of any piece of memory in their true order.
//!
//! A CPU may be stopped anywhere, also between reading its ring's count and storing the
//! incremented one. So only the CPU itself changes that count, and the drain that it asks for.
//! Other drains remember here how far they have read.

use std::cell::Cell;
use std::num::NonZeroU32;
use std::ops::Range;

use thiserror::Error;
use umbra_shadow::abi::{
    BadRecord, RECORD_BYTES, RECORD_FRAMES, RING_MAX_RECORDS, Record, RecordKind,
};
use umbra_shadow::codes::PAGE_SIZE;

use crate::Moment;

/// Most CPUs that may have a ring.
const CPUS: usize = 64;
/// Most records in all rings: all of them may be drained at one exit.
const RECORDS: u64 = 4 * RING_MAX_RECORDS;

/// Guest memory, as far as rings need it.
pub trait RingMemory {
    /// Copies guest memory out. False if not all of it is RAM.
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool;

    /// Copies into guest memory. False, and nothing is written, if not all of it is RAM.
    fn write(&self, gpa: u64, from: &[u8]) -> bool;

    /// Reads a number.
    fn read_u64(&self, gpa: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }
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
    /// A CPU asked for the drain. It is in no record of its own, so its ring is emptied.
    Cpu(u16),
    /// The VMM itself, for a finding or at the end of a run. Any CPU may be inside a record.
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

/// A record of a ring, with its return addresses.
#[derive(Clone, Copy, Debug)]
pub struct RingRecord {
    /// The CPU that wrote it, and when.
    pub at: Moment,
    /// What the guest wrote. The addresses in it have not been checked.
    pub record: Result<Record, BadRecord>,
    /// Return addresses, innermost first.
    pub frames: [u64; RECORD_FRAMES],
    /// How many of `frames` are set.
    pub depth: usize,
}

impl RingRecord {
    fn new(bytes: &RawBytes, ring: &Ring, cpu: u16, clock: &Clock) -> Self {
        let record = Record::decode(bytes);
        let (mut frames, mut depth) = ([0; RECORD_FRAMES], 0);
        if let Some(stack) = record.as_ref().ok().and_then(|record| record.body.stack()) {
            for (to, address) in frames.iter_mut().zip(stack.addresses(ring.text_base)) {
                *to = address;
                depth += 1;
            }
        }
        let at = Moment { cpu, micros: clock.micros(Record::stamp(bytes)) };
        Self { at, record, frames, depth }
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
    fn micros(&self, stamp: u64) -> Option<u64> {
        let khz = u64::from(self.khz?.get());
        // A guest's counter begins with 0, but a host that emulates ring 0 shows it its own.
        let begin = self.begin.get().unwrap_or(if stamp < self.host { 0 } else { self.host });
        self.begin.set(Some(begin));
        let ticks = stamp.saturating_sub(begin);
        Some((ticks / khz).saturating_mul(1000).saturating_add(ticks % khz * 1000 / khz))
    }
}

/// A record in guest memory.
type RawBytes = [u8; RECORD_BYTES as usize];

/// Records that are read at a time: a page of them.
const BLOCK: usize = 64;

/// The records of one ring in a drain, in the order in which they were written.
struct Reader<'a> {
    ring: Ring,
    cpu: u16,
    clock: &'a Clock,
    /// Records drained or in `block`, also in earlier drains; and the number of all records.
    read: u64,
    count: u64,
    block: Vec<u8>,
    /// The next in `block`.
    next: usize,
}

impl<'a> Reader<'a> {
    /// Reads how many records there are and counts all of them as drained. If the ring's CPU asked
    /// for the drain, its ring is emptied. Without new records there is no reader.
    fn new(
        cpu: u16,
        ring: &mut Ring,
        clock: &'a Clock,
        by: DrainBy,
        ram: &dyn RingMemory,
    ) -> Option<Self> {
        // Copied once, and bounded: the guest may have written anything.
        let count = ram.read_u64(ring.gpa)?.min(ring.records);
        // A count that is less than it was is the guest's own doing.
        let read = ring.drained.min(count);
        ring.drained = count;
        if by == DrainBy::Cpu(cpu) {
            ring.drained = 0;
            // It was readable, so it is RAM, and the write succeeds.
            let _ = ram.write(ring.gpa, &0u64.to_le_bytes());
        }
        let mut reader = Self { ring: *ring, cpu, clock, read, count, block: Vec::new(), next: 0 };
        reader.refill(ram).then_some(reader)
    }

    /// Reads the next records; false if there are none.
    fn refill(&mut self, ram: &dyn RingMemory) -> bool {
        let some = (self.count - self.read).min(BLOCK as u64);
        self.block.resize(some as usize * RECORD_BYTES as usize, 0);
        let at = self.ring.gpa + (1 + self.read) * RECORD_BYTES;
        self.read += some;
        self.next = 0;
        some > 0 && ram.read(at, &mut self.block)
    }

    fn bytes(&self) -> &RawBytes {
        const NONE: &RawBytes = &[0; RECORD_BYTES as usize];
        self.block.as_chunks().0.get(self.next).unwrap_or(NONE)
    }

    fn record(&self) -> RingRecord {
        RingRecord::new(self.bytes(), &self.ring, self.cpu, self.clock)
    }

    /// The next record's place among those of all CPUs. A free comes before other records with its
    /// stamp.
    fn order(&self) -> (u64, bool) {
        let bytes = self.bytes();
        (Record::stamp(bytes), bytes[0] != RecordKind::Freed.into())
    }

    /// Whether there is none behind [`Self::record`].
    fn is_last(&self) -> bool {
        (self.next + 1) * RECORD_BYTES as usize == self.block.len() && self.read == self.count
    }

    /// Goes to the next record; false if this was the last.
    fn advance(&mut self, ram: &dyn RingMemory) -> bool {
        self.next += 1;
        self.next * (RECORD_BYTES as usize) < self.block.len() || self.refill(ram)
    }
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

    /// The pages of rings in which there are no records, by guest-physical address. Every CPU
    /// stands still, perhaps in the middle of its next record.
    pub fn unused_pages(&self, ram: &dyn RingMemory) -> impl Iterator<Item = Range<u64>> {
        self.rings.iter().flatten().filter_map(|ring| {
            let count = ram.read_u64(ring.gpa)?.min(ring.records);
            let end = ring.gpa + (1 + ring.records) * RECORD_BYTES;
            let start = (ring.gpa + (2 + count) * RECORD_BYTES).next_multiple_of(PAGE_SIZE);
            let end = end / PAGE_SIZE * PAGE_SIZE;
            (start < end).then_some(start..end)
        })
    }

    /// Drains all rings: passes their new records to `take` in the order of their stamps, each with
    /// whether it is the last of its CPU. Every CPU stands still. If a CPU asked for the drain, its
    /// ring is empty afterwards. Wild stamps only change the order of the guest's own events.
    pub fn drain(
        &mut self,
        by: DrainBy,
        ram: &dyn RingMemory,
        mut take: impl FnMut(&RingRecord, bool),
    ) {
        let clock = &self.clock;
        let rings =
            (0..).zip(&mut self.rings).filter_map(|(cpu, ring)| Some((cpu, ring.as_mut()?)));
        let mut readers: Vec<_> =
            rings.filter_map(|(cpu, ring)| Reader::new(cpu, ring, clock, by, ram)).collect();
        while let Some(first) = (0..readers.len()).min_by_key(|at| readers[*at].order()) {
            // All of one CPU up to the next record of another.
            let others = readers.iter().enumerate().filter(|(at, _)| *at != first);
            let until = others.map(|(_, reader)| reader.order()).min();
            let reader = &mut readers[first];
            let more = loop {
                take(&reader.record(), reader.is_last());
                if !reader.advance(ram) {
                    break false;
                }
                if until.is_some_and(|until| reader.order() > until) {
                    break true;
                }
            };
            if !more {
                readers.remove(first);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;

    use super::*;
    use umbra_shadow::abi::RecordBody;

    /// Address and cache of an allocation.
    fn allocation(record: &RingRecord) -> (u64, u16) {
        match record.record.map(|record| record.body) {
            Ok(RecordBody::Allocated { address, cache, .. }) => (address, cache),
            other => panic!("no allocation: {other:?}"),
        }
    }

    /// 4 MiB of guest memory.
    pub(crate) struct Ram(RefCell<Vec<u8>>);

    impl Ram {
        pub(crate) fn new() -> Self {
            Self(RefCell::new(vec![0; 4 << 20]))
        }
    }

    impl RingMemory for Ram {
        fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
            let ram = self.0.borrow();
            let from = ram.get(gpa as usize..gpa as usize + to.len());
            from.map(|from| to.copy_from_slice(from)).is_some()
        }

        fn write(&self, gpa: u64, from: &[u8]) -> bool {
            let mut ram = self.0.borrow_mut();
            let to = ram.get_mut(gpa as usize..gpa as usize + from.len());
            to.map(|to| to.copy_from_slice(from)).is_some()
        }
    }

    fn ram_with_ring(count: u64) -> (Ram, Rings) {
        let ram = Ram::new();
        let mut rings = Rings::default();
        rings.set_up(1, 0x10_0000, 4, 0xffff_ffff_0000_0000).expect("CPU 1 may have a ring");
        assert!(ram.write(0x10_0000, &count.to_le_bytes()));
        for i in 0..4u8 {
            let mut bytes = [0; 64];
            bytes[0] = RecordKind::Allocated.into();
            bytes[1] = 255;
            bytes[8] = i + 1;
            bytes[28..32].copy_from_slice(&0x8010_0000u32.to_le_bytes());
            assert!(ram.write(0x10_0040 + 64 * u64::from(i), &bytes));
        }
        (ram, rings)
    }

    #[test]
    fn a_drain_takes_what_the_count_says_once() {
        let (ram, mut rings) = ram_with_ring(2);
        let header = 0x10_0000;
        let mut addresses = |by, count: Option<u64>| {
            if let Some(count) = count {
                assert!(ram.write(header, &count.to_le_bytes()));
            }
            let mut addresses = Vec::new();
            rings.drain(by, &ram, |event, _| {
                assert_eq!(
                    (event.depth, event.frames[0], event.frames[1]),
                    (RECORD_FRAMES, 0xffff_ffff_8010_0000, 0)
                );
                addresses.push(allocation(event).0);
            });
            (addresses, ram.read_u64(header).expect("inside RAM"))
        };
        // Its CPU may be about to write the third record: the count stays as it is.
        assert_eq!(addresses(DrainBy::Vmm, None), (vec![1, 2], 2));
        assert_eq!(addresses(DrainBy::Cpu(0), None), (vec![], 2), "another CPU asks");
        assert_eq!(addresses(DrainBy::Vmm, Some(3)), (vec![3], 3));
        // Its own CPU starts anew.
        assert_eq!(addresses(DrainBy::Cpu(1), Some(4)), (vec![4], 0));
        assert_eq!(addresses(DrainBy::Vmm, Some(1)), (vec![1], 1));
        assert_eq!(addresses(DrainBy::Cpu(1), None), (vec![], 0));
        // Nonsense.
        assert_eq!(addresses(DrainBy::Vmm, Some(3)).0, [1, 2, 3]);
        assert!(addresses(DrainBy::Vmm, Some(1)).0.is_empty());
        assert_eq!(addresses(DrainBy::Vmm, Some(2)).0, [2]);
    }

    #[test]
    fn pages_without_records_are_found() {
        let ram = Ram::new();
        let mut rings = Rings::default();
        // Three pages and a half, and one that fills less than a page.
        rings.set_up(0, 0x10_0000, 223, 0).expect("a ring");
        rings.set_up(1, 0x20_0000, 62, 0).expect("a ring");
        for (count, pages) in [
            (0, Some(0x10_1000..0x10_3000)),
            // The header, 62 records, and the one that may be half written.
            (62, Some(0x10_1000..0x10_3000)),
            (63, Some(0x10_2000..0x10_3000)),
            (126, Some(0x10_2000..0x10_3000)),
            (127, None),
            (u64::MAX, None),
        ] {
            assert!(ram.write(0x10_0000, &u64::to_le_bytes(count)));
            assert_eq!(rings.unused_pages(&ram).next(), pages, "{count}");
        }
    }

    #[test]
    fn a_wild_count_is_bounded_by_the_ring() {
        for count in [5, u64::MAX / 64, u64::MAX] {
            let (ram, mut rings) = ram_with_ring(count);
            let mut taken = 0;
            rings.drain(DrainBy::Vmm, &ram, |_, _| taken += 1);
            assert_eq!(taken, 4, "count {count:#x}");
        }
        assert!(Rings::default().set_up(64, 0, 1, 0).is_err());
    }

    /// Writes records with these stamps; each is identified by CPU and stamp.
    fn fill(ram: &Ram, cpu: u16, gpa: u64, stamps: &[u64]) {
        for (i, stamp) in stamps.iter().enumerate() {
            let mut bytes = [0; 64];
            bytes[0] = RecordKind::Allocated.into();
            bytes[2..4].copy_from_slice(&cpu.to_le_bytes());
            bytes[20..28].copy_from_slice(&stamp.to_le_bytes());
            assert!(ram.write(gpa + 64 * (1 + i as u64), &bytes));
        }
        assert!(ram.write(gpa, &(stamps.len() as u64).to_le_bytes()));
    }

    #[test]
    fn events_of_all_cpus_come_in_the_order_of_their_stamps() {
        let ram = Ram::new();
        // A time is a stamp.
        let mut rings = Rings::new(Clock::tsc(1000, u64::MAX));
        let ring = |cpu: u16| 0x10_0000 + u64::from(cpu) * 0x4_0000;
        for cpu in 0..3 {
            rings.set_up(cpu, ring(cpu), 1000, 0).expect("a ring for each");
        }
        let mut drain = |stamps: [&[u64]; 3]| {
            for (cpu, stamps) in (0u16..).zip(stamps) {
                fill(&ram, cpu, ring(cpu), stamps);
            }
            let mut taken = Vec::new();
            for by in [DrainBy::Vmm, DrainBy::Cpu(0), DrainBy::Cpu(1), DrainBy::Cpu(2)] {
                let mut last = [false; 3];
                rings.drain(by, &ram, |event, is_last| {
                    let last = &mut last[usize::from(event.at.cpu)];
                    assert!(!std::mem::replace(last, is_last), "once, at the end");
                    taken.push((allocation(event).1, event.at.micros.unwrap_or_default()));
                });
            }
            taken
        };
        assert_eq!(drain([&[1, 4], &[], &[2, 3, 5]]), [(0, 1), (2, 2), (2, 3), (0, 4), (2, 5)]);
        // More than are read at a time; one that was written late comes first.
        let [even, odd] = [0, 1].map(|from| (from + 6..500).step_by(2).collect::<Vec<u64>>());
        let taken = drain([&even, &[4], &odd]);
        assert_eq!(taken[0], (1, 4));
        assert!(taken[1..].iter().map(|t| t.1).eq(6..500));
        // Stamps that make no sense cost nobody a record.
        assert_eq!(drain([&[9, 9, 1 << 63, 0], &[7, u64::MAX, 7], &[0; 70]]).len(), 77);
    }

    #[test]
    fn a_free_comes_before_an_allocation_with_its_stamp() {
        let ram = Ram::new();
        let mut rings = Rings::new(Clock::tsc(2_000_000, 1 << 40));
        for (cpu, kind) in [(0, RecordKind::Allocated), (1, RecordKind::Freed)] {
            let gpa = 0x10_0000 + 0x1000 * u64::from(cpu);
            rings.set_up(cpu, gpa, 4, 0).expect("a ring");
            fill(&ram, cpu, gpa, &[3_000_000_000]);
            assert!(ram.write(gpa + 64, &[kind.into()]));
        }
        let mut taken = Vec::new();
        rings.drain(DrainBy::Vmm, &ram, |event, _| taken.push(event.at));
        assert_eq!(taken, [1, 0].map(|cpu| Moment { cpu, micros: Some(1_500_000) }));
    }

    #[test]
    fn stamps_are_times_if_they_are_time_stamp_counters() {
        for (khz, stamp, micros) in [
            (1_000_000, 0, Some(0)),
            (1_000_000, 1_234_567_890, Some(1_234_567)),
            (3_700_000, 3_700_000_000_000, Some(1_000_000_000)),
            (u32::MAX, u64::MAX, Some(4_294_967_296_999)),
            (1, u64::MAX, Some(u64::MAX)),
            (0, 5, None),
        ] {
            assert_eq!(Clock::tsc(khz, u64::MAX).micros(stamp.min(u64::MAX - 1)), micros);
        }
        // The host's own, which began before the run.
        let clock = Clock::tsc(1_000, 5_000);
        assert_eq!(
            [6_000, 4_000, 7_500].map(|stamp| clock.micros(stamp)),
            [1000, 0, 2500].map(Some)
        );
        // The guest's own, which outlives what the host's was then.
        let clock = Clock::tsc(1_000, 5_000);
        assert_eq!([4_000, 6_000].map(|stamp| clock.micros(stamp)), [4000, 6000].map(Some));
    }

    #[test]
    fn rings_do_not_overlap_and_hold_so_much_in_all() {
        let mut rings = Rings::default();
        assert!(rings.set_up(0, 0x10_0000, 3, 0).is_ok());
        assert!(rings.set_up(1, 0x10_00c0, 3, 0).is_err(), "its header is the other's last record");
        assert!(rings.set_up(1, 0x10_0100, 3, 0).is_ok());
        assert!(rings.set_up(1, 0x10_0140, 3, 0).is_ok(), "the CPU's own, in another place");
        for cpu in 2..5 {
            let gpa = u64::from(cpu) * 0x100_0000;
            assert!(rings.set_up(cpu, gpa, RING_MAX_RECORDS, 0).is_ok());
        }
        assert!(rings.set_up(5, 0x500_0000, RING_MAX_RECORDS, 0).is_err());
        assert!(rings.set_up(5, 0x500_0000, RING_MAX_RECORDS - 6, 0).is_ok());
        assert!(rings.has(5) && !rings.has(6));
    }
}
