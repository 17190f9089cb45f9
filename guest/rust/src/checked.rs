//! A checked wrapper around any `GlobalAlloc`.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::ffi::c_void;
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

use umbra_shadow::codes::{GRANULE, SLAB_FREE, SLAB_REDZONE};

/// Bytes of the smallest redzone before an object.
const REDZONE: usize = 16;
/// The last eight bytes before an object are this, XORed with its address, size and alignment.
const MARK: u64 = 0x5eed_0b1e_c7ed_0b1e;

/// Makes an allocator checked. Every object has redzones before and behind it. Freed memory is
/// poisoned until it is handed out again. Double and invalid frees, also those with another layout,
/// are reported and not passed on.
///
/// With [`Checked::quarantine`], freed memory goes through the quarantine before the inner
/// allocator gets it back. Where redzones are switched off, or where there is no Umbra, the inner
/// allocator gets the kernel's requests unchanged.
///
/// The inner allocator needs no change. It may keep its own data in free memory, so it runs with
/// this CPU's reports off.
pub struct Checked<A> {
    inner: A,
    /// Its number for the quarantine, if it has one.
    number: AtomicU8,
}

impl<A> Checked<A> {
    /// Wraps `inner`.
    pub const fn new(inner: A) -> Self {
        Self { inner, number: AtomicU8::new(0) }
    }

    /// The allocator inside.
    pub const fn inner(&self) -> &A {
        &self.inner
    }
}

impl<A: GlobalAlloc + Sync> Checked<A> {
    /// Sends freed memory through the quarantine from now on, if this run has one. Called once,
    /// after [`crate::start`].
    pub fn quarantine(&'static self) {
        let context = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: `release` is made for this type, and `self` stays.
        self.number.store(unsafe { crate::quarantine_add(release::<A>, context) }, Relaxed);
    }
}

impl<A: GlobalAlloc> Checked<A> {
    /// Returns a slot to the inner allocator.
    ///
    /// # Safety
    /// The inner allocator handed it out, and nobody uses it.
    unsafe fn give_back(&self, object: u64, slot: &Slot) {
        // SAFETY: the caller's promise; the object has a mark if there is room before it.
        crate::suppressed(|| unsafe {
            if slot.before != 0 {
                mark(object, 0);
            }
            self.inner.dealloc((object - slot.before as u64) as *mut u8, slot.layout);
        });
    }
}

/// Takes memory back that has left the quarantine. The note is the alignment's logarithm.
extern "C" fn release<A: GlobalAlloc>(object: u64, rest: u64, note: u8, context: *mut c_void) {
    // SAFETY: `quarantine` gave this context; the object was freed once, with this rest of its slot
    // and this alignment.
    unsafe {
        let this = &*context.cast::<Checked<A>>();
        this.give_back(object, &Slot::with_rest(rest as usize, 1 << note));
    }
}

/// The memory that the inner allocator hands out for an object.
struct Slot {
    /// The request to the inner allocator.
    layout: Layout,
    /// Bytes of redzone before the object; 0 if there are no redzones.
    before: usize,
}

impl Slot {
    /// The slot of an object: whole granules between two redzones, or just the object. `None` if
    /// that overflows.
    fn of(object: Layout) -> Option<Self> {
        let behind = crate::redzone(object.size() as u64) as usize;
        if behind == 0 {
            return Some(Self { layout: object, before: 0 });
        }
        let before = before(object.align());
        let size = object.size().checked_next_multiple_of(GRANULE as usize)?;
        let size = size.checked_add(before)?.checked_add(behind)?;
        let layout = Layout::from_size_align(size, object.align().max(GRANULE as usize)).ok()?;
        Some(Self { layout, before })
    }

    /// The slot of an object with this alignment, which has `rest` bytes from the object on.
    ///
    /// # Safety
    /// There is one.
    unsafe fn with_rest(rest: usize, align: usize) -> Self {
        // Redzones are off for all sizes or for none, during the whole run.
        let (before, align) = match crate::redzone(0) {
            0 => (0, align),
            _ => (before(align), align.max(GRANULE as usize)),
        };
        // SAFETY: the caller's promise.
        Self { layout: unsafe { Layout::from_size_align_unchecked(rest + before, align) }, before }
    }

    /// Bytes from the object on.
    fn rest(&self) -> u64 {
        (self.layout.size() - self.before) as u64
    }
}

/// Bytes of redzone before an object with such an alignment.
fn before(align: usize) -> usize {
    align.max(REDZONE)
}

/// The mark before an object at this address.
fn mark_of(object: u64, layout: Layout) -> u64 {
    MARK ^ object ^ (layout.size() as u64).rotate_left(32) ^ layout.align() as u64
}

/// Marks the start of an object, in its redzone. In assembly, which is not checked.
///
/// # Safety
/// The eight bytes before `object` are the wrapper's.
unsafe fn mark(object: u64, mark: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov [{} - 8], {}", in(reg) object, in(reg) mark, options(nostack, preserves_flags))
    };
}

/// Whether an object of this layout starts at an address.
///
/// # Safety
/// The eight bytes before `object` are mapped.
unsafe fn is_marked(object: u64, layout: Layout) -> bool {
    let found: u64;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov {}, [{} - 8]",
             out(reg) found, in(reg) object, options(nostack, preserves_flags, readonly));
    }
    found == mark_of(object, layout)
}

// SAFETY: memory comes from the inner allocator, with at least the requested size and alignment. It
// gets back the memory that it handed out, with the same layout, at once or later; after a bad free
// it gets nothing.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Checked<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(slot) = Slot::of(layout) else { return core::ptr::null_mut() };
        // SAFETY: the slot has a size.
        let take = || crate::suppressed(|| unsafe { self.inner.alloc(slot.layout) });
        let mut start = take();
        if start.is_null() && self.number.load(Relaxed) != 0 && crate::quarantine_drain() > 0 {
            start = take();
        }
        if start.is_null() {
            return start;
        }
        // SAFETY: inside the slot.
        let object = unsafe { start.add(slot.before) };
        if slot.before != 0 {
            // SAFETY: the redzone has at least that many bytes.
            unsafe { mark(object as u64, mark_of(object as u64, layout)) };
            crate::poison(start as u64, slot.before as u64, SLAB_REDZONE);
        }
        crate::alloc(object as u64, layout.size() as u64, slot.rest(), SLAB_REDZONE, 0);
        object
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        let Some(slot) = Slot::of(layout) else { return };
        let at = object as u64;
        // Free memory may have lost its mark; its shadow says that it is free.
        // SAFETY: `object` came from `alloc`, or is at least an address near other objects.
        if slot.before != 0 && !crate::is_poisoned(at) && !unsafe { is_marked(at, layout) } {
            return crate::invalid_free(at);
        }
        let note = layout.align().trailing_zeros() as u8;
        if crate::free_later(at, at, slot.rest(), SLAB_FREE, self.number.load(Relaxed), note) {
            // SAFETY: the inner allocator handed out the slot, with this layout.
            unsafe { self.give_back(at, &slot) };
        }
    }
}
