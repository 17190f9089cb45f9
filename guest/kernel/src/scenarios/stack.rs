//! Bugs on stack and global variables. Names as in Linux's KASAN test suite where it has the same
//! case.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{opaque, read, scenarios, write};
use crate::thread;

/// The address of a variable on another thread's stack.
static OTHER: AtomicU64 = AtomicU64::new(0);
static mut GLOBAL: [u8; 10] = [7; 10];
static mut FIRST: [u8; 10] = [1; 10];
static mut SECOND: [u8; 10] = [2; 10];

// Rust has no arrays of variable length, so this is a C compiler's code for one. rdi: its bytes;
// rsi: a function of its address and its bytes. There are 32 bytes before it, and at least as many
// behind.
global_asm!(
    ".globl with_alloca",
    ".type with_alloca, @function",
    "with_alloca:",
    "push rbp",
    "mov rbp, rsp",
    "push rbx",
    "push r12",
    "mov rbx, rdi",
    "mov r12, rsi",
    "lea rax, [rdi + 95]",
    "and rax, -32",
    "sub rsp, rax",
    "and rsp, -32",
    "lea rdi, [rsp + 32]",
    "mov rsi, rbx",
    "call __asan_alloca_poison",
    "lea rdi, [rsp + 32]",
    "mov rsi, rbx",
    "call r12",
    "mov rdi, rsp",
    "lea rsi, [rbp - 16]",
    "call __asan_allocas_unpoison",
    "lea rsp, [rbp - 16]",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    ".size with_alloca, . - with_alloca",
);

unsafe extern "C" {
    safe fn with_alloca(bytes: u64, body: extern "C" fn(u64, u64));
}

/// The range of its variable, which no longer exists.
#[inline(never)]
fn dangling() -> core::ops::Range<u64> {
    let mut array = [0u8; 512];
    let p = opaque(&raw mut array) as u64;
    write(p, 1);
    p..p + 512
}

/// Adds a frame, so that the frame of [`use_again`] covers the old one of [`dangling`].
#[inline(never)]
fn further_down(stale: core::ops::Range<u64>) {
    let mut array = [0u8; 64];
    opaque(&raw mut array);
    use_again(stale);
    opaque(&raw mut array);
}

/// Writes to `stale` memory where this function's own frame has no variable.
#[inline(never)]
fn use_again(stale: core::ops::Range<u64>) {
    let mut array = [0u8; 24];
    let p = opaque(&raw mut array) as u64;
    write(p, 1);
    if stale.contains(&(p + 24)) {
        write(p + 24, 1);
    } else {
        crate::println!("use_after_return: the stack was not used again");
    }
}

#[inline(never)]
fn too_deep(depth: u64) -> u64 {
    let frame = opaque([depth; 40]);
    // The end is never reached, but recursion without one would be undefined behaviour.
    if depth == 0 { 0 } else { too_deep(depth - 1) + frame[depth as usize % 40] }
}

scenarios! {
    kasan_stack_oob, "stack-out-of-bounds Read 1 10", "reads behind an array on the stack", {
        let mut array = [0u8; 10];
        let p = opaque(&raw mut array) as u64;
        write(p + 9, 1);
        read(p + 10);
    }

    kasan_stack_oob_left, "stack-out-of-bounds Write 1 -1", "writes before an array on the stack", {
        let mut array = [0u8; 24];
        let p = opaque(&raw mut array) as u64;
        write(p, 1);
        write(p - 1, 1);
    }

    kasan_alloca_oob_left, "alloca-out-of-bounds Read 1 -",
    "reads before an array of variable length", {
        extern "C" fn kasan_alloca_oob_left(array: u64, bytes: u64) {
            write(array, 1);
            write(array + bytes - 1, 1);
            read(array - 1);
        }
        with_alloca(opaque(10), kasan_alloca_oob_left);
    }

    kasan_alloca_oob_right, "alloca-out-of-bounds Read 1 -",
    "reads behind an array of variable length", {
        extern "C" fn kasan_alloca_oob_right(array: u64, bytes: u64) {
            read(array + bytes);
        }
        with_alloca(opaque(10), kasan_alloca_oob_right);
    }

    use_after_scope, "use-after-scope Write 1 3", "writes to a variable whose block has ended", {
        let p;
        {
            let mut inner = [0u8; 40];
            p = opaque(&raw mut inner) as u64;
            write(p, 1);
        }
        write(p + 3, 1);
    }

    use_after_return, "stack-out-of-bounds Write 1 24",
    "writes through a pointer to a variable of a function that has returned, when another uses \
     that part of the stack", {
        further_down(opaque(dangling()));
    }

    other_stack_oob, "stack-out-of-bounds Read 1 10",
    "reads behind an array on the stack of another thread, which waits", {
        fn owner() {
            let mut array = [0u8; 10];
            let p = opaque(&raw mut array) as u64;
            write(p + 9, 1);
            OTHER.store(p, Relaxed);
            thread::yield_now();
            OTHER.store(0, Relaxed);
        }
        let Some(slot) = thread::spawn("owner", owner) else { return };
        while OTHER.load(Relaxed) == 0 {
            thread::yield_now();
        }
        read(OTHER.load(Relaxed) + 10);
        thread::join(slot);
    }

    stack_overflow_into_guard, "stack-out-of-bounds Write 8 -",
    "recurses in a thread with a guard page until its stack has no room left", {
        fn stack_overflow_into_guard() {
            opaque(too_deep(opaque(1000)));
        }
        thread::run_guarded("stack_overflow_into_guard", stack_overflow_into_guard);
    }

    kasan_global_oob_right, "global-out-of-bounds Read 1 13", "reads behind a global variable", {
        let p = &raw const GLOBAL as u64;
        read(p + 9);
        read(p + 13);
    }

    // Compilers put no redzone before a variable: the access hits the one behind its neighbour.
    kasan_global_oob_left, "global-out-of-bounds Read 1 29",
    "reads before a global variable that has a neighbour", {
        let (first, second) = (&raw const FIRST as u64, &raw const SECOND as u64);
        read(opaque(first.max(second)) - 3);
    }
}
