//! The test kernel's allocators: pages, slabs, and `kmalloc` over both.
//!
//! They are compiled *without* the sanitizer, as Linux compiles `mm/slub.c` where KASAN is on, and
//! linked as one object: an allocator has nothing to check on its own data, works on freed memory
//! on purpose, and would pay for both. Whoever uses what it hands out is checked as ever.
//! `guest/kernel/src/memory.rs` is its face in the kernel.
#![no_std]

mod lock;
pub mod page;
pub mod slab;

/// The direct map: all guest-physical memory, one to one.
pub(crate) const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    unsafe extern "C" {
        fn kernel_memory_panic(line: u32) -> !;
    }
    // SAFETY: the kernel prints the line and ends.
    unsafe { kernel_memory_panic(info.location().map_or(0, |at| at.line())) }
}
