//! Bugs on whole pages.

use super::{opaque, read, scenarios, write};
use crate::page;

scenarios! {
    pagealloc_uaf, "use-after-free Write 1 0", "writes to a freed page", {
        let Some(p) = page::alloc(2) else { return };
        page::free(p);
        write(p, 0);
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

    page_crossing_uaf, "use-after-free Read 8 0", "reads across the end of a page into a free one", {
        let pages: [_; 32] = core::array::from_fn(|_| page::alloc(0).unwrap_or(0));
        let Some(&low) = pages.iter().find(|&&low| low != 0 && pages.contains(&(low + 4096))) else {
            crate::println!("no two of the pages are neighbours");
            return;
        };
        read(low + 4095);
        page::free(low + 4096);
        // SAFETY: mapped memory; being caught is what this is for.
        opaque(unsafe { (opaque(low + 4092) as *const u64).read_unaligned() });
        pages.into_iter().filter(|&page| page != 0 && page != low + 4096).for_each(page::free);
    }
}
