//! The test kernel's allocators: pages, slabs, and `kmalloc` over both.
//!
//! They are compiled *without* the sanitizer, as Linux compiles `mm/slub.c` under KASAN, and linked
//! as one object: an allocator works on freed memory on purpose. All code that uses the memory it
//! hands out is checked. `guest/kernel/src/memory.rs` has the bindings for the kernel.
#![no_std]

mod lock;
pub mod page;
mod retry;
pub mod slab;

/// The direct map: all guest-physical memory, one to one.
pub(crate) const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;

/// Takes over the memory from `start` to `end` (guest-physical). The first part of it describes the
/// rest. Returns where the rest begins (an address of the direct map).
#[unsafe(no_mangle)]
pub extern "C" fn kernel_memory_init(start: u64, end: u64) -> u64 {
    let first = page::init(start, end);
    slab::init();
    first
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    unsafe extern "C" {
        fn kernel_memory_panic(line: u32) -> !;
    }
    // SAFETY: the kernel prints the line and ends.
    unsafe { kernel_memory_panic(info.location().map_or(0, |at| at.line())) }
}
