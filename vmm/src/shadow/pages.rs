//! The page map: the state of each part of guest memory at one moment, in few cells.

use std::ops::Range;

use umbra_report::{PageCounts, PageMap};
use umbra_shadow::{
    Shadow,
    codes::{
        FREE_PAGE, GRANULE_SHIFT, PAGE_BUSY, PAGE_BYTES, PAGE_SHIFT, PAGE_VALID, SHADOW_PER_PAGE,
    },
};

use super::{memory::ShadowBacking, windows::Windows};

/// Classifies all pages of `ram` (guest-physical, in order) into at most `max` cells. Safe while
/// vCPUs run; their changes meanwhile may be missing.
///
/// With page shadow it reads one byte per page; a full shadow is read as a whole.
pub fn page_map(windows: &Windows, ram: &[Range<u64>], max: usize) -> PageMap {
    let shadow = windows.model().memory();
    let pages = ram.last().map_or(0, |last| last.end >> PAGE_SHIFT);
    let pages_per_cell = pages.div_ceil(max.max(1) as u64).max(1).next_power_of_two();
    let mut cells = vec![PageCounts::default(); pages.div_ceil(pages_per_cell) as usize];
    for range in ram {
        for page in range.start >> PAGE_SHIFT..range.end >> PAGE_SHIFT {
            if let Some(cell) = cells.get_mut((page / pages_per_cell) as usize) {
                *shadow.class_of(page).counter(cell) += 1;
            }
        }
    }
    let mut total = PageCounts::default();
    cells.iter().for_each(|cell| total.add(cell));
    PageMap { pages_per_cell, cells, total }
}

/// State of a page.
#[derive(Clone, Copy)]
enum Class {
    Valid,
    Free,
    Bytes,
    Poisoned,
}

impl Class {
    fn counter(self, counts: &mut PageCounts) -> &mut u64 {
        match self {
            Self::Valid => &mut counts.valid,
            Self::Free => &mut counts.free,
            Self::Bytes => &mut counts.bytes,
            Self::Poisoned => &mut counts.poisoned,
        }
    }
}

impl ShadowBacking {
    fn class_of(&self, page: u64) -> Class {
        let Some(mapping) = &self.page else { return self.class_by_bytes(page) };
        match mapping.load(page) {
            Some(PAGE_VALID) => Class::Valid,
            Some(PAGE_BYTES | PAGE_BUSY) => Class::Bytes,
            Some(FREE_PAGE) => Class::Free,
            _ => Class::Poisoned,
        }
    }

    /// In a full shadow: what a page's 512 bytes amount to.
    fn class_by_bytes(&self, page: u64) -> Class {
        /// The highest bit of each byte: poison codes have it.
        const POISON: u64 = 0x8080_8080_8080_8080;
        let first = page << (PAGE_SHIFT - GRANULE_SHIFT);
        let (mut all, mut any) = (u64::MAX, 0);
        for at in (first..first + SHADOW_PER_PAGE).step_by(8) {
            let word = self.byte.load_u64(at).unwrap_or_default();
            (all, any) = (all & word, any | word);
        }
        match (all, any) {
            (_, 0) => Class::Valid,
            (u64::MAX, _) => Class::Free,
            (all, _) if all & POISON == POISON => Class::Poisoned,
            _ => Class::Bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use umbra_shadow::codes::{LARGE_REDZONE, SLAB_REDZONE};

    use super::*;
    use crate::shadow::{MemslotError, Memslots, Mode, Notify, WindowsConfig};

    struct NoMachine;

    impl Memslots for NoMachine {
        fn map(&mut self, _: u64, _: *mut u8, _: u64, _: bool) -> Result<u32, MemslotError> {
            Ok(0)
        }

        fn unmap(&mut self, _: u32) -> Result<(), MemslotError> {
            Ok(())
        }
    }

    #[test]
    fn both_shadows_give_the_same_map() {
        let ram = vec![0..0x10_0000, 0x20_0000..0x30_0000];
        let maps = [Mode::PerPage, Mode::Full].map(|mode| {
            let config =
                WindowsConfig { ram: ram.clone(), mode, notify: Notify::Sync, limit: None };
            let mut windows = Windows::new(&config, &mut NoMachine).expect("3 MiB of guest memory");
            for (gpa, len, code) in [
                (0x1000, 0x2000, FREE_PAGE),
                (0x5000, 0x1000, LARGE_REDZONE),
                (0x7ff8, 8, SLAB_REDZONE),
                (0x2f_f008, 8, SLAB_REDZONE),
            ] {
                windows.poison(gpa, len, code, &mut NoMachine).expect("inside RAM");
            }
            page_map(&windows, &ram, 100)
        });
        assert_eq!(maps[0], maps[1]);
        let map = &maps[0];
        assert_eq!((map.pages_per_cell, map.cells.len()), (8, 96));
        assert_eq!(map.cells[0], PageCounts { valid: 4, free: 2, bytes: 1, poisoned: 1 });
        assert_eq!(map.cells[1], PageCounts { valid: 8, ..PageCounts::default() });
        assert_eq!(map.cells[32].total(), 0, "the hole");
        assert_eq!(map.cells[95].bytes, 1);
        assert_eq!(map.total, PageCounts { valid: 507, free: 2, bytes: 2, poisoned: 1 });
    }
}
