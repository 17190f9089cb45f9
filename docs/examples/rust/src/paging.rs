//! Page tables.

use crate::boot::{DIRECT_MAP, IMAGE_MAP};

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;
const LARGE_PAGE: u64 = 2 << 20;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Page tables that are not used yet.
#[repr(align(4096))]
struct Tables([[u64; 512]; 32]);
static mut TABLES: Tables = Tables([[0; 512]; 32]);
static mut USED: usize = 0;

unsafe extern "C" {
    static mut boot_pml4: [u64; 512];
}

/// The guest-physical address of a new table.
fn new_table() -> u64 {
    // SAFETY: one CPU, and nothing interrupts it.
    unsafe {
        let table = &raw const TABLES.0[USED];
        USED += 1;
        table as u64 - IMAGE_MAP
    }
}

/// Maps `bytes` of physical memory from `physical` on at `virt`, writable, in large pages where
/// both addresses allow it.
pub fn map(virt: u64, physical: u64, bytes: u64) {
    let mut done = 0;
    while done < bytes {
        let (at, to) = (virt + done, physical + done);
        let large = (at | to) % LARGE_PAGE == 0;
        let last = if large { 21 } else { 12 };
        let mut table = &raw mut boot_pml4 as *mut u64;
        let mut shift = 39;
        // SAFETY: all tables are in the direct map, and the mapped addresses were not used before.
        unsafe {
            while shift > last {
                let entry = table.add((at >> shift & 511) as usize);
                if *entry & 1 == 0 {
                    *entry = new_table() | PRESENT_WRITABLE;
                }
                table = (DIRECT_MAP + (*entry & FRAME)) as *mut u64;
                shift -= 9;
            }
            let size = if large { LARGE } else { 0 };
            *table.add((at >> shift & 511) as usize) = to | PRESENT_WRITABLE | size;
        }
        done += if large { LARGE_PAGE } else { 4096 };
    }
}
