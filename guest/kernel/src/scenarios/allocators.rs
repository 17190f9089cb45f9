//! The checked wrapper around allocators of other projects. They are not changed, and each has
//! memory of its own.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use spinning_top::RawSpinlock;
use talc::TalcLock;
use talc::source::Manual;
use umbra_guest::Checked;

use super::{opaque, read, scenarios, write};
use crate::page;

/// A heap has `1 << ORDER` pages.
const ORDER: usize = 5;
const BYTES: usize = 4096 << ORDER;

static LINKED_LIST: Heap<linked_list_allocator::LockedHeap> =
    Heap::new(linked_list_allocator::LockedHeap::empty(), |heap, at| {
        // SAFETY: the memory is the heap's.
        unsafe { heap.lock().init(at, BYTES) };
    });
static BUDDY: Heap<buddy_system_allocator::LockedHeap<32>> =
    Heap::new(buddy_system_allocator::LockedHeap::empty(), |heap, at| {
        // SAFETY: as above.
        unsafe { heap.lock().init(at as usize, BYTES) };
    });
static TALC: Heap<TalcLock<RawSpinlock, Manual>> = Heap::new(TalcLock::new(Manual), |heap, at| {
    // SAFETY: as above.
    unsafe { heap.lock().claim(at, BYTES) };
});

/// A checked allocator, and how it gets its memory.
struct Heap<A: 'static> {
    checked: Checked<A>,
    init: fn(&A, *mut u8),
    ready: AtomicBool,
}

impl<A: GlobalAlloc> Heap<A> {
    const fn new(inner: A, init: fn(&A, *mut u8)) -> Self {
        Self { checked: Checked::new(inner), init, ready: AtomicBool::new(false) }
    }

    /// The allocator, with memory.
    fn get(&self) -> Option<&Checked<A>> {
        if !self.ready.swap(true, Relaxed) {
            (self.init)(self.checked.inner(), page::alloc(ORDER)? as *mut u8);
        }
        Some(&self.checked)
    }
}

fn layout(size: usize, align: usize) -> Layout {
    match Layout::from_size_align(size, align) {
        Ok(layout) => layout,
        Err(_) => panic!("alignment {align}"),
    }
}

/// Allocates an object of 13 bytes.
#[inline(always)]
fn thirteen<A: GlobalAlloc>(heap: &Heap<A>) -> Option<(&Checked<A>, Layout, u64)> {
    let (heap, layout) = (heap.get()?, layout(13, 8));
    // SAFETY: the layout has a size.
    let p = unsafe { heap.alloc(layout) } as u64;
    (p != 0).then_some((heap, layout, p))
}

#[inline(always)]
fn oob<A: GlobalAlloc>(heap: &Heap<A>) {
    let Some((heap, layout, p)) = thirteen(heap) else { return };
    read(p);
    write(p + 12, 1);
    write(p + 13, 1);
    // SAFETY: a bug on purpose; the redzone goes on from there.
    opaque(unsafe { (opaque(p + 8) as *const u64).read_unaligned() });
    read(p - 1);
    // SAFETY: it came from this allocator, with this layout.
    unsafe { heap.dealloc(p as *mut u8, layout) };
}

#[inline(always)]
fn uaf<A: GlobalAlloc>(heap: &Heap<A>) {
    let Some((heap, layout, p)) = thirteen(heap) else { return };
    // SAFETY: as above.
    unsafe { heap.dealloc(p as *mut u8, layout) };
    read(p + 8);
}

#[inline(always)]
fn double_free<A: GlobalAlloc>(heap: &Heap<A>) {
    let Some((heap, layout, p)) = thirteen(heap) else { return };
    // SAFETY: a bug on purpose; the wrapper does not pass the second one on.
    unsafe {
        heap.dealloc(p as *mut u8, layout);
        heap.dealloc(opaque(p as *mut u8), layout);
    }
}

#[inline(always)]
fn invalid_free<A: GlobalAlloc>(heap: &Heap<A>) {
    let Some((heap, layout, p)) = thirteen(heap) else { return };
    // SAFETY: bugs on purpose, but the last; the wrapper does not pass them on.
    unsafe {
        heap.dealloc(opaque((p + 8) as *mut u8), layout);
        heap.dealloc(opaque((p - 8) as *mut u8), layout);
        heap.dealloc(p as *mut u8, layout);
    }
}

/// Uses objects of many sizes and alignments up to their ends, while others are allocated, freed
/// and resized.
#[inline(always)]
fn exact<A: GlobalAlloc>(heap: &Heap<A>) {
    const SIZES: [usize; 12] = [1, 7, 8, 13, 16, 24, 40, 64, 100, 256, 1000, 2048];
    let Some(heap) = heap.get() else { return };
    for round in 0..3 {
        let mut objects = [(0, layout(1, 1)); SIZES.len()];
        for (i, object) in objects.iter_mut().enumerate() {
            let layout = layout(SIZES[(i + 5 * round) % SIZES.len()], 1 << (i % 8));
            // SAFETY: the layout has a size.
            let p = unsafe { heap.alloc(layout) } as u64;
            if p == 0 || p % layout.align() as u64 != 0 {
                crate::println!("exact: {layout:?} at {p:#x}");
                return;
            }
            write(p, 1);
            write(p + layout.size() as u64 - 1, 2);
            *object = (p, layout);
        }
        for (p, old) in objects.iter_mut().step_by(2) {
            let size = if round == 1 { old.size().div_ceil(2) } else { old.size() * 2 };
            // SAFETY: it came from this allocator, with this layout.
            *p = unsafe { heap.realloc(*p as *mut u8, *old, size) } as u64;
            *old = layout(size, old.align());
            write(*p, 1);
            write(*p + size as u64 - 1, 2);
        }
        let (odd, even) = (objects.iter().skip(1).step_by(2), objects.iter().step_by(2));
        // SAFETY: as above.
        odd.chain(even).for_each(|&(p, layout)| unsafe { heap.dealloc(p as *mut u8, layout) });
    }
}

scenarios! {
    linked_list_oob,
    "slab-out-of-bounds Write 1 13;slab-out-of-bounds Read 8 13;slab-out-of-bounds Read 1 -1",
    "both ends of an object of linked_list_allocator", { oob(&LINKED_LIST) }
    linked_list_uaf, "slab-use-after-free Read 1 8",
    "a freed object of linked_list_allocator", { uaf(&LINKED_LIST) }
    linked_list_double_free, "double-free Free 0 0",
    "an object of linked_list_allocator, freed twice", {
        double_free(&LINKED_LIST)
    }
    linked_list_invalid_free, "invalid-free Free 0 8;invalid-free Free 0 -8",
    "frees inside and before an object of linked_list_allocator", { invalid_free(&LINKED_LIST) }
    linked_list_exact, "silent",
    "all bytes of linked_list_allocator's objects", { exact(&LINKED_LIST) }

    buddy_oob,
    "slab-out-of-bounds Write 1 13;slab-out-of-bounds Read 8 13;slab-out-of-bounds Read 1 -1",
    "both ends of an object of buddy_system_allocator", { oob(&BUDDY) }
    buddy_uaf, "slab-use-after-free Read 1 8",
    "a freed object of buddy_system_allocator", { uaf(&BUDDY) }
    buddy_double_free, "double-free Free 0 0",
    "an object of buddy_system_allocator, freed twice", { double_free(&BUDDY) }
    buddy_invalid_free, "invalid-free Free 0 8;invalid-free Free 0 -8",
    "frees inside and before an object of buddy_system_allocator", { invalid_free(&BUDDY) }
    buddy_exact, "silent", "all bytes of buddy_system_allocator's objects", { exact(&BUDDY) }

    talc_oob,
    "slab-out-of-bounds Write 1 13;slab-out-of-bounds Read 8 13;slab-out-of-bounds Read 1 -1",
    "both ends of an object of talc", { oob(&TALC) }
    talc_uaf, "slab-use-after-free Read 1 8", "a freed object of talc", { uaf(&TALC) }
    talc_double_free, "double-free Free 0 0",
    "an object of talc, freed twice", { double_free(&TALC) }
    talc_invalid_free, "invalid-free Free 0 8;invalid-free Free 0 -8",
    "frees inside and before an object of talc", { invalid_free(&TALC) }
    talc_exact, "silent", "all bytes of talc's objects", { exact(&TALC) }
}
