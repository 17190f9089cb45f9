//! The rings in which a guest records its allocations and frees.

use umbra_shadow::abi::{RECORD_BYTES, RECORD_FRAMES, RING_MAX_RECORDS, Record};
use vm_memory::GuestAddress;

use crate::hypercall::CallError;
use crate::machine::memory::Ram;

/// Most CPUs that may have a ring.
const CPUS: usize = 64;
/// Most records in all rings: all of them may be drained at one exit.
const RECORDS: u64 = 4 * RING_MAX_RECORDS;

/// One CPU's ring.
#[derive(Clone, Copy, Debug)]
struct Ring {
    gpa: u64,
    records: u64,
    text_base: u64,
}

/// A record, and the return addresses in it.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// What the guest wrote; nothing in it has been checked.
    pub record: Record,
    /// Return addresses, innermost first.
    pub frames: [u64; RECORD_FRAMES],
    /// How many of `frames` are set.
    pub depth: usize,
}

impl Event {
    fn new(record: Record, text_base: u64) -> Self {
        let depth = usize::from(record.depth).min(RECORD_FRAMES);
        let frames = record.frames.map(|f| if f == 0 { 0 } else { text_base.wrapping_add(f.into()) });
        Self { record, frames, depth }
    }
}

/// All rings of a guest.
#[derive(Debug, Default)]
pub struct Rings {
    rings: Vec<Option<Ring>>,
    buffer: Vec<u8>,
}

impl Rings {
    /// Takes note of a ring: a header at `gpa` and `records` records behind it, all of which is RAM (the caller has
    /// checked that).
    ///
    /// # Errors
    /// There are no rings for CPUs with such a number, too many records in all rings, or another ring in that place.
    pub fn set_up(&mut self, cpu: u16, gpa: u64, records: u64, text_base: u64) -> Result<(), CallError> {
        let at = usize::from(cpu);
        if at >= CPUS {
            return Err(CallError::Limit { what: "rings", most: CPUS as u64 });
        }
        let bytes = |records: u64| (records + 1) * RECORD_BYTES;
        let mut all = records;
        let others = self.rings.iter().enumerate().filter(|(other, _)| *other != at);
        for ring in others.filter_map(|(_, ring)| ring.as_ref()) {
            if gpa < ring.gpa + bytes(ring.records) && ring.gpa < gpa + bytes(records) {
                return Err(CallError::Argument { what: "ring address", value: gpa });
            }
            all += ring.records;
        }
        if all > RECORDS {
            return Err(CallError::Limit { what: "records in all rings", most: RECORDS });
        }
        if self.rings.len() <= at {
            self.rings.resize(at + 1, None);
        }
        self.rings[at] = Some(Ring { gpa, records, text_base });
        Ok(())
    }

    /// The CPUs that have a ring.
    pub fn cpus(&self) -> impl Iterator<Item = u16> + use<> {
        let set: Vec<_> = self.rings.iter().map(Option::is_some).collect();
        (0..).zip(set).filter_map(|(cpu, set)| set.then_some(cpu))
    }

    /// Whether a CPU has a ring.
    pub fn has(&self, cpu: u16) -> bool {
        matches!(self.rings.get(usize::from(cpu)), Some(Some(_)))
    }

    /// Takes all records out of a CPU's ring. That CPU must stand still. A CPU without a ring has none.
    pub fn drain(&mut self, cpu: u16, ram: &Ram, mut take: impl FnMut(&Event)) {
        let Some(Some(ring)) = self.rings.get(usize::from(cpu)).copied() else { return };
        let header = GuestAddress(ring.gpa);
        // Copied once, and bounded: the guest may write anything at any time.
        let Ok(count) = ram.read_u64(header) else { return };
        let count = count.min(ring.records) as usize;
        self.buffer.resize(count * RECORD_BYTES as usize, 0);
        if ram.read(GuestAddress(ring.gpa + RECORD_BYTES), &mut self.buffer).is_err() {
            return;
        }
        // It was readable, so it is RAM and can be written.
        let _ = ram.write(header, &0u64.to_le_bytes());
        for bytes in self.buffer.as_chunks::<{ RECORD_BYTES as usize }>().0 {
            take(&Event::new(Record::from_bytes(bytes), ring.text_base));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram_with_ring(count: u64) -> (Ram, Rings) {
        let ram = Ram::new(4 << 20).expect("4 MiB of guest memory");
        let mut rings = Rings::default();
        rings.set_up(1, 0x10_0000, 4, 0xffff_ffff_0000_0000).expect("CPU 1 may have a ring");
        ram.write(GuestAddress(0x10_0000), &count.to_le_bytes()).expect("inside RAM");
        for i in 0..4u8 {
            let mut bytes = [0; 64];
            bytes[0] = i + 1;
            bytes[1] = 255;
            bytes[24..28].copy_from_slice(&0x8010_0000u32.to_le_bytes());
            ram.write(GuestAddress(0x10_0040 + 64 * u64::from(i)), &bytes).expect("inside RAM");
        }
        (ram, rings)
    }

    #[test]
    fn a_drain_takes_what_the_count_says_and_resets_it() {
        let (ram, mut rings) = ram_with_ring(3);
        let mut kinds = Vec::new();
        rings.drain(1, &ram, |event| {
            assert_eq!((event.depth, event.frames[0], event.frames[1]), (10, 0xffff_ffff_8010_0000, 0));
            kinds.push(event.record.kind);
        });
        assert_eq!(kinds, [1, 2, 3]);
        rings.drain(1, &ram, |_| panic!("the ring is empty"));
        rings.drain(0, &ram, |_| panic!("CPU 0 has no ring"));
    }

    #[test]
    fn a_wild_count_is_bounded_by_the_ring() {
        for count in [5, u64::MAX / 64, u64::MAX] {
            let (ram, mut rings) = ram_with_ring(count);
            let mut taken = 0;
            rings.drain(1, &ram, |_| taken += 1);
            assert_eq!(taken, 4, "count {count:#x}");
        }
        assert!(Rings::default().set_up(64, 0, 1, 0).is_err());
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
