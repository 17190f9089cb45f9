//! Code for the benchmarks to measure: one operation, repeated in a loop with a known number of
//! instructions.
//!
//! The host chooses by words `bench=WHAT:ROUNDS:...` on the command line, runs the kernel with two
//! numbers of rounds, and divides the difference. Between the lines `bench begin` and `bench end`
//! nothing but the loop runs.
//!
//! | word | what a round is |
//! | --- | --- |
//! | `bench=check:ROUNDS:ENTRY:PLACE:OFFSET:SIZE` | a call of `__asan_ENTRY_noabort`, see below |
//! | `bench=call:ROUNDS:NAME` | a call of the runtime, see [`calls`] |
//! | `bench=record:ROUNDS:DEPTH` | an event without any shadow, `DEPTH` frames deep |
//! | `bench=kmalloc:ROUNDS:BYTES` | `kmalloc` and `kfree` |
//! | `bench=replay:1` | all events of the initrd, see [`replay`](crate::replay) |
//! | `bench=touch:1` | all of free memory taken, and a byte of each page written |
//! | `bench=chunks:ROUNDS:STATE` | a promotion in 2 MiB of its own, with `new` or `used` shadow |
//!
//! A check looks at the address `OFFSET` bytes into `PLACE`: `page` (two pages, accessible as a
//! whole), `beside` (the second of two is byte-checked), or `object` (1005 bytes in a slab). `SIZE`
//! is for `loadN` and `storeN`. With the `ENTRY` `none` a bare `ret` is called.

use core::arch::{asm, global_asm};

use umbra_guest::abi::{CallNumber, PORT};
use umbra_guest::codes::{FREE_PAGE, GRANULE_SHIFT, PAGE_SIZE, SLAB_REDZONE};

use crate::boot::BootInfo;
use crate::slab::{kfree, kmalloc};
use crate::{page, println};

global_asm!(".balign 16", "bench_none:", "ret");

unsafe extern "C" {
    fn bench_none();
    fn __asan_load1_noabort();
    fn __asan_load2_noabort();
    fn __asan_load4_noabort();
    fn __asan_load8_noabort();
    fn __asan_load16_noabort();
    fn __asan_loadN_noabort();
    fn __asan_store1_noabort();
    fn __asan_store2_noabort();
    fn __asan_store4_noabort();
    fn __asan_store8_noabort();
    fn __asan_store16_noabort();
    fn __asan_storeN_noabort();
    fn umbra_poison();
    fn umbra_unpoison();
    fn umbra_alloc();
    fn __asan_set_shadow_f8();
}

/// A C function, whatever its arguments: at most five integers.
pub type Function = unsafe extern "C" fn();

/// Most 2 MiB blocks that `chunks` touches.
const CHUNKS: usize = 64;
/// A block of 2 MiB, as page order.
const CHUNK_ORDER: usize = 9;
/// Bytes of the object that checks are tried on: 125 whole granules, and one of which 5 bytes are
/// valid.
const OBJECT: u64 = 1005;

/// Calls `f(arguments)` `rounds` times. The loop adds eight instructions to each round, besides
/// `call` and `ret`.
#[inline(never)]
fn repeat(rounds: u64, f: Function, arguments: [u64; 5]) {
    if rounds == 0 {
        return;
    }
    println!("bench begin");
    // SAFETY: the callers' functions take such arguments; what a C function may change is declared.
    unsafe {
        asm!("2:",
             "mov rdi, [r12]", "mov rsi, [r12 + 8]", "mov rdx, [r12 + 16]",
             "mov rcx, [r12 + 24]", "mov r8, [r12 + 32]",
             "call r13", "dec r14", "jnz 2b",
             in("r12") &arguments, in("r13") f, inout("r14") rounds => _, clobber_abi("C"));
    }
    println!("bench end");
}

/// [`repeat`], `depth` frames deeper.
#[inline(never)]
fn repeat_at(depth: u64, rounds: u64, f: Function, arguments: [u64; 5]) {
    if depth == 0 {
        repeat(rounds, f, arguments);
    } else {
        repeat_at(depth - 1, rounds, f, arguments);
        // No tail call: the call above keeps its frame.
        core::hint::black_box(depth);
    }
}

/// The check called `__asan_NAME_noabort`; `none` is a bare `ret`.
pub fn entry(name: &str) -> Option<Function> {
    let f: Function = match name {
        "none" => bench_none,
        "load1" => __asan_load1_noabort,
        "load2" => __asan_load2_noabort,
        "load4" => __asan_load4_noabort,
        "load8" => __asan_load8_noabort,
        "load16" => __asan_load16_noabort,
        "loadN" => __asan_loadN_noabort,
        "store1" => __asan_store1_noabort,
        "store2" => __asan_store2_noabort,
        "store4" => __asan_store4_noabort,
        "store8" => __asan_store8_noabort,
        "store16" => __asan_store16_noabort,
        "storeN" => __asan_storeN_noabort,
        _ => return None,
    };
    Some(f)
}

unsafe extern "C" fn allocate_and_free(bytes: u64) {
    if let Some(at) = kmalloc(bytes) {
        kfree(at);
    }
}

/// Allocates a page and frees it.
unsafe extern "C" fn page_and_back(_: u64) {
    if let Some(at) = page::alloc(0) {
        page::free(at);
    }
}

/// Makes the page of `at` wholly accessible, then byte-checked.
unsafe extern "C" fn demote_and_promote(at: u64) {
    umbra_guest::unpoison(at, PAGE_SIZE);
    umbra_guest::poison(at, 8, SLAB_REDZONE);
}

unsafe extern "C" fn give_and_take(at: u64) {
    umbra_guest::alloc(at, 64, 96, SLAB_REDZONE, 1);
    umbra_guest::free(at, at, 96, SLAB_REDZONE);
}

unsafe extern "C" fn drain() {
    // SAFETY: a call of the ABI. It changes nothing in this kernel's memory but the ring's count.
    unsafe {
        asm!("out dx, eax",
             inout("eax") CallNumber::RingDrain as u32 => _, in("dx") PORT, in("rdi") 0,
             options(nostack));
    }
}

fn with_arguments<F: Copy>(f: F) -> Function {
    const { assert!(size_of::<F>() == size_of::<Function>()) };
    // SAFETY: both are pointers to C functions; `repeat` passes more arguments than any of them
    // takes.
    unsafe { core::mem::transmute_copy(&f) }
}

/// The calls of `bench=call`: the function and its arguments, for an unused page at `at`. None of
/// the seven pages behind it is byte-checked, unless the name ends with `-beside`.
fn calls(name: &str, at: u64) -> Option<(Function, [u64; 5])> {
    let redzone = u64::from(SLAB_REDZONE);
    Some(match name {
        "poison" => (umbra_poison, [at, 8, redzone, 0, 0]),
        "unpoison" => (umbra_unpoison, [at, 8, 0, 0, 0]),
        "poison-page" => (umbra_poison, [at, PAGE_SIZE, FREE_PAGE.into(), 0, 0]),
        "unpoison-page" => (umbra_unpoison, [at, PAGE_SIZE, 0, 0, 0]),
        "poison-page-beside" => {
            umbra_guest::poison(at + PAGE_SIZE, 8, SLAB_REDZONE);
            (umbra_poison, [at, PAGE_SIZE, FREE_PAGE.into(), 0, 0])
        }
        "unpoison-page-beside" => {
            umbra_guest::poison(at + PAGE_SIZE, 8, SLAB_REDZONE);
            (umbra_unpoison, [at, PAGE_SIZE, 0, 0, 0])
        }
        "page" => (with_arguments(page_and_back as unsafe extern "C" fn(u64)), [0; 5]),
        "promote" => {
            (with_arguments(demote_and_promote as unsafe extern "C" fn(u64)), [at, 0, 0, 0, 0])
        }
        "alloc" => (umbra_alloc, [at, 64, 96, redzone, 1]),
        "alloc-free" => {
            (with_arguments(give_and_take as unsafe extern "C" fn(u64)), [at, 0, 0, 0, 0])
        }
        // As at the end of a scope with a variable of 32 bytes.
        "scope" => (
            __asan_set_shadow_f8,
            [(at.cast_signed() >> GRANULE_SHIFT).cast_unsigned(), 4, 0, 0, 0],
        ),
        "drain" => (drain, [0; 5]),
        _ => return None,
    })
}

fn chunks(rounds: u64, used: bool) -> Option<()> {
    let mut blocks = [0; CHUNKS];
    for block in &mut blocks {
        *block = page::alloc(CHUNK_ORDER)?;
    }
    if used {
        // The next page has its shadow in the same page of shadow.
        blocks.iter().for_each(|&at| umbra_guest::poison(at + PAGE_SIZE, 8, SLAB_REDZONE));
    }
    println!("bench begin");
    for &at in blocks.iter().take(rounds as usize) {
        umbra_guest::poison(at, 8, SLAB_REDZONE);
    }
    println!("bench end");
    for at in blocks {
        // A poisoned start would be taken for a double free.
        umbra_guest::unpoison(at, 8);
        page::free(at);
    }
    Some(())
}

/// Takes all blocks that are free, and writes a byte of each page. Two pages are free afterwards,
/// for other benchmarks.
fn touch() -> Option<()> {
    let left = page::alloc(1)?;
    for order in (0..=CHUNK_ORDER).rev() {
        while let Some(at) = page::alloc(order) {
            for page in 0..1 << order {
                // SAFETY: in the block, which is this function's.
                unsafe { ((at + page * PAGE_SIZE) as *mut u8).write_volatile(1) };
            }
        }
    }
    page::free(left);
    Some(())
}

/// Runs the benchmark of one word. None if the word makes no sense, or memory is too small.
fn bench(word: &str, initrd: &[u8]) -> Option<()> {
    let mut parts = word.split(':');
    let mut text = || parts.next();
    let what = text()?;
    let rounds: u64 = text()?.parse().ok()?;
    match what {
        "check" => {
            let f = entry(text()?)?;
            let at = match text()? {
                "page" => page::alloc(1)?,
                "beside" => {
                    let at = page::alloc(1)?;
                    umbra_guest::poison(at + PAGE_SIZE + 64, 8, SLAB_REDZONE);
                    at
                }
                "object" => kmalloc(OBJECT)?,
                _ => return None,
            };
            let at = at + text()?.parse::<u64>().ok()?;
            repeat(rounds, f, [at, text()?.parse().ok()?, 0, 0, 0]);
        }
        "call" => {
            let (f, arguments) = calls(text()?, page::alloc(3)?)?;
            repeat(rounds, f, arguments);
        }
        "record" => {
            let f: Function = umbra_alloc;
            repeat_at(text()?.parse().ok()?, rounds, f, [page::alloc(0)?, 0, 0, 0, 0]);
        }
        "kmalloc" => {
            let f = with_arguments(allocate_and_free as unsafe extern "C" fn(u64));
            repeat(rounds, f, [text()?.parse().ok()?, 0, 0, 0, 0]);
        }
        "replay" => crate::replay::run(initrd)?,
        "touch" => touch()?,
        "chunks" => chunks(rounds, text()? == "used")?,
        _ => return None,
    }
    Some(())
}

/// Runs the benchmarks of the command line.
pub fn run(info: &BootInfo) {
    for word in
        info.command_line.split_ascii_whitespace().filter_map(|word| word.strip_prefix("bench="))
    {
        if bench(word, info.initrd).is_none() {
            println!("bench={word}: there is no such benchmark, or too little memory");
        }
    }
}
