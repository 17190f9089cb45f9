//! The kernel's heaps for Rust collections: `kmalloc` as the global allocator, and a small
//! allocator that knows nothing of Umbra, to try `Checked` on.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

use crate::slab::{kfree, kmalloc, krealloc};

/// `kmalloc` as the global allocator.
pub struct Kmalloc;

#[global_allocator]
static HEAP: Kmalloc = Kmalloc;

// SAFETY: `kmalloc` hands out distinct memory of at least the requested size. It is aligned to 8
// bytes, to 16 from 16 bytes on, and to a page above 4096 bytes; a larger alignment asks for that
// many bytes.
unsafe impl GlobalAlloc for Kmalloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = match layout.align() {
            0..=8 => layout.size(),
            9..=16 => layout.size().max(16),
            17..=4096 => layout.size().max(4097),
            _ => return null_mut(),
        };
        kmalloc(size as u64).map_or(null_mut(), |at| at as *mut u8)
    }

    unsafe fn dealloc(&self, object: *mut u8, _: Layout) {
        kfree(object as u64);
    }

    unsafe fn realloc(&self, object: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let size = if layout.align() > 16 { size.max(4097) } else { size };
        krealloc(object as u64, layout.size() as u64, size as u64)
            .map_or(null_mut(), |at| at as *mut u8)
    }
}

/// A first-fit allocator over fixed memory with its free list *inside* the free blocks, as is
/// common in small kernels. It does not know that it is being checked.
pub struct FirstFit<const N: usize> {
    memory: UnsafeCell<Memory<N>>,
}

#[repr(align(16))]
struct Memory<const N: usize> {
    bytes: [u8; N],
    first: *mut Block,
    ready: bool,
}

struct Block {
    size: usize,
    next: *mut Block,
}

// SAFETY: one CPU and no preemption: the cell has one user at a time.
unsafe impl<const N: usize> Sync for FirstFit<N> {}

impl<const N: usize> FirstFit<N> {
    /// An allocator over `N` bytes of its own.
    pub const fn new() -> Self {
        Self { memory: UnsafeCell::new(Memory { bytes: [0; N], first: null_mut(), ready: false }) }
    }
}

fn block_size(layout: Layout) -> usize {
    layout.size().max(size_of::<Block>()).next_multiple_of(16)
}

// SAFETY: blocks are cut from the memory without overlap, in multiples of 16 bytes from a 16-byte
// aligned start.
unsafe impl<const N: usize> GlobalAlloc for FirstFit<N> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > 16 {
            return null_mut();
        }
        let size = block_size(layout);
        // SAFETY: one user at a time; list entries point to free blocks inside the memory.
        unsafe {
            let memory = &mut *self.memory.get();
            if !memory.ready {
                memory.ready = true;
                memory.first = (&raw mut memory.bytes).cast();
                memory.first.write(Block { size: N, next: null_mut() });
            }
            let mut link = &raw mut memory.first;
            while !(*link).is_null() {
                let block = *link;
                let Block { size: have, next } = block.read();
                if have == size {
                    *link = next;
                    return block.cast();
                }
                if have > size {
                    let rest: *mut Block = block.byte_add(size);
                    rest.write(Block { size: have - size, next });
                    *link = rest;
                    return block.cast();
                }
                link = &raw mut (*block).next;
            }
            null_mut()
        }
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        // SAFETY: the block was handed out by `alloc` with this layout, and is free now.
        unsafe {
            let memory = &mut *self.memory.get();
            let block: *mut Block = object.cast();
            block.write(Block { size: block_size(layout), next: memory.first });
            memory.first = block;
        }
    }
}
