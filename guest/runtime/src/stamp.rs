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

/// The stamp of an event that happens now, the low half first.
#[inline(always)]
pub fn of(allocation: bool) -> [u32; 2] {
    if are_counted() {
        let next = NEXT.fetch_add(1, Relaxed);
        return [next as u32, (next >> 32) as u32];
    }
    tsc(allocation)
}

/// [`of`], where stamps are time stamp counters.
#[inline(always)]
pub fn tsc(allocation: bool) -> [u32; 2] {
    if allocation && SOURCE.load(Relaxed) == FENCED_TSC {
        // SAFETY: changes nothing. The fence is no `_mm_lfence`, which needs SSE.
        unsafe { asm!("lfence", options(nostack, preserves_flags)) };
    }
    let (low, high);
    // SAFETY: every x86-64 CPU has the counter, and ring 0 may read it. The halves go into a record
    // as they are, so they are not put together as `_rdtsc` does.
    unsafe {
        asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    [low, high]
}
