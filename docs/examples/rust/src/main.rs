//! A small kernel: it boots, has a heap, prints, and resets the machine.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod console;
mod heap;
mod paging;

use alloc::vec::Vec;

use heap::Heap;

/// The memory that this kernel uses, from address 0 on.
const MEMORY: u64 = 32 << 20;

#[global_allocator]
static HEAP: Heap = Heap::new();

#[unsafe(no_mangle)]
extern "C" fn kernel_main() -> ! {
    println!("the kernel runs");
    let squares: Vec<u32> = (1..=10).map(|n| n * n).collect();
    println!("the squares up to 10 add up to {}", sum(&squares));
    boot::reset()
}

/// Adds up all numbers, and one more: a bug.
#[inline(never)]
fn sum(numbers: &[u32]) -> u32 {
    let mut sum = 0;
    for i in 0..=numbers.len() {
        // SAFETY: not given.
        sum += unsafe { *numbers.as_ptr().add(i) };
    }
    sum
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("{info}");
    boot::reset()
}
