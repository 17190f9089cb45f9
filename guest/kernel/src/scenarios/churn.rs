//! Allocator churn: the workload for measurements of what the shadow costs.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use alloc::vec::Vec;

use super::{scenarios, write};
use crate::page;
use crate::slab::{kfree, kmalloc};

static OPERATIONS: AtomicU64 = AtomicU64::new(4000);

/// Whether a churn keeps its live objects at its end.
static KEEP: AtomicBool = AtomicBool::new(false);

/// From now on `huge_churn` does not free its live objects at its end.
pub fn keep() {
    KEEP.store(true, Relaxed);
}

/// Sets how many allocations and frees `huge_churn` makes.
pub fn set_operations(n: u64) {
    OPERATIONS.store(n, Relaxed);
}

/// A xorshift generator (Marsaglia 2003): the same sequence each run.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

scenarios! {
    huge_churn, "silent",
    "allocations and frees of all kinds in random order, each used at its edges", {
        const LIVE: u64 = 1024;
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut live: Vec<(u64, bool)> = Vec::with_capacity(LIVE as usize);
        live.resize(LIVE as usize, (0, false));
        for _ in 0..OPERATIONS.load(Relaxed) {
            let r = random.next();
            let (p, pages) = &mut live[(r % LIVE) as usize];
            if *p != 0 {
                if *pages { page::free(*p) } else { kfree(*p) }
                *p = 0;
                continue;
            }
            *pages = r >> 16 & 63 == 0;
            if *pages {
                let Some(at) = page::alloc((r >> 32 & 3) as usize) else { continue };
                *p = at;
                write(at + 4095, 1);
            } else {
                // Mostly small, as in kernels; now and then with pages of its own.
                let size = match r >> 24 & 63 {
                    0 => 4097 + (r >> 40) % 8000,
                    1..=6 => 512 + (r >> 40) % 3000,
                    _ => 8 + (r >> 40) % 250,
                };
                let Some(at) = kmalloc(size) else { continue };
                *p = at;
                write(at, 1);
                write(at + size - 1, 1);
            }
        }
        for (p, pages) in live {
            if p != 0 && !KEEP.load(Relaxed) {
                if pages { page::free(p) } else { kfree(p) }
            }
        }
    }
}
