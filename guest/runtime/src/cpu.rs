//! Interrupts of the CPU that runs.

use core::arch::asm;

/// The interrupt flag, and others, as they were.
pub struct Flags(u64);

/// Turns interrupts off on this CPU, so that what follows is neither interrupted nor moved to
/// another.
#[inline(always)]
pub fn interrupts_off() -> Flags {
    let flags: u64;
    // SAFETY: ring 0 may turn interrupts off. For the compiler this is an access to all memory, so
    // it moves no access to before it.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    Flags(flags)
}

/// Turns them on again, if they were.
#[inline(always)]
pub fn restore_interrupts(flags: Flags) {
    // SAFETY: restores the flags. The compiler moves no access to behind it.
    unsafe { asm!("push {}", "popfq", in(reg) flags.0) };
}

/// Runs `work` with interrupts off.
#[inline(always)]
pub fn without_interrupts<T>(work: impl FnOnce() -> T) -> T {
    let flags = interrupts_off();
    let result = work();
    restore_interrupts(flags);
    result
}
