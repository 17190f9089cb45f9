//! Interrupts of the CPU that runs.

use core::arch::asm;

/// Runs `work` with interrupts off on this CPU, so that it is neither interrupted nor moved to
/// another.
#[inline(always)]
pub fn without_interrupts<T>(work: impl FnOnce() -> T) -> T {
    let flags: u64;
    // SAFETY: ring 0 may turn interrupts off. For the compiler this is an access to all memory, so
    // it moves no access out of `work`.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    let result = work();
    // SAFETY: restores the flags.
    unsafe { asm!("push {}", "popfq", in(reg) flags) };
    result
}
