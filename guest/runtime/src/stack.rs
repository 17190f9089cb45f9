//! Stack walks by frame pointers. The runtime is compiled with frame pointers throughout.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use umbra_shadow::abi::RECORD_FRAMES;

/// The start of the kernel's code. Recorded return addresses are distances from it.
static TEXT_BASE: AtomicU64 = AtomicU64::new(0);
/// The bytes of the kernel's code. A return address outside ends a stack.
static TEXT_BYTES: AtomicU64 = AtomicU64::new(0);

/// Sets the start of the kernel's code.
pub fn set_text_start(start: u64) {
    TEXT_BASE.store(start, Relaxed);
}

/// Sets the end of the kernel's code.
pub fn set_text_end(end: u64) {
    TEXT_BYTES.store(end.saturating_sub(TEXT_BASE.load(Relaxed)).min(1 << 32), Relaxed);
}

/// The caller's frame pointer.
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let fp;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) fp, options(nomem, nostack, preserves_flags)) };
    fp
}

/// The return address of the frame at `fp`.
///
/// # Safety
/// `fp` comes from [`frame_pointer`] in a function that has not returned.
#[inline(always)]
pub unsafe fn return_address(fp: u64) -> u64 {
    // SAFETY: the System V frame layout: saved rbp, then the return address.
    unsafe { *((fp + 8) as *const u64) }
}

/// The most bytes between two neighbouring frames. A larger distance means a broken chain.
const MAX_FRAME: u64 = 64 << 10;

/// Bytes above a frame that [`is_near`] takes for stack.
const NEAR: u64 = 16 << 10;

/// Whether `address` may be on the stack whose frame at `fp` is the innermost one. [`holds`] knows.
#[inline(always)]
pub fn is_near(fp: u64, address: u64) -> bool {
    address.wrapping_sub(fp) < NEAR
}

/// Most frames that [`holds`] follows.
const SEARCHED: usize = 64;

/// Whether `address` is in a frame of the stack whose frame at `fp` is the innermost one. Only
/// addresses above `fp` count.
///
/// # Safety
/// As [`return_address`].
#[cold]
#[inline(never)]
pub unsafe fn holds(fp: u64, address: u64) -> bool {
    let mut frame = fp;
    for _ in 0..SEARCHED {
        // SAFETY: the first is the caller's; the others follow at a short distance up the stack.
        let next = unsafe { (frame as *const u64).read_volatile() };
        if next <= frame || next - frame > MAX_FRAME || !next.is_multiple_of(8) {
            return false;
        }
        if (frame..next).contains(&address) {
            return true;
        }
        frame = next;
    }
    false
}

/// One step of [`walk`], from the frame number `$depth` at `$fp` to the one at `$next`.
macro_rules! frame {
    ($depth:literal, $fp:literal, $next:literal, $deeper:literal) => {
        concat!(
            "mov {address}, [",
            $fp,
            " + 8]\n",
            "mov ",
            $next,
            ", [",
            $fp,
            "]\n",
            "sub {address}, [rip + {base}]\n",
            "cmp {address}, [rip + {text}]\n",
            "jae 2",
            $depth,
            "f\n",
            "mov [{to} + 4 * ",
            $depth,
            "], {address:e}\n",
            "lea {address}, [",
            $next,
            " - 1]\n",
            "sub {address}, ",
            $fp,
            "\n",
            "cmp {address}, {farthest}\n",
            "jae 2",
            $deeper,
            "f\n",
        )
    };
}

/// The end of [`walk`] after `$depth` frames.
macro_rules! ends_with {
    ($depth:literal) => {
        concat!("2", $depth, ": mov {depth:e}, ", $depth, "\njmp 30f")
    };
}

/// Fills `frames` with return addresses as distances from the text base, innermost first. Returns
/// their number.
///
/// It runs for every event, and is most of its cost: ten instructions a frame. Two registers hold
/// the frame pointer by turns.
///
/// # Safety
/// As [`return_address`].
#[inline(always)]
pub unsafe fn walk(fp: u64, frames: *mut u32) -> u64 {
    let depth: u64;
    // SAFETY: reads the given frame, and others that follow at a short distance up the same stack;
    // writes at most `RECORD_FRAMES` frames.
    unsafe {
        asm!(
            frame!(0, "{a}", "{b}", 1),
            frame!(1, "{b}", "{a}", 2),
            frame!(2, "{a}", "{b}", 3),
            frame!(3, "{b}", "{a}", 4),
            frame!(4, "{a}", "{b}", 5),
            frame!(5, "{b}", "{a}", 6),
            frame!(6, "{a}", "{b}", 7),
            frame!(7, "{b}", "{a}", 8),
            frame!(8, "{a}", "{b}", 9),
            ends_with!(9), ends_with!(0), ends_with!(1), ends_with!(2), ends_with!(3),
            ends_with!(4), ends_with!(5), ends_with!(6), ends_with!(7), ends_with!(8),
            "30:",
            a = inout(reg) fp => _, b = out(reg) _, address = out(reg) _, depth = out(reg) depth,
            to = in(reg) frames, base = sym TEXT_BASE, text = sym TEXT_BYTES,
            farthest = const MAX_FRAME, options(nostack),
        );
    }
    depth
}
const _: () = assert!(RECORD_FRAMES == 9);
