//! Stamps of records: they put the events of any piece of memory in their true order.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
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

/// The stamp of an event that happens now.
#[inline(always)]
pub fn of(allocation: bool) -> u64 {
    let source = SOURCE.load(Relaxed);
    if source == COUNTER {
        return next();
    }
    if allocation && source == FENCED_TSC {
        // SAFETY: changes nothing. The fence is no `_mm_lfence`, which needs SSE.
        unsafe { asm!("lfence", options(nostack, preserves_flags)) };
    }
    // SAFETY: every x86-64 CPU has the counter, and ring 0 may read it.
    unsafe { _rdtsc() }
}

#[cold]
#[inline(never)]
fn next() -> u64 {
    NEXT.fetch_add(1, Relaxed)
}
