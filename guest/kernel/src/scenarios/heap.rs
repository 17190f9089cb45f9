//! Bugs in uses of Rust's collections, and of a wrapped allocator that knows nothing of Umbra.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};

use umbra_guest::Checked;

use super::{opaque, read, scenarios, write};
use crate::heap::FirstFit;

static WRAPPED: Checked<FirstFit<16384>> = Checked::new(FirstFit::new());
static WAITING: Checked<FirstFit<16384>> = Checked::new(FirstFit::new());

/// The start of a message, as a device writes it.
#[repr(C, packed)]
struct Header {
    tag: u8,
    length: u64,
}

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

    slice_to_vec_oob, "slab-out-of-bounds Read 96 64",
    "copies a slice that a device's answer made longer than its buffer", {
        let buffer: Box<[u8]> = vec![1; 64].into();
        // SAFETY: a bug on purpose.
        let answer = unsafe { core::slice::from_raw_parts(buffer.as_ptr(), opaque(96)) };
        opaque(answer.to_vec());
    }

    vec_stale_pointer, "slab-use-after-free Read 4 0",
    "reads through a pointer to a vector that has grown since", {
        let mut queue: Vec<u32> = Vec::with_capacity(4);
        queue.extend([1, 2, 3, 4]);
        let first = queue.as_ptr();
        queue.push(opaque(5));
        // SAFETY: mapped memory; being caught is what this is for.
        opaque(unsafe { opaque(first).read_volatile() });
        opaque(queue);
    }

    vec_set_len_oob, "slab-out-of-bounds Read 8 40",
    "sums a vector of 5 whose length was set to 6", {
        let mut list: Vec<u64> = Vec::with_capacity(5);
        list.extend([1; 5]);
        // SAFETY: a bug on purpose, undone below.
        unsafe { list.set_len(opaque(6)) };
        opaque(list.iter().sum::<u64>());
        // SAFETY: as it was.
        unsafe { list.set_len(5) };
    }

    box_freed_twice, "double-free Free 0 0", "makes two boxes of one pointer", {
        let task = Box::into_raw(Box::new([7_u64; 6]));
        // SAFETY: a bug on purpose: the second is one too many.
        unsafe {
            drop(Box::from_raw(opaque(task)));
            drop(Box::from_raw(opaque(task)));
        }
    }

    rc_count_underflow, "slab-use-after-free Read 8 0",
    "gives back a reference count once too often", {
        let shared = Rc::into_raw(Rc::new([3_u32; 10]));
        // SAFETY: as above.
        unsafe {
            drop(Rc::from_raw(opaque(shared)));
            drop(Rc::from_raw(opaque(shared)));
        }
    }

    packed_header_oob, "slab-out-of-bounds Read 8 13",
    "reads a field of a packed header across the end of its buffer", {
        let buffer: Vec<u8> = vec![0; 13];
        // SAFETY: a bug on purpose.
        let header = unsafe { &*buffer.as_ptr().add(opaque(7)).cast::<Header>() };
        opaque(header.length);
        opaque(header.tag);
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

    wrapped_wrong_layout, "invalid-free Free 0 0",
    "frees an object of a wrapped allocator with another layout", {
        // SAFETY: a bug on purpose; the wrapper does not pass the first free on.
        unsafe {
            let p = WRAPPED.alloc(LAYOUT);
            WRAPPED.dealloc(opaque(p), Layout::from_size_align_unchecked(16, 8));
            read(p as u64 + 39);
            WRAPPED.dealloc(p, LAYOUT);
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
