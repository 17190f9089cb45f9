//! Page tables of the check shadow, walked as a CPU does.

use umbra_shadow::abi::check_shadow::{
    BYTE_WINDOW, ENTRY_WINDOW, PAGE_WINDOW, check_address, slot_of,
};
use umbra_shadow::codes::UNKNOWN;
use umbra_shadow::group::Entry;

use super::*;

const DIRECT: u64 = 0xffff_8000_0000_0000;
const IMAGE: u64 = 0xffff_ffff_8000_0000;
const RAM: u64 = 64 * MIB;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

impl Guest {
    /// One with a check shadow for the direct map and the first MiB as image.
    fn with_check_shadow() -> Self {
        let mut guest = Self::new(RAM, Mode::PerPage, Notify::Ring, None);
        let regions = [
            CheckedRegion { va: DIRECT, bytes: RAM, key: 0 },
            CheckedRegion { va: IMAGE, bytes: MIB, key: 0 },
        ];
        guest.windows.top_level(0, regions.into_iter(), &mut guest.memslots).expect("tables");
        guest
    }

    fn word(&self, gpa: u64) -> u64 {
        let host = self.memslots.pointer(gpa, false).expect("a table in a memslot");
        // SAFETY: an aligned word of a memslot.
        unsafe { host.cast::<u64>().read_volatile() }
    }

    /// Where an address leads, if it is mapped.
    fn walk(&mut self, at: u64) -> Option<u64> {
        let regions = std::iter::empty();
        let slot = slot_of(at);
        let mut entry = self.windows.top_level(slot, regions, &mut self.memslots).expect("tables");
        for shift in [30, 21, 12] {
            if entry & PRESENT == 0 {
                return None;
            }
            entry = self.word((entry & FRAME) + (at >> shift & 511) * 8);
            if shift == 21 && entry & LARGE != 0 {
                return Some((entry & FRAME) + at % (2 * MIB));
            }
        }
        (entry & PRESENT != 0).then(|| (entry & FRAME) + at % 4096)
    }

    /// The check shadow of an address: where it is, and its byte.
    fn check(&mut self, va: u64) -> (u64, u8) {
        let gpa = self.walk(check_address(va)).expect("check shadow everywhere");
        let host = self.memslots.pointer(gpa, false).expect("in a memslot");
        // SAFETY: a byte of a memslot.
        (gpa, unsafe { host.read_volatile() })
    }

    fn set_entry(&mut self, group: u64, entry: Entry) {
        let gpa = self.windows.layout().entries.gpa + group * 8;
        for (i, byte) in (0..).zip(entry.bits().to_le_bytes()) {
            let host = self.memslots.pointer(gpa + i, true).expect("entries can be written");
            // SAFETY: a byte of a memslot.
            unsafe { host.write_volatile(byte) };
        }
    }
}

#[test]
fn check_shadow_is_a_pattern_everywhere_and_windows_are_beside() {
    let mut guest = Guest::with_check_shadow();
    let layout = *guest.windows.layout();
    for va in [DIRECT, DIRECT + RAM - 1, DIRECT + (1 << 44), IMAGE, IMAGE + RAM, u64::MAX] {
        let (gpa, value) = guest.check(va);
        assert_eq!((gpa & !4095, value), (layout.patterns.gpa, 0), "{va:#x}");
    }
    for (window, at) in
        [(layout.byte, BYTE_WINDOW), (layout.page, PAGE_WINDOW), (layout.entries, ENTRY_WINDOW)]
    {
        for offset in [0, window.bytes / 2, window.bytes - 1] {
            assert_eq!(guest.walk(at + offset), Some(window.gpa + offset));
        }
        assert_eq!(guest.walk(at + window.bytes.next_multiple_of(2 * MIB)), None);
    }
    // Each page of a pattern is accessible or poisoned, and nobody writes to it.
    for (page, bit) in (0..8).map(|page| (page, 1 << page)) {
        guest.set_entry(3, Entry::pattern(layout.patterns.gpa, bit));
        for other in 0..8 {
            let expected = if other == page { UNKNOWN } else { 0 };
            let (gpa, value) = guest.check(DIRECT + 3 * 32768 + other * 4096 + 4095);
            assert_eq!(value, expected, "page {other} of pattern {bit:#x}");
            assert!(guest.memslots.pointer(gpa, true).is_none());
        }
    }
}

#[test]
fn aliases_share_their_entries() {
    let mut guest = Guest::with_check_shadow();
    let real = guest.byte_gpa(32768) & !4095;
    guest.set_entry(1, Entry::real(real));
    for va in [DIRECT, IMAGE] {
        assert_eq!(guest.walk(check_address(va + 32768 + 8)), Some(real + 1));
    }
    // A region that comes later, with byte-checked pages already, and memory that is poisoned.
    guest.set_pages(40 * MIB, 1, PAGE_BYTES);
    let layout = *guest.windows.layout();
    guest.windows.add_virtual(layout.virtual_start, MIB, &mut guest.memslots).expect("keys");
    let far = CheckedRegion { va: DIRECT + (1 << 40), bytes: MIB, key: layout.virtual_start };
    guest.windows.add_checked(far, &mut guest.memslots).expect("tables");
    assert_eq!(guest.check(far.va).1, UNKNOWN);
}

#[test]
fn shadow_is_not_reclaimed_while_an_entry_points_to_it() {
    let mut guest = Guest::with_check_shadow();
    let (patterns, real) = (guest.windows.layout().patterns.gpa, guest.byte_gpa(0));
    // The last byte-checked page of the group has just become free; its neighbours are poisoned.
    guest.set_bytes(0, 4096, FREE_PAGE);
    guest.set_pages(0, 8, FREE_PAGE);
    for entry in [Entry::real(real), Entry::from_bits(Entry::pattern(patterns, 0).bits() | 1 << 9)]
    {
        guest.set_entry(0, entry);
        assert_eq!(reclaim_all(&mut guest.windows), 0, "{entry:x?}");
    }
    assert_eq!(guest.load(real).expect("it is mapped"), FREE_PAGE);
    guest.set_entry(0, Entry::pattern(patterns, 0xff));
    assert_eq!(reclaim_all(&mut guest.windows), 4096);
}
