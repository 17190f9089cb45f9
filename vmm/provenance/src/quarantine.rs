//! The quarantine: freed memory waits before it returns to the guest's allocators, oldest first.
//!
//! The queue is in the VMM and not in the guest: the VMM sees each free anyway, and no wild write
//! of the guest can break the queue. When a drain says that objects are to be evicted, the guest
//! fetches their list (`guest/runtime/src/quarantine.rs`).
//!
//! Its size is bounded by what a guest can free between two drains, and by [`MAX_OBJECTS`]. A
//! hostile guest can only harm its own allocators.

use std::collections::VecDeque;

use umbra_shadow::abi::{RING_MAX_RECORDS, Released};

/// Default size, as a share of guest memory: as in KASAN (`mm/kasan/quarantine.c`).
const SHARE: u64 = 32;
/// Most bytes that a CPU frees between two drains: as KASAN's queue of a CPU.
const BATCH_MAX: u64 = 1 << 20;
/// Batches of each CPU that fit into the quarantine.
const BATCHES: u64 = 16;
/// Batches of each CPU that an eviction leaves free: for what one CPU has freed since the last
/// eviction, and for what lies in all rings, twice, since the last object of a batch may be as
/// large as the batch.
const BATCHES_FREE: u64 = 5;
/// Most objects; above that the oldest are evicted whatever their size. 16 bytes each.
pub const MAX_OBJECTS: usize = 1 << 20;
/// Most additional objects until the guest fetches evicted ones: all records of all rings, twice.
const MAX_PENDING: usize = 8 * RING_MAX_RECORDS as usize;

/// Size of the quarantine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QuarantineSize {
    /// A share of guest memory, 1/32, as in KASAN.
    #[default]
    Auto,
    /// This many bytes; 0 is none.
    Bytes(u64),
}

impl QuarantineSize {
    /// The smallest size except 0.
    pub const MIN: u64 = 64 << 10;

    /// Bytes for a guest with `memory` bytes.
    pub fn bytes(self, memory: u64) -> u64 {
        match self {
            Self::Auto => memory / SHARE,
            Self::Bytes(bytes) => bytes.min(memory),
        }
    }
}

/// Bytes that each of `cpus` may free between two drains, for a quarantine of `limit` bytes.
pub fn batch(limit: u64, cpus: u8) -> u64 {
    (limit / BATCHES / u64::from(cpus).max(1)).min(BATCH_MAX)
}

/// Figures of the quarantine. Sizes are bytes of slots, redzones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct QuarantineFigures {
    /// Its limit; 0 without a quarantine.
    pub limit_bytes: u64,
    /// Bytes that wait now.
    pub bytes: u64,
    /// The most that waited.
    pub peak_bytes: u64,
    /// Objects that wait now.
    pub objects: u64,
    /// Objects pushed so far.
    pub held: u64,
    /// Evicted objects.
    pub released: u64,
}

/// Freed memory that waits.
#[derive(Debug)]
pub struct Quarantine {
    queue: VecDeque<Released>,
    /// Bytes that an eviction keeps.
    keep: u64,
    batch: u64,
    figures: QuarantineFigures,
}

impl Quarantine {
    /// An empty quarantine of at most `limit` bytes, for a guest with `cpus` CPUs.
    pub fn new(limit: u64, cpus: u8) -> Self {
        let batch = batch(limit, cpus);
        let free = batch.saturating_mul(BATCHES_FREE).saturating_mul(cpus.into());
        Self {
            queue: VecDeque::new(),
            keep: limit.saturating_sub(free),
            batch,
            figures: QuarantineFigures { limit_bytes: limit, ..QuarantineFigures::default() },
        }
    }

    /// Its figures so far.
    pub fn figures(&self) -> QuarantineFigures {
        self.figures
    }

    /// Host memory of the queue, in bytes.
    pub fn host_bytes(&self) -> u64 {
        (self.queue.capacity() * size_of::<Released>()) as u64
    }

    /// Pushes freed memory, which is already poisoned. False if the queue is full: the guest has
    /// fetched nothing.
    #[inline]
    pub fn push(&mut self, memory: Released) -> bool {
        if self.queue.len() >= MAX_OBJECTS + MAX_PENDING {
            return false;
        }
        let f = &mut self.figures;
        f.objects += 1;
        f.held += 1;
        f.bytes += u64::from(memory.slot);
        f.peak_bytes = f.peak_bytes.max(f.bytes);
        self.queue.push_back(memory);
        true
    }

    /// Whether the guest has to fetch evicted memory: a batch more waits than an eviction keeps.
    pub fn needs_eviction(&self) -> bool {
        self.figures.bytes > self.keep + self.batch || self.queue.len() > MAX_OBJECTS
    }

    /// Evicts the oldest objects, at most `max`: those over the limit, or `all`.
    pub fn evict(&mut self, max: usize, all: bool) -> Vec<Released> {
        let mut evicted = Vec::with_capacity(max.min(self.queue.len()));
        while evicted.len() < max
            && (all || self.figures.bytes > self.keep || self.queue.len() > MAX_OBJECTS)
            && let Some(memory) = self.queue.pop_front()
        {
            self.figures.objects -= 1;
            self.figures.released += 1;
            self.figures.bytes -= u64::from(memory.slot);
            evicted.push(memory);
        }
        if all && self.queue.is_empty() {
            self.queue.shrink_to(0);
        }
        evicted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use umbra_shadow::abi::Owner;

    use super::*;

    fn memory(address: u64, slot: u32) -> Released {
        Released::new(address, slot, Owner { allocator: 1, note: 0 })
    }

    #[test]
    fn the_oldest_come_out_when_there_is_a_batch_too_much() {
        let mut quarantine = Quarantine::new(160 << 10, 1);
        assert_eq!((quarantine.batch, quarantine.keep), (10 << 10, 110 << 10));
        for i in 0..120 {
            assert!(!quarantine.needs_eviction() && quarantine.push(memory(i, 1024)));
        }
        assert!(
            !quarantine.needs_eviction()
                && quarantine.push(memory(120, 1))
                && quarantine.needs_eviction()
        );
        let evicted = quarantine.evict(4, false);
        assert_eq!(evicted.iter().map(|m| m.address).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(quarantine.evict(100, false).len(), 7);
        assert!(quarantine.evict(100, false).is_empty() && !quarantine.needs_eviction());
        let figures = quarantine.figures();
        assert_eq!((figures.bytes, figures.peak_bytes), ((109 << 10) + 1, (120 << 10) + 1));
        assert_eq!((figures.objects, figures.held, figures.released), (110, 121, 11));
        assert_eq!(quarantine.evict(1000, true).len(), 110);
        assert_eq!((quarantine.figures().bytes, quarantine.host_bytes()), (0, 0));
    }

    #[test]
    fn a_guest_that_fetches_nothing_fills_a_bounded_queue() {
        let mut quarantine = Quarantine::new(1 << 30, 1);
        let held = (0..2 * MAX_OBJECTS as u64 + MAX_PENDING as u64)
            .filter(|i| quarantine.push(memory(*i, 0)))
            .count();
        assert_eq!(held, MAX_OBJECTS + MAX_PENDING);
        assert!(
            quarantine.needs_eviction() && quarantine.evict(usize::MAX, false).len() == MAX_PENDING
        );
    }

    #[test]
    fn a_share_of_memory_is_the_default() {
        assert_eq!(QuarantineSize::Auto.bytes(256 << 20), 8 << 20);
        assert_eq!(QuarantineSize::Bytes(0).bytes(256 << 20), 0);
        assert_eq!(QuarantineSize::Bytes(1 << 40).bytes(256 << 20), 256 << 20);
        assert_eq!(
            (batch(8 << 20, 1), batch(8 << 20, 4), batch(1 << 40, 1)),
            (512 << 10, 128 << 10, 1 << 20)
        );
        assert_eq!(Quarantine::new(0, 64).keep, 0);
    }

    proptest! {
        /// CPUs that free as the guest's runtime does, in any order, never have more waiting than
        /// the limit.
        #[test]
        fn the_limit_holds(
            cpus in 1..5u8,
            steps in proptest::collection::vec((0..5u8, 1..5000u32, any::<bool>()), 1..2000),
        ) {
            const LIMIT: u64 = 256 << 10;
            let batch = batch(LIMIT, cpus);
            let mut quarantine = Quarantine::new(LIMIT, cpus);
            // Per CPU: what its ring holds, and how much that is.
            let mut rings = vec![(Vec::new(), 0u64); usize::from(cpus)];
            for (cpu, slot, other) in steps {
                let cpu = usize::from(cpu % cpus);
                let slot = slot.min(batch as u32);
                rings[cpu].0.push(memory(0, slot));
                rings[cpu].1 += u64::from(slot);
                let drain = rings[cpu].1 > batch;
                // Another CPU's report drains as well, and nobody fetches anything then.
                if drain || other {
                    for (at, (ring, waiting)) in rings.iter_mut().enumerate() {
                        ring.drain(..).for_each(|memory| assert!(quarantine.push(memory)));
                        *waiting = if drain && at == cpu { 0 } else { *waiting };
                    }
                }
                let in_rings = rings.iter().flat_map(|ring| &ring.0);
                let in_rings: u64 = in_rings.map(|m| u64::from(m.slot)).sum();
                prop_assert!(quarantine.figures().bytes + in_rings <= LIMIT);
                if drain && quarantine.needs_eviction() {
                    quarantine.evict(usize::MAX, false);
                }
            }
        }
    }
}
