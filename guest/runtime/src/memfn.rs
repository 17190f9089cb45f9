//! The checked memory functions: instrumented code calls them for copies, fills and compares.
//!
//! `cargo xtask guest` renames the `umbra_checked_*` symbols to their C names after it has made the
//! runtime's own unchecked ones local, so the runtime never checks itself.

use core::arch::asm;
use core::ffi::c_void;

use umbra_shadow::abi::Access::{Read, Write};

use crate::checks::check_range;
use crate::stack::{frame_pointer, return_address};

macro_rules! caller {
    () => {
        // SAFETY: the function around this has a frame of its own and has not returned.
        unsafe { return_address(frame_pointer()) }
    };
}

#[inline]
unsafe fn copy_up(to: *mut u8, from: *const u8, n: usize) {
    // SAFETY: the caller of the C function vouches for both ranges. Eight bytes a step: on hosts
    // that emulate ring 0 each step of a string instruction costs as much as an instruction.
    unsafe {
        asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) n % 8,
             inout("rcx") n / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack));
    }
}

#[inline]
unsafe fn copy_down(to: *mut u8, from: *const u8, n: usize) {
    if n == 0 {
        return;
    }
    // SAFETY: as in `copy_up`; the direction flag is clear again at the end, as the C ABI wants it.
    unsafe {
        asm!("std", "rep movsb", "sub rdi, 7", "sub rsi, 7", "mov rcx, {words}", "rep movsq", "cld",
             words = in(reg) n / 8, inout("rcx") n % 8 => _, inout("rdi") to.add(n - 1) => _,
             inout("rsi") from.add(n - 1) => _, options(nostack));
    }
}

/// `memcpy`.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_checked_memcpy(
    to: *mut u8,
    from: *const u8,
    n: usize,
) -> *mut c_void {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { copy(to, from, n, ip) }
}

#[inline]
unsafe fn copy(to: *mut u8, from: *const u8, n: usize, ip: u64) -> *mut c_void {
    if check_range(from as u64, n as u64, Read, ip) && check_range(to as u64, n as u64, Write, ip) {
        // SAFETY: the caller's promise.
        unsafe { copy_up(to, from, n) }
    }
    to.cast()
}

/// `memmove`.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_checked_memmove(
    to: *mut u8,
    from: *const u8,
    n: usize,
) -> *mut c_void {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { copy_either_way(to, from, n, ip) }
}

#[inline]
unsafe fn copy_either_way(to: *mut u8, from: *const u8, n: usize, ip: u64) -> *mut c_void {
    if check_range(from as u64, n as u64, Read, ip) && check_range(to as u64, n as u64, Write, ip) {
        // SAFETY: the caller's promise; in this direction an overlap is read before it is written.
        unsafe {
            if (to as usize).wrapping_sub(from as usize) < n {
                copy_down(to, from, n)
            } else {
                copy_up(to, from, n)
            }
        }
    }
    to.cast()
}

/// `memset`.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_checked_memset(to: *mut u8, value: i32, n: usize) -> *mut c_void {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { set(to, value, n, ip) }
}

#[inline]
unsafe fn set(to: *mut u8, value: i32, n: usize, ip: u64) -> *mut c_void {
    if check_range(to as u64, n as u64, Write, ip) {
        let word = u64::from(value as u8) * 0x0101_0101_0101_0101;
        // SAFETY: the caller's promise.
        unsafe {
            asm!("rep stosq", "mov rcx, {rest}", "rep stosb", rest = in(reg) n % 8,
                 inout("rcx") n / 8 => _, inout("rdi") to => _, in("rax") word, options(nostack));
        }
    }
    to.cast()
}

/// `memcmp`.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_checked_memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { compare(a, b, n, ip) }
}

#[inline]
unsafe fn compare(a: *const u8, b: *const u8, n: usize, ip: u64) -> i32 {
    if !check_range(a as u64, n as u64, Read, ip) || !check_range(b as u64, n as u64, Read, ip) {
        return 0;
    }
    for i in 0..n {
        // SAFETY: the caller's promise.
        let (x, y) = unsafe { (*a.add(i), *b.add(i)) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// `bcmp`.
///
/// # Safety
/// As `memcmp`'s.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_checked_bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { compare(a, b, n, ip) }
}

/// `strlen`. A string that runs past its object, or was freed, is found as a read of all of it.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_checked_strlen(text: *const u8) -> usize {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { length(text, ip) }
}

#[inline]
unsafe fn length(text: *const u8, ip: u64) -> usize {
    let mut len = 0;
    // SAFETY: the caller's promise: there is a zero.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    check_range(text as u64, len as u64 + 1, Read, ip);
    len
}

/// `memcpy`, by the name that compilers use on request (`asan-kernel-mem-intrinsic-prefix`) so that
/// a kernel's own `memcpy` may stay unchecked.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn __asan_memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut c_void {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { copy(to, from, n, ip) }
}

/// `memmove`; see [`__asan_memcpy`].
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn __asan_memmove(to: *mut u8, from: *const u8, n: usize) -> *mut c_void {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { copy_either_way(to, from, n, ip) }
}

/// `memset`; see [`__asan_memcpy`].
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn __asan_memset(to: *mut u8, value: i32, n: usize) -> *mut c_void {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { set(to, value, n, ip) }
}

/// `memcmp`, by the name that the linker gives to calls when it is told to `--wrap` the function.
/// Rust kernels use this for the functions that no compiler option covers: otherwise they would get
/// those of `compiler_builtins`, which is linked first.
///
/// It must not jump to [`umbra_checked_memcmp`]: that gets the wrapped name, and lld wraps calls
/// from the function's own object file, too.
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn __wrap_memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { compare(a, b, n, ip) }
}

/// `bcmp`; see [`__wrap_memcmp`].
///
/// # Safety
/// As `memcmp`'s.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn __wrap_bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { compare(a, b, n, ip) }
}

/// `strlen`; see [`__wrap_memcmp`].
///
/// # Safety
/// As C's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn __wrap_strlen(text: *const u8) -> usize {
    let ip = caller!();
    // SAFETY: the caller's promise.
    unsafe { length(text, ip) }
}
