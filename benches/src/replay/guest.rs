//! Converts a trace for the test kernel, whose allocators replay its allocations and frees.
//!
//! The kernel cannot allocate at given addresses. Its events have numbered *places* instead, each
//! of which holds one allocation at a time. Blocks of pages that became slabs are left out, since
//! the kernel's slab allocator makes its own. The trace has no event for frees of many objects at
//! once. So the objects of a freed slab, and an object whose place is handed out again, are freed
//! first.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use umbra_shadow::codes::PAGE_SIZE;

use crate::trace::{Event, TraceError};

/// Most caches in the kernel.
const CACHES: usize = 16;
/// The largest object of the kernel's caches; larger ones come from `kmalloc`.
const LARGEST: u32 = 4096;

/// The first byte of an event (`guest/kernel/src/replay.rs`).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum What {
    Kmalloc = 0,
    CacheAlloc = 1,
    Free = 2,
    PagesAlloc = 3,
    PagesFree = 4,
}

/// The file for the kernel, and what is in it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GuestTrace {
    /// The file: an initrd.
    pub file: Vec<u8>,
    /// Objects allocated.
    pub objects: u64,
    /// Blocks of pages allocated.
    pub blocks: u64,
    /// Frees of both.
    pub frees: u64,
}

impl GuestTrace {
    /// Events in it.
    pub fn events(&self) -> u64 {
        self.objects + self.blocks + self.frees
    }
}

/// An event that may still be left out.
struct Step {
    what: What,
    argument: u8,
    bytes: u32,
    place: u32,
}

/// A block of allocated pages.
struct Block {
    /// The step that allocates it; none once it is known to be a slab.
    step: Option<usize>,
    place: u32,
    end: u64,
}

#[derive(Default)]
struct Maker {
    steps: Vec<Option<Step>>,
    blocks: BTreeMap<u64, Block>,
    objects: BTreeMap<u64, u32>,
    /// Empty places, and the number of all places.
    empty: Vec<u32>,
    places: u32,
}

impl Maker {
    fn place(&mut self) -> u32 {
        self.empty.pop().unwrap_or_else(|| {
            self.places += 1;
            self.places - 1
        })
    }

    fn step(&mut self, what: What, argument: u8, bytes: u32, place: u32) {
        self.steps.push(Some(Step { what, argument, bytes, place }));
    }

    fn free(&mut self, addr: u64) {
        if let Some(place) = self.objects.remove(&addr) {
            self.step(What::Free, 0, 0, place);
            self.empty.push(place);
        }
    }

    /// The known block that holds `addr`.
    fn block(&mut self, addr: u64) -> Option<&mut Block> {
        self.blocks
            .range_mut(..=addr)
            .next_back()
            .map(|(_, block)| block)
            .filter(|block| addr < block.end)
    }

    /// Frees the blocks that begin in a range, with their objects.
    fn drop_blocks(&mut self, range: Range<u64>) {
        let objects: Vec<_> = self.objects.range(range.clone()).map(|(addr, _)| *addr).collect();
        objects.into_iter().for_each(|addr| self.free(addr));
        let blocks: Vec<_> = self.blocks.range(range).map(|(addr, _)| *addr).collect();
        for addr in blocks {
            let Some(block) = self.blocks.remove(&addr) else { continue };
            if block.step.is_some() {
                self.step(What::PagesFree, 0, 0, block.place);
                self.empty.push(block.place);
            }
        }
    }

    fn event(&mut self, event: Event, caches: &HashMap<u32, u8>) {
        match event {
            Event::PageAlloc { addr, order } => {
                let end = addr + (PAGE_SIZE << order);
                self.drop_blocks(addr..end);
                let place = self.place();
                let step = Some(self.steps.len());
                self.step(What::PagesAlloc, order, 0, place);
                self.blocks.insert(addr, Block { step, place, end });
            }
            Event::PageFree { addr, order } => self.drop_blocks(addr..addr + (PAGE_SIZE << order)),
            Event::Alloc { addr, bytes, cache, .. } => {
                self.free(addr);
                // The kernel's slab allocator allocates its own pages. Their place stays unused.
                if let Some(step) = self.block(addr).and_then(|block| block.step.take())
                    && let Some(step) = self.steps.get_mut(step)
                {
                    *step = None;
                }
                let place = self.place();
                match caches.get(&bytes).filter(|_| cache.is_some()) {
                    Some(&number) => self.step(What::CacheAlloc, number, 0, place),
                    None => self.step(What::Kmalloc, 0, bytes, place),
                }
                self.objects.insert(addr, place);
            }
            Event::Free { addr } => self.free(addr),
        }
    }
}

/// Makes the file of the first events of a trace.
///
/// # Errors
/// The trace is bad.
pub fn make(
    trace: impl Iterator<Item = Result<Event, TraceError>>,
) -> Result<GuestTrace, TraceError> {
    let events: Vec<_> = trace.collect::<Result<_, _>>()?;
    // Linux, too, puts objects of one size into one cache where it can.
    let mut sizes: HashMap<u32, u64> = HashMap::new();
    for event in &events {
        if let Event::Alloc { bytes, cache: Some(_), .. } = event
            && (1..=LARGEST).contains(bytes)
        {
            *sizes.entry(*bytes).or_default() += 1;
        }
    }
    let mut sizes: Vec<_> = sizes.into_iter().collect();
    sizes.sort_by_key(|(bytes, times)| (std::cmp::Reverse(*times), *bytes));
    sizes.truncate(CACHES);
    let caches: HashMap<_, _> =
        sizes.iter().zip(0u8..).map(|((bytes, _), number)| (*bytes, number)).collect();
    let mut maker = Maker::default();
    events.into_iter().for_each(|event| maker.event(event, &caches));
    let steps: Vec<_> = maker.steps.into_iter().flatten().collect();
    let mut made = GuestTrace::default();
    made.file.extend(b"UREP");
    let header = [maker.places, sizes.len() as u32, steps.len() as u32];
    let mut number = |number: u32| made.file.extend(number.to_le_bytes());
    header.into_iter().chain(sizes.iter().map(|(bytes, _)| *bytes)).for_each(&mut number);
    for step in steps {
        [step.what as u32 | u32::from(step.argument) << 8, step.bytes, step.place]
            .into_iter()
            .for_each(&mut number);
        match step.what {
            What::Kmalloc | What::CacheAlloc => made.objects += 1,
            What::PagesAlloc => made.blocks += 1,
            What::Free | What::PagesFree => made.frees += 1,
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(made: &GuestTrace) -> Vec<u32> {
        made.file.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn slabs_are_the_kernels_own_affair() {
        let events = [
            Event::PageAlloc { addr: 0x8000, order: 1 },
            Event::PageAlloc { addr: 0x4000, order: 0 },
            Event::Alloc { addr: 0x9040, bytes: 184, slot: 192, cache: Some(3) },
            Event::Alloc { addr: 0x9400, bytes: 20, slot: 32, cache: None },
            Event::Free { addr: 0x7000 },
            Event::Free { addr: 0x9400 },
            Event::PageFree { addr: 0x8000, order: 1 },
            Event::PageFree { addr: 0x4000, order: 0 },
        ];
        let made = make(events.into_iter().map(Ok)).unwrap();
        let (alloc, cache, free, pages, pages_free) = (0, 1, 2, 3, 4);
        #[rustfmt::skip]
        assert_eq!(words(&made), [
            u32::from_le_bytes(*b"UREP"), 4, 1, 6,
            184,
            pages, 0, 1,
            cache, 0, 2,
            alloc, 20, 3,
            free, 0, 3,
            free, 0, 2,
            pages_free, 0, 1,
        ]);
        assert_eq!((made.objects, made.blocks, made.frees, made.events()), (2, 1, 3, 6));
    }

    #[test]
    fn what_is_handed_out_again_is_freed_first() {
        let object = Event::Alloc { addr: 0x9400, bytes: 20, slot: 32, cache: None };
        let block = Event::PageAlloc { addr: 0x4000, order: 2 };
        let made = make([object, object, block, block].into_iter().map(Ok)).unwrap();
        let whats: Vec<_> = words(&made)[4..].chunks(3).map(|event| event[0]).collect();
        assert_eq!(whats, [0, 2, 0, 2 << 8 | 3, 4, 2 << 8 | 3]);
    }
}
