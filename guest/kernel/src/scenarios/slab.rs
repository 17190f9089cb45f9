//! Bugs on slab objects. Names follow Linux's KASAN test suite (`mm/kasan/kasan_test.c`) where
//! it has the same case.

use umbra_guest::codes::{PAGE_SHIFT, PAGE_SIZE};

use super::{opaque, read, scenarios, write};
use crate::layout::DIRECT_MAP;
use crate::slab::{Cache, kfree, kfree_sensitive, kmalloc, krealloc, ksize};

scenarios! {
    kmalloc_oob_right,
    "slab-out-of-bounds Write 1 115;slab-out-of-bounds Write 1 120;slab-out-of-bounds Read 1 128",
    "writes behind a 115-byte object: at its end, a granule further, and past its slot", {
        let Some(p) = kmalloc(115) else { return };
        write(p + 115, b'x');
        write(p + 120, b'y');
        read(p + 128);
        kfree(p);
    }

    kmalloc_oob_left, "slab-out-of-bounds Read 1 -1", "reads the byte before an object", {
        let Some(first) = kmalloc(15) else { return };
        let Some(p) = kmalloc(15) else { return };
        let p = p.max(first);
        read(p - 1);
        kfree(first);
        kfree(if p == first { return } else { p });
    }

    kmalloc_large_oob_right, "slab-out-of-bounds Write 1 3840",
    "writes behind a large object of a slab", {
        let Some(p) = kmalloc(4096 - 256) else { return };
        write(p + 4096 - 256, 0);
        kfree(p);
    }

    kmalloc_uaf, "slab-use-after-free Read 1 8", "reads a freed object", {
        let Some(p) = kmalloc(10) else { return };
        kfree(p);
        read(p + 8);
    }

    kmalloc_uaf2, "slab-use-after-free Read 1 40",
    "reads a freed object after another of its size was allocated", {
        let Some(p) = kmalloc(43) else { return };
        kfree(p);
        // The quarantine holds the first object, so the second is elsewhere.
        let Some(q) = kmalloc(43) else { return };
        read(p + 40);
        kfree(q);
    }

    kmalloc_uaf_write, "slab-use-after-free Write 1 8", "writes to a freed object", {
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

    kmem_cache_oob, "slab-out-of-bounds Read 1 200",
    "reads behind an object of a cache of its own", {
        let Some(cache) = Cache::new("test_cache", 200) else { return };
        let Some(p) = cache.alloc() else { return };
        read(p + 200);
        cache.free(p);
        cache.destroy();
    }

    kmem_cache_double_free, "double-free Free 0 0", "frees an object of a cache of its own twice", {
        let Some(cache) = Cache::new("double_free_cache", 200) else { return };
        let Some(p) = cache.alloc() else { return };
        cache.free(p);
        cache.free(opaque(p));
        cache.destroy();
    }

    kmem_cache_invalid_free, "invalid-free Free 0 1",
    "frees an address inside an object of a cache of its own", {
        let Some(cache) = Cache::new("invalid_free_cache", 200) else { return };
        let Some(p) = cache.alloc() else { return };
        cache.free(opaque(p + 1));
        cache.free(p);
        cache.destroy();
    }

    kmalloc_unaligned_oob, "slab-out-of-bounds Read 8 64",
    "reads eight bytes across the end of an object, unaligned", {
        let Some(p) = kmalloc(64) else { return };
        // SAFETY: mapped memory; being caught is what this is for.
        opaque(unsafe { (opaque(p + 60) as *const u64).read_unaligned() });
        kfree(p);
    }

    kmalloc_node_oob_right, "slab-out-of-bounds Read 1 4096",
    "reads behind an object as large as a page", {
        let Some(p) = kmalloc(4096) else { return };
        read(p + 4095);
        read(p + 4096);
        kfree(p);
    }

    krealloc_more_oob, "slab-out-of-bounds Write 1 235;slab-out-of-bounds Write 1 240",
    "writes behind an object that has grown in place", {
        realloc_oob(201, 235, &[200, 201, 218, 234], &[]);
    }

    krealloc_less_oob,
    "slab-out-of-bounds Write 1 201;slab-out-of-bounds Write 1 208;slab-out-of-bounds Write 1 218;\
     slab-out-of-bounds Write 1 234;slab-out-of-bounds Write 1 235",
    "writes where an object reached before it shrank in place", {
        realloc_oob(235, 201, &[200], &[218, 234, 235]);
    }

    krealloc_uaf, "slab-use-after-free Read 1 0;slab-use-after-free Read 1 0",
    "changes the size of a freed object, and reads it", {
        let Some(p) = kmalloc(201) else { return };
        kfree(p);
        if krealloc(opaque(p), 201, 235).is_some() {
            crate::println!("a freed object was given a new size");
        }
        read(p);
    }

    kmalloc_oob_16, "slab-out-of-bounds Write 16 13", "writes 16 bytes to an object of 13", {
        let Some(p) = kmalloc(13) else { return };
        // SAFETY: mapped memory, 16-byte aligned; being caught is what this is for.
        unsafe { (opaque(p) as *mut u128).write_volatile(0) };
        kfree(p);
    }

    kmalloc_uaf_16, "slab-use-after-free Read 16 0", "reads 16 bytes of a freed object", {
        let Some(p) = kmalloc(16) else { return };
        kfree(p);
        // SAFETY: as above.
        opaque(unsafe { (opaque(p) as *const u128).read_volatile() });
    }

    ksize_unpoisons_memory, "slab-out-of-bounds Read 1 128",
    "asks for an object's whole size, and reads behind that", {
        let Some(p) = kmalloc(123) else { return };
        let all = ksize(p);
        write(p + 123, b'x');
        write(p + all - 1, b'x');
        read(p + all);
        kfree(p);
    }

    ksize_uaf,
    "slab-use-after-free Read 1 0;slab-use-after-free Read 1 0;slab-use-after-free Read 1 120",
    "asks for the size of a freed object, and reads it", {
        let Some(p) = kmalloc(120) else { return };
        kfree(p);
        ksize(opaque(p));
        read(p);
        read(p + 120);
    }

    kmalloc_double_kzfree, "slab-use-after-free Read 1 0;double-free Free 0 0",
    "clears and frees an object twice", {
        let Some(p) = kmalloc(16) else { return };
        kfree_sensitive(p);
        kfree_sensitive(opaque(p));
    }

    kmem_cache_double_destroy, "slab-use-after-free Read 1 0", "destroys a cache twice", {
        let Some(cache) = Cache::new("double_destroy_cache", 200) else { return };
        cache.destroy();
        opaque(cache).destroy();
    }

    kmem_cache_accounted, "silent", "objects of a cache, one after the other", {
        let Some(cache) = Cache::new("accounted_cache", 200) else { return };
        for _ in 0..5 {
            let Some(p) = cache.alloc() else { return };
            write(p, b'x');
            write(p + 199, b'x');
            cache.free(p);
        }
        cache.destroy();
    }

    kmem_cache_bulk, "silent", "objects of a cache, many at once", {
        let Some(cache) = Cache::new("bulk_cache", 200) else { return };
        let mut objects = [0; 10];
        if cache.alloc_bulk(&mut objects) {
            for p in objects {
                write(p, b'x');
                write(p + 199, b'x');
            }
            objects.into_iter().for_each(|p| cache.free(p));
        }
        cache.destroy();
    }

    kfree_via_page, "silent", "frees an object by an address computed from its page", {
        let Some(p) = kmalloc(8) else { return };
        let number = opaque((p - DIRECT_MAP) >> PAGE_SHIFT);
        kfree(DIRECT_MAP + (number << PAGE_SHIFT) + (p & (PAGE_SIZE - 1)));
    }

    kfree_via_phys, "silent", "frees an object by an address computed from its physical one", {
        let Some(p) = kmalloc(8) else { return };
        kfree(opaque(p - DIRECT_MAP) + DIRECT_MAP);
    }
}

/// Allocates `old` bytes, resizes them to `new`, writes at `good` offsets, then behind the end and
/// at `bad` ones.
#[inline(always)]
pub fn realloc_oob(old: u64, new: u64, good: &[u64], bad: &[u64]) {
    let Some(p) = kmalloc(old) else { return };
    let Some(p) = krealloc(p, old, new) else { return };
    for at in good {
        write(p + at, b'x');
    }
    write(p + new, b'x');
    write(p + new.next_multiple_of(8), b'x');
    // Not in a loop: each is a finding of its own.
    if let [first, second, third] = bad {
        write(p + first, b'x');
        write(p + second, b'x');
        write(p + third, b'x');
    }
    kfree(p);
}
