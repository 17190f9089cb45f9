//! The page tables of the check shadow, for kernels whose compiler checks inline.
//!
//! `umbra_shadow::group` tells how the check shadow works, and `umbra_shadow::abi::check_shadow`
//! where it is. Here are the tables: the guest puts an entry of its top-level table to each slot
//! ([`CheckTables::top_level`]), and changes nothing but entries of the last level.
//!
//! - The entries of the last level are one array by group, as the page shadow is one by page. A
//!   table of them serves 16 MiB of keys. All aliases of that memory use the same table, so the
//!   addresses of a region are congruent to its keys modulo 16 MiB.
//! - Where there is no region, all tables are the same three, which lead to the pattern page of
//!   accessible memory.
//! - The windows are mapped beside, in large pages.

use umbra_shadow::abi::check_shadow::{
    BYTE_WINDOW, CHECK_SLOT, CHECK_SLOTS, ENTRY_WINDOW, PAGE_WINDOW, TOP_LEVEL_SHIFT,
    check_address, slot_of,
};
use umbra_shadow::codes::{PAGE_SIZE, SHADOW_PER_PAGE, UNKNOWN};
use umbra_shadow::group::{Entry, GROUP_SHIFT, PAGES};

use super::error::ShadowError;
use super::layout::{LARGE_PAGE, Layout, Window};
use super::mapping::Mapping;
use super::memslots::Memslots;

/// Entries of a page table.
const ENTRIES: u64 = 512;
/// Bytes of checked memory whose entries are in one table.
const TABLE_COVERS: u64 = ENTRIES << GROUP_SHIFT;

/// Bits of an entry that points to a table: present, writable, accessed (Intel SDM volume 3, table
/// 4-19).
const TABLE: u64 = 1 << 0 | 1 << 1 | 1 << 5;
/// Bits of one that maps a large page: also dirty, large, global, and not executable (table 4-18).
const LARGE: u64 = TABLE | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 63;
/// The address in an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The tables that all memory without a region shares: of the last level, and the two above.
const NO_REGION: [u64; 3] = [0, 1, 2];

/// Why a region is not in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Its addresses are not congruent to its keys.
    #[error("a region at {va:#x} has memory from {key:#x} on: not the same modulo 16 MiB")]
    Congruence {
        /// Virtual start.
        va: u64,
        /// The key of its start.
        key: u64,
    },
    /// Another region has memory in the same 16 MiB, or the windows are there.
    #[error("a region at {va:#x} shares 16 MiB with other memory, or lies in the check shadow")]
    Shared {
        /// An address of the region.
        va: u64,
    },
    /// There are too many, or too large ones.
    #[error("there is no room for the tables of all regions")]
    Full,
}

/// Memory of a region: `bytes` (not 0) from `va` on, with keys from `key` on.
#[derive(Clone, Copy, Debug)]
pub struct CheckedRegion {
    /// Virtual start.
    pub va: u64,
    /// Bytes; the end does not wrap.
    pub bytes: u64,
    /// The key of the start.
    pub key: u64,
}

/// All tables of a guest.
#[derive(Debug)]
pub(super) struct CheckTables {
    windows: [Window; 3],
    _patterns: Mapping,
    tables: Mapping,
    /// The memslot of these.
    memslot: u32,
    /// Tables in use.
    used: u64,
    entries: Mapping,
    /// Which tables of the last level are filled.
    filled: Vec<bool>,
    /// The entries of the guest's top-level table, from [`CHECK_SLOT`] on.
    top: [u64; CHECK_SLOTS as usize],
}

impl CheckTables {
    /// Tables without a region. `has_page` tells whether there is a page window.
    pub(super) fn new(
        layout: &Layout,
        has_page: bool,
        memslots: &mut dyn Memslots,
    ) -> Result<Self, ShadowError> {
        let windows = [layout.patterns, layout.tables, layout.entries];
        let reserve = |window: Window| {
            let bytes = window.bytes;
            Mapping::new(bytes).map_err(|source| ShadowError::Reserve { bytes, source })
        };
        let [patterns, tables, entries] = windows.map(reserve);
        let (mut patterns, tables, entries) = (patterns?, tables?, entries?);
        fill_patterns(&mut patterns);
        show(&patterns, layout.patterns, true, memslots)?;
        show(&entries, layout.entries, false, memslots)?;
        let memslot = show(&tables, layout.tables, false, memslots)?;
        let mut this = Self {
            windows,
            _patterns: patterns,
            tables,
            memslot,
            used: NO_REGION.len() as u64,
            filled: vec![false; (layout.entries.bytes / PAGE_SIZE) as usize],
            entries,
            top: [0; CHECK_SLOTS as usize],
        };
        this.fill_table(NO_REGION[0], Entry::pattern(layout.patterns.gpa, 0).bits());
        for level in 1..NO_REGION.len() {
            this.fill_table(NO_REGION[level], this.link(NO_REGION[level - 1]));
        }
        this.top = [this.link(NO_REGION[2]); CHECK_SLOTS as usize];
        let page = if has_page { layout.page.bytes } else { 0 };
        let byte = layout.byte;
        this.map_window(BYTE_WINDOW, byte.gpa, byte.bytes)?;
        this.map_window(PAGE_WINDOW, layout.page.gpa, page)?;
        this.map_window(ENTRY_WINDOW, layout.entries.gpa, layout.entries.bytes)?;
        Ok(this)
    }

    /// The guest-physical address of the pattern pages.
    pub(super) fn patterns(&self) -> u64 {
        self.windows[0].gpa
    }

    /// The entry for a slot of the guest's top-level table; 0 if it is none of these.
    pub(super) fn top_level(&self, slot: u16) -> u64 {
        let slot = slot.checked_sub(CHECK_SLOT);
        slot.and_then(|slot| self.top.get(usize::from(slot))).copied().unwrap_or(0)
    }

    /// Adds a region. `entry_of` makes the entry of a group that was in no region so far.
    ///
    /// If the guest has used the tables, [`Self::renew`] has to follow.
    pub(super) fn add(
        &mut self,
        region: CheckedRegion,
        entry_of: impl Fn(u64) -> Entry,
    ) -> Result<(), TableError> {
        let CheckedRegion { va, bytes, key } = region;
        if va % TABLE_COVERS != key % TABLE_COVERS {
            return Err(TableError::Congruence { va, key });
        }
        let before = va % TABLE_COVERS;
        for unit in 0..(before + bytes).div_ceil(TABLE_COVERS) {
            let (va, table) =
                (va - before + unit * TABLE_COVERS, (key - before) / TABLE_COVERS + unit);
            let filled = self.filled.get_mut(table as usize).ok_or(TableError::Full)?;
            if !std::mem::replace(filled, true) {
                for group in table * ENTRIES..(table + 1) * ENTRIES {
                    store(&mut self.entries, group, entry_of(group).bits());
                }
            }
            self.add_table(va, (self.windows[2].gpa + table * PAGE_SIZE) | TABLE)?;
        }
        Ok(())
    }

    /// Makes the host forget what it knows of the tables: one that has tables of its own for the
    /// guest's does not see that the VMM has changed them. Every vCPU stands still.
    pub(super) fn renew(&mut self, memslots: &mut dyn Memslots) -> Result<(), ShadowError> {
        let window = self.windows[1];
        let gpa = window.gpa;
        memslots.unmap(self.memslot).map_err(|source| ShadowError::Memslot { gpa, source })?;
        self.memslot = show(&self.tables, window, false, memslots)?;
        Ok(())
    }

    /// Puts a table of the last level, whose entry is `new`, where the check shadow of `va` is.
    fn add_table(&mut self, va: u64, new: u64) -> Result<(), TableError> {
        let at = check_address(va);
        let windows = slot_of(BYTE_WINDOW)..=slot_of(ENTRY_WINDOW);
        if va < 0xffff_8000_0000_0000 || windows.contains(&slot_of(at)) {
            return Err(TableError::Shared { va });
        }
        let place = self.place(at, self.link(NO_REGION[0]), NO_REGION)?;
        match self.load(place) {
            Some(old) if old == new => Ok(()),
            Some(old) if old == self.link(NO_REGION[0]) => {
                store(&mut self.tables, place, new);
                Ok(())
            }
            _ => Err(TableError::Shared { va }),
        }
    }

    /// Maps a window at `at`, in large pages. Both, and `gpa`, are multiples of these.
    fn map_window(&mut self, at: u64, gpa: u64, bytes: u64) -> Result<(), ShadowError> {
        for offset in (0..bytes).step_by(LARGE_PAGE as usize) {
            let place = self.place(at + offset, 0, [0; 3]);
            let Ok(place) = place else {
                let Window { gpa, bytes: len } = self.windows[1];
                return Err(ShadowError::OutsideWindow { gpa, len });
            };
            store(&mut self.tables, place, (gpa + offset) | LARGE);
        }
        Ok(())
    }

    /// The place of the entry for 2 MiB at `at`, among all entries in tables. Makes the two tables
    /// above that, in the place of those in `shared`; new ones at first have `empty` in the lower
    /// level, and the shared one in the upper.
    fn place(&mut self, at: u64, empty: u64, shared: [u64; 3]) -> Result<u64, TableError> {
        let top = usize::from(slot_of(at) - CHECK_SLOT);
        let above = if empty == 0 { 0 } else { self.link(shared[1]) };
        if self.top[top] == self.link(NO_REGION[2]) {
            self.top[top] = self.new_table(above)?;
        }
        let upper = self.table_at(self.top[top]) * ENTRIES + (at >> 30) % ENTRIES;
        let mut entry = self.load(upper).unwrap_or(0);
        if entry == above {
            entry = self.new_table(empty)?;
            store(&mut self.tables, upper, entry);
        }
        Ok(self.table_at(entry) * ENTRIES + (at >> 21) % ENTRIES)
    }

    /// The entry at a place among all entries in tables.
    fn load(&self, place: u64) -> Option<u64> {
        self.tables.load_u64(place.checked_mul(8)?)
    }

    /// Takes a table and fills it. Returns the entry that points to it.
    fn new_table(&mut self, fill: u64) -> Result<u64, TableError> {
        let table = self.used;
        if (table + 1) * PAGE_SIZE > self.windows[1].bytes {
            return Err(TableError::Full);
        }
        self.used += 1;
        self.fill_table(table, fill);
        Ok(self.link(table))
    }

    fn fill_table(&mut self, table: u64, entry: u64) {
        for at in table * ENTRIES..(table + 1) * ENTRIES {
            store(&mut self.tables, at, entry);
        }
    }

    /// The entry that points to a table.
    fn link(&self, table: u64) -> u64 {
        (self.windows[1].gpa + table * PAGE_SIZE) | TABLE
    }

    /// The table that an entry points to. Only the guest writes others than [`Self::link`] made,
    /// and loses by it: what is beyond all tables is not stored.
    fn table_at(&self, entry: u64) -> u64 {
        (entry & FRAME).wrapping_sub(self.windows[1].gpa) / PAGE_SIZE
    }

    /// Host memory of patterns and tables that is resident, in bytes.
    pub(super) fn resident_bytes(&self) -> u64 {
        let filled = self.filled.iter().filter(|filled| **filled).count() as u64;
        self.windows[0].bytes + (self.used + filled) * PAGE_SIZE
    }
}

/// Shows a window to the guest.
fn show(
    mapping: &Mapping,
    window: Window,
    readonly: bool,
    memslots: &mut dyn Memslots,
) -> Result<u32, ShadowError> {
    let Window { gpa, bytes } = window;
    let host = mapping.pointer(0, bytes).ok_or(ShadowError::OutsideWindow { gpa, len: bytes })?;
    memslots.map(gpa, host, bytes, readonly).map_err(|source| ShadowError::Memslot { gpa, source })
}

/// Stores an entry. Nothing happens outside the mapping.
fn store(tables: &mut Mapping, at: u64, entry: u64) {
    let _ = tables.write(at.saturating_mul(8), &entry.to_le_bytes());
}

/// Fills the pattern pages: eighth i of page n is poisoned if bit i of n is set.
fn fill_patterns(patterns: &mut Mapping) {
    for pattern in 0..1u64 << PAGES {
        for page in (0..u64::from(PAGES)).filter(|page| pattern >> page & 1 != 0) {
            patterns.fill(pattern * PAGE_SIZE + page * SHADOW_PER_PAGE, SHADOW_PER_PAGE, UNKNOWN);
        }
    }
}

const _: () = assert!(BYTE_WINDOW.is_multiple_of(1 << TOP_LEVEL_SHIFT));
