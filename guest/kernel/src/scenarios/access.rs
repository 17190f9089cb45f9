//! The checks' entry points: at every alignment, and at addresses without memory.

use super::{opaque, read, scenarios};
use crate::page;
use crate::slab::{kfree, kmalloc};

unsafe extern "C" {
    fn __asan_load1_noabort(at: u64);
    fn __asan_load2_noabort(at: u64);
    fn __asan_load4_noabort(at: u64);
    fn __asan_load8_noabort(at: u64);
    fn __asan_load16_noabort(at: u64);
    fn __asan_loadN_noabort(at: u64, n: u64);
    fn __asan_store1_noabort(at: u64);
    fn __asan_store2_noabort(at: u64);
    fn __asan_store4_noabort(at: u64);
    fn __asan_store8_noabort(at: u64);
    fn __asan_store16_noabort(at: u64);
    fn __asan_storeN_noabort(at: u64, n: u64);
}

/// Checks accesses of every size and alignment inside `start..end`.
fn check_inside(start: u64, end: u64) {
    // SAFETY: these look at shadow only.
    unsafe {
        for at in start..end {
            __asan_load1_noabort(at);
            __asan_store1_noabort(at);
            if at + 2 <= end {
                __asan_load2_noabort(at);
                __asan_store2_noabort(at);
            }
            if at + 4 <= end {
                __asan_load4_noabort(at);
                __asan_store4_noabort(at);
            }
            if at + 8 <= end {
                __asan_load8_noabort(at);
                __asan_store8_noabort(at);
            }
            if at + 16 <= end {
                __asan_load16_noabort(at);
                __asan_store16_noabort(at);
            }
            for n in 0..=end - at {
                __asan_loadN_noabort(at, n);
                __asan_storeN_noabort(at, n);
            }
        }
    }
}

scenarios! {
    entry_points_inside, "silent",
    "every check, at every alignment, up to the ends of objects and across pages", {
        for size in [1, 5, 8, 13, 16, 23, 24] {
            let Some(p) = kmalloc(size) else { return };
            check_inside(p, p + size);
            kfree(p);
        }
        let Some(p) = page::alloc(1) else { return };
        check_inside(p + 4084, p + 4108);
        page::free(p);
    }

    entry_points_across_the_end,
    "slab-out-of-bounds Read 2 13;slab-out-of-bounds Read 4 13;slab-out-of-bounds Read 8 13;\
     slab-out-of-bounds Read 16 13;slab-out-of-bounds Write 2 13;slab-out-of-bounds Write 4 13;\
     slab-out-of-bounds Write 8 13;slab-out-of-bounds Write 16 13;slab-out-of-bounds Read 1 13;\
     slab-out-of-bounds Write 3 13",
    "every check, unaligned, by one byte too far", {
        let Some(p) = kmalloc(13) else { return };
        let p = opaque(p);
        // SAFETY: these look at shadow only.
        unsafe {
            __asan_load2_noabort(p + 12);
            __asan_load4_noabort(p + 10);
            __asan_load8_noabort(p + 6);
            __asan_load16_noabort(p - 2 + 2);
            __asan_store2_noabort(p + 12);
            __asan_store4_noabort(p + 10);
            __asan_store8_noabort(p + 6);
            __asan_store16_noabort(p);
            __asan_loadN_noabort(p + 13, 1);
            __asan_storeN_noabort(p + 11, 3);
        }
        kfree(p);
    }

    entry_points_behind_the_end,
    "slab-out-of-bounds Read 2 17;slab-out-of-bounds Read 2 23;slab-out-of-bounds Read 4 17;\
     slab-out-of-bounds Read 4 21;slab-out-of-bounds Read 8 17;slab-out-of-bounds Read 2 16;\
     slab-out-of-bounds Read 4 16;slab-out-of-bounds Read 8 16",
    "every check, unaligned: first where nothing is valid, then by one byte too far", {
        let Some(p) = kmalloc(16) else { return };
        let p = opaque(p);
        // Where nothing is valid, the report shows the exact address that the check reported.
        // SAFETY: these look at shadow only.
        unsafe {
            __asan_load2_noabort(p + 17);
            __asan_load2_noabort(p + 23);
            __asan_load4_noabort(p + 17);
            __asan_load4_noabort(p + 21);
            __asan_load8_noabort(p + 17);
            __asan_load2_noabort(p + 15);
            __asan_load4_noabort(p + 13);
            __asan_load8_noabort(p + 9);
        }
        kfree(p);
    }

    null_pointer, "null-ptr-deref Read 8 -", "checks an access through a null pointer", {
        // SAFETY: looks at shadow only; the fault of that is what this is for.
        unsafe { __asan_load8_noabort(opaque(0x10)) };
    }

    user_memory, "user-memory-access Write 4 -",
    "checks an access to an address of the lower half", {
        // SAFETY: as above.
        unsafe { __asan_store4_noabort(opaque(0x1234_5678_9000)) };
    }

    wild_access, "wild-memory-access Read 1 -",
    "checks an access to an upper-half address that maps nothing", {
        // SAFETY: as above.
        unsafe { __asan_load1_noabort(opaque(0xffff_9000_0000_0123)) };
    }

    beyond_memory, "wild-memory-access Write 8 -;wild-memory-access Read 8 -",
    "writes and reads guest-physical memory that does not exist, through the direct map", {
        // It is mapped: its large page begins with memory, or is one of the first GiB.
        let at = page::end() + 64;
        // SAFETY: mapped, to where nothing is: the write is lost, and the read gives all ones.
        unsafe {
            (opaque(at) as *mut u64).write_volatile(0);
            opaque((opaque(at) as *const u64).read_volatile());
        }
    }

    page_oob_into_free_neighbour, "use-after-free Read 1 0",
    "reads behind a page whose neighbour is free", {
        let Some((low, pages)) = super::pages::neighbours() else { return };
        page::free(low + 4096);
        read(low + 4096);
        pages.into_iter().for_each(page::free);
    }
}
