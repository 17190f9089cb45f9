//! A checked wrapper around any `GlobalAlloc`.

use core::alloc::{GlobalAlloc, Layout};

use umbra_shadow::codes::{GRANULE, SLAB_FREE, SLAB_REDZONE};

/// Least bytes of redzone behind an object.
const REDZONE: usize = 16;

/// Makes an allocator checked: a redzone behind every object, freed memory poisoned until it is handed out again,
/// double frees reported and not passed on.
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

/// The layout that the inner allocator sees: whole granules, and the redzone. `None` if that overflows.
fn padded(layout: Layout) -> Option<Layout> {
    let size = layout.size().checked_next_multiple_of(GRANULE as usize)?.checked_add(REDZONE)?;
    Layout::from_size_align(size, layout.align().max(GRANULE as usize)).ok()
}

// SAFETY: memory comes from the inner allocator, with at least the size and alignment asked for; what is given back
// to it is what it handed out, with the same layout, or (a double free) nothing.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Checked<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(slot) = padded(layout) else { return core::ptr::null_mut() };
        // SAFETY: `slot` has a size.
        let object = crate::suppressed(|| unsafe { self.inner.alloc(slot) });
        if !object.is_null() {
            crate::alloc(object as u64, layout.size() as u64, slot.size() as u64, SLAB_REDZONE, 0);
        }
        object
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        let Some(slot) = padded(layout) else { return };
        if crate::free(object as u64, object as u64, slot.size() as u64, SLAB_FREE) {
            // SAFETY: the inner allocator handed out `object` with this layout.
            crate::suppressed(|| unsafe { self.inner.dealloc(object, slot) });
        }
    }
}
