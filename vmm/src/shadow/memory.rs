//! The shadow bytes, by key, as the models of `umbra-shadow` access them.

use std::{iter, ops::Range};

use umbra_shadow::{
    codes::{
        FREE_PAGE, GRANULE_SHIFT, PAGE_BUSY, PAGE_BYTES, PAGE_SHIFT, SHADOW_PER_PAGE,
        SLAB_FREE_TRACK, SLAB_REDZONE, VMALLOC_INVALID,
    },
    memory::ShadowMemory,
};

use super::{
    layout::{CHUNK_BYTES, CHUNK_COVERS, Layout},
    mapping::Mapping,
};

/// Pages of guest memory behind one chunk of byte shadow.
const CHUNK_PAGES: u64 = CHUNK_COVERS >> PAGE_SHIFT;

/// Page shadow and byte shadow of a whole guest in host memory, by key (`keys.rs`).
///
/// Reads are safe while guest vCPUs run; each value is read once. Byte shadow of a chunk that was
/// never mapped reads as zero and costs nothing. A write to such a chunk counts it as mapped;
/// [`super::Windows`] checks the limit before.
#[derive(Debug)]
pub struct ShadowBacking {
    layout: Layout,
    /// The first address without shadow: the end of RAM, or of the virtual memory that the guest
    /// has keys for.
    end: u64,
    /// `None` for a full shadow, where every page is byte-checked.
    pub(super) page: Option<Mapping>,
    pub(super) byte: Mapping,
    /// Which chunks may hold host memory: mapped for the guest, or written by the VMM.
    mapped: Vec<bool>,
    mapped_chunks: u64,
    mapped_peak_chunks: u64,
    /// Byte-checked pages, as far as the VMM itself changed the page shadow: all of them in `sync`
    /// mode.
    tracked_pages: i64,
    tracked_peak_pages: i64,
}

impl ShadowBacking {
    pub(super) fn new(layout: Layout, page: Option<Mapping>, byte: Mapping) -> Self {
        Self {
            layout,
            end: layout.ram_end,
            page,
            byte,
            mapped: vec![false; layout.chunks()],
            mapped_chunks: 0,
            mapped_peak_chunks: 0,
            tracked_pages: 0,
            tracked_peak_pages: 0,
        }
    }

    /// Where the guest sees the two shadows.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Extends the keys to `end`.
    pub(super) fn extend(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// Whether `chunk` may hold host memory.
    pub(super) fn is_mapped(&self, chunk: usize) -> bool {
        self.mapped.get(chunk).copied().unwrap_or(false)
    }

    /// Counts `chunk` as mapped, or no longer. In a full shadow, one for virtual memory is filled
    /// when it comes into being; no vCPU can reach it yet.
    pub(super) fn set_mapped(&mut self, chunk: usize, mapped: bool) {
        match self.mapped.get_mut(chunk) {
            Some(was) if *was != mapped => {
                *was = mapped;
                if mapped && self.page.is_none() && chunk >= self.layout.first_virtual_chunk() {
                    self.byte.fill(chunk as u64 * CHUNK_BYTES, CHUNK_BYTES, VMALLOC_INVALID);
                }
                if mapped {
                    self.mapped_chunks += 1;
                    self.mapped_peak_chunks = self.mapped_peak_chunks.max(self.mapped_chunks);
                } else {
                    self.mapped_chunks -= 1;
                }
            }
            _ => {}
        }
    }

    /// Bytes of byte shadow that may hold host memory now.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_chunks * CHUNK_BYTES
    }

    /// The most that [`Self::mapped_bytes`] has been.
    pub fn mapped_peak_bytes(&self) -> u64 {
        self.mapped_peak_chunks * CHUNK_BYTES
    }

    /// The first chunk from `from` on for which [`Self::is_mapped`] holds.
    pub(super) fn next_mapped(&self, from: usize) -> Option<usize> {
        let at = self.mapped.get(from..)?.iter().position(|mapped| *mapped)?;
        Some(from + at)
    }

    /// The chunks for which [`Self::is_mapped`] holds, in order.
    pub(super) fn mapped_chunks(&self) -> impl Iterator<Item = usize> + '_ {
        self.mapped.iter().enumerate().filter(|(_, mapped)| **mapped).map(|(chunk, _)| chunk)
    }

    /// Whether any page of `chunk` is byte-checked or on its way to be.
    pub(super) fn chunk_in_use(&self, chunk: usize) -> bool {
        (0..CHUNK_BYTES / super::mapping::HOST_PAGE)
            .any(|page| self.shadow_page_in_use(chunk, page))
    }

    /// Whether any of the eight guest pages behind shadow page `page` of `chunk` is byte-checked or
    /// on its way to be.
    pub(super) fn shadow_page_in_use(&self, chunk: usize, page: u64) -> bool {
        match &self.page {
            None => true,
            Some(mapping) => {
                mapping.load_u64(chunk as u64 * CHUNK_PAGES + page * 8).is_none_or(any_byte_checked)
            }
        }
    }

    /// Bytes of byte shadow that byte-checked pages in mapped chunks use now.
    pub fn used_bytes(&self) -> u64 {
        if self.page.is_none() {
            let more =
                self.mapped_bytes().saturating_sub(self.layout.ram_chunks() as u64 * CHUNK_BYTES);
            return (self.layout.ram_end >> GRANULE_SHIFT) + more;
        }
        let pages = self.mapped_chunks().map(|chunk| self.used_pages(chunk));
        pages.sum::<u64>() * SHADOW_PER_PAGE
    }

    /// Byte-checked pages of `chunk` now; 0 in a full shadow, where they do not change.
    pub(super) fn used_pages(&self, chunk: usize) -> u64 {
        let Some(mapping) = &self.page else { return 0 };
        let first = chunk as u64 * CHUNK_PAGES;
        mapping.count(first, CHUNK_PAGES, PAGE_BYTES).unwrap_or(0)
    }

    /// The free pages between two guest-physical addresses, multiples of 4096, by rising address;
    /// neighbours together. With `objects` also those that hold nothing but freed objects whose
    /// frees are known ([`SLAB_FREE_TRACK`]), or parts of such and redzones. A full shadow has no
    /// page shadow to find them.
    pub fn unused_pages(
        &self,
        range: Range<u64>,
        objects: bool,
    ) -> impl Iterator<Item = Range<u64>> {
        let mut at = range.start >> PAGE_SHIFT;
        let end = range.end >> PAGE_SHIFT;
        let word = move |page: u64| self.page.as_ref()?.load_u64(page & !7).filter(|_| page < end);
        let unused = move |word: u64, page: u64| match (word >> (8 * (page & 7))) as u8 {
            FREE_PAGE => true,
            SLAB_FREE_TRACK => objects,
            PAGE_BYTES => objects && self.holds_freed_objects(page),
            _ => false,
        };
        iter::from_fn(move || {
            // Most words have no free page, or only free pages.
            while let Some(word) = word(at)
                && !unused(word, at)
            {
                at = if word == 0 { (at & !7) + 8 } else { at + 1 };
            }
            let start = at;
            while let Some(word) = word(at)
                && unused(word, at)
            {
                at = if word == u64::MAX { (at & !7) + 8 } else { at + 1 };
            }
            (at > start).then_some(start << PAGE_SHIFT..at.min(end) << PAGE_SHIFT)
        })
    }

    /// Whether a byte-checked page holds nothing but freed objects whose frees are known, and
    /// redzones.
    fn holds_freed_objects(&self, page: u64) -> bool {
        let first = page * SHADOW_PER_PAGE;
        let fits = |byte: u8| matches!(byte, SLAB_FREE_TRACK | SLAB_REDZONE);
        let mut freed = false;
        self.is_mapped((first / CHUNK_BYTES) as usize)
            && (first..first + SHADOW_PER_PAGE).step_by(8).all(|at| {
                let bytes = self.byte.load_u64(at).unwrap_or(0).to_ne_bytes();
                freed |= bytes.contains(&SLAB_FREE_TRACK);
                bytes.into_iter().all(fits)
            })
            && freed
    }

    /// The most that byte-checked pages have used, as far as the VMM itself changed the page
    /// shadow. Exact in `sync` mode, where nobody else does.
    pub(super) fn tracked_peak_bytes(&self) -> u64 {
        self.tracked_peak_pages.max(0) as u64 * SHADOW_PER_PAGE
    }
}

/// Whether one of the eight page-shadow values in `word` is [`PAGE_BYTES`] or [`PAGE_BUSY`].
fn any_byte_checked(word: u64) -> bool {
    word.to_ne_bytes().iter().any(|byte| matches!(*byte, PAGE_BYTES | PAGE_BUSY))
}

impl ShadowMemory for ShadowBacking {
    fn base(&self) -> u64 {
        0
    }

    fn limit(&self) -> u64 {
        self.end
    }

    fn page(&self, addr: u64) -> u8 {
        match &self.page {
            Some(mapping) => mapping.load(addr >> PAGE_SHIFT).unwrap_or(0),
            None => PAGE_BYTES,
        }
    }

    fn set_pages(&mut self, addr: u64, pages: u64, value: u8) {
        let Some(mapping) = &mut self.page else { return };
        let first = addr >> PAGE_SHIFT;
        let Some(before) = mapping.count(first, pages, PAGE_BYTES) else { return };
        mapping.fill(first, pages, value);
        let after = if value == PAGE_BYTES { pages } else { 0 };
        self.tracked_pages += after as i64 - before as i64;
        self.tracked_peak_pages = self.tracked_peak_pages.max(self.tracked_pages);
    }

    fn byte(&self, addr: u64) -> u8 {
        // A read would make host memory resident.
        let chunk = (addr / CHUNK_COVERS) as usize;
        if !self.is_mapped(chunk) {
            let full = self.page.is_none() && chunk >= self.layout.first_virtual_chunk();
            return if full { VMALLOC_INVALID } else { 0 };
        }
        self.byte.load(addr >> GRANULE_SHIFT).unwrap_or(0)
    }

    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        let first = addr >> GRANULE_SHIFT;
        if granules == 0 || self.byte.pointer(first, granules).is_none() {
            return;
        }
        for chunk in first / CHUNK_BYTES..=(first + granules - 1) / CHUNK_BYTES {
            self.set_mapped(chunk as usize, true);
        }
        self.byte.fill(first, granules, value);
    }
}

#[cfg(test)]
mod tests {
    use umbra_shadow::codes::{FREE_PAGE, PAGE_VALID, SLAB_REDZONE};

    use super::*;

    fn shadow(ram_end: u64) -> ShadowBacking {
        let layout = Layout::new(ram_end).unwrap();
        let page = Mapping::new(layout.page.bytes).unwrap();
        ShadowBacking::new(layout, Some(page), Mapping::new(layout.byte.bytes).unwrap())
    }

    #[test]
    fn positions_are_guest_physical() {
        let mut shadow = shadow(8 << 20);
        shadow.set_pages(0x3fff, 2, FREE_PAGE);
        assert_eq!(
            [0x2fff, 0x3000, 0x4fff, 0x5000].map(|addr| shadow.page(addr)),
            [PAGE_VALID, FREE_PAGE, FREE_PAGE, PAGE_VALID]
        );
        shadow.set_bytes(0x1f_fff8, 2, SLAB_REDZONE);
        assert_eq!(
            [0x1f_fff7, 0x1f_fff8, 0x20_0007, 0x20_0008].map(|addr| shadow.byte(addr)),
            [0, SLAB_REDZONE, SLAB_REDZONE, 0]
        );
        // The two granules lie in two chunks.
        assert_eq!(shadow.mapped_bytes(), 2 * CHUNK_BYTES);
        assert_eq!(shadow.mapped_chunks().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn use_is_seen_in_every_position() {
        let mut shadow = shadow(8 << 20);
        shadow.set_mapped(1, true);
        for page in 512..1024u64 {
            for (value, used) in [(PAGE_BYTES, SHADOW_PER_PAGE), (PAGE_BUSY, 0)] {
                shadow.set_pages(page << 12, 1, value);
                assert!(
                    shadow.chunk_in_use(1) && !shadow.chunk_in_use(0) && !shadow.chunk_in_use(2)
                );
                assert!(shadow.shadow_page_in_use(1, (page - 512) / 8));
                assert_eq!(shadow.used_bytes(), used);
            }
            shadow.set_pages(page << 12, 1, if page % 2 == 0 { FREE_PAGE } else { PAGE_VALID });
            assert!(!shadow.chunk_in_use(1));
        }
        assert_eq!(shadow.tracked_peak_bytes(), SHADOW_PER_PAGE);
    }

    #[test]
    fn free_pages_come_in_runs() {
        let mut shadow = shadow(64 << 12);
        let runs = |shadow: &ShadowBacking, start: u64, end: u64| -> Vec<_> {
            shadow
                .unused_pages(start << 12..end << 12, false)
                .map(|run| (run.start >> 12, run.end >> 12))
                .collect()
        };
        assert_eq!(runs(&shadow, 0, 64), []);
        for (first, pages) in [(0, 1), (2, 3), (7, 10), (30, 34)] {
            shadow.set_pages(first << 12, pages, FREE_PAGE);
        }
        shadow.set_pages(20 << 12, 2, SLAB_REDZONE);
        assert_eq!(runs(&shadow, 0, 64), [(0, 1), (2, 5), (7, 17), (30, 64)]);
        assert_eq!(runs(&shadow, 8, 40), [(8, 17), (30, 40)]);
        assert_eq!(runs(&shadow, 17, 30), []);
        assert_eq!(runs(&shadow, 0, 1 << 40), [(0, 1), (2, 5), (7, 17), (30, 64)]);
    }

    proptest::proptest! {
        #[test]
        fn unused_pages_are_those_of_a_plain_look(
            // The page shadow, and how the byte shadow begins and ends.
            values in proptest::collection::vec(
                (
                    proptest::sample::select(vec![
                        0u8, 1, 1, 2, 0xfe, SLAB_FREE_TRACK, FREE_PAGE, FREE_PAGE,
                    ]),
                    proptest::sample::select(vec![
                        SLAB_FREE_TRACK, SLAB_FREE_TRACK, SLAB_REDZONE, 0, 5, 0xfb, 0xfe,
                    ]),
                    proptest::sample::select(vec![
                        SLAB_FREE_TRACK, SLAB_REDZONE, SLAB_REDZONE, 0, 0xfb,
                    ]),
                    1..512u64,
                ),
                1..100,
            ),
            start in 0..110u64,
            len in 0..110u64,
            objects in proptest::bool::ANY,
        ) {
            let mut shadow = shadow(values.len() as u64 * 4096);
            for (page, (value, left, right, granules)) in (0u64..).zip(&values) {
                shadow.set_pages(page << 12, 1, *value);
                shadow.set_bytes(page << 12, *granules, *left);
                shadow.set_bytes((page << 12) + granules * 8, 512 - granules, *right);
            }
            let found: Vec<u64> = shadow
                .unused_pages(start << 12..(start + len) << 12, objects)
                .flat_map(|run| run.step_by(4096))
                .collect();
            let unused = |(page, left, right, _): &(u8, u8, u8, u64)| match *page {
                FREE_PAGE => true,
                SLAB_FREE_TRACK => objects,
                PAGE_BYTES => {
                    let both = [*left, *right];
                    let expected = [SLAB_FREE_TRACK, SLAB_REDZONE];
                    let fits = both.iter().all(|code| expected.contains(code));
                    objects && fits && both.contains(&SLAB_FREE_TRACK)
                }
                _ => false,
            };
            let plain: Vec<u64> = (start..start + len)
                .filter(|page| values.get(*page as usize).is_some_and(unused))
                .map(|page| page << 12)
                .collect();
            proptest::prop_assert_eq!(found, plain);
        }
    }

    #[test]
    fn the_model_cannot_reach_outside() {
        let mut shadow = shadow(4096);
        shadow.set_bytes(u64::MAX, u64::MAX, 1);
        shadow.set_bytes(0, shadow.layout.byte.bytes + 1, 1);
        shadow.set_pages(u64::MAX, 1, 1);
        shadow.set_pages(0, shadow.layout.page.bytes + 1, 1);
        shadow.set_pages(0, u64::MAX, 1);
        assert_eq!((shadow.page(0), shadow.byte(0), shadow.mapped_bytes()), (0, 0, 0));
        assert_eq!((shadow.page(u64::MAX), shadow.byte(u64::MAX)), (0, 0));
    }
}
