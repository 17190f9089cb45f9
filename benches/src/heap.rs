//! Heap memory of a value, measured by dropping it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

static COUNTING: AtomicBool = AtomicBool::new(false);
static GIVEN_BACK: AtomicU64 = AtomicU64::new(0);

/// The system's allocator. It counts what is freed while [`bytes_of`] runs, and costs nothing at
/// other times.
struct Counting;

// SAFETY: all of it is the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, object: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.realloc(object, layout, size) }
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        if COUNTING.load(Relaxed) {
            GIVEN_BACK.fetch_add(layout.size() as u64, Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(object, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

/// Bytes of `value` on the heap, spare capacity included. No other thread may free anything
/// meanwhile.
pub fn bytes_of<T>(value: T) -> u64 {
    GIVEN_BACK.store(0, Relaxed);
    COUNTING.store(true, Relaxed);
    drop(value);
    COUNTING.store(false, Relaxed);
    GIVEN_BACK.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_was_allocated() {
        // Other tests may free something at the same time: never less.
        let (small, large) =
            (bytes_of(vec![0u8; 1000]), bytes_of(Vec::<u64>::with_capacity(1 << 20)));
        assert!(small >= 1000 && large >= 8 << 20, "{small} {large}");
    }
}
