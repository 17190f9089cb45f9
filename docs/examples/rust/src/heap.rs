//! The heap: one MiB of the direct map, handed out from below. Only the last object is reused after
//! its free.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::boot::DIRECT_MAP;

/// Its start.
pub const START: u64 = DIRECT_MAP + (16 << 20);
/// Its bytes.
pub const BYTES: u64 = 1 << 20;

/// The allocator.
pub struct Heap {
    /// Bytes that are handed out.
    used: AtomicU64,
}

impl Heap {
    /// A heap without objects.
    pub const fn new() -> Self {
        Self { used: AtomicU64::new(0) }
    }
}

// SAFETY: no byte is handed out twice before it is free.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = self.used.load(Relaxed).next_multiple_of(layout.align() as u64);
        let end = start + layout.size() as u64;
        if end > BYTES {
            return null_mut();
        }
        self.used.store(end, Relaxed);
        (START + start) as *mut u8
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        let start = object as u64 - START;
        if start + layout.size() as u64 == self.used.load(Relaxed) {
            self.used.store(start, Relaxed);
        }
    }
}
