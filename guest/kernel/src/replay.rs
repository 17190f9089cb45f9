//! Replays allocator events through this kernel's allocators. The events are the initrd.
//!
//! The file, little endian, in units of 4 bytes: `UREP`; the number of places, of caches, and of
//! events; for each cache the bytes of an object; then the events, three units each: what (the
//! first byte, as below) and a cache's number or a page order (the second byte); bytes; and the
//! place that holds the address meanwhile. `benches/src/replay/guest.rs` makes it.

use umbra_guest::codes::PAGE_SIZE;

use crate::memory::page;
use crate::memory::slab::{Cache, kfree, kmalloc};
use crate::println;

const MAGIC: u32 = u32::from_le_bytes(*b"UREP");
/// Most caches. The allocator has room for more: `kmalloc` and the scenarios have some too.
const CACHES: usize = 16;
/// Bytes of an event.
const EVENT: usize = 12;

mod what {
    pub const KMALLOC: u8 = 0;
    pub const CACHE_ALLOC: u8 = 1;
    pub const FREE: u8 = 2;
    pub const PAGES_ALLOC: u8 = 3;
    pub const PAGES_FREE: u8 = 4;
}

/// Takes a number from the start of `file`.
fn number(file: &mut &[u8]) -> Option<u32> {
    let (number, rest) = file.split_first_chunk()?;
    *file = rest;
    Some(u32::from_le_bytes(*number))
}

/// Replays a file. None if the file makes no sense, or memory is too small.
pub fn run(mut file: &[u8]) -> Option<()> {
    if number(&mut file)? != MAGIC {
        return None;
    }
    let (places, count, events) =
        (number(&mut file)?, number(&mut file)? as usize, number(&mut file)?);
    let mut caches = [None; CACHES];
    for cache in caches.get_mut(..count)? {
        *cache = Some(Cache::new("replay", number(&mut file)?.into())?);
    }
    let file = file.get(..events as usize * EVENT)?;
    let bytes = u64::from(places) * 8;
    let order = bytes.div_ceil(PAGE_SIZE).max(1).next_power_of_two().trailing_zeros();
    let table = page::alloc(order as usize)? as *mut u64;
    let mut failed = 0u32;
    println!("bench begin");
    for event in file.chunks_exact(EVENT) {
        let word = |at: usize| {
            u32::from_le_bytes([event[at], event[at + 1], event[at + 2], event[at + 3]])
        };
        let (bytes, place) = (word(4), word(8));
        if place >= places {
            return None;
        }
        // SAFETY: the table has room for so many addresses.
        let place = unsafe { table.add(place as usize) };
        let address = match event[0] {
            what::KMALLOC => kmalloc(bytes.into()),
            what::CACHE_ALLOC => caches.get(usize::from(event[1])).copied().flatten()?.alloc(),
            what::PAGES_ALLOC => page::alloc(event[1].into()),
            free => {
                // SAFETY: as above; every place is filled before it is emptied.
                match (free, unsafe { place.read() }) {
                    (_, 0) => {}
                    (what::FREE, at) => kfree(at),
                    (what::PAGES_FREE, at) => page::free(at),
                    _ => return None,
                }
                continue;
            }
        };
        failed += u32::from(address.is_none());
        // SAFETY: as above.
        unsafe { place.write(address.unwrap_or(0)) };
    }
    println!("bench end");
    if failed > 0 {
        println!("replay: {failed} allocations failed");
    }
    Some(())
}
