//! The slab allocator: caches of equal objects, `kmalloc` over a row of caches, and large
//! allocations.
//!
//! A slab is a block of pages; the bitmap of its free objects is in its first page's description.
//! Every object is followed by a redzone, whose size is a setting of the run. A freed slot goes
//! through the quarantine, if there is one, before it can be taken again.

use core::ffi::c_void;
use core::ptr::addr_of_mut;

use umbra_guest::codes::{FREE_PAGE, LARGE_REDZONE, PAGE_SIZE, SLAB_FREE, SLAB_REDZONE};

use crate::DIRECT_MAP;
use crate::lock::locked;
use crate::page::{self, SLAB_OBJECTS, Use};
use crate::retry::or_after_quarantine;

/// The sizes of `kmalloc`'s caches; anything larger gets pages of its own.
const KMALLOC: [(u64, &str); 12] = [
    (8, "kmalloc-8"),
    (16, "kmalloc-16"),
    (32, "kmalloc-32"),
    (64, "kmalloc-64"),
    (96, "kmalloc-96"),
    (128, "kmalloc-128"),
    (192, "kmalloc-192"),
    (256, "kmalloc-256"),
    (512, "kmalloc-512"),
    (1024, "kmalloc-1k"),
    (2048, "kmalloc-2k"),
    (4096, "kmalloc-4k"),
];
const CACHES: usize = 32;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct CacheData {
    object: u64,
    slot: u64,
    order: u8,
    slots: u8,
    /// Slabs of this cache with free objects. The array is small: a slab that does not fit comes
    /// back when one of its objects is freed.
    partial: [u32; 8],
    /// An object that stands for the cache, so that uses after [`Cache::destroy`] are found. 0 in
    /// `kmalloc`'s caches.
    descriptor: u64,
}

const UNUSED: CacheData =
    CacheData { object: 0, slot: 0, order: 0, slots: 0, partial: [NONE; 8], descriptor: 0 };

static mut CACHE_DATA: [CacheData; CACHES] = [UNUSED; CACHES];
static mut CACHE_COUNT: usize = 0;
/// The slabs' number for the quarantine.
static mut QUARANTINE: u8 = 0;

fn data(cache: usize) -> &'static mut CacheData {
    // SAFETY: one CPU at a time makes or destroys caches; all else holds the lock. No reference is
    // kept across a call that asks for another.
    unsafe { &mut (*addr_of_mut!(CACHE_DATA))[cache] }
}

/// Bytes of a cache's objects and slots. They never change, so no lock is needed.
fn sizes(cache: usize) -> (u64, u64) {
    // SAFETY: no reference is made, since the holder of the lock may have one.
    unsafe { ((*addr_of_mut!(CACHE_DATA))[cache].object, (*addr_of_mut!(CACHE_DATA))[cache].slot) }
}

/// The order of a cache's slabs. It never changes either.
fn order(cache: usize) -> u8 {
    // SAFETY: as in `sizes`.
    unsafe { (*addr_of_mut!(CACHE_DATA))[cache].order }
}

/// A cache of equal objects.
#[derive(Clone, Copy)]
struct Cache(usize);

impl Cache {
    /// Makes a cache for objects of `object` bytes (at most 4096).
    fn new(name: &str, object: u64) -> Option<Self> {
        let cache = Self::without_descriptor(name, object)?;
        data(cache.0).descriptor = alloc(32)?;
        Some(cache)
    }

    fn without_descriptor(name: &str, object: u64) -> Option<Self> {
        // SAFETY: as in `data`.
        let id = unsafe { *addr_of_mut!(CACHE_COUNT) };
        if id >= CACHES || object == 0 || object > 4096 {
            return None;
        }
        let align = if object.is_multiple_of(16) { 16 } else { 8 };
        let slot = (object + umbra_guest::redzone(object)).next_multiple_of(align);
        let order = (0..3).find(|&o| (PAGE_SIZE << o) % slot < (PAGE_SIZE << o) / 8).unwrap_or(3);
        let slots = ((PAGE_SIZE << order) / slot).min(SLAB_OBJECTS as u64) as u8;
        *data(id) = CacheData { object, slot, order, slots, ..UNUSED };
        // SAFETY: as in `data`.
        unsafe { *addr_of_mut!(CACHE_COUNT) = id + 1 };
        // Cache 0 is "none" for Umbra.
        umbra_guest::name_cache(id as u16 + 1, name, object);
        Some(Self(id))
    }

    /// Allocates an object for a request of `bytes`; the rest of it is redzone.
    fn alloc_bytes(self, bytes: u64) -> Option<u64> {
        let at = or_after_quarantine(|| locked(|| self.take()))?;
        umbra_guest::alloc(at, bytes, sizes(self.0).1, SLAB_REDZONE, self.0 as u16 + 1);
        Some(at)
    }

    /// With the lock held: takes a free slot, still poisoned.
    fn take(self) -> Option<u64> {
        let d = data(self.0);
        let number = match d.partial.iter().find(|&&n| n != NONE) {
            Some(&number) => number,
            None => {
                let number = page::take(d.order.into(), Use::Slab)?;
                umbra_guest::poison(page::address(number), PAGE_SIZE << d.order, SLAB_REDZONE);
                let p = page::page(number);
                p.cache = self.0 as u8;
                p.in_use = 0;
                for (i, word) in p.free.iter_mut().enumerate() {
                    let bits = usize::from(d.slots).saturating_sub(64 * i).min(64);
                    *word = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
                }
                d.partial[0] = number;
                number
            }
        };
        let p = page::page(number);
        let word = p.free.iter().position(|w| *w != 0)?;
        let bit = p.free[word].trailing_zeros();
        p.free[word] &= !(1 << bit);
        p.in_use += 1;
        if p.in_use == d.slots {
            self.forget(number);
        }
        Some(page::address(number) + (word as u64 * 64 + u64::from(bit)) * d.slot)
    }

    /// With the lock held: gives slot `index` of a slab back, which the caller has poisoned.
    fn give(self, number: u32, index: u64) {
        let p = page::page(number);
        let d = data(self.0);
        p.free[(index / 64) as usize] |= 1 << (index % 64);
        p.in_use -= 1;
        // One empty slab is kept, as most kernels do: its objects stay freed objects for a while.
        let others = d.partial.iter().any(|&n| n != NONE && n != number);
        if p.in_use == 0 && others {
            self.forget(number);
            umbra_guest::poison(page::address(number), PAGE_SIZE << d.order, FREE_PAGE);
            page::give(number);
        } else if !d.partial.contains(&number)
            && let Some(entry) = d.partial.iter_mut().find(|n| **n == NONE)
        {
            *entry = number;
        }
    }

    fn forget(self, number: u32) {
        for entry in data(self.0).partial.iter_mut().filter(|n| **n == number) {
            *entry = NONE;
        }
    }

    /// Destroys the cache. Its id is not used again.
    fn destroy(self) {
        let descriptor = data(self.0).descriptor;
        if umbra_guest::check(descriptor, 1, false) {
            kfree(descriptor);
        }
    }
}

fn free_in_slab(at: u64, number: u32, cache: Cache) {
    let (_, slot) = sizes(cache.0);
    let slab = page::address(number);
    let index = (at - slab) / slot;
    // SAFETY: written at the start only.
    let quarantine = unsafe { *addr_of_mut!(QUARANTINE) };
    if umbra_guest::free_later(at, slab + index * slot, slot, SLAB_FREE, quarantine, cache.0 as u8)
    {
        locked(|| cache.give(number, index));
    }
}

/// Takes a slot back that has left the quarantine.
extern "C" fn release(at: u64, slot: u64, cache: u8, _: *mut c_void) {
    let cache = Cache(cache.into());
    // A slab of that many pages starts at a multiple of them.
    let slab = at & !((PAGE_SIZE << order(cache.0)) - 1);
    let number = ((slab - DIRECT_MAP) / PAGE_SIZE) as u32;
    let index = (at - slab) as u32 / slot as u32;
    locked(|| cache.give(number, index.into()));
}

/// Bytes from one object of a cache to the next; 0 behind the last cache.
#[unsafe(no_mangle)]
pub extern "C" fn kernel_slab_slot(cache: usize) -> u64 {
    if cache < CACHES { sizes(cache).1 } else { 0 }
}

/// Makes `kmalloc`'s caches.
pub fn init() {
    // SAFETY: `release` takes any context; there are no frees yet.
    unsafe {
        *addr_of_mut!(QUARANTINE) = umbra_guest::quarantine_add(release, core::ptr::null_mut())
    };
    for (object, name) in KMALLOC {
        Cache::without_descriptor(name, object).expect("kmalloc's caches fit the table");
    }
}

/// Makes a cache for objects of `object` bytes (at most 4096). Returns its number, or `u32::MAX` if
/// that fails.
///
/// # Safety
/// `name` points to `len` bytes of UTF-8.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kmem_cache_create(name: *const u8, len: usize, object: u64) -> u32 {
    // SAFETY: the caller's promise.
    let name = unsafe { core::str::from_utf8_unchecked(core::slice::from_raw_parts(name, len)) };
    Cache::new(name, object).map_or(u32::MAX, |cache| cache.0 as u32)
}

/// Allocates an object of a cache that [`kmem_cache_create`] made. 0 if there is no memory.
#[unsafe(no_mangle)]
pub extern "C" fn kmem_cache_alloc(cache: u32) -> u64 {
    let cache = Cache(cache as usize);
    cache.alloc_bytes(sizes(cache.0).0).unwrap_or(0)
}

/// Destroys a cache. Its number is not used again.
#[unsafe(no_mangle)]
pub extern "C" fn kmem_cache_destroy(cache: u32) {
    Cache(cache as usize).destroy();
}

/// Allocates `bytes`, 16-byte aligned if they are 16 or more. 0 if there is no memory.
#[unsafe(no_mangle)]
pub extern "C" fn kmalloc(bytes: u64) -> u64 {
    alloc(bytes).unwrap_or(0)
}

#[inline(always)]
fn alloc(bytes: u64) -> Option<u64> {
    match KMALLOC.iter().position(|(object, _)| bytes <= *object) {
        Some(cache) => Cache(cache).alloc_bytes(bytes),
        None => {
            let order = bytes.div_ceil(PAGE_SIZE).next_power_of_two().trailing_zeros() as usize;
            if order >= page::ORDERS {
                return None;
            }
            let at =
                page::address(or_after_quarantine(|| locked(|| page::take(order, Use::Large)))?);
            umbra_guest::alloc(at, bytes, PAGE_SIZE << order, LARGE_REDZONE, 0);
            Some(at)
        }
    }
}

/// A block of pages: its first page, its use, its order, and its cache if it is a slab. The block
/// of a live allocation does not change.
struct Block {
    number: u32,
    used: Use,
    order: u8,
    cache: u8,
}

/// The block that holds `at`.
#[inline(always)]
fn block(at: u64) -> Option<Block> {
    let mut number = page::number(at)?;
    locked(|| {
        for order in 0..page::ORDERS {
            number &= !0 << order;
            let p = page::page(number);
            if p.used != Use::Tail && usize::from(p.order) >= order {
                return Some(Block { number, used: p.used, order: p.order, cache: p.cache });
            }
        }
        None
    })
}

/// Frees what `kmalloc` handed out.
#[unsafe(no_mangle)]
pub extern "C" fn kfree(at: u64) {
    let Some(block) = block(at) else { return umbra_guest::invalid_free(at) };
    match block.used {
        Use::Slab => free_in_slab(at, block.number, Cache(block.cache.into())),
        Use::Large => {
            if umbra_guest::free(
                at,
                page::address(block.number),
                PAGE_SIZE << block.order,
                FREE_PAGE,
            ) {
                locked(|| page::give(block.number));
            }
        }
        // Freed memory: Umbra finds the kind of bad free. Without Umbra nothing happens.
        Use::Free | Use::Pages | Use::Tail => {
            umbra_guest::free(at, at, 0, FREE_PAGE);
        }
    }
}

/// Makes an allocation's whole room accessible, and returns its bytes. 0, after a report, if it was
/// freed.
#[unsafe(no_mangle)]
pub extern "C" fn ksize(at: u64) -> u64 {
    if !umbra_guest::check(at, 1, false) {
        return 0;
    }
    let room = block(at).map_or(0, |block| block.room());
    umbra_guest::unpoison(at, room);
    room
}

/// Frees what `kmalloc` handed out, and clears it first.
#[unsafe(no_mangle)]
pub extern "C" fn kfree_sensitive(at: u64) {
    let bytes = ksize(at);
    // SAFETY: that much memory belongs to the allocation.
    unsafe { core::ptr::write_bytes(at as *mut u8, 0, bytes as usize) };
    kfree(at);
}

impl Block {
    /// The bytes to which an allocation in it may grow in place.
    fn room(&self) -> u64 {
        match self.used {
            Use::Slab => sizes(self.cache.into()).0,
            Use::Large => PAGE_SIZE << self.order,
            _ => 0,
        }
    }
}

/// Changes an allocation's size, in place where its slot allows it. 0 if there is no memory, or,
/// after a report, if it was freed.
#[unsafe(no_mangle)]
pub extern "C" fn krealloc(at: u64, old: u64, new: u64) -> u64 {
    if !umbra_guest::check(at, 1, false) {
        return 0;
    }
    let block = block(at);
    let room = block.as_ref().map_or(0, Block::room);
    if new <= room {
        let redzone = if room > 4096 { LARGE_REDZONE } else { SLAB_REDZONE };
        let cache =
            block.map_or(0, |block| if block.used == Use::Slab { block.cache + 1 } else { 0 });
        // A new allocation in the same place, with the stack of this call (as KASAN's
        // `kasan_krealloc`).
        umbra_guest::alloc(at, new, room, redzone, cache.into());
        return at;
    }
    let Some(to) = alloc(new) else { return 0 };
    // SAFETY: both are allocations of at least that size, and distinct.
    unsafe {
        core::ptr::copy_nonoverlapping(at as *const u8, to as *mut u8, old.min(new) as usize)
    };
    kfree(at);
    to
}
