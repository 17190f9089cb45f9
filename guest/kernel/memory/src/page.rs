//! The page allocator: a binary buddy system over one range of memory.
//!
//! A [`Page`] describes each page. Free pages themselves hold no data, so they stay poisoned.

use core::ptr::addr_of_mut;

use umbra_guest::codes::{FREE_PAGE, PAGE_SIZE};

use crate::DIRECT_MAP;
use crate::lock::locked;
use crate::retry::or_after_quarantine;

/// Blocks have `1 << order` pages, with orders below this.
pub const ORDERS: usize = 11;
/// Most objects in one slab: the bits of [`Page::free`].
pub const SLAB_OBJECTS: usize = 192;

const NONE: u32 = u32::MAX;

/// The use of a block of pages, in the description of its first page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Use {
    /// Not the first page of a block.
    Tail = 0,
    /// The first page of a free block.
    Free,
    /// Handed out as pages.
    Pages,
    /// A slab.
    Slab,
    /// A large allocation.
    Large,
}

/// One page's description.
pub struct Page {
    next: u32,
    prev: u32,
    /// Order of the block that starts here.
    pub order: u8,
    /// The use of that block.
    pub used: Use,
    /// A slab's cache.
    pub cache: u8,
    /// A slab's objects in use.
    pub in_use: u8,
    /// A slab's free objects, one bit each.
    pub free: [u64; SLAB_OBJECTS / 64],
}

struct Buddy {
    pages: *mut Page,
    start: u32,
    end: u32,
    heads: [u32; ORDERS],
}

static mut BUDDY: Buddy =
    Buddy { pages: core::ptr::null_mut(), start: 0, end: 0, heads: [NONE; ORDERS] };

fn buddy() -> &'static mut Buddy {
    // SAFETY: at start, or with the lock held: no two callers at a time, and none keeps the
    // reference across a call of another public function.
    unsafe { &mut *addr_of_mut!(BUDDY) }
}

impl Buddy {
    fn page(&mut self, number: u32) -> &mut Page {
        assert!(number < self.end, "page {number} is not memory");
        // SAFETY: `init` made room for the descriptions of all pages below `end`, zeroed.
        unsafe { &mut *self.pages.add(number as usize) }
    }

    fn push(&mut self, number: u32, order: usize) {
        let head = self.heads[order];
        if head != NONE {
            self.page(head).prev = number;
        }
        let page = self.page(number);
        (page.next, page.prev, page.order, page.used) = (head, NONE, order as u8, Use::Free);
        self.heads[order] = number;
    }

    fn unlink(&mut self, number: u32) {
        let page = self.page(number);
        let (next, prev, order) = (page.next, page.prev, page.order as usize);
        page.used = Use::Tail;
        if next != NONE {
            self.page(next).prev = prev;
        }
        if prev == NONE {
            self.heads[order] = next;
        } else {
            self.page(prev).next = next;
        }
    }
}

/// Takes over the memory from `start` to `end` (guest-physical). The first part of it holds the
/// descriptions. Returns where the rest begins (an address of the direct map).
pub fn init(start: u64, end: u64) -> u64 {
    let b = buddy();
    b.pages = (DIRECT_MAP + start.next_multiple_of(PAGE_SIZE)) as *mut Page;
    b.end = (end / PAGE_SIZE) as u32;
    let descriptions_end =
        b.pages as u64 - DIRECT_MAP + u64::from(b.end) * size_of::<Page>() as u64;
    b.start = descriptions_end.div_ceil(PAGE_SIZE) as u32;
    let mut at = b.start;
    while at < b.end {
        let mut order = (at.trailing_zeros() as usize).min(ORDERS - 1);
        while at + (1 << order) > b.end {
            order -= 1;
        }
        b.push(at, order);
        at += 1 << order;
    }
    let first = address(b.start);
    umbra_guest::poison(first, address(b.end) - first, FREE_PAGE);
    first
}

/// The direct-map address of a page.
pub fn address(number: u32) -> u64 {
    DIRECT_MAP + u64::from(number) * PAGE_SIZE
}

/// The page that holds a direct-map address, if the allocator manages that page.
pub fn number(address: u64) -> Option<u32> {
    // SAFETY: neither changes after the start. No reference is made: others may hold one.
    let managed = unsafe { (*addr_of_mut!(BUDDY)).start..(*addr_of_mut!(BUDDY)).end };
    let number = u32::try_from(address.checked_sub(DIRECT_MAP)? / PAGE_SIZE).ok()?;
    managed.contains(&number).then_some(number)
}

/// A page's description. The caller holds the lock.
pub fn page(number: u32) -> &'static mut Page {
    buddy().page(number)
}

/// With the lock held: takes a block of `1 << order` pages, still poisoned, and notes its use.
/// `None` when there is none.
pub fn take(order: usize, used: Use) -> Option<u32> {
    let b = buddy();
    let mut from = (order..ORDERS).find(|&o| b.heads[o] != NONE)?;
    let number = b.heads[from];
    b.unlink(number);
    while from > order {
        from -= 1;
        b.push(number + (1 << from), from);
    }
    let page = b.page(number);
    (page.order, page.used) = (order as u8, used);
    Some(number)
}

/// With the lock held: gives a block back. The caller has poisoned it.
pub fn give(mut number: u32) {
    let b = buddy();
    let page = b.page(number);
    page.used = Use::Tail;
    let mut order = page.order as usize;
    while order + 1 < ORDERS {
        let other = number ^ (1 << order);
        if other < b.start || other + (1 << order) > b.end {
            break;
        }
        let page = b.page(other);
        if page.used != Use::Free || page.order as usize != order {
            break;
        }
        b.unlink(other);
        number = number.min(other);
        order += 1;
    }
    b.push(number, order);
}

/// Allocates `1 << order` pages: accessible, and recorded by Umbra. 0 if there are none.
#[unsafe(no_mangle)]
pub extern "C" fn kernel_pages_alloc(order: usize) -> u64 {
    let Some(number) = or_after_quarantine(|| locked(|| take(order, Use::Pages))) else { return 0 };
    let (at, bytes) = (address(number), PAGE_SIZE << order);
    umbra_guest::alloc(at, bytes, bytes, 0, 0);
    at
}

/// Takes `1 << order` pages for a stack, still poisoned. 0 if there are none.
#[unsafe(no_mangle)]
pub extern "C" fn kernel_pages_take(order: usize) -> u64 {
    or_after_quarantine(|| locked(|| take(order, Use::Pages))).map_or(0, address)
}

/// The counterpart of [`kernel_pages_take`]. The caller has poisoned them.
#[unsafe(no_mangle)]
pub extern "C" fn kernel_pages_give(at: u64) {
    if let Some(number) = number(at) {
        locked(|| give(number));
    }
}

/// Frees what [`kernel_pages_alloc`] handed out.
#[unsafe(no_mangle)]
pub extern "C" fn kernel_pages_free(at: u64) {
    let Some(number) = number(at) else { return umbra_guest::invalid_free(at) };
    let bytes = PAGE_SIZE << locked(|| page(number).order);
    if umbra_guest::free(at, at & !(PAGE_SIZE - 1), bytes, FREE_PAGE) {
        locked(|| give(number));
    }
}
