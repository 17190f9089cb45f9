//! The one lock of all allocators. It guards what they know of memory, not the memory's shadow:
//! that is changed without it, by whoever has just taken the memory or is about to give it back, so
//! that CPUs do so at once.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

static HELD: AtomicBool = AtomicBool::new(false);

/// Runs `work` with the lock held. It does not nest, and the kernel takes no interrupts but when it
/// idles.
#[inline(always)]
pub fn locked<T>(work: impl FnOnce() -> T) -> T {
    while HELD.swap(true, Acquire) {
        while HELD.load(Relaxed) {
            spin_loop();
        }
    }
    let result = work();
    HELD.store(false, Release);
    result
}
