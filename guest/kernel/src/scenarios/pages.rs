//! Bugs on whole pages.

use alloc::vec::Vec;

use super::{opaque, read, scenarios, write};
use crate::page;

/// Allocates pages until two are neighbours. Returns the address of the lower one, and all pages
/// but the upper one.
pub fn neighbours() -> Option<(u64, Vec<u64>)> {
    // Sooner or later a larger block is split, whose pages are neighbours.
    let mut pages = Vec::new();
    loop {
        let page = page::alloc(0)?;
        match pages.last() {
            Some(&last) if page == last + 4096 => return Some((last, pages)),
            _ => pages.push(page),
        }
    }
}

scenarios! {
    pagealloc_uaf, "use-after-free Read 1 0", "reads freed pages", {
        let Some(p) = page::alloc(4) else { return };
        page::free(p);
        read(p);
    }

    pagealloc_uaf_write, "use-after-free Write 1 4096", "writes to the second of two freed pages", {
        let Some(p) = page::alloc(1) else { return };
        page::free(p);
        write(p + 4096, 0);
    }

    pagealloc_double_free, "double-free Free 0 0", "frees pages twice", {
        let Some(p) = page::alloc(1) else { return };
        page::free(p);
        page::free(opaque(p));
    }

    pagealloc_invalid_free, "invalid-free Free 0 8", "frees an address inside a page", {
        let Some(p) = page::alloc(0) else { return };
        page::free(opaque(p + 8));
        page::free(p);
    }

    page_crossing_uaf, "use-after-free Read 8 0",
    "reads across the end of a page into a free one", {
        let Some((low, pages)) = neighbours() else { return };
        read(low + 4095);
        page::free(low + 4096);
        // SAFETY: mapped memory; being caught is what this is for.
        opaque(unsafe { (opaque(low + 4092) as *const u64).read_unaligned() });
        pages.into_iter().for_each(page::free);
    }
}
