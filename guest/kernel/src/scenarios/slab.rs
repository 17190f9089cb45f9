//! Bugs on slab objects and large allocations. Names follow Linux's KASAN test suite (`mm/kasan/kasan_test.c`) where
//! it has the same case.

use super::{opaque, read, scenarios, write};
use crate::slab::{Cache, kfree, kmalloc, krealloc};

unsafe extern "C" {
    fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8;
}

scenarios! {
    kmalloc_oob_right, "slab-out-of-bounds Write 1 115;slab-out-of-bounds Write 1 120;slab-out-of-bounds Read 1 128",
    "writes behind a 115-byte object: at its end, a granule further, and past its slot", {
        let Some(p) = kmalloc(115) else { return };
        write(p + 115, b'x');
        write(p + 120, b'y');
        read(p + 128);
        kfree(p);
    }

    kmalloc_oob_left, "slab-out-of-bounds Read 1 -1", "reads the byte before an object", {
        let Some(first) = kmalloc(24) else { return };
        let Some(p) = kmalloc(24) else { return };
        let p = p.max(first);
        read(p - 1);
        kfree(first);
        kfree(if p == first { return } else { p });
    }

    kmalloc_large_oob_right, "slab-out-of-bounds Write 1 3840", "writes behind a large object of a slab", {
        let Some(p) = kmalloc(4096 - 256) else { return };
        write(p + 4096 - 256, 0);
        kfree(p);
    }

    kmalloc_pagealloc_oob_right, "slab-out-of-bounds Write 1 4106;slab-out-of-bounds Write 1 8191",
    "writes behind an allocation that has pages of its own", {
        let Some(p) = kmalloc(4096 + 10) else { return };
        write(p + 4105, 0);
        write(p + 4106, 0);
        write(p + 8191, 0);
        kfree(p);
    }

    kmalloc_uaf, "slab-use-after-free Write 1 8", "writes to a freed object", {
        let Some(p) = kmalloc(10) else { return };
        kfree(p);
        write(p + 8, b'x');
    }

    kmalloc_uaf_read8, "slab-use-after-free Read 8 16", "reads eight bytes of a freed object", {
        let Some(p) = kmalloc(64) else { return };
        kfree(p);
        // SAFETY: mapped memory; being caught is what this is for.
        unsafe { (opaque(p + 16) as *const u64).read_volatile() };
    }

    kmem_cache_oob, "slab-out-of-bounds Read 1 200", "reads behind an object of a cache of its own", {
        let Some(cache) = Cache::new("test_cache", 200) else { return };
        let Some(p) = cache.alloc() else { return };
        read(p + 200);
        cache.free(p);
    }

    kmem_cache_double_free, "double-free Free 0 0", "frees an object twice", {
        let Some(keep) = kmalloc(200) else { return };
        let Some(p) = kmalloc(200) else { return };
        kfree(p);
        kfree(opaque(p));
        kfree(keep);
    }

    kmem_cache_invalid_free, "invalid-free Free 0 1", "frees an address inside an object", {
        let Some(p) = kmalloc(200) else { return };
        kfree(opaque(p + 1));
        kfree(p);
    }

    krealloc_less_oob, "slab-out-of-bounds Write 1 201", "writes where an object reached before it shrank", {
        let Some(p) = kmalloc(235) else { return };
        let Some(p) = krealloc(p, 235, 201) else { return };
        write(p + 200, 0);
        write(p + 201, 0);
        kfree(p);
    }

    kmalloc_memcpy_oob, "slab-out-of-bounds Write 40 32", "copies 40 bytes into an object of 32", {
        let (Some(from), Some(to)) = (kmalloc(64), kmalloc(32)) else { return };
        // SAFETY: a bug on purpose; the checked `memcpy` reports it and copies nothing.
        unsafe { core::ptr::copy_nonoverlapping(opaque(from) as *const u8, opaque(to) as *mut u8, opaque(40)) };
        kfree(from);
        kfree(to);
    }

    kmalloc_memset_oob, "slab-out-of-bounds Write 130 128", "fills 130 bytes of an object of 128", {
        let Some(p) = kmalloc(128) else { return };
        // SAFETY: as above.
        unsafe { core::ptr::write_bytes(opaque(p) as *mut u8, 0, opaque(130)) };
        kfree(p);
    }

    kmalloc_memmove_negative_size, "out-of-bounds Read 18446744073709551614 4", "moves -2 bytes", {
        let Some(p) = kmalloc(64) else { return };
        // SAFETY: a bug on purpose; the checked `memmove` reports it and moves nothing.
        unsafe { memmove(p as *mut u8, opaque(p + 4) as *const u8, opaque(usize::MAX - 1)) };
        kfree(p);
    }

    kmalloc_unaligned_oob, "slab-out-of-bounds Read 8 64", "reads eight bytes across the end of an object, unaligned", {
        let Some(p) = kmalloc(64) else { return };
        // SAFETY: mapped memory; being caught is what this is for.
        opaque(unsafe { (opaque(p + 60) as *const u64).read_unaligned() });
        kfree(p);
    }
}
