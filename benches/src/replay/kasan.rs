//! What KASAN would poison and unpoison at each event of a trace.
//!
//! | event | what happens | in Linux |
//! | --- | --- | --- |
//! | page alloc | the block becomes accessible | `kasan_unpoison_pages` |
//! | page free | the block is poisoned as free pages | `kasan_poison_pages` |
//! | first object in a block | the whole block is poisoned as slab redzone | `kasan_poison_slab`, when a slab is made |
//! | object allocated | the bytes asked for become accessible; of `kmalloc`'s slots, the rest is poisoned as redzone | `kasan_slab_alloc`, `kasan_kmalloc` |
//! | object freed | it is poisoned as freed | `kasan_slab_free` |
//! | large `kmalloc` (over 8 KiB) | its block is no slab: the bytes behind those asked for are poisoned, and nothing when it is freed: its pages are | `kasan_kmalloc_large` |
//!
//! The recorded kernel had no KASAN: its objects lie without KASAN's redzones. [`Live::redzones`]
//! is what these would add. Older allocations are not known: memory begins accessible, an older
//! slab is poisoned page by page as its objects appear, and a free of an older object does nothing.
//! Frees of many objects at once have no event: their objects stay live until their place or their
//! pages are handed out again.

use std::collections::BTreeMap;
use std::ops::Range;

use umbra_shadow::codes::{
    FREE_PAGE, LARGE_REDZONE, PAGE_SHIFT, PAGE_SIZE, SLAB_FREE, SLAB_REDZONE,
};

use crate::trace::Event;

/// The largest slot of `kmalloc`'s caches (`KMALLOC_MAX_CACHE_SIZE`); beyond it, `kmalloc` takes
/// pages.
const LARGEST_SLOT: u32 = 8192;
/// Number of orders of blocks.
const ORDERS: u64 = 11;
/// Bytes of a granule if one byte of shadow covers 32 bytes instead of 8: no two objects share a
/// granule.
const LARGE_GRANULE: u64 = 32;

/// A change of the shadow: address, bytes, and a poison code; `None` unpoisons.
pub type Change = (u64, u64, Option<u8>);

/// State of a page.
#[derive(Clone, Copy, Default)]
struct Page {
    /// For the first page of an allocated block: its order plus one.
    order: u8,
    slab: bool,
}

/// Bytes of a live object, and of its slot.
#[derive(Clone, Copy)]
struct Object {
    bytes: u32,
    slot: u32,
}

/// Sums over all live objects, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Their number.
    pub objects: u64,
    /// Their slots.
    pub slots: u64,
    /// The redzones that KASAN would add to the slots.
    pub redzones: u64,
    /// Growth of the slots if each began at a multiple of 32 bytes.
    pub aligned_to_32: u64,
}

impl Live {
    fn add(&mut self, object: Object, sign: i64) {
        let slot = u64::from(object.slot);
        let add = |sum: &mut u64, value: u64| *sum = sum.wrapping_add_signed(sign * value as i64);
        add(&mut self.objects, 1);
        add(&mut self.slots, slot);
        add(&mut self.redzones, redzone(object.bytes));
        add(&mut self.aligned_to_32, slot.next_multiple_of(LARGE_GRANULE) - slot);
    }
}

/// KASAN's redzone behind an object of this size (`optimal_redzone` in `mm/kasan/generic.c`),
/// without its metadata.
fn redzone(bytes: u32) -> u64 {
    match bytes {
        0..=48 => 16,
        49..=96 => 32,
        97..=448 => 64,
        449..=3968 => 128,
        3969..=16_128 => 256,
        16_129..=32_256 => 512,
        32_257..=64_512 => 1024,
        _ => 2048,
    }
}

/// The state that the rules need.
pub struct Kasan {
    pages: Vec<Page>,
    objects: BTreeMap<u64, Object>,
    live: Live,
}

impl Kasan {
    /// For memory from 0 to `memory` bytes.
    pub fn new(memory: u64) -> Self {
        let pages = vec![Page::default(); (memory >> PAGE_SHIFT) as usize];
        Self { pages, objects: BTreeMap::new(), live: Live::default() }
    }

    /// All live objects.
    pub fn live(&self) -> Live {
        self.live
    }

    /// Calls `change` for each change that `event` makes, in order. The event lies inside the
    /// memory.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn event<E>(
        &mut self,
        event: Event,
        mut change: impl FnMut(Change) -> Result<(), E>,
    ) -> Result<(), E> {
        match event {
            Event::PageAlloc { addr, order } => {
                self.forget(addr, order);
                if let Some(page) = self.pages.get_mut((addr >> PAGE_SHIFT) as usize) {
                    page.order = order + 1;
                }
                change((addr, PAGE_SIZE << order, None))
            }
            Event::PageFree { addr, order } => {
                self.forget(addr, order);
                change((addr, PAGE_SIZE << order, Some(FREE_PAGE)))
            }
            Event::Alloc { addr, bytes, slot, cache } => {
                let rest = (addr + u64::from(bytes), u64::from(slot - bytes));
                if cache.is_none() && slot > LARGEST_SLOT {
                    change((addr, bytes.into(), None))?;
                    return change((rest.0, rest.1, Some(LARGE_REDZONE)));
                }
                self.make_slabs(addr, slot, &mut change)?;
                // `kmalloc`'s caches have objects as large as their slots.
                let object = Object { bytes: if cache.is_some() { bytes } else { slot }, slot };
                if let Some(old) = self.objects.insert(addr, object) {
                    self.live.add(old, -1);
                }
                self.live.add(object, 1);
                change((addr, bytes.into(), None))?;
                match cache {
                    None if rest.1 > 0 => change((rest.0, rest.1, Some(SLAB_REDZONE))),
                    _ => Ok(()),
                }
            }
            Event::Free { addr } => {
                let Some(object) = self.objects.remove(&addr) else { return Ok(()) };
                self.live.add(object, -1);
                change((addr, u64::from(object.bytes).next_multiple_of(8), Some(SLAB_FREE)))
            }
        }
    }

    /// Poisons the pages of an object that are not yet known as slabs.
    fn make_slabs<E>(
        &mut self,
        addr: u64,
        slot: u32,
        change: &mut impl FnMut(Change) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut page = addr >> PAGE_SHIFT;
        while page <= (addr + u64::from(slot) - 1) >> PAGE_SHIFT {
            if self.pages.get(page as usize).is_some_and(|page| page.slab) {
                page += 1;
                continue;
            }
            let block = self.block(page);
            for page in
                self.pages.get_mut(block.start as usize..block.end as usize).into_iter().flatten()
            {
                page.slab = true;
            }
            let len = (block.end - block.start) << PAGE_SHIFT;
            change((block.start << PAGE_SHIFT, len, Some(SLAB_REDZONE)))?;
            page = block.end;
        }
        Ok(())
    }

    /// The known block of a page.
    fn block(&self, page: u64) -> Range<u64> {
        (0..ORDERS)
            .find_map(|order| {
                let first = page >> order << order;
                let is = self
                    .pages
                    .get(first as usize)
                    .is_some_and(|page| u64::from(page.order) == order + 1);
                is.then_some(first..first + (1 << order))
            })
            .unwrap_or(page..page + 1)
    }

    /// Forgets the pages of a block and its objects.
    fn forget(&mut self, addr: u64, order: u8) {
        let first = (addr >> PAGE_SHIFT) as usize;
        let mut slab = false;
        for page in self.pages.get_mut(first..first + (1 << order)).into_iter().flatten() {
            slab |= page.slab;
            *page = Page::default();
        }
        let end = addr + (PAGE_SIZE << order);
        if slab {
            while let Some((&at, &object)) = self.objects.range(addr..end).next() {
                self.objects.remove(&at);
                self.live.add(object, -1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The changes of each event.
    fn changes(events: &[Event]) -> (Vec<Vec<Change>>, Live) {
        let mut rules = Kasan::new(1 << 20);
        let all = events
            .iter()
            .map(|event| {
                let mut all = Vec::new();
                rules
                    .event(*event, |change| {
                        all.push(change);
                        Ok::<_, ()>(())
                    })
                    .unwrap();
                all
            })
            .collect();
        (all, rules.live())
    }

    const OF_CACHE: Event = Event::Alloc { addr: 0x8040, bytes: 184, slot: 192, cache: Some(0) };
    const KMALLOC: Event = Event::Alloc { addr: 0x9400, bytes: 20, slot: 32, cache: None };

    #[test]
    fn a_slab_lives_and_dies() {
        let (all, live) = changes(&[
            Event::PageAlloc { addr: 0x8000, order: 1 },
            OF_CACHE,
            KMALLOC,
            Event::Free { addr: 0x8040 },
            Event::Free { addr: 0x8040 },
            KMALLOC,
            Event::PageFree { addr: 0x8000, order: 1 },
        ]);
        assert_eq!(
            all,
            [
                vec![(0x8000, 0x2000, None)],
                vec![(0x8000, 0x2000, Some(SLAB_REDZONE)), (0x8040, 184, None)],
                vec![(0x9400, 20, None), (0x9414, 12, Some(SLAB_REDZONE))],
                vec![(0x8040, 184, Some(SLAB_FREE))],
                vec![],
                vec![(0x9400, 20, None), (0x9414, 12, Some(SLAB_REDZONE))],
                vec![(0x8000, 0x2000, Some(FREE_PAGE))],
            ]
        );
        assert_eq!(live, Live::default());
    }

    #[test]
    fn what_was_there_before_the_recording_is_found_page_by_page() {
        let across = Event::Alloc { addr: 0x8f80, bytes: 256, slot: 256, cache: None };
        let (all, live) = changes(&[OF_CACHE, across, Event::Free { addr: 0x8f00 }]);
        assert_eq!(all[0], [(0x8000, 0x1000, Some(SLAB_REDZONE)), (0x8040, 184, None)]);
        assert_eq!(all[1], [(0x9000, 0x1000, Some(SLAB_REDZONE)), (0x8f80, 256, None)]);
        assert_eq!(all[2], []);
        assert_eq!(live, Live { objects: 2, slots: 448, redzones: 128, aligned_to_32: 0 });
    }

    #[test]
    fn a_large_allocation_is_no_slab() {
        let (all, live) = changes(&[
            Event::PageAlloc { addr: 0x8000, order: 2 },
            Event::Alloc { addr: 0x8000, bytes: 9000, slot: 16384, cache: None },
            Event::Free { addr: 0x8000 },
        ]);
        assert_eq!(all[1], [(0x8000, 9000, None), (0x8000 + 9000, 7384, Some(LARGE_REDZONE))]);
        assert_eq!((&all[2][..], live), (&[][..], Live::default()));
    }
}
