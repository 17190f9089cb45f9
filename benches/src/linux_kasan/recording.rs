//! Converts a [`trace`](crate::trace) into the workload of the compared Linux kernels, which an
//! initcall replays (`guest/linux/patches`, `mm/umbra_replay.c`).

use std::collections::{BTreeMap, HashMap};

use umbra_shadow::codes::PAGE_SIZE;

use crate::trace::{Event, TraceError};

/// The first bytes of a recording.
const MAGIC: [u8; 8] = *b"UMBRPLY1";
/// Bytes before the first event, and of an event.
const HEADER: usize = 24;
const EVENT: usize = 12;

/// Types of events.
const KMALLOC: u8 = 0;
const KFREE: u8 = 1;
const CACHE_ALLOC: u8 = 2;
const CACHE_FREE: u8 = 3;
const PAGE_ALLOC: u8 = 4;
const PAGE_FREE: u8 = 5;

/// A recording, and what is in it.
pub struct Recording {
    /// The file: an initrd.
    pub bytes: Vec<u8>,
    /// Allocations in it.
    pub allocations: u64,
}

/// An event of a recording, and whether it is kept.
struct Replayed {
    kind: u8,
    c: u8,
    slot: u32,
    size: u32,
    left_out: bool,
}

impl Replayed {
    /// An object is freed.
    fn free(slot: u32, cache: Option<u8>) -> Self {
        let kind = if cache.is_some() { CACHE_FREE } else { KFREE };
        Self { kind, c: cache.unwrap_or(0), slot, size: 0, left_out: false }
    }
}

/// Makes a recording of a trace. Addresses become slots of a table. Frees of what the trace did not
/// allocate are left out, and so are pages that were allocated for slabs, which the replaying
/// kernel allocates by itself.
///
/// # Errors
/// The trace is bad.
pub fn record(
    events: impl Iterator<Item = Result<Event, TraceError>>,
) -> Result<Recording, TraceError> {
    let mut all: Vec<Replayed> = Vec::new();
    let mut objects: HashMap<u64, (u32, Option<u8>)> = HashMap::new();
    // Live blocks by address: slot, order, and the event that allocated it.
    let mut blocks: BTreeMap<u64, (u32, u8, usize)> = BTreeMap::new();
    let mut free_slots = Vec::new();
    let mut slots = 0;
    let mut take = |free: &mut Vec<u32>| {
        free.pop().unwrap_or_else(|| {
            slots += 1;
            slots - 1
        })
    };
    for event in events {
        match event? {
            Event::Alloc { addr, bytes, cache, .. } => {
                let around = blocks.range(..=addr).next_back();
                if let Some((start, (_, order, at))) = around
                    && addr < start + (PAGE_SIZE << order)
                    && let Some(block) = all.get_mut(*at)
                {
                    block.left_out = true;
                }
                // The free of the object that was here is not in the trace.
                let known = objects.get(&addr).copied();
                if let Some((slot, cache)) = known {
                    all.push(Replayed::free(slot, cache));
                }
                let slot = known.map_or_else(|| take(&mut free_slots), |(slot, _)| slot);
                objects.insert(addr, (slot, cache));
                let kind = if cache.is_some() { CACHE_ALLOC } else { KMALLOC };
                all.push(Replayed {
                    kind,
                    c: cache.unwrap_or(0),
                    slot,
                    size: bytes,
                    left_out: false,
                });
            }
            Event::Free { addr } => {
                let Some((slot, cache)) = objects.remove(&addr) else { continue };
                free_slots.push(slot);
                all.push(Replayed::free(slot, cache));
            }
            Event::PageAlloc { addr, order } => {
                let slot =
                    blocks.get(&addr).map_or_else(|| take(&mut free_slots), |(slot, ..)| *slot);
                blocks.insert(addr, (slot, order, all.len()));
                all.push(Replayed { kind: PAGE_ALLOC, c: order, slot, size: 0, left_out: false });
            }
            Event::PageFree { addr, order } => {
                let Some((slot, allocated, at)) = blocks.remove(&addr) else { continue };
                free_slots.push(slot);
                if allocated == order && all.get(at).is_some_and(|block| !block.left_out) {
                    all.push(Replayed {
                        kind: PAGE_FREE,
                        c: order,
                        slot,
                        size: 0,
                        left_out: false,
                    });
                }
            }
        }
    }
    all.retain(|event| !event.left_out);
    let mut bytes = Vec::with_capacity(HEADER + all.len() * EVENT);
    bytes.extend(MAGIC);
    for word in [all.len() as u32, slots, 1 << 8, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for event in &all {
        bytes.extend([event.kind, event.c, 0, 0]);
        bytes.extend(event.slot.to_le_bytes());
        bytes.extend(event.size.to_le_bytes());
    }
    let allocations =
        all.iter().filter(|e| matches!(e.kind, KMALLOC | CACHE_ALLOC | PAGE_ALLOC)).count();
    Ok(Recording { bytes, allocations: allocations as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(recording: &Recording) -> Vec<(u8, u32)> {
        let event = |bytes: &[u8]| (bytes[0], u32::from_le_bytes(bytes[4..8].try_into().unwrap()));
        recording.bytes[HEADER..].chunks(EVENT).map(event).collect()
    }

    #[test]
    fn slabs_and_unknown_frees_are_left_out() {
        let object = |addr, cache| Event::Alloc { addr, bytes: 24, slot: 32, cache };
        let events = [
            Event::Free { addr: 0x9000 },
            Event::PageAlloc { addr: 0x4000, order: 1 },
            Event::PageAlloc { addr: 0x8000, order: 0 },
            object(0x5020, Some(3)),
            object(0x5040, None),
            Event::Free { addr: 0x5020 },
            Event::PageFree { addr: 0x8000, order: 0 },
            Event::PageFree { addr: 0x4000, order: 1 },
            object(0x7000, None),
        ];
        let recording = record(events.into_iter().map(Ok)).unwrap();
        assert_eq!(
            kinds(&recording),
            [
                (PAGE_ALLOC, 1),
                (CACHE_ALLOC, 2),
                (KMALLOC, 3),
                (CACHE_FREE, 2),
                (PAGE_FREE, 1),
                (KMALLOC, 0)
            ]
        );
        assert_eq!(recording.allocations, 4);
        assert_eq!(recording.bytes.len(), HEADER + 6 * EVENT);
    }
}
