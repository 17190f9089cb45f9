//! A checked wrapper around any `GlobalAlloc`.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;

use umbra_shadow::codes::{GRANULE, SLAB_FREE, SLAB_REDZONE};

/// Least bytes of redzone before and behind an object.
const REDZONE: usize = 16;
/// What the last eight bytes before an object hold, combined with its address.
const MARK: u64 = 0x5eed_0b1e_c7ed_0b1e;

/// Makes an allocator checked: redzones before and behind every object, freed memory poisoned until it is handed out
/// again, double and invalid frees reported and not passed on.
///
/// The inner allocator stays as it is. Since it may keep its own data in free memory, it runs with this CPU's
/// reports off.
pub struct Checked<A> {
    inner: A,
}

impl<A> Checked<A> {
    /// Wraps `inner`.
    pub const fn new(inner: A) -> Self {
        Self { inner }
    }

    /// The allocator inside.
    pub const fn inner(&self) -> &A {
        &self.inner
    }
}

/// Where an object lies in what the inner allocator hands out.
struct Slot {
    /// What the inner allocator is asked for.
    layout: Layout,
    /// Bytes of redzone before the object.
    before: usize,
}

impl Slot {
    /// The slot of an object: whole granules between two redzones. `None` if that overflows.
    fn of(object: Layout) -> Option<Self> {
        let before = object.align().max(REDZONE);
        let size = object.size().checked_next_multiple_of(GRANULE as usize)?;
        let size = size.checked_add(before)?.checked_add(REDZONE)?;
        let layout = Layout::from_size_align(size, object.align().max(GRANULE as usize)).ok()?;
        Some(Self { layout, before })
    }

    /// Bytes from the object on.
    fn rest(&self) -> u64 {
        (self.layout.size() - self.before) as u64
    }
}

/// Marks the start of an object, in its redzone. Assembly, which is not checked.
///
/// # Safety
/// The eight bytes before `object` are the wrapper's.
unsafe fn mark(object: u64, mark: u64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mov [{} - 8], {}", in(reg) object, in(reg) mark, options(nostack, preserves_flags)) };
}

/// Whether an object starts at an address.
///
/// # Safety
/// The eight bytes before `object` are mapped.
unsafe fn is_marked(object: u64) -> bool {
    let found: u64;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov {}, [{} - 8]", out(reg) found, in(reg) object, options(nostack, preserves_flags, readonly));
    }
    found == MARK ^ object
}

// SAFETY: memory comes from the inner allocator, with at least the size and alignment asked for; what is given back
// to it is what it handed out, with the same layout, or (a bad free) nothing.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Checked<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(slot) = Slot::of(layout) else { return core::ptr::null_mut() };
        // SAFETY: the slot has a size.
        let start = crate::suppressed(|| unsafe { self.inner.alloc(slot.layout) });
        if start.is_null() {
            return start;
        }
        // SAFETY: inside the slot.
        let object = unsafe { start.add(slot.before) };
        // SAFETY: the redzone has at least that many bytes.
        unsafe { mark(object as u64, MARK ^ object as u64) };
        crate::poison(start as u64, slot.before as u64, SLAB_REDZONE);
        crate::alloc(object as u64, layout.size() as u64, slot.rest(), SLAB_REDZONE, 0);
        object
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        let Some(slot) = Slot::of(layout) else { return };
        let at = object as u64;
        // Of memory that is free the mark may be gone; that it is free is known.
        // SAFETY: `object` came from `alloc`, or is at least an address near other objects.
        if !crate::is_poisoned(at) && !unsafe { is_marked(at) } {
            return crate::invalid_free(at);
        }
        if crate::free(at, at, slot.rest(), SLAB_FREE) {
            // SAFETY: the inner allocator handed out the slot, with this layout.
            crate::suppressed(|| unsafe {
                mark(at, 0);
                self.inner.dealloc(object.sub(slot.before), slot.layout);
            });
        }
    }
}
