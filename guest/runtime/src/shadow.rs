//! The guest's view of the shadow: windows at fixed virtual addresses. The guest changes them
//! directly or by hypercall.
//!
//! Shadow is looked up by its *place* ([`state::place`]): the address itself, or where the compiler
//! checks inline its key.

use core::arch::asm;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU8, Ordering, compiler_fence};

use umbra_shadow::abi::{CallNumber, Features, MemoryUse, check_shadow};
use umbra_shadow::codes;
use umbra_shadow::full::Full;
use umbra_shadow::memory::ShadowMemory;
use umbra_shadow::model::Shadow;
use umbra_shadow::two_level::TwoLevel;

use crate::cpu::without_interrupts;
use crate::{INLINE, groups, host, state};

/// The windows: at offset 0 from the arithmetically shifted address (see `ARCHITECTURE.md`), or
/// where [`check_shadow`] says.
pub struct Windows;

#[inline]
pub(crate) fn page_shadow(place: u64) -> *mut u8 {
    if INLINE {
        check_shadow::PAGE_WINDOW.wrapping_add(place >> codes::PAGE_SHIFT) as *mut u8
    } else {
        (place.cast_signed() >> codes::PAGE_SHIFT) as *mut u8
    }
}

#[inline]
pub(crate) fn byte_shadow(place: u64) -> *mut u8 {
    if INLINE {
        check_shadow::BYTE_WINDOW.wrapping_add(place >> codes::GRANULE_SHIFT) as *mut u8
    } else {
        (place.cast_signed() >> codes::GRANULE_SHIFT) as *mut u8
    }
}

/// Fills shadow, by words where possible: on hosts that emulate ring 0 each instruction counts.
///
/// # Safety
/// `at` and the `n` bytes from it on are mapped shadow.
#[inline]
pub(crate) unsafe fn fill(mut at: *mut u8, mut n: u64, value: u8) {
    let word = u64::from(value) * 0x0101_0101_0101_0101;
    // The stores before (which marks the page busy) and after (which marks it byte-checked) must
    // not move across this one.
    compiler_fence(Ordering::SeqCst);
    // SAFETY: the caller vouches for the range. The stores are in assembly, because they are
    // unaligned: x86 allows that and Rust does not.
    unsafe {
        if n >= 128 {
            asm!("rep stosq",
                 inout("rcx") n / 8 => _, inout("rdi") at => at, in("rax") word,
                 options(nostack));
            n %= 8;
            if n > 0 {
                // Covers the rest, and some bytes before it a second time.
                let last = at.sub(8 - n as usize);
                asm!("mov [{}], {}", in(reg) last, in(reg) word, options(nostack));
            }
        } else if n >= 8 {
            let last = at.add(n as usize - 8);
            while at < last {
                asm!("mov [{}], {}", in(reg) at, in(reg) word, options(nostack));
                at = at.add(8);
            }
            asm!("mov [{}], {}", in(reg) last, in(reg) word, options(nostack));
        } else if n >= 4 {
            asm!("mov [{0}], {2:e}", "mov [{1}], {2:e}",
                 in(reg) at, in(reg) at.add(n as usize - 4), in(reg) word, options(nostack));
        } else if n >= 2 {
            asm!("mov [{0}], {2:x}", "mov [{1}], {2:x}",
                 in(reg) at, in(reg) at.add(n as usize - 2), in(reg) word, options(nostack));
        } else if n == 1 {
            asm!("mov [{}], {}", in(reg) at, in(reg_byte) value, options(nostack));
        }
    }
    compiler_fence(Ordering::SeqCst);
}

impl ShadowMemory for Windows {
    fn base(&self) -> u64 {
        if INLINE { 0 } else { 0xffff_8000_0000_0000 }
    }

    fn limit(&self) -> u64 {
        u64::MAX
    }

    #[inline]
    fn page(&self, address: u64) -> u8 {
        // SAFETY: callers pass addresses of added regions only, whose shadow the kernel has mapped.
        unsafe { page_shadow(address).read_volatile() }
    }

    #[inline]
    fn set_pages(&mut self, address: u64, pages: u64, value: u8) {
        // SAFETY: as in `page`.
        unsafe { fill(page_shadow(address), pages, value) }
    }

    #[inline]
    fn byte(&self, address: u64) -> u8 {
        // SAFETY: as in `page`.
        unsafe { byte_shadow(address).read_volatile() }
    }

    #[inline]
    fn set_bytes(&mut self, address: u64, granules: u64, value: u8) {
        // SAFETY: as in `page`.
        unsafe { fill(byte_shadow(address), granules, value) }
    }

    fn claim_page(&mut self, address: u64, from: u8) -> bool {
        // SAFETY: as in `page`; a byte is aligned, and other CPUs change it by such accesses only.
        let page = unsafe { AtomicU8::from_ptr(page_shadow(address)) };
        page.compare_exchange(from, codes::PAGE_BUSY, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    #[inline]
    fn open_group(&mut self, place: u64) {
        if INLINE {
            groups::open(place);
        }
    }

    #[inline]
    fn settle_groups(&mut self, place: u64, pages: u64, value: u8) {
        if INLINE {
            groups::settle(place, pages, value);
        }
    }

    #[cold]
    fn wait_page(&self, address: u64) -> u8 {
        // Another CPU, or in `sync` mode the VMM, fills it: some 70 instructions.
        loop {
            let page = self.page(address);
            if page != codes::PAGE_BUSY {
                return page;
            }
            spin_loop();
        }
    }
}

/// The place of a whole page of the first region, if the guest keeps two-level shadow: the most
/// frequent change of whole pages. All else goes through the model.
#[inline(always)]
fn whole_page(address: u64, len: u64) -> Option<u64> {
    let kinds = Features::SHADOW | Features::RING | Features::SYNC;
    let wanted = Features::PER_PAGE | Features::RING;
    if len != codes::PAGE_SIZE
        || address & (codes::PAGE_SIZE - 1) != 0
        || state::mode().bits() & kinds.bits() != wanted.bits()
    {
        return None;
    }
    state::place_in_first(address, address + (codes::PAGE_SIZE - 1))
}

/// Sets a whole page that has shadow, with interrupts off: the CPU that changes the group's entry
/// forgets it.
#[inline(always)]
fn set_page(place: u64, value: u8) {
    // SAFETY: the shadow of regions is mapped.
    unsafe { page_shadow(place).write_volatile(value) }
    if INLINE {
        groups::settle_page(place, value);
    }
}

fn full() -> bool {
    state::mode().has(Features::FULL)
}

/// The place of `address..address + len`, if shadow exists and covers all of it.
fn covered(address: u64, len: u64) -> Option<u64> {
    if len == 0 || !state::mode().has(Features::SHADOW) {
        return None;
    }
    state::place(address, address.checked_add(len - 1)?)
}

/// Poisons memory, as this run's mode requires. Memory outside all regions has no shadow and does
/// not change.
#[inline(never)]
pub fn poison(address: u64, len: u64, code: u8) {
    if let Some(place) = whole_page(address, len)
        && code >= codes::POISON_MIN
    {
        return without_interrupts(|| set_page(place, code));
    }
    poison_any(address, len, code);
}

/// [`poison`] in all cases.
#[inline(never)]
fn poison_any(address: u64, len: u64, code: u8) {
    let Some(place) = covered(address, len) else { return };
    if state::mode().has(Features::SYNC) {
        host::hypercall(CallNumber::Poison, address, len, u64::from(code), 0);
    } else if full() {
        let _ = Full::new(Windows).poison(place, len, code);
    } else {
        // An interrupt handler must not wait for a promotion that it interrupted.
        let _ = without_interrupts(|| TwoLevel::new(Windows).poison(place, len, code));
    }
}

/// Unpoisons memory; the counterpart of [`poison`].
pub fn unpoison(address: u64, len: u64) {
    unpoison_for(address, len, MemoryUse::Unchanged);
}

/// [`unpoison`], which also passes the use of the memory to the VMM in `sync` mode.
#[inline(never)]
pub fn unpoison_for(address: u64, len: u64, memory_use: MemoryUse) {
    if let Some(place) = whole_page(address, len) {
        return without_interrupts(|| set_page(place, codes::PAGE_VALID));
    }
    unpoison_any(address, len, memory_use);
}

/// [`unpoison_for`] in all cases.
#[inline(never)]
fn unpoison_any(address: u64, len: u64, memory_use: MemoryUse) {
    let Some(place) = covered(address, len) else { return };
    if state::mode().has(Features::SYNC) {
        host::hypercall(CallNumber::Unpoison, address, len, memory_use.into(), 0);
    } else if full() {
        let _ = Full::new(Windows).unpoison(place, len);
    } else {
        let _ = without_interrupts(|| TwoLevel::new(Windows).unpoison(place, len));
    }
}

/// Makes pages byte-checked. For stacks, whose shadow compiled code stores directly.
pub fn promote(address: u64, len: u64) {
    // In `sync` mode the VMM promotes at the first poisoning. `full` has nothing to promote.
    if let Some(place) = covered(address, len)
        && state::mode().has(Features::RING)
        && !full()
    {
        let _ = without_interrupts(|| TwoLevel::new(Windows).promote(place, len));
    }
}

/// Sets the byte shadow of `granules` of a stack. Unlike [`poison`] and [`unpoison`] it never
/// demotes a page: the compiler's next store to the stack's shadow needs a byte-checked page.
pub fn set_on_stack(address: u64, granules: u64, value: u8) {
    let len = granules << codes::GRANULE_SHIFT;
    let Some(place) = covered(address, len) else { return };
    if !state::mode().has(Features::SYNC) {
        promote(address, len);
        Windows.set_bytes(place, granules, value);
    } else if value == 0 {
        unpoison(address, len);
    } else if value >= codes::POISON_MIN {
        poison(address, len, value);
    } else {
        // Fewer bytes may be valid than before.
        poison(address, len, codes::STACK_MID);
        for i in 0..granules {
            unpoison(address + (i << codes::GRANULE_SHIFT), u64::from(value));
        }
    }
}

/// Whether an access is good.
pub fn check(address: u64, len: u64) -> bool {
    if len == 0 || !state::mode().has(Features::SHADOW) {
        return true;
    }
    let Some(place) = covered(address, len) else { return false };
    if full() {
        Full::new(Windows).check(place, len).is_ok()
    } else {
        TwoLevel::new(Windows).check(place, len).is_ok()
    }
}

/// The byte-shadow value in force at `address`; 0 where there is no shadow.
pub fn value(address: u64) -> u8 {
    match covered(address, 1) {
        None => 0,
        Some(place) if full() => Full::new(Windows).state(place),
        Some(place) => TwoLevel::new(Windows).state(place),
    }
}
