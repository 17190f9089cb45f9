//! Guest pages and what starts in each, by number.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::hash::BuildHasher;
use std::iter;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use umbra_shadow::codes::{PAGE_SHIFT, PAGE_SIZE};

use crate::heap;
use crate::pool::{NO_PLACE, Pool};

/// No object.
pub const NOTHING: u32 = NO_PLACE;

/// A page in which objects start.
///
/// It is cut into cells, a power of two of them, so small that in none two objects start. So the
/// cell of an address says what starts there; an allocator's slots share a size, and nearly all
/// cells are in use.
#[derive(Debug)]
pub struct Page {
    number: u64,
    cells: Cells,
    /// In which blocks something starts: a bit for each.
    used: u32,
    /// Its neighbours among the pages with freed objects, by their last free.
    older: u32,
    newer: u32,
    objects: u16,
    freed: u16,
}

/// What starts in each cell. Pages of large objects have few cells, which need no memory of their
/// own.
#[derive(Debug)]
enum Cells {
    Few([u32; FEW]),
    Many(Box<[u32]>),
}

/// How many cells are few.
const FEW: usize = 4;

impl Cells {
    /// So many cells or a few more, in which nothing starts.
    fn new(count: usize) -> Self {
        if count <= FEW {
            Self::Few([NOTHING; FEW])
        } else {
            Self::Many(vec![NOTHING; count].into_boxed_slice())
        }
    }

    /// A cell is so many bytes, as a power of two.
    #[inline]
    fn shift(&self) -> u32 {
        PAGE_SHIFT - self.len().trailing_zeros()
    }

    /// Host memory of so many, beside the page's own.
    fn bytes_of(count: usize) -> usize {
        if count <= FEW { 0 } else { heap::taken(count * size_of::<u32>()) }
    }

    fn bytes(&self) -> usize {
        Self::bytes_of(self.len())
    }
}

impl Deref for Cells {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Self::Few(cells) => cells,
            Self::Many(cells) => cells,
        }
    }
}

impl DerefMut for Cells {
    fn deref_mut(&mut self) -> &mut [u32] {
        match self {
            Self::Few(cells) => cells,
            Self::Many(cells) => cells,
        }
    }
}

impl Page {
    #[inline]
    fn shift(&self) -> u32 {
        self.cells.shift()
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What starts in the cell of this offset.
    #[inline]
    pub fn at(&self, offset: u16) -> u32 {
        self.cells.get(usize::from(offset >> self.shift())).copied().unwrap_or(NOTHING)
    }

    /// Whether certainly nothing starts behind the cell of this offset and before `end`, both in
    /// bytes from the start of the page.
    #[inline]
    pub fn is_empty_behind(&self, offset: u16, end: u64) -> bool {
        let shift = self.shift();
        let cells = usize::from(offset >> shift) + 1..=(end.saturating_sub(1) >> shift) as usize;
        end <= PAGE_SIZE
            && self.cells[..].get(cells).is_some_and(|all| all.iter().all(|id| *id == NOTHING))
    }

    /// What starts in the cell of this offset, and in those before it, the last first.
    pub fn up_to(&self, offset: u16) -> impl Iterator<Item = u32> {
        let last = usize::from(offset >> self.shift());
        let mut blocks = self.used & (u32::MAX >> (BLOCKS - 1 - block(offset)));
        let blocks = iter::from_fn(move || {
            let block = blocks.checked_ilog2()?;
            blocks ^= 1 << block;
            Some(block)
        });
        let cells = blocks.flat_map(move |block| {
            let Range { start, end } = self.cells_of(block);
            self.cells.get(start..end.min(last + 1)).unwrap_or_default().iter().rev()
        });
        cells.copied().filter(|id| *id != NOTHING)
    }

    /// The cells that begin in a block, or the one that it lies in.
    fn cells_of(&self, block: u32) -> Range<usize> {
        let first = block << BLOCK_SHIFT;
        let last = first + (1 << BLOCK_SHIFT) - 1;
        (first >> self.shift()) as usize..(last >> self.shift()) as usize + 1
    }

    /// What starts in the cell of this offset, and in those behind it, the first first.
    pub fn from(&self, offset: u16) -> impl Iterator<Item = u32> {
        let cells = self.cells.get(usize::from(offset >> self.shift())..).unwrap_or_default();
        cells.iter().copied().filter(|id| *id != NOTHING)
    }
}

/// Host memory of a tree's first node of regions, and the most that a region adds: a node holds 5
/// at least, and one in six nodes has pointers beside.
const REGION_NODE: usize = heap::taken(11 * 2 * size_of::<u64>() + 16);
const REGION_BYTES: usize = REGION_NODE / 5 + 2 * REGION_NODE / 30 + 1;
/// Pages of a region.
const REGION: u64 = u64::BITS as u64;
/// Bytes of a block of a page, as a power of two, and blocks of a page.
const BLOCK_SHIFT: u32 = PAGE_SHIFT - BLOCKS.ilog2();
const BLOCKS: u32 = u32::BITS;
/// Pages that were found last.
const RECENT: usize = 1024;
/// Most cells of a page: one a byte.
const MOST_CELLS: usize = PAGE_SIZE as usize;

/// All pages in which objects start.
#[derive(Debug)]
pub struct Pages {
    pages: Pool<Page>,
    /// By number. The hash has a random key, so that a guest cannot aim for equal ones.
    index: HashTable<u32>,
    hash: RandomState,
    /// Places of pages that were found last, by the low bits of their numbers.
    recent: Box<[AtomicU32; RECENT]>,
    /// Which pages of a region of 64 there are, a bit for each.
    regions: BTreeMap<u64, u64>,
    /// The page whose last free is the oldest, and the newest.
    oldest: u32,
    newest: u32,
    /// Host memory of all cells.
    cells: usize,
}

impl Default for Pages {
    fn default() -> Self {
        Self {
            pages: Pool::default(),
            index: HashTable::new(),
            hash: RandomState::default(),
            recent: Box::new([const { AtomicU32::new(NO_PLACE) }; RECENT]),
            regions: BTreeMap::new(),
            oldest: NO_PLACE,
            newest: NO_PLACE,
            cells: 0,
        }
    }
}

/// A page's bit in its region.
fn bit(number: u64) -> u64 {
    1 << (number % REGION)
}

/// The block of an offset.
fn block(offset: u16) -> u32 {
    u32::from(offset) >> BLOCK_SHIFT
}

/// The cells of a page whose objects take `bytes` bytes or more.
fn cells_for(bytes: u64) -> usize {
    (PAGE_SIZE >> bytes.clamp(1, PAGE_SIZE).ilog2()) as usize
}

impl Pages {
    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.pages.bytes()
            + heap::of_table(&self.index)
            + usize::from(!self.regions.is_empty()) * REGION_NODE
            + self.regions.len() * REGION_BYTES
            + self.cells
    }

    /// Bytes that [`Pages::add`] adds for a page that is not there; none if it cannot be added.
    pub fn growth(&self, number: u64, bytes: u64) -> Option<usize> {
        let cells = Cells::bytes_of(cells_for(bytes));
        let region = match self.regions.contains_key(&(number / REGION)) {
            true => 0,
            false => usize::from(self.regions.is_empty()) * REGION_NODE + REGION_BYTES,
        };
        Some(self.pages.growth()? + heap::growth_of_table(&self.index) + region + cells)
    }

    /// A page by its place in the table.
    pub fn get(&self, at: u32) -> Option<&Page> {
        self.pages.get(at)
    }

    /// The place of a page, by its number, if anything starts in it.
    #[inline]
    pub fn find(&self, number: u64) -> Option<u32> {
        let recent = self.recent.get(number as usize % RECENT)?.load(Relaxed);
        match self.pages.get(recent) {
            Some(page) if page.number == number => Some(recent),
            _ => self.find_in_index(number),
        }
    }

    /// The place of a page that was not found lately.
    fn find_in_index(&self, number: u64) -> Option<u32> {
        let is_it = |at: &u32| self.pages.get(*at).is_some_and(|page| page.number == number);
        let at = *self.index.find(self.hash.hash_one(number), is_it)?;
        self.recent.get(number as usize % RECENT)?.store(at, Relaxed);
        Some(at)
    }

    /// The page with this number, if anything starts in it.
    #[inline]
    pub fn page(&self, number: u64) -> Option<&Page> {
        self.get(self.find(number)?)
    }

    /// The last page before `number` in which anything starts, but not before `first`.
    pub fn last_between(&self, first: u64, number: u64) -> Option<u64> {
        let region = number / REGION;
        let below =
            self.regions.get(&region).map_or(0, |pages| pages & bit(number).wrapping_sub(1));
        let (region, pages) = match below {
            0 => self.regions.range(first / REGION..region).next_back().map(|(r, p)| (*r, *p))?,
            pages => (region, pages),
        };
        Some(region * REGION + u64::from(pages.ilog2())).filter(|number| *number >= first)
    }

    /// Adds a page, which is not there, for an object of `bytes` bytes.
    pub fn add(&mut self, number: u64, bytes: u64) -> u32 {
        let cells = Cells::new(cells_for(bytes));
        self.cells += cells.bytes();
        let (older, newer) = (NO_PLACE, NO_PLACE);
        let page = Page { number, cells, used: 0, older, newer, objects: 0, freed: 0 };
        let at = self.pages.insert(page);
        let (pages, state) = (&self.pages, &self.hash);
        let hash_of = |at: &u32| pages.get(*at).map_or(0, |page| state.hash_one(page.number));
        self.index.insert_unique(state.hash_one(number), at, hash_of);
        *self.regions.entry(number / REGION).or_default() |= bit(number);
        at
    }

    /// Bytes that [`Pages::refine`] adds so that an object at `offset` has a cell of its own beside
    /// what starts at `other`, in the same cell.
    pub fn refined(&self, at: u32, offset: u16, other: u16) -> usize {
        let Some(page) = self.get(at) else { return 0 };
        Cells::bytes_of(Self::finer(offset, other)).saturating_sub(page.cells.bytes())
    }

    /// So many cells have these offsets in different ones.
    fn finer(offset: u16, other: u16) -> usize {
        let differ = (offset ^ other).max(1).ilog2();
        (MOST_CELLS >> differ).min(MOST_CELLS)
    }

    /// Cuts a page into more cells; see [`Pages::refined`]. `offset_of` is where an object starts.
    pub fn refine(&mut self, at: u32, offset: u16, other: u16, offset_of: impl Fn(u32) -> u16) {
        let Some(page) = self.pages.get_mut(at) else { return };
        let finer = Cells::new(Self::finer(offset, other));
        self.cells += finer.bytes();
        let old = std::mem::replace(&mut page.cells, finer);
        self.cells -= old.bytes();
        let shift = page.shift();
        for id in old.iter().copied().filter(|id| *id != NOTHING) {
            if let Some(cell) = page.cells.get_mut(usize::from(offset_of(id) >> shift)) {
                *cell = id;
            }
        }
    }

    /// An object, `is_freed` or not, starts in the page at `offset`, whose cell is free.
    pub fn put(&mut self, at: u32, offset: u16, object: u32, is_freed: bool) {
        let Some(page) = self.pages.get_mut(at) else { return };
        let shift = page.shift();
        if let Some(cell) = page.cells.get_mut(usize::from(offset >> shift)) {
            *cell = object;
            page.objects += 1;
            page.used |= 1 << block(offset);
        }
        if is_freed {
            self.freed(at);
        }
    }

    /// What starts at `offset` is forgotten. The page goes with its last object.
    pub fn take(&mut self, at: u32, offset: u16, is_freed: bool) {
        if is_freed {
            self.live(at);
        }
        let Some(page) = self.pages.get_mut(at) else { return };
        let shift = page.shift();
        if let Some(cell) = page.cells.get_mut(usize::from(offset >> shift)) {
            *cell = NOTHING;
            page.objects -= 1;
            let cells = page.cells.get(page.cells_of(block(offset))).unwrap_or_default();
            if cells.iter().all(|id| *id == NOTHING) {
                page.used &= !(1 << block(offset));
            }
        }
        if page.objects == 0 {
            self.remove(at);
        }
    }

    fn remove(&mut self, at: u32) {
        let Some(page) = self.pages.remove(at) else { return };
        self.cells -= page.cells.bytes();
        if let Entry::Occupied(mut region) = self.regions.entry(page.number / REGION) {
            *region.get_mut() &= !bit(page.number);
            if *region.get() == 0 {
                region.remove();
            }
        }
        if let Ok(entry) =
            self.index.find_entry(self.hash.hash_one(page.number), |other| *other == at)
        {
            entry.remove();
        }
    }

    /// An object in a page was freed, later than all others.
    pub fn freed(&mut self, at: u32) {
        let Some(page) = self.pages.get_mut(at) else { return };
        page.freed += 1;
        if self.newest == at {
            return;
        }
        if page.freed > 1 {
            self.unlink(at);
        }
        let before = std::mem::replace(&mut self.newest, at);
        if let Some(page) = self.pages.get_mut(at) {
            (page.older, page.newer) = (before, NO_PLACE);
        }
        match self.pages.get_mut(before) {
            Some(page) => page.newer = at,
            None => self.oldest = at,
        }
    }

    /// A freed object in a page is no more, or is live again.
    pub fn live(&mut self, at: u32) {
        let Some(page) = self.pages.get_mut(at) else { return };
        page.freed -= 1;
        if page.freed == 0 {
            self.unlink(at);
        }
    }

    /// Takes a page out of those with freed objects.
    fn unlink(&mut self, at: u32) {
        let Some(page) = self.pages.get_mut(at) else { return };
        let (older, newer) = (page.older, page.newer);
        (page.older, page.newer) = (NO_PLACE, NO_PLACE);
        match self.pages.get_mut(older) {
            Some(page) => page.newer = newer,
            None => self.oldest = newer,
        }
        match self.pages.get_mut(newer) {
            Some(page) => page.older = older,
            None => self.newest = older,
        }
    }

    /// The page whose last free is the longest ago.
    pub fn oldest(&self) -> Option<&Page> {
        self.get(self.oldest)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    impl Pages {
        /// The numbers of all pages, rising.
        fn numbers(&self) -> impl Iterator<Item = u64> {
            let of = |(region, pages): (&u64, &u64)| {
                let (first, pages) = (region * REGION, *pages);
                (first..first + REGION).filter(move |number| pages & bit(*number) != 0)
            };
            self.regions.iter().flat_map(of)
        }

        /// All objects and their pages' numbers, by rising address.
        pub fn ids(&self) -> impl Iterator<Item = (u32, u64)> {
            self.numbers()
                .filter_map(|number| self.page(number))
                .flat_map(|page| page.from(0).map(|id| (id, page.number)))
        }

        /// Panics unless its parts agree.
        pub fn checked(&self, is_freed: impl Fn(u32) -> bool) {
            assert_eq!(self.numbers().count(), self.pages.len());
            assert!(self.regions.values().all(|pages| *pages != 0));
            assert_eq!(self.index.len(), self.pages.len());
            let (mut with_freed, mut cells) = (0, 0);
            for number in self.numbers() {
                let page = self.page(number).expect("it is in the index");
                assert_eq!(page.from(0).count(), usize::from(page.objects));
                assert_eq!(page.from(0).filter(|id| is_freed(*id)).count(), page.freed.into());
                assert!(page.objects > 0);
                let blocks = (0..BLOCKS).filter(|block| page.used & 1 << block != 0);
                let in_blocks = blocks.flat_map(|block| &page.cells[page.cells_of(block)]);
                let starting: BTreeSet<_> = in_blocks.filter(|id| **id != NOTHING).collect();
                assert_eq!(starting.len(), usize::from(page.objects), "blocks are marked");
                with_freed += usize::from(page.freed > 0);
                cells += page.cells.bytes();
            }
            assert_eq!(cells, self.cells);
            let (mut at, mut before) = (self.oldest, NO_PLACE);
            while let Some(page) = self.get(at) {
                assert!(page.freed > 0 && page.older == before);
                (before, at) = (at, page.newer);
                with_freed -= 1;
            }
            assert_eq!((before, with_freed), (self.newest, 0));
        }
    }

    fn cells(pages: &Pages, at: u32) -> usize {
        pages.get(at).expect("a page").cells.len()
    }

    #[test]
    fn cells_are_as_small_as_need_be() {
        for (bytes, cells) in
            [(0, 4096), (1, 4096), (8, 512), (63, 128), (64, 64), (96, 64), (4096, 1), (1 << 40, 1)]
        {
            assert_eq!(cells_for(bytes), cells, "{bytes}");
        }
        let mut pages = Pages::default();
        let at = pages.add(5, 96);
        let offsets = [0u16, 96, 192, 100];
        pages.put(at, 0, 0, false);
        pages.put(at, 96, 1, true);
        pages.put(at, 192, 2, false);
        assert_eq!(cells(&pages, at), 64);
        // 100 is in the cell of 96, and 4 bytes behind.
        assert_eq!(pages.get(at).expect("a page").at(100), 1);
        let before = pages.bytes();
        let growth = pages.refined(at, 100, 96);
        pages.refine(at, 100, 96, |id| offsets[id as usize]);
        assert_eq!((pages.bytes() - before, cells(&pages, at)), (growth, 1024));
        pages.put(at, 100, 3, true);
        pages.checked(|id| id % 2 == 1);
        let page = pages.page(5).expect("a page");
        assert_eq!(page.from(97).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(page.up_to(191).collect::<Vec<_>>(), [3, 1, 0]);
        assert!(pages.page(6).is_none());
        for (id, offset) in offsets.into_iter().enumerate() {
            pages.take(at, offset, id % 2 == 1);
        }
        assert!(pages.find(5).is_none());
    }

    #[test]
    fn the_page_of_the_oldest_free_is_known() {
        let mut pages = Pages::default();
        let at: Vec<_> = (0..4).map(|number| pages.add(number, 64)).collect();
        for at in &at {
            pages.put(*at, 0, 0, false);
        }
        let oldest = |pages: &Pages| pages.oldest().map(|page| page.number);
        assert_eq!(oldest(&pages), None);
        for page in [2, 0, 1, 2, 3, 3] {
            pages.freed(at[page]);
        }
        assert_eq!(oldest(&pages), Some(0));
        pages.live(at[0]);
        assert_eq!(oldest(&pages), Some(1));
        pages.freed(at[1]);
        assert_eq!(oldest(&pages), Some(2));
        pages.live(at[2]);
        assert_eq!(oldest(&pages), Some(2), "it has another");
        pages.live(at[3]);
        pages.live(at[3]);
        pages.live(at[2]);
        pages.live(at[1]);
        assert_eq!(oldest(&pages), Some(1));
        pages.live(at[1]);
        assert_eq!(oldest(&pages), None);
    }
}
