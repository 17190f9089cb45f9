//! Where the check shadow and the windows are in a kernel whose compiler checks inline.
//!
//! The VMM makes the page tables for all of this ([`CallNumber::TopLevel`]). So the addresses are
//! the same in every kernel:
//!
//! | addresses | what |
//! | --- | --- |
//! | [`CHECK_OFFSET`] + (address >> 3) | the check shadow of the upper half, as KASAN's |
//! | [`BYTE_WINDOW`] + (key >> 3) | byte shadow |
//! | [`PAGE_WINDOW`] + (key >> 12) | page shadow |
//! | [`ENTRY_WINDOW`] + (key >> 15 << 3) | the entry of a key's group ([`group`](crate::group)) |
//!
//! The last three are where the check shadow's own check shadow would be: nobody checks it.
//!
//! [`CallNumber::TopLevel`]: super::CallNumber::TopLevel

use crate::codes::GRANULE_SHIFT;

/// What a compiler adds to `address >> 3`: the offset of Linux's KASAN with tables of four levels.
pub const CHECK_OFFSET: u64 = 0xdfff_fc00_0000_0000;

/// The first slot of the top-level table whose addresses are check shadow, of the lowest address of
/// the upper half; and how many there are.
pub const CHECK_SLOT: u16 = slot_of(check_address(0xffff_8000_0000_0000));
/// Top-level slots of the check shadow.
pub const CHECK_SLOTS: u16 = 32;

/// Byte shadow of key 0.
pub const BYTE_WINDOW: u64 = check_address(0xffff_ec00_0000_0000);
/// Most bytes of the byte shadow: two top-level slots, for 8 TiB of keys.
pub const BYTE_WINDOW_MAX: u64 = 2 << TOP_LEVEL_SHIFT;
/// Page shadow of key 0.
pub const PAGE_WINDOW: u64 = BYTE_WINDOW + BYTE_WINDOW_MAX;
/// The entry of group 0.
pub const ENTRY_WINDOW: u64 = PAGE_WINDOW + (4 << 30);

/// Address bits below those that select an entry of the top-level table.
pub const TOP_LEVEL_SHIFT: u32 = 39;

/// The check shadow of an address.
#[inline(always)]
pub const fn check_address(address: u64) -> u64 {
    (address >> GRANULE_SHIFT).wrapping_add(CHECK_OFFSET)
}

/// The slot of the top-level table for an address.
pub const fn slot_of(address: u64) -> u16 {
    (address >> TOP_LEVEL_SHIFT & 511) as u16
}

const _: () = assert!(CHECK_SLOT == 472 && slot_of(check_address(u64::MAX)) == 503);
const _: () = assert!(slot_of(BYTE_WINDOW) == 499 && slot_of(ENTRY_WINDOW) == 501);
