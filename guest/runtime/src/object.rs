//! The fast path for the most frequent changes of shadow: an allocation or a free of one slab
//! object, on pages that are byte-checked already.
//!
//! It is a few stores to byte shadow. All else (other pages, whole pages, odd slots) goes through
//! the model (`shadow`), with the same result.

use umbra_shadow::abi::Features;
use umbra_shadow::codes::{GRANULE, GRANULE_SHIFT, PAGE_BYTES, PAGE_SIZE, POISON_MIN};

use crate::shadow::{byte_shadow, fill, page_shadow};
use crate::state;

/// The byte shadow of a slot, if it fits the fast path: whole granules, mapped, on
/// byte-checked pages.
#[inline(always)]
fn slot_shadow(mode: Features, address: u64, slot: u64) -> Option<*mut u8> {
    let last = address.wrapping_add(slot.wrapping_sub(1));
    if (address | slot) & (GRANULE - 1) != 0 || slot.wrapping_sub(1) >= PAGE_SIZE {
        return None;
    }
    let place = state::place_in_first(address, last)?;
    let last = place + (slot - 1);
    if mode.has(Features::PER_PAGE) {
        // SAFETY: both addresses are in a region, so their shadow is mapped.
        let pages =
            unsafe { (page_shadow(place).read_volatile(), page_shadow(last).read_volatile()) };
        if pages != (PAGE_BYTES, PAGE_BYTES) {
            return None;
        }
    } else if !mode.has(Features::FULL) {
        return None;
    }
    Some(byte_shadow(place))
}

/// Makes `bytes` at the start of a slot of at most a page accessible, and poisons the rest of it.
/// False if it does not fit the fast path; then nothing was done.
#[inline(always)]
pub fn allocated(mode: Features, address: u64, bytes: u64, slot: u64, redzone: u8) -> bool {
    if bytes > slot || redzone < POISON_MIN {
        return false;
    }
    let Some(shadow) = slot_shadow(mode, address, slot) else { return false };
    let (whole, rest) = (bytes >> GRANULE_SHIFT, (bytes & (GRANULE - 1)) as u8);
    // SAFETY: the shadow of the slot is mapped, and nobody owns the slot yet.
    unsafe {
        fill(shadow.add(whole as usize), (slot >> GRANULE_SHIFT) - whole, redzone);
        if rest != 0 {
            shadow.add(whole as usize).write_volatile(rest);
        }
        fill(shadow, whole, 0);
    }
    true
}

/// A slot that fits the fast path.
#[derive(Clone, Copy)]
pub struct Slot {
    shadow: *mut u8,
    granules: u64,
}

/// The slot at `start`, which gets `code` when its object is freed. None if it does not fit the
/// fast path.
#[inline(always)]
pub fn slot(mode: Features, start: u64, slot: u64, code: u8) -> Option<Slot> {
    if code < POISON_MIN {
        return None;
    }
    Some(Slot { shadow: slot_shadow(mode, start, slot)?, granules: slot >> GRANULE_SHIFT })
}

impl Slot {
    /// Whether the object is accessible, as far as its first granule tells.
    #[inline(always)]
    pub fn is_accessible(self) -> bool {
        // SAFETY: the shadow of the slot is mapped.
        unsafe { self.shadow.read_volatile() < POISON_MIN }
    }

    /// Poisons the slot.
    #[inline(always)]
    pub fn poison(self, code: u8) {
        // SAFETY: the shadow of the slot is mapped.
        unsafe { fill(self.shadow, self.granules, code) }
    }
}
