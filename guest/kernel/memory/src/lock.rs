//! The one lock of all allocators. It guards their data, not the shadow of the memory they manage.
//! A CPU changes the shadow without the lock, after it has taken memory or before it gives it back,
//! so CPUs can do so at once.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

static HELD: AtomicBool = AtomicBool::new(false);

/// Runs `work` with the lock held. The lock does not nest. The kernel takes interrupts only while
/// it idles.
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
