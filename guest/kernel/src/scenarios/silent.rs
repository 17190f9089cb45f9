//! Legal behaviour close to the edge: none of it may be reported.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use super::{opaque, read, scenarios, write};
use crate::page;
use crate::slab::{Cache, kfree, kmalloc, krealloc};
use crate::thread;

unsafe extern "C" {
    fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32;
    fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8;
}

static TABLE: [u8; 13] = *b"thirteen byte";

fn recurse(depth: u64) -> u64 {
    let frame = opaque([depth; 5]);
    if depth == 0 { frame[0] } else { recurse(depth - 1) + frame[4] }
}

fn in_a_thread() {
    for _ in 0..3 {
        opaque(recurse(6));
        thread::yield_now();
    }
}

/// Recurses, then does `last`, which does not return.
fn recurse_and(last: fn() -> !, depth: u64) -> u64 {
    let frame = opaque([depth; 5]);
    if depth == 0 { last() } else { recurse_and(last, depth - 1) + frame[4] }
}

extern "C" fn leave_deep_frames() {
    opaque(recurse_and(|| jump::throw(), 12));
}

fn end_in_depth() {
    opaque(recurse_and(thread::exit, 12));
}

extern "C" fn fill(buffer: u64, bytes: u64) {
    (buffer..buffer + bytes).for_each(|at| write(at, 0xaa));
}

/// Leaves frames without returning from them, as `longjmp` does, and uses stack memory that no
/// compiler laid out.
mod jump {
    use core::arch::global_asm;

    global_asm!(
        // rdi: a function, which may end by `throw`. The callee-saved registers are on the stack
        // meanwhile.
        ".globl jump_catch",
        "jump_catch:",
        "push rbp",
        "mov rbp, rsp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov [rip + jump_frame], rbp",
        "call rdi",
        "jump_return:",
        "lea rsp, [rbp - 40]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        ".globl jump_throw",
        "jump_throw:",
        "mov rbp, [rip + jump_frame]",
        "jmp jump_return",
        // rdi: a function of the address and the bytes of a buffer.
        ".globl jump_with_buffer",
        "jump_with_buffer:",
        "push rbp",
        "mov rbp, rsp",
        "mov rax, rdi",
        "sub rsp, 2048",
        "mov rdi, rsp",
        "mov esi, 2048",
        "call rax",
        "leave",
        "ret",
        ".section .bss.jump_frame, \"aw\", @nobits",
        ".balign 8",
        "jump_frame:",
        ".skip 8",
        ".text",
    );

    unsafe extern "C" {
        #[link_name = "jump_catch"]
        pub safe fn catch(body: extern "C" fn());
        #[link_name = "jump_throw"]
        pub safe fn throw() -> !;
        #[link_name = "jump_with_buffer"]
        pub safe fn with_buffer(body: extern "C" fn(u64, u64));
    }
}

scenarios! {
    exact_fit, "silent", "first and last byte of objects of every size class", {
        for size in [
            1, 7, 8, 9, 16, 31, 32, 64, 96, 115, 128, 200, 256, 500, 1024, 2048, 4096, 4097, 9000,
        ] {
            let Some(p) = kmalloc(size) else { return };
            write(p, 1);
            write(p + size - 1, 2);
            kfree(p);
        }
    }

    partial_granules, "silent", "accesses of each size that end where an object of odd size ends", {
        for size in 8..24 {
            let Some(p) = kmalloc(size) else { return };
            // SAFETY: all of these lie inside the object.
            unsafe {
                opaque((opaque(p + size - 8) as *const u64).read_unaligned());
                opaque((opaque(p + size - 4) as *const u32).read_unaligned());
                opaque((opaque(p + size - 2) as *const u16).read_unaligned());
                (opaque(p + (size - 4) / 4 * 4) as *const u32).read_volatile();
            }
            read(p + size - 1);
            kfree(p);
        }
    }

    reuse_after_free, "silent", "a freed object's memory is handed out again and used", {
        for size in [16, 100, 128] {
            let Some(p) = kmalloc(size) else { return };
            kfree(p);
            let Some(q) = kmalloc(size) else { return };
            write(q, 1);
            write(q + size - 1, 1);
            kfree(q);
        }
    }

    krealloc_in_place_and_moved, "silent",
    "an allocation grows, shrinks and moves; all of it is used each time", {
        let Some(mut p) = kmalloc(20) else { return };
        let mut old = 20;
        for new in [30, 32, 70, 40, 200, 5000, 100, 9000] {
            let Some(q) = krealloc(p, old, new) else { return };
            (p, old) = (q, new);
            write(p, 1);
            write(p + new - 1, 1);
        }
        kfree(p);
    }

    page_reuse_as_slab, "silent", "pages, then slabs of two caches, then pages again", {
        for _ in 0..3 {
            let Some(p) = page::alloc(0) else { return };
            write(p, 1);
            write(p + 4095, 1);
            page::free(p);
            let mut objects = [0; 8];
            for (i, object) in objects.iter_mut().enumerate() {
                let size = if i % 2 == 0 { 500 } else { 1000 };
                let Some(p) = kmalloc(size) else { return };
                write(p + size - 1, 1);
                *object = p;
            }
            objects.into_iter().for_each(kfree);
        }
    }

    large_exact, "silent", "first and last byte of allocations that have pages of their own", {
        for size in [4097, 8191, 8192, 12288, 20000] {
            let Some(p) = kmalloc(size) else { return };
            for at in [0, 4095, 4096, size - 1] {
                write(p + at, 1);
            }
            kfree(p);
        }
    }

    unaligned_inside, "silent", "unaligned accesses inside an object and across valid pages", {
        let Some(p) = kmalloc(64) else { return };
        for at in 0..=56 {
            // SAFETY: inside the object.
            opaque(unsafe { (opaque(p + at) as *const u64).read_unaligned() });
        }
        kfree(p);
        let Some(p) = page::alloc(1) else { return };
        for at in 4089..4096 {
            // SAFETY: inside the two pages.
            unsafe { (opaque(p + at) as *mut u64).write_unaligned(at) };
        }
        page::free(p);
    }

    memory_functions, "silent",
    "copies, moves, fills and compares that end with their objects, or have no length", {
        let (Some(a), Some(b)) = (kmalloc(61), kmalloc(61)) else { return };
        // SAFETY: all of these lie inside the objects; those without a length touch nothing.
        unsafe {
            core::ptr::write_bytes(a as *mut u8, 5, opaque(61));
            core::ptr::copy_nonoverlapping(a as *const u8, b as *mut u8, opaque(61));
            memmove((a + 7) as *mut u8, a as *const u8, opaque(54));
            memmove(a as *mut u8, (a + 7) as *const u8, opaque(54));
            memmove(a as *mut u8, (a + 61) as *const u8, opaque(0));
            if memcmp(a as *const u8, b as *const u8, opaque(61)) != 0 {
                crate::println!("memory_functions: the copies differ");
            }
        }
        kfree(a);
        kfree(b);
    }

    deep_stack, "silent", "recursion over frames with redzones, and the same stack again", {
        for _ in 0..3 {
            opaque(recurse(20));
        }
    }

    threads, "silent",
    "threads that yield in the middle of frames with redzones; their stacks are used again", {
        for _ in 0..2 {
            let workers: [_; 3] = core::array::from_fn(|_| thread::spawn("worker", in_a_thread));
            workers.into_iter().flatten().for_each(thread::join);
        }
    }

    no_return_path, "silent",
    "leaves deep frames without returning, and lets code without redzones use their memory", {
        for _ in 0..2 {
            jump::catch(leave_deep_frames);
            jump::with_buffer(fill);
        }
    }

    thread_exits_in_depth, "silent",
    "threads that end in deep frames; their stacks are used again, as stacks and as pages", {
        for _ in 0..2 {
            let worker = thread::spawn("worker", end_in_depth);
            worker.into_iter().for_each(thread::join);
            let Some(p) = page::alloc(2) else { return };
            for at in (0..4 * 4096).step_by(64) {
                write(p + at, 1);
            }
            page::free(p);
        }
    }

    globals, "silent", "every byte of a global variable of odd size", {
        let p = &raw const TABLE as u64;
        for at in 0..TABLE.len() as u64 {
            read(p + at);
        }
    }

    caches, "silent", "objects of a cache of their own, all of their bytes", {
        let Some(cache) = Cache::new("silent_cache", 72) else { return };
        let mut objects = [0; 40];
        for object in &mut objects {
            let Some(p) = cache.alloc() else { return };
            write(p, 1);
            write(p + 71, 1);
            *object = p;
        }
        objects.into_iter().for_each(|p| cache.free(p));
    }

    collections, "silent", "vectors, strings and maps that grow, shrink and are dropped", {
        let mut v = Vec::new();
        let mut s = String::new();
        let mut m = BTreeMap::new();
        for i in 0..60u32 {
            v.push(i);
            s.push_str("abc");
            m.insert(i * 7 % 60, i);
        }
        v.truncate(7);
        v.shrink_to_fit();
        m.retain(|k, _| k % 2 == 0);
        opaque((v, s, m));
    }
}
