//! Groups of pages in a kernel that is checked inline (`umbra_shadow::group`): the entries of the
//! check shadow's page tables.

use core::arch::asm;
use core::hint::spin_loop;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use umbra_shadow::abi::Features;
use umbra_shadow::abi::check_shadow::{CHECK_OFFSET, ENTRY_WINDOW, check_address};
use umbra_shadow::codes::{GRANULE_SHIFT, PAGE_SHIFT, SHADOW_PER_PAGE};
use umbra_shadow::group::{self, Entry, GROUP_SHIFT, GroupTable, PAGES};

use umbra_shadow::runtime::ForgetFn;

use crate::cpu::without_interrupts;
use crate::host::Host;
use crate::shadow::{byte_shadow, fill, page_shadow};
use crate::state::{self, CPUS};

static PATTERNS: AtomicU64 = AtomicU64::new(0);
static BYTE_WINDOW: AtomicU64 = AtomicU64::new(0);

/// Takes over where the VMM has the shadow, guest-physical.
pub fn set_host(host: &Host) {
    PATTERNS.store(host.patterns, Relaxed);
    BYTE_WINDOW.store(host.byte_window.0, Relaxed);
}

/// Rises when a CPU has poisoned or promoted pages, and another one has looked at it since it last
/// rose: all that CPUs did between two looks of any CPU has one number. So CPUs seldom write it.
static GENERATION: AtomicU64 = AtomicU64::new(0);
/// The highest that a CPU has looked at.
static SEEN: AtomicU64 = AtomicU64::new(0);
/// The one that each CPU has looked at.
static FLUSHED: [AtomicU64; CPUS] = [const { AtomicU64::new(0) }; CPUS];
/// The kernel's [`ForgetFn`], or null.
static ON_FORGET: AtomicPtr<()> = AtomicPtr::new(null_mut());

/// This CPU forgets all translations of check shadow that have changed elsewhere since it did so
/// last. Each CPU calls it now and then: at its timer's tick, when it was idle, when it switches to
/// another task.
pub fn tick() {
    without_interrupts(|| {
        let flushed = &FLUSHED[state::cpu_of(state::current())];
        let generation = GENERATION.load(SeqCst);
        if flushed.load(Relaxed) == generation && state::knows_cpu() {
            return;
        }
        // Before the flush: a change that this flush misses finds this number, and makes a new one.
        SEEN.fetch_max(generation, SeqCst);
        on_forget(u64::MAX);
        flush_global();
        flushed.store(generation, Relaxed);
    });
}

/// This CPU has changed entries that others may have translations of.
#[inline]
fn announce() {
    if SEEN.load(SeqCst) == GENERATION.load(SeqCst) {
        GENERATION.fetch_add(1, SeqCst);
    }
}

/// Sets what is called when this CPU forgets a translation.
pub fn set_on_forget(call: ForgetFn) {
    ON_FORGET.store(call as *mut (), Relaxed);
}

#[inline]
fn on_forget(address: u64) {
    let call = ON_FORGET.load(Relaxed);
    if !call.is_null() {
        // SAFETY: `set_on_forget` stores only a `ForgetFn`.
        let call: ForgetFn = unsafe { core::mem::transmute(call) };
        call(address);
    }
}

/// Drops all translations of this CPU, also the global ones (Intel SDM volume 3, 4.10.4.1).
fn flush_global() {
    const PGE: u64 = 1 << 7;
    // SAFETY: global pages are off for an instruction.
    unsafe {
        let cr4: u64;
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack));
        asm!("mov cr4, {}", in(reg) cr4 & !PGE, options(nostack));
        asm!("mov cr4, {}", in(reg) cr4, options(nostack));
    }
}

/// The page at `place` has become busy.
#[inline(never)]
pub fn open(place: u64) {
    group::open(&Entries, place >> GROUP_SHIFT);
}

/// [`settle`] for the page at `place`.
#[inline(always)]
pub fn settle_page(place: u64, value: u8) {
    let page = place >> PAGE_SHIFT & u64::from(PAGES - 1);
    group::settle(&Entries, place >> GROUP_SHIFT, 1 << page, value);
}

/// The page shadow of `pages` pages from `place` on has become `value`.
#[inline]
pub fn settle(place: u64, pages: u64, value: u8) {
    group::settle_pages(&Entries, place >> PAGE_SHIFT, pages, value);
}

/// This CPU drops its translation of the check shadow of `address`.
#[inline]
pub fn forget(address: u64) {
    on_forget(address);
    // SAFETY: drops a translation.
    unsafe {
        asm!("invlpg [{}]", in(reg) check_address(address), options(nostack, preserves_flags));
    }
}

/// Whether the page fault of the instruction at `rip` was a store to the check shadow of a group
/// that is real by now: the compiler's, to the shadow of its stack, by a translation that is out of
/// date. This CPU forgets that, and the store can be repeated. A load does not fault there; a jump
/// would again.
pub fn is_stale_store(rip: u64) -> bool {
    let at: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) at, options(nomem, nostack, preserves_flags)) };
    let address = at.wrapping_sub(CHECK_OFFSET) << GRANULE_SHIFT;
    if at == rip || check_address(address) != at || state::mode() == Features::default() {
        return false;
    }
    let is_real = state::place(address, address)
        .is_some_and(|place| Entries.entry(place >> GROUP_SHIFT).is_real());
    if is_real {
        forget(address);
    }
    is_real
}

#[cold]
#[inline(never)]
fn forget_aliases(group: u64) {
    state::addresses(place_of(group)).for_each(forget);
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
        announce();
        match state::only_address(place_of(group)) {
            Some(address) => forget(address),
            None => forget_aliases(group),
        }
    }

    fn pause(&self) {
        spin_loop();
    }
}
