//! Groups of pages in a kernel that is checked inline (`umbra_shadow::group`): the entries of the
//! check shadow's page tables.

use core::arch::asm;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use umbra_shadow::abi::Features;
use umbra_shadow::abi::check_shadow::{CHECK_OFFSET, ENTRY_WINDOW, check_address};
use umbra_shadow::codes::{GRANULE_SHIFT, PAGE_SHIFT, SHADOW_PER_PAGE};
use umbra_shadow::group::{self, Entry, GROUP_SHIFT, GroupTable, PAGES};

use crate::host::Host;
use crate::shadow::{byte_shadow, fill, page_shadow};
use crate::state;

static PATTERNS: AtomicU64 = AtomicU64::new(0);
static BYTE_WINDOW: AtomicU64 = AtomicU64::new(0);

/// Takes over where the VMM has the shadow, guest-physical.
pub fn set_host(host: &Host) {
    PATTERNS.store(host.patterns, Relaxed);
    BYTE_WINDOW.store(host.byte_window.0, Relaxed);
}

/// The page at `place` has become busy.
#[inline(never)]
pub fn open(place: u64) {
    group::open(&Entries, place >> GROUP_SHIFT);
}

/// The page shadow of `pages` pages from `place` on has become `value`.
#[inline]
pub fn settle(place: u64, pages: u64, value: u8) {
    group::settle_pages(&Entries, place >> PAGE_SHIFT, pages, value);
}

/// This CPU drops its translation of the check shadow of `address`.
#[inline]
pub fn forget(address: u64) {
    // SAFETY: drops a translation.
    unsafe {
        asm!("invlpg [{}]", in(reg) check_address(address), options(nostack, preserves_flags));
    }
}

/// Whether the page fault that this CPU handles was a store to the check shadow of a group that is
/// real by now: the compiler's, to the shadow of its stack, by a translation that is out of date.
/// This CPU forgets that, and the store can be repeated.
pub fn is_stale_store() -> bool {
    let at: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) at, options(nomem, nostack, preserves_flags)) };
    let address = at.wrapping_sub(CHECK_OFFSET) << GRANULE_SHIFT;
    if check_address(address) != at || state::mode() == Features::default() {
        return false;
    }
    let is_real = state::place(address, address)
        .is_some_and(|place| Entries.entry(place >> GROUP_SHIFT).is_real());
    if is_real {
        forget(address);
    }
    is_real
}

struct Entries;

/// Where a group begins.
fn place_of(group: u64) -> u64 {
    group << GROUP_SHIFT
}

fn entry_of(group: u64) -> &'static AtomicU64 {
    // SAFETY: the VMM has mapped the entries of all regions; they are aligned, and all CPUs change
    // them by atomic operations.
    unsafe { AtomicU64::from_ptr((ENTRY_WINDOW + (group << 3)) as *mut u64) }
}

impl GroupTable for Entries {
    const PATIENCE: u32 = 4096;

    #[inline]
    fn patterns(&self) -> u64 {
        PATTERNS.load(Relaxed)
    }

    #[inline]
    fn byte_window(&self) -> u64 {
        BYTE_WINDOW.load(Relaxed)
    }

    #[inline]
    fn classes(&self, group: u64) -> u64 {
        // SAFETY: the VMM has mapped the page shadow of all regions, whole groups of it.
        unsafe { page_shadow(place_of(group)).cast::<u64>().read_volatile() }
    }

    #[inline]
    fn fill(&self, group: u64, page: u32, value: u8) {
        // SAFETY: the same of the byte shadow.
        unsafe {
            let at = byte_shadow(place_of(group) + (u64::from(page % PAGES) << PAGE_SHIFT));
            fill(at, SHADOW_PER_PAGE, value);
        }
    }

    #[inline]
    fn entry(&self, group: u64) -> Entry {
        Entry::from_bits(entry_of(group).load(SeqCst))
    }

    #[inline]
    fn exchange(&self, group: u64, from: Entry, to: Entry) -> bool {
        entry_of(group).compare_exchange(from.bits(), to.bits(), SeqCst, SeqCst).is_ok()
    }

    #[inline]
    fn forget(&self, group: u64) {
        state::addresses(place_of(group)).for_each(forget);
    }

    fn pause(&self) {
        spin_loop();
    }
}
