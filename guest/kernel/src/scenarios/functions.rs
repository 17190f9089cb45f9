//! Bugs through memory and string functions and atomic operations. Names as in Linux's KASAN test suite where it has
//! the same case.

use core::ffi::CStr;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
        unsafe { core::ptr::copy_nonoverlapping(opaque(from) as *const u8, opaque(to) as *mut u8, opaque(40)) };
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

    kmalloc_memmove_invalid_size, "slab-out-of-bounds Read 64 64", "moves 64 bytes from within 64", {
        let Some(p) = kmalloc(64) else { return };
        // SAFETY: as above.
        unsafe { memmove(p as *mut u8, opaque(p + 4) as *const u8, opaque(64)) };
        kfree(p);
    }

    kmalloc_oob_in_memset, "slab-out-of-bounds Write 128 120", "fills 128 bytes of an object of 120", {
        memset_over(8, 128);
    }

    kmalloc_oob_memset_2, "slab-out-of-bounds Write 2 120", "fills 2 bytes across the end of an object", {
        memset_over(1, 2);
    }

    kmalloc_oob_memset_4, "slab-out-of-bounds Write 4 120", "fills 4 bytes across the end of an object", {
        memset_over(1, 4);
    }

    kmalloc_oob_memset_8, "slab-out-of-bounds Write 8 120", "fills 8 bytes across the end of an object", {
        memset_over(1, 8);
    }

    kmalloc_oob_memset_16, "slab-out-of-bounds Write 16 120", "fills 16 bytes across the end of an object", {
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

    kasan_strings, "slab-use-after-free Read 1 0", "asks for the length of a freed string", {
        let Some(p) = kmalloc(23) else { return };
        // SAFETY: mapped memory; being caught is what this is for.
        unsafe { core::ptr::write_bytes(p as *mut u8, 0, 23) };
        kfree(p);
        // SAFETY: as above.
        opaque(unsafe { CStr::from_ptr(opaque(p) as *const _) }.count_bytes());
    }

    kasan_bitops_generic,
    "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Read 8 9",
    "sets, clears, flips and reads bits behind the 9 bytes of a bitmap", {
        let Some(p) = kmalloc(9) else { return };
        // SAFETY: mapped memory, 8-byte aligned; being caught is what this is for. The compiler checks an address that it
        // knows once.
        let word = || unsafe { AtomicU64::from_ptr(opaque(p + 8) as *mut u64) };
        word().fetch_or(1, Relaxed);
        word().fetch_and(!1, Relaxed);
        word().fetch_xor(1, Relaxed);
        opaque(word().load(Relaxed));
        kfree(p);
    }
}
