//! A small kernel: it boots, has a heap, prints, and resets the machine.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod console;
mod heap;
mod paging;

use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;

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
    println!("and a copy of them to {}", copied(&squares).iter().sum::<u32>());
    println!("which is the same: {}", same(&squares, &squares.clone()));
    println!("the first one was {}", first(squares));
    free_inside(vec![0; 64]);
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

/// Copies all numbers, and one more: a bug.
#[inline(never)]
fn copied(numbers: &[u32]) -> Vec<u32> {
    // SAFETY: not given.
    unsafe { core::slice::from_raw_parts(numbers.as_ptr(), numbers.len() + 1) }.to_vec()
}

/// Compares all numbers, and one more: a bug.
#[inline(never)]
fn same(numbers: &[u32], others: &[u32]) -> bool {
    let len = numbers.len() + 1;
    // SAFETY: not given.
    unsafe {
        core::slice::from_raw_parts(numbers.as_ptr(), len)
            == core::slice::from_raw_parts(others.as_ptr(), len)
    }
}

/// Reads the first number after all are freed, and others have the memory: a bug.
#[inline(never)]
fn first(numbers: Vec<u32>) -> u32 {
    let (first, len) = (numbers.as_ptr(), numbers.len());
    drop(numbers);
    let _others: Vec<u32> = black_box(vec![7; len]);
    // SAFETY: not given.
    unsafe { first.read_volatile() }
}

/// Frees what begins inside of an object: a bug.
#[inline(never)]
fn free_inside(mut bytes: Vec<u8>) {
    // SAFETY: not given.
    drop(unsafe { Vec::from_raw_parts(bytes.as_mut_ptr().add(16), 16, 16) });
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("{info}");
    boot::reset()
}
