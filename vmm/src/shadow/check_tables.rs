//! The page tables of the check shadow, for kernels whose compiler checks inline.
//!
//! `umbra_shadow::group` tells how the check shadow works, and `umbra_shadow::abi::check_shadow`
//! where it is. Here are the tables: the guest puts an entry of its top-level table to each slot
//! ([`CheckTables::top_level`]), and changes nothing but entries of the last level.
//!
//! - The entries of the last level are one array by group, as the page shadow is one by page. A
//!   table of them serves 16 MiB of keys. All aliases of that memory use the same table, so the
//!   addresses of a region are congruent to its keys modulo 16 MiB.
//! - Where there is no region, the tables of the two lowest levels are the same two, which lead to
//!   the pattern page of accessible memory.
//! - The windows are mapped beside, in large pages.

use std::collections::BTreeMap;
use std::io;

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

/// The tables that all memory without a region shares: of the last level, and the one above.
const NO_REGION: [u64; 2] = [0, 1];
/// The tables of the top-level slots, one for each, so that the guest's entries never change.
const FIRST_OF_SLOTS: u64 = 2;
const FIRST_FREE: u64 = FIRST_OF_SLOTS + CHECK_SLOTS as u64;

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

/// All tables of a guest. The guest can write to them, so nothing is ever read back.
#[derive(Debug)]
pub(super) struct CheckTables {
    windows: [Window; 3],
    patterns: Mapping,
    tables: Mapping,
    entries: Mapping,
    /// The memslots of these three.
    memslots: [u32; 3],
    /// Tables in use.
    used: u64,
    /// The tables above the last level, by the GiB of addresses that each is for.
    middle: BTreeMap<u64, u64>,
    /// The tables of the last level, by the 2 MiB of addresses that each is for.
    last: BTreeMap<u64, u64>,
    /// Which tables of the last level are filled.
    filled: Vec<bool>,
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
        let mut this = Self {
            windows,
            patterns: patterns?,
            tables: tables?,
            entries: entries?,
            memslots: [0; 3],
            used: FIRST_FREE,
            middle: BTreeMap::new(),
            last: BTreeMap::new(),
            filled: vec![false; (layout.entries.bytes / PAGE_SIZE) as usize],
        };
        fill_patterns(&mut this.patterns);
        this.fill_shared();
        let page = if has_page { layout.page.bytes } else { 0 };
        this.map_window(BYTE_WINDOW, layout.byte.gpa, layout.byte.bytes)?;
        this.map_window(PAGE_WINDOW, layout.page.gpa, page)?;
        this.map_window(ENTRY_WINDOW, layout.entries.gpa, layout.entries.bytes)?;
        // Nobody writes to the patterns.
        this.memslots = [
            show(&this.patterns, layout.patterns, true, memslots)?,
            show(&this.tables, layout.tables, false, memslots)?,
            show(&this.entries, layout.entries, false, memslots)?,
        ];
        Ok(this)
    }

    /// The guest-physical address of the pattern pages.
    pub(super) fn patterns(&self) -> u64 {
        self.windows[0].gpa
    }

    /// The entry for a slot of the guest's top-level table; 0 if it is none of these.
    pub(super) fn top_level(&self, slot: u16) -> u64 {
        let slot = slot.checked_sub(CHECK_SLOT).filter(|slot| *slot < CHECK_SLOTS);
        slot.map_or(0, |slot| self.link(FIRST_OF_SLOTS + u64::from(slot)))
    }

    /// Whether a group's entry points to its own shadow, or is about to.
    pub(super) fn is_real(&self, group: u64) -> bool {
        let bits = group.checked_mul(8).and_then(|at| self.entries.load_u64(at));
        bits.is_some_and(|bits| {
            let entry = Entry::from_bits(bits);
            entry.is_real() || entry.is_busy()
        })
    }

    /// Adds a region, or nothing of it. `entry_of` makes the entry of a group that was in no region
    /// so far.
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
        let units = 0..(before + bytes).div_ceil(TABLE_COVERS);
        let unit = |unit| (va - before + unit * TABLE_COVERS, (key - before) / TABLE_COVERS + unit);
        for (va, table) in units.clone().map(unit) {
            self.make_room(va, table)?;
        }
        for (va, table) in units.map(unit) {
            self.fill_entries(table, &entry_of);
            let at = check_address(va);
            self.last.insert(at / LARGE_PAGE, table);
            let (empty, gpa) = (self.link(NO_REGION[0]), self.windows[2].gpa);
            self.set(at, empty, (gpa + table * PAGE_SIZE) | TABLE)?;
        }
        Ok(())
    }

    /// Makes the host forget what it knows of the tables: one that has tables of its own for the
    /// guest's does not see that the VMM has changed them. Every vCPU stands still.
    pub(super) fn renew(&mut self, memslots: &mut dyn Memslots) -> Result<(), ShadowError> {
        let window = self.windows[1];
        hide(self.memslots[1], window, memslots)?;
        self.memslots[1] = show(&self.tables, window, false, memslots)?;
        Ok(())
    }

    /// Takes all of it from the guest.
    pub(super) fn remove(self, memslots: &mut dyn Memslots) -> Result<(), ShadowError> {
        let mut all = self.memslots.into_iter().zip(self.windows);
        all.try_for_each(|(memslot, window)| hide(memslot, window, memslots))
    }

    /// Checks that a table of the last level may be where the check shadow of `va` is, and makes
    /// the table above.
    fn make_room(&mut self, va: u64, table: u64) -> Result<(), TableError> {
        let at = check_address(va);
        let windows = slot_of(BYTE_WINDOW)..=slot_of(ENTRY_WINDOW);
        let other = self.last.get(&(at / LARGE_PAGE)).is_some_and(|last| *last != table);
        if other || va < 0xffff_8000_0000_0000 || windows.contains(&slot_of(at)) {
            return Err(TableError::Shared { va });
        }
        if table >= self.filled.len() as u64 {
            return Err(TableError::Full);
        }
        let empty = self.link(NO_REGION[0]);
        self.middle_table(at, empty).map(drop)
    }

    /// Fills a table of the last level, if that was not done before.
    fn fill_entries(&mut self, table: u64, entry_of: &impl Fn(u64) -> Entry) {
        let Some(filled) = self.filled.get_mut(table as usize) else { return };
        if !std::mem::replace(filled, true) {
            for group in table * ENTRIES..(table + 1) * ENTRIES {
                store(&mut self.entries, group, entry_of(group).bits());
            }
        }
    }

    /// Maps a window at `at`, in large pages. Both, and `gpa`, are multiples of these.
    fn map_window(&mut self, at: u64, gpa: u64, bytes: u64) -> Result<(), ShadowError> {
        for offset in (0..bytes).step_by(LARGE_PAGE as usize) {
            self.set(at + offset, 0, (gpa + offset) | LARGE)?;
        }
        Ok(())
    }

    /// Sets the entry for 2 MiB of addresses at `at`, in the table that [`Self::middle_table`] has.
    fn set(&mut self, at: u64, empty: u64, entry: u64) -> Result<(), TableError> {
        let table = self.middle_table(at, empty)?;
        store(&mut self.tables, table * ENTRIES + (at / LARGE_PAGE) % ENTRIES, entry);
        Ok(())
    }

    /// The table above the last level for the GiB of addresses at `at`. A new one has entries
    /// `empty`.
    fn middle_table(&mut self, at: u64, empty: u64) -> Result<u64, TableError> {
        let gib = at >> 30;
        if let Some(table) = self.middle.get(&gib) {
            return Ok(*table);
        }
        let table = self.used;
        if (table + 1) * PAGE_SIZE > self.windows[1].bytes {
            return Err(TableError::Full);
        }
        self.used += 1;
        self.fill_table(table, empty);
        self.middle.insert(gib, table);
        let of_slot = FIRST_OF_SLOTS + u64::from(slot_of(at) - CHECK_SLOT);
        let link = self.link(table);
        store(&mut self.tables, of_slot * ENTRIES + gib % ENTRIES, link);
        Ok(table)
    }

    /// Fills the tables that are there from the start.
    fn fill_shared(&mut self) {
        let windows = slot_of(BYTE_WINDOW)..=slot_of(ENTRY_WINDOW);
        self.fill_table(NO_REGION[0], Entry::pattern(self.patterns(), 0).bits());
        self.fill_table(NO_REGION[1], self.link(NO_REGION[0]));
        for slot in 0..CHECK_SLOTS {
            let is_window = windows.contains(&(CHECK_SLOT + slot));
            let empty = if is_window { 0 } else { self.link(NO_REGION[1]) };
            self.fill_table(FIRST_OF_SLOTS + u64::from(slot), empty);
        }
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

    /// Host memory of patterns and tables, in bytes. It only grows.
    pub(super) fn resident_bytes(&self) -> io::Result<u64> {
        [&self.patterns, &self.tables, &self.entries].into_iter().map(Mapping::resident_bytes).sum()
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

/// Takes a window from the guest.
fn hide(memslot: u32, window: Window, memslots: &mut dyn Memslots) -> Result<(), ShadowError> {
    memslots.unmap(memslot).map_err(|source| ShadowError::Memslot { gpa: window.gpa, source })
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
