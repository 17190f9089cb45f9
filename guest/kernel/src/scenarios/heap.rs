//! Bugs in uses of Rust's collections, and of a wrapped allocator that knows nothing of Umbra.

use alloc::boxed::Box;
use alloc::vec;
use core::alloc::{GlobalAlloc, Layout};

use umbra_guest::Checked;

use super::{opaque, read, scenarios, write};
use crate::heap::FirstFit;

static WRAPPED: Checked<FirstFit<16384>> = Checked::new(FirstFit::new());
static WAITING: Checked<FirstFit<16384>> = Checked::new(FirstFit::new());

const LAYOUT: Layout = match Layout::from_size_align(40, 8) {
    Ok(layout) => layout,
    Err(_) => panic!(),
};

scenarios! {
    vec_get_unchecked_oob, "slab-out-of-bounds Read 4 40", "reads element 10 of a vector of 10", {
        let v = opaque(vec![1u32; 10]);
        // SAFETY: a bug on purpose; the vector's slot ends further on.
        opaque(unsafe { *v.as_ptr().add(opaque(10)) });
    }

    box_use_after_free, "slab-use-after-free Write 8 8",
    "writes through a pointer to a dropped box", {
        let b = Box::new([1u64, 2, 3]);
        let p = Box::into_raw(b);
        // SAFETY: it came from a box.
        drop(unsafe { Box::from_raw(p) });
        // SAFETY: mapped memory; being caught is what this is for.
        unsafe { (&raw mut (*opaque(p))[1]).write_volatile(9) };
    }

    wrapped_oob, "slab-out-of-bounds Write 1 40",
    "writes behind an object of a wrapped allocator", {
        // SAFETY: the layout has a size; what is freed came from the allocator.
        unsafe {
            let p = WRAPPED.alloc(LAYOUT);
            write(p as u64 + 39, 1);
            write(p as u64 + 40, 1);
            WRAPPED.dealloc(p, LAYOUT);
        }
    }

    wrapped_uaf, "slab-use-after-free Read 1 20", "reads a freed object of a wrapped allocator", {
        // SAFETY: as above.
        unsafe {
            let p = WRAPPED.alloc(LAYOUT);
            WRAPPED.dealloc(p, LAYOUT);
            read(p as u64 + 20);
        }
    }

    wrapped_double_free, "double-free Free 0 0", "frees an object of a wrapped allocator twice", {
        // SAFETY: a bug on purpose; the wrapper does not pass the second free on.
        unsafe {
            let p = WRAPPED.alloc(LAYOUT);
            WRAPPED.dealloc(p, LAYOUT);
            WRAPPED.dealloc(opaque(p), LAYOUT);
        }
    }

    wrapped_quarantine, "slab-use-after-free Read 1 20",
    "reads a freed object of a wrapped allocator with a quarantine, which then gives way until all \
     memory was used again", {
        WAITING.quarantine();
        // SAFETY: as above.
        unsafe {
            let p = WAITING.alloc(LAYOUT);
            WAITING.dealloc(p, LAYOUT);
            // Without a quarantine this is the same memory.
            let q = WAITING.alloc(LAYOUT);
            read(p as u64 + 20);
            WAITING.dealloc(q, LAYOUT);
            for _ in 0..1000 {
                let p = WAITING.alloc(LAYOUT);
                assert!(!p.is_null(), "the quarantine gives way");
                write(p as u64 + 39, 1);
                WAITING.dealloc(p, LAYOUT);
            }
        }
    }

    wrapped_reuse, "silent", "a wrapped allocator's memory is used again, first and last byte", {
        // SAFETY: as above, without the bug.
        unsafe {
            for _ in 0..4 {
                let (a, b) = (WRAPPED.alloc(LAYOUT), WRAPPED.alloc(LAYOUT));
                for p in [a, b] {
                    write(p as u64, 1);
                    write(p as u64 + 39, 1);
                }
                WRAPPED.dealloc(a, LAYOUT);
                WRAPPED.dealloc(b, LAYOUT);
            }
        }
    }
}
