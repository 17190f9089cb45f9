//! Memory that is contiguous in virtual addresses only: single pages, mapped side by side, with an
//! unmapped page behind each area. It has its own shadow, by virtual address.
//!
//! Each address is handed out once, from below, so no translation has to be flushed. There are
//! enough for the scenarios. Only one CPU calls this.

use core::ptr::addr_of_mut;

use umbra_guest::Mapping;
use umbra_guest::codes::{PAGE_SIZE, VMALLOC_INVALID};

use crate::layout::DIRECT_MAP;
use crate::{boot, page};

/// The start of the areas (Linux's `VMALLOC_START`).
const START: u64 = 0xffff_c900_0000_0000;
/// Bytes for all areas.
const BYTES: u64 = 16 << 20;
/// Most areas at a time.
const AREAS: usize = 64;

#[derive(Clone, Copy)]
struct Area {
    start: u64,
    pages: u64,
}

struct Areas {
    /// The start of the next area; 0 before the first.
    next: u64,
    areas: [Option<Area>; AREAS],
}

static mut ALL: Areas = Areas { next: 0, areas: [None; AREAS] };

fn all() -> &'static mut Areas {
    // SAFETY: one CPU, and no caller keeps the reference across a call of another.
    unsafe { &mut *addr_of_mut!(ALL) }
}

/// Allocates a zeroed page for page tables. Returns its guest-physical address.
fn table() -> u64 {
    let Some(at) = page::alloc(0) else { panic!("no memory for page tables") };
    // SAFETY: a page of its own.
    unsafe { core::ptr::write_bytes(at as *mut u8, 0, PAGE_SIZE as usize) };
    at - DIRECT_MAP
}

/// Maps the shadow of all areas, once. Without Umbra there is none.
fn map_shadow() {
    let offer = umbra_guest::discover();
    if let Some(region) = umbra_guest::add_virtual(&offer, START, BYTES) {
        offer.mappings(&region).iter().for_each(|mapping| boot::map(mapping, &mut table));
    }
}

/// Allocates `bytes`, in whole pages. `None` if there is no room.
pub fn vmalloc(bytes: u64) -> Option<u64> {
    let all = all();
    if all.next == 0 {
        map_shadow();
        all.next = START;
    }
    let (start, pages) = (all.next, bytes.div_ceil(PAGE_SIZE));
    let vacant = all.areas.iter_mut().find(|area| area.is_none())?;
    if pages == 0 || (pages + 1) * PAGE_SIZE > START + BYTES - start {
        return None;
    }
    for i in 0..pages {
        let gpa = page::alloc(0)? - DIRECT_MAP;
        boot::map(&Mapping { start: start + i * PAGE_SIZE, gpa, bytes: PAGE_SIZE }, &mut table);
    }
    *vacant = Some(Area { start, pages });
    all.next = start + (pages + 1) * PAGE_SIZE;
    umbra_guest::alloc(start, bytes, pages * PAGE_SIZE, VMALLOC_INVALID, 0);
    Some(start)
}

/// Frees what [`vmalloc`] handed out; a bad address is reported.
pub fn vfree(at: u64) {
    let Some(area) = all().areas.iter_mut().find(|area| area.is_some_and(|area| area.start == at))
    else {
        return umbra_guest::invalid_free(at);
    };
    let Some(Area { start, pages }) = area.take() else { return };
    if umbra_guest::free(at, start, pages * PAGE_SIZE, VMALLOC_INVALID) {
        for i in 0..pages {
            if let Some(gpa) = boot::unmap(start + i * PAGE_SIZE) {
                page::free(DIRECT_MAP + gpa);
            }
        }
    }
}

/// The direct-map address of a byte in an area.
pub fn direct(at: u64) -> Option<u64> {
    Some(DIRECT_MAP + boot::translate(at)? + at % PAGE_SIZE)
}
