//! Stamps of records: they put the events of any piece of memory in their true order.

use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use umbra_shadow::abi::Features;

/// Where stamps come from.
static SOURCE: AtomicU8 = AtomicU8::new(COUNTER);
/// A counter that all CPUs share.
const COUNTER: u8 = 0;
/// Time stamp counters.
const TSC: u8 = 1;
/// Time stamp counters, with a fence before those of allocations.
const FENCED_TSC: u8 = 2;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Follows what the VMM says of the host's time stamp counters.
pub fn set(features: Features) {
    let source = match (features.has(Features::STAMPS_TSC), features.has(Features::STAMPS_FENCED)) {
        (false, _) => COUNTER,
        (true, false) => TSC,
        (true, true) => FENCED_TSC,
    };
    SOURCE.store(source, Relaxed);
}

/// Whether stamps come from a counter.
pub fn are_counted() -> bool {
    SOURCE.load(Relaxed) == COUNTER
}

/// Stores the stamp of an event that happens now, the low half first.
///
/// # Safety
/// `to` may be written.
#[inline(always)]
pub unsafe fn of(allocation: bool, to: *mut [u32; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        if are_counted() {
            let next = NEXT.fetch_add(1, Relaxed);
            to.write([next as u32, (next >> 32) as u32]);
        } else {
            tsc(allocation, to);
        }
    }
}

/// [`of`], where stamps are time stamp counters.
///
/// # Safety
/// `to` may be written.
#[inline(always)]
pub unsafe fn tsc(allocation: bool, to: *mut [u32; 2]) {
    if allocation && SOURCE.load(Relaxed) == FENCED_TSC {
        // SAFETY: changes nothing. The fence is no `_mm_lfence`, which needs SSE.
        unsafe { asm!("lfence", options(nostack, preserves_flags)) };
    }
    // SAFETY: every x86-64 CPU has the counter, and ring 0 may read it. The halves go to `to` as
    // they are: the compiler would put them together first.
    unsafe {
        asm!("rdtsc", "mov [{to}], eax", "mov [{to} + 4], edx", to = in(reg) to,
             out("eax") _, out("edx") _, options(nostack, preserves_flags));
    }
}
