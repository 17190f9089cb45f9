//! Bugs in memory and string functions and in atomic operations. Names as in Linux's KASAN test
//! suite where it has the same case.

use core::ffi::CStr;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use super::{opaque, scenarios};
use crate::slab::{kfree, kmalloc};

unsafe extern "C" {
    fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8;
    fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32;
}

/// Fills the last bytes of an object of 120 bytes and `over` more.
#[inline(always)]
fn memset_over(over: u64, n: usize) {
    let Some(p) = kmalloc(120) else { return };
    // SAFETY: a bug on purpose; the checked `memset` reports it and fills nothing.
    unsafe { core::ptr::write_bytes(opaque(p + 120 + over - n as u64) as *mut u8, 0, opaque(n)) };
    kfree(p);
}

scenarios! {
    kmalloc_memcpy_oob, "slab-out-of-bounds Write 40 32", "copies 40 bytes into an object of 32", {
        let (Some(from), Some(to)) = (kmalloc(64), kmalloc(32)) else { return };
        // SAFETY: a bug on purpose; the checked `memcpy` reports it and copies nothing.
        unsafe {
            let (from, to) = (opaque(from) as *const u8, opaque(to) as *mut u8);
            core::ptr::copy_nonoverlapping(from, to, opaque(40));
        }
        kfree(from);
        kfree(to);
    }

    kmalloc_memset_oob, "slab-out-of-bounds Write 130 128", "fills 130 bytes of an object of 128", {
        let Some(p) = kmalloc(128) else { return };
        // SAFETY: as above.
        unsafe { core::ptr::write_bytes(opaque(p) as *mut u8, 0, opaque(130)) };
        kfree(p);
    }

    kmalloc_memmove_negative_size, "out-of-bounds Read 18446744073709551614 4", "moves -2 bytes", {
        let Some(p) = kmalloc(64) else { return };
        // SAFETY: a bug on purpose; the checked `memmove` reports it and moves nothing.
        unsafe { memmove(p as *mut u8, opaque(p + 4) as *const u8, opaque(usize::MAX - 1)) };
        kfree(p);
    }

    kmalloc_memmove_invalid_size, "slab-out-of-bounds Read 64 64",
    "moves 64 bytes from within 64", {
        let Some(p) = kmalloc(64) else { return };
        // SAFETY: as above.
        unsafe { memmove(p as *mut u8, opaque(p + 4) as *const u8, opaque(64)) };
        kfree(p);
    }

    kmalloc_oob_in_memset, "slab-out-of-bounds Write 128 120",
    "fills 128 bytes of an object of 120", {
        memset_over(8, 128);
    }

    kmalloc_oob_memset_2, "slab-out-of-bounds Write 2 120",
    "fills 2 bytes across the end of an object", {
        memset_over(1, 2);
    }

    kmalloc_oob_memset_4, "slab-out-of-bounds Write 4 120",
    "fills 4 bytes across the end of an object", {
        memset_over(1, 4);
    }

    kmalloc_oob_memset_8, "slab-out-of-bounds Write 8 120",
    "fills 8 bytes across the end of an object", {
        memset_over(1, 8);
    }

    kmalloc_oob_memset_16, "slab-out-of-bounds Write 16 120",
    "fills 16 bytes across the end of an object", {
        memset_over(1, 16);
    }

    kmalloc_uaf_memset, "slab-use-after-free Write 33 0", "fills a freed object", {
        let Some(p) = kmalloc(33) else { return };
        kfree(p);
        // SAFETY: as above.
        unsafe { core::ptr::write_bytes(opaque(p) as *mut u8, 0, opaque(33)) };
    }

    kasan_memchr, "slab-out-of-bounds Read 1 24", "searches 25 bytes of an object of 24", {
        let Some(p) = kmalloc(24) else { return };
        // SAFETY: mapped memory; being caught is what this is for.
        let bytes = unsafe {
            core::ptr::write_bytes(p as *mut u8, 0, 24);
            core::slice::from_raw_parts(opaque(p) as *const u8, opaque(25))
        };
        opaque(bytes.contains(&b'1'));
        kfree(p);
    }

    kasan_memcmp, "slab-out-of-bounds Read 25 24", "compares 25 bytes of an object of 24", {
        let Some(p) = kmalloc(24) else { return };
        let other = opaque([0u8; 25]);
        // SAFETY: a bug on purpose; the checked `memcmp` reports it and compares nothing.
        opaque(unsafe { memcmp(opaque(p) as *const u8, other.as_ptr(), opaque(25)) });
        kfree(p);
    }

    kasan_strings,
    "slab-use-after-free Read 1 16;slab-use-after-free Read 1 16;slab-use-after-free Read 1 16;\
     slab-use-after-free Read 1 16;slab-use-after-free Read 1 16;slab-use-after-free Read 1 16",
    "searches, compares and measures a freed string, by six functions", {
        let Some(p) = kmalloc(24) else { return };
        // SAFETY: mapped memory; being caught is what this is for.
        unsafe { core::ptr::write_bytes(p as *mut u8, 0, 24) };
        kfree(p);
        // An allocator may keep data at the start of a freed object, so the string begins behind
        // it. Each function stops at its first byte.
        let text = opaque(p + 16);
        opaque(strings::chr(text, b'1'));
        opaque(strings::rchr(text, b'1'));
        opaque(strings::cmp(text, c"2"));
        opaque(strings::ncmp(text, c"2", 1));
        // SAFETY: as above.
        opaque(unsafe { CStr::from_ptr(text as *const _) }.count_bytes());
        opaque(strings::nlen(text, 1));
    }

    kasan_bitops_generic,
    "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;\
     slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;\
     slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;\
     slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;\
     slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;\
     slab-out-of-bounds Read 8 9;slab-out-of-bounds Write 8 9",
    "sets, clears, flips and tests bits behind the 9 bytes of a bitmap, atomically and not", {
        let Some(p) = kmalloc(9) else { return };
        // The first bit of the second word is in the object, the ninth is not.
        let (inside, behind) = (opaque(p + 8), 8);
        bits::atomic(inside).fetch_or(1, Relaxed);
        bits::plain::<{ bits::SET }>(inside, 0);
        bits::atomic(inside).fetch_and(!1, Relaxed);
        bits::plain::<{ bits::CLEAR }>(inside, 0);
        bits::atomic(inside).fetch_and(!1, Release);
        bits::plain::<{ bits::CLEAR }>(inside, 0);
        bits::atomic(inside).fetch_xor(1, Relaxed);
        bits::plain::<{ bits::CHANGE }>(inside, 0);

        opaque(bits::atomic(inside).fetch_or(1 << behind, AcqRel));
        opaque(bits::plain::<{ bits::SET }>(inside, behind));
        opaque(bits::atomic(inside).fetch_or(1 << behind, Acquire));
        opaque(bits::atomic(inside).fetch_and(!(1 << behind), AcqRel));
        opaque(bits::plain::<{ bits::CLEAR }>(inside, behind));
        opaque(bits::atomic(inside).fetch_xor(1 << behind, AcqRel));
        opaque(bits::plain::<{ bits::CHANGE }>(inside, behind));
        opaque(bits::atomic(inside).load(Relaxed) >> behind & 1);
        opaque(bits::atomic(inside).fetch_and(!(1 << behind), Release) & 0x80);
        kfree(p);
    }
}

/// String functions as kernels write them: a loop over bytes.
mod strings {
    use core::ffi::CStr;

    use super::super::read;

    #[inline(never)]
    pub fn chr(mut text: u64, wanted: u8) -> Option<u64> {
        loop {
            match read(text) {
                byte if byte == wanted => return Some(text),
                0 => return None,
                _ => text += 1,
            }
        }
    }

    #[inline(never)]
    pub fn rchr(mut text: u64, wanted: u8) -> Option<u64> {
        let mut last = None;
        loop {
            match read(text) {
                byte if byte == wanted => last = Some(text),
                0 => return last,
                _ => {}
            }
            text += 1;
        }
    }

    #[inline(never)]
    pub fn cmp(text: u64, other: &CStr) -> i32 {
        for (i, &byte) in other.to_bytes_with_nul().iter().enumerate() {
            let difference = i32::from(read(text + i as u64)) - i32::from(byte);
            if difference != 0 {
                return difference;
            }
        }
        0
    }

    #[inline(never)]
    pub fn ncmp(text: u64, other: &CStr, most: usize) -> i32 {
        for (i, &byte) in other.to_bytes_with_nul().iter().enumerate().take(most) {
            let difference = i32::from(read(text + i as u64)) - i32::from(byte);
            if difference != 0 {
                return difference;
            }
        }
        0
    }

    #[inline(never)]
    pub fn nlen(text: u64, most: u64) -> u64 {
        (0..most).take_while(|i| read(text + i) != 0).count() as u64
    }
}

/// Operations on one bit of a word, as in Linux: the compiler checks the atomic ones; the others
/// are assembly with checks of their own (`include/asm-generic/bitops/instrumented-non-atomic.h`).
mod bits {
    use core::arch::asm;
    use core::sync::atomic::AtomicU64;

    use super::super::opaque;

    pub const SET: u8 = 0;
    pub const CLEAR: u8 = 1;
    pub const CHANGE: u8 = 2;

    /// A word as an atomic one. The compiler checks a known address only once, so the address is
    /// hidden each time.
    #[inline(always)]
    pub fn atomic(at: u64) -> &'static AtomicU64 {
        // SAFETY: mapped memory, 8-byte aligned; being caught is what this is for.
        unsafe { AtomicU64::from_ptr(opaque(at) as *mut u64) }
    }

    /// Changes the bit, and returns its old value.
    #[inline(always)]
    pub fn plain<const WHAT: u8>(at: u64, bit: u64) -> bool {
        umbra_guest::check(at, 8, true);
        let before: u8;
        // SAFETY: as above; the bit is one of the word's.
        unsafe {
            match WHAT {
                SET => {
                    asm!("bts qword ptr [{}], {}", "setc {}",
                         in(reg) at, in(reg) bit, out(reg_byte) before)
                }
                CLEAR => {
                    asm!("btr qword ptr [{}], {}", "setc {}",
                         in(reg) at, in(reg) bit, out(reg_byte) before)
                }
                _ => {
                    asm!("btc qword ptr [{}], {}", "setc {}",
                         in(reg) at, in(reg) bit, out(reg_byte) before)
                }
            }
        }
        before != 0
    }
}
