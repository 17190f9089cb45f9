//! The provenance of a run: drains rings into the table of objects and the quarantine.

use umbra_shadow::abi::{Record, RecordBody, Released};

use crate::rings::{Clock, DrainBy, RingError, RingMemory, RingRecord, Rings};
use crate::stacks::Frames;
use crate::{Objects, Quarantine};

/// Finds the key of a range: guest-virtual address and bytes. None if the guest cannot have objects
/// there.
pub type KeyOf<'a> = &'a dyn Fn(u64, u64) -> Option<u64>;

/// An allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The key of its address.
    pub key: u64,
    /// Requested bytes.
    pub size: u64,
    /// Bytes that the allocator took for it: its slot. 0 if they are not known.
    pub slot: u64,
    /// Its cache, 0 for none.
    pub cache: u16,
}

/// On which CPU something happened, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// The guest's number of the CPU.
    pub cpu: u16,
    /// Microseconds since the guest's time stamp counter was 0, if they are known.
    pub micros: Option<u64>,
}

/// Who did something to an object, when, and where in the code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event<'a> {
    /// The guest's task.
    pub task: u32,
    /// CPU and time.
    pub at: Moment,
    /// Return addresses, innermost first.
    pub frames: Frames<'a>,
}

/// How many records of a drain were refused, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusedRecords {
    /// Records that make no sense, or whose address has no key.
    pub senseless: u64,
    /// Frees of memory that was to wait, when the quarantine's queue was full. The guest does not
    /// fetch evicted memory.
    pub queue_full: u64,
}

/// A free of an address inside of a live object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidFree {
    /// The address that was freed.
    pub address: u64,
    /// Its key.
    pub key: u64,
    /// On which CPU, and when.
    pub at: Moment,
    /// The task that did it.
    pub task: u32,
    /// Return addresses, innermost first.
    pub frames: Vec<u64>,
}

/// The outcome of a drain, beside the records that were taken in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Records that were refused.
    pub refused: RefusedRecords,
    /// Frees that were certainly wrong, at most [`INVALID_FREES`].
    pub invalid_frees: Vec<InvalidFree>,
    /// The collector has taken all that it may in one drain.
    pub more: bool,
}

/// Most invalid frees that one drain reports. More are only counted, as unknown frees.
pub const INVALID_FREES: usize = 16;

/// Why a record is refused.
enum RecordError {
    Senseless,
    QueueFull,
}

/// Events so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventCounts {
    /// Allocations.
    pub allocations: u64,
    /// Frees.
    pub frees: u64,
    /// Drains, of all rings at once, but for the collector's.
    pub ring_drains: u64,
    /// Records that the collector took.
    pub collected: u64,
}

/// Who allocated and freed what.
#[derive(Debug)]
pub struct Provenance {
    objects: Objects,
    quarantine: Quarantine,
    rings: Rings,
    counts: EventCounts,
}

impl Provenance {
    /// Keeps history in `objects`, and freed memory in `quarantine`. There are no rings yet.
    pub fn new(objects: Objects, quarantine: Quarantine) -> Self {
        Self { objects, quarantine, rings: Rings::default(), counts: EventCounts::default() }
    }

    /// With stamps of records that `clock` explains. Called before there are rings.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { rings: Rings::new(clock), ..self }
    }

    /// The objects.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The quarantine.
    pub fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// The quarantine, to push to it or to evict from it.
    pub fn quarantine_mut(&mut self) -> &mut Quarantine {
        &mut self.quarantine
    }

    /// The rings.
    pub fn rings(&self) -> &Rings {
        &self.rings
    }

    /// Events so far.
    pub fn counts(&self) -> EventCounts {
        self.counts
    }

    /// Takes all objects out.
    pub fn take_objects(&mut self) -> Objects {
        std::mem::take(&mut self.objects)
    }

    /// Names a cache, and sets the bytes of its object slots.
    pub fn name_cache(&mut self, id: u16, name: &[u8], object_size: u64) {
        self.objects.name_cache(id, name, object_size);
    }

    /// Names a task.
    pub fn name_task(&mut self, task: u32, name: &[u8]) {
        self.objects.name_task(task, name);
    }

    /// Sets up a ring; see [`Rings::set_up`].
    ///
    /// # Errors
    /// The ring is refused.
    pub fn set_up_ring(
        &mut self,
        cpu: u16,
        gpa: u64,
        records: u64,
        text_base: u64,
    ) -> Result<(), RingError> {
        self.rings.set_up(cpu, gpa, records, text_base)
    }

    /// Records an allocation.
    pub fn allocated(&mut self, new: Allocation, by: &Event) {
        self.counts.allocations += 1;
        self.objects.allocated(new, by);
    }

    /// Records a free. Returns false if it is certainly wrong ([`Objects::is_invalid_free`]).
    pub fn freed(&mut self, key: u64, by: &Event) -> bool {
        self.counts.frees += 1;
        self.objects.freed(key, by)
    }

    /// Records that work was queued for the object at `key`.
    pub fn related(&mut self, key: u64, by: &Event) {
        self.objects.related(key, by);
    }

    /// Drains all rings; see [`Rings::drain`].
    pub fn drain(&mut self, by: DrainBy, memory: &dyn RingMemory, key_of: KeyOf<'_>) -> Drained {
        // The records change all other fields.
        let mut rings = std::mem::take(&mut self.rings);
        let mut drained = Drained::default();
        let collects = by == DrainBy::Collector;
        self.counts.ring_drains += u64::from(!rings.is_empty() && !collects);
        let taken = rings.drain(by, memory, |record| match self.take_in(record, key_of) {
            Ok(None) => {}
            Ok(Some(free)) if drained.invalid_frees.len() < INVALID_FREES => {
                drained.invalid_frees.push(free);
            }
            Ok(Some(_)) => {}
            Err(RecordError::Senseless) => drained.refused.senseless += 1,
            Err(RecordError::QueueFull) => drained.refused.queue_full += 1,
        });
        self.rings = rings;
        if collects {
            self.counts.collected += taken.records;
        }
        drained.more = taken.more;
        drained
    }

    /// Applies a record. Returns the free that it is, if that is certainly wrong.
    fn take_in(
        &mut self,
        record: &RingRecord,
        key_of: KeyOf<'_>,
    ) -> Result<Option<InvalidFree>, RecordError> {
        let key_of = |address, bytes| key_of(address, bytes).ok_or(RecordError::Senseless);
        let frames = Frames::Distances { base: record.text_base, words: record.frames() };
        let (mut waits, mut invalid) = (None, None);
        let Record { task, body } = record.decode().map_err(|_| RecordError::Senseless)?;
        let by = Event { task, at: record.at, frames };
        match body {
            RecordBody::Allocated { address, bytes, slot, cache, .. } => {
                let (size, slot) = (u64::from(bytes), u64::from(slot));
                let key = key_of(address, size.max(slot).max(1))?;
                self.allocated(Allocation { key, size, slot, cache }, &by);
            }
            RecordBody::Freed { address, slot, owner, .. } => {
                let key = key_of(address, u64::from(slot).max(1))?;
                if self.freed(key, &by) {
                    waits = owner.map(|owner| Released::new(address, slot, owner));
                } else {
                    // The quarantine must not give it to an allocator: it is no slot.
                    let (at, frames) = (by.at, frames.to_vec());
                    invalid = Some(InvalidFree { address, key, at, task, frames });
                }
            }
            RecordBody::Related { address, .. } => {
                self.related(key_of(address, 1)?, &by);
            }
            RecordBody::Cache { id, object, name } => {
                self.name_cache(id, name, object.into());
            }
            RecordBody::Task { name } => self.name_task(task, name),
        }
        match waits {
            Some(memory) if !self.quarantine.push(memory) => Err(RecordError::QueueFull),
            _ => Ok(invalid),
        }
    }
}

#[cfg(test)]
mod tests {
    use umbra_shadow::abi::{Owner, PackedRecord};

    use super::*;
    use crate::rings::tests::Ram;

    const RING: u64 = 0x10_0000;
    const OWNER: Owner = Owner { allocator: 1, note: 0 };

    /// Writes these records, numbered from 0, to a ring of CPU 0. Their addresses are 0x1000.
    fn with_records(provenance: &mut Provenance, records: &[PackedRecord]) -> Ram {
        let ram = Ram::new();
        provenance.set_up_ring(0, RING, 64, 0).expect("a ring");
        for (i, record) in (0u32..).zip(records) {
            let bytes = record.record(0, 0, 0x1000, i.into()).to_bytes();
            assert!(ram.write(RING + 64 * u64::from(1 + i), &bytes));
        }
        assert!(ram.write(RING, &(records.len() as u64).to_le_bytes()));
        ram
    }

    #[test]
    fn refused_records_are_counted_by_reason() {
        let mut provenance = Provenance::new(Objects::default(), Quarantine::new(1 << 30, 1));
        let free = PackedRecord::quarantined(OWNER, 64);
        let records = [PackedRecord::allocated(0, 64), free, free, PackedRecord::freed()];
        let ram = with_records(&mut provenance, &records);
        // Another CPU has freed as much as the queue holds, all but one, and fetches nothing.
        let other = Released::new(0x2000, 0, OWNER);
        while provenance.quarantine_mut().push(other) {}
        assert_eq!(provenance.quarantine_mut().evict(1, true), [other]);
        let drained = provenance.drain(DrainBy::Cpu(0), &ram, &|va, _| Some(va));
        assert_eq!(drained.refused, RefusedRecords { senseless: 0, queue_full: 1 });
        // The events count all the same.
        assert_eq!((provenance.counts().allocations, provenance.counts().frees), (1, 3));

        let ram = with_records(&mut provenance, &records);
        assert!(ram.write(RING + 64, &[99]));
        let drained = provenance.drain(DrainBy::Cpu(0), &ram, &|_, _| None);
        assert_eq!(drained.refused, RefusedRecords { senseless: 4, queue_full: 0 });
    }

    #[test]
    fn frees_inside_live_objects_are_invalid() {
        let mut provenance = Provenance::new(Objects::default(), Quarantine::new(1 << 30, 1));
        let mut live = |key, size| {
            let new = Allocation { key, size, slot: size, cache: 0 };
            provenance.allocated(new, &Event::default());
        };
        live(0x0fc0, 128);
        let free = PackedRecord::quarantined(OWNER, 64);
        let ram = with_records(&mut provenance, &[free; 2 * INVALID_FREES]);
        let drained = provenance.drain(DrainBy::Cpu(0), &ram, &|va, _| Some(va));
        assert_eq!(drained.refused, RefusedRecords::default());
        assert_eq!(drained.invalid_frees.len(), INVALID_FREES);
        let first = &drained.invalid_frees[0];
        assert_eq!((first.address, first.key, first.at.cpu), (0x1000, 0x1000, 0));
        // None of them is memory that an allocator may get.
        assert_eq!(provenance.quarantine_mut().evict(99, true), []);
        assert_eq!(provenance.objects().counts().unknown_frees, 2 * INVALID_FREES as u64);
        // The object is alive, and can be freed.
        assert!(!provenance.objects().is_invalid_free(0x0fc0));
        provenance.freed(0x0fc0, &Event::default());
        assert!(!provenance.objects().is_invalid_free(0x1000), "freed: the guest's check sees it");
    }

    #[test]
    fn frees_that_may_be_right_are_not_invalid() {
        let mut provenance = Provenance::new(Objects::default(), Quarantine::new(0, 1));
        let pages = Allocation { key: 0x4000, size: 0x4000, slot: 0, cache: 0 };
        provenance.allocated(pages, &Event::default());
        let invalid = |key| provenance.objects().is_invalid_free(key);
        assert!(!invalid(0x4000), "its start");
        assert!(!invalid(0x5000), "a page that was split off");
        assert!(invalid(0x5010));
        assert!(!invalid(0x8000), "behind it");
        assert!(!invalid(0x10), "nothing is known there");

        let limits = crate::ObjectLimits { objects: 0, ..crate::ObjectLimits::of_budget(0) };
        let mut full = Provenance::new(Objects::new(limits), Quarantine::new(0, 1));
        full.allocated(pages, &Event::default());
        assert!(full.objects().counts().dropped > 0);
        assert!(!full.objects().is_invalid_free(0x5010));
    }

    #[test]
    fn a_drain_of_many_rings_counts_once() {
        let mut provenance = Provenance::new(Objects::default(), Quarantine::new(0, 1));
        let drain = |provenance: &mut Provenance, by| {
            let drained = provenance.drain(by, &Ram::new(), &|_, _| None);
            assert_eq!(drained, Drained::default());
            provenance.counts().ring_drains
        };
        assert_eq!(drain(&mut provenance, DrainBy::Vmm), 0, "no rings");
        for cpu in 0..3 {
            provenance.set_up_ring(cpu, u64::from(cpu) * 0x1000, 16, 0).expect("a ring");
        }
        assert_eq!(drain(&mut provenance, DrainBy::Vmm), 1);
        assert_eq!(drain(&mut provenance, DrainBy::Cpu(1)), 2);
    }
}
