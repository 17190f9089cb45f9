//! Bugs on memory that is contiguous in virtual addresses only. Names as in Linux's KASAN test
//! suite where it has them.
//!
//! Memory that is not mapped is checked and not accessed: the access would fault, as in Linux.

use core::arch::asm;

use super::{opaque, read, scenarios, write};
use crate::vmalloc::{direct, vfree, vmalloc};

unsafe extern "C" {
    fn __asan_load1_noabort(at: u64);
    fn __asan_load8_noabort(at: u64);
    fn __asan_store8_noabort(at: u64);
    fn __asan_storeN_noabort(at: u64, n: u64);
}

/// Calls `body` on the stack that ends at `top`. The chain of frames ends there, too.
///
/// # Safety
/// Nobody else uses that stack.
#[inline(always)]
unsafe fn call_on(top: u64, body: extern "C" fn()) {
    // SAFETY: the caller's promise; `body` keeps r12.
    unsafe {
        asm!("push rbp", "mov r12, rsp", "xor ebp, ebp", "mov rsp, {}", "call {}",
             "mov rsp, r12", "pop rbp",
             in(reg) top, in(reg) body, out("r12") _, clobber_abi("C"));
    }
}

extern "C" fn vmalloc_stack_user() {
    let mut array = [0u8; 10];
    let p = opaque(&raw mut array) as u64;
    write(p + 9, 1);
    read(p + 10);
}

scenarios! {
    vmalloc_stack, "stack-out-of-bounds Read 1 10;use-after-free Write 1 16383",
    "reads behind an array on a stack in virtual memory, and writes to that stack after its end", {
        const BYTES: u64 = 16 << 10;
        let Some(stack) = vmalloc(BYTES) else { return };
        umbra_guest::stack_alloc(stack, BYTES);
        // SAFETY: the stack was made for this.
        unsafe { call_on(stack + BYTES, vmalloc_stack_user) };
        umbra_guest::stack_free(stack, BYTES);
        write(stack + BYTES - 1, 0);
        vfree(stack);
    }

    vmalloc_oob, "vmalloc-out-of-bounds Read 1 2035;vmalloc-out-of-bounds Read 1 2040",
    "reads behind what was asked for, in the same page", {
        let size = 4096 / 2 - 8 - 5;
        let Some(p) = vmalloc(size) else { return };
        write(p, 0);
        write(p + size - 1, 0);
        read(p + size);
        read(p + size + 5);
        // By its other address, all of the page is accessible.
        if let Some(page) = direct(p) {
            write(page, 0);
            read(page + size);
            read(page + 4095);
        }
        vfree(p);
    }

    vmalloc_oob_guard,
    "vmalloc-out-of-bounds Read 8 8192;vmalloc-out-of-bounds Read 8 8192;\
     vmalloc-out-of-bounds Write 8 12280;vmalloc-out-of-bounds Write 8200 8192",
    "checks accesses to the page behind an area, and across its start", {
        let Some(p) = vmalloc(8192) else { return };
        let p = opaque(p);
        // SAFETY: these look at shadow only.
        unsafe {
            __asan_load8_noabort(p + 8184);
            __asan_load8_noabort(p + 8192);
            __asan_load8_noabort(p + 8185);
            __asan_store8_noabort(p + 12280);
            __asan_storeN_noabort(p, 8192);
            __asan_storeN_noabort(p, 8200);
        }
        vfree(p);
    }

    vmalloc_uaf, "vmalloc-out-of-bounds Read 1 0;vmalloc-out-of-bounds Write 8 4088",
    "checks accesses to a freed area", {
        let Some(p) = vmalloc(4096) else { return };
        vfree(p);
        let p = opaque(p);
        // SAFETY: as above.
        unsafe {
            __asan_load1_noabort(p);
            __asan_store8_noabort(p + 4088);
        }
    }

    vmalloc_invalid_free, "invalid-free Free 0 16;invalid-free Free 0 0",
    "frees an address inside an area, and an area twice", {
        let Some(p) = vmalloc(100) else { return };
        vfree(opaque(p + 16));
        vfree(p);
        vfree(opaque(p));
    }

    vmalloc_exact, "silent",
    "areas of many sizes: their ends, accesses across pages, and their pages by another address", {
        for size in [1, 8, 13, 2048, 4088, 4095, 4096, 4097, 8191, 8192, 12289, 40000] {
            let Some(p) = vmalloc(size) else { return };
            let Some(q) = vmalloc(size) else { return };
            for p in [p, q] {
                write(p, 1);
                write(p + size - 1, 2);
                for page in 1..size.div_ceil(4096) {
                    // SAFETY: inside the area, if only just.
                    unsafe { (opaque(p + page * 4096 - 1) as *mut u16).write_unaligned(3) };
                    if page * 4096 + 4 <= size {
                        let across = opaque(p + page * 4096 - 4) as *const u64;
                        // SAFETY: as above.
                        opaque(unsafe { across.read_unaligned() });
                    }
                }
                if let Some(page) = direct(p) {
                    read(page);
                    read(page + 4095);
                }
            }
            vfree(p);
            write(q, 1);
            vfree(q);
        }
    }
}
