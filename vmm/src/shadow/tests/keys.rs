//! Virtual memory with shadow of its own.

use umbra_shadow::abi::VIRTUAL_UNIT;
use umbra_shadow::codes::VMALLOC_INVALID;

use super::*;

/// Its address and bytes: neither end is at a unit's end.
const VA: u64 = 0xffff_c900_0012_3000;
const LEN: u64 = VIRTUAL_UNIT + 0x5000;
/// The end of the guest's RAM.
const RAM: u64 = 5 * MIB;

fn add(guest: &mut Guest, va: u64, len: u64) -> u64 {
    let key = guest.windows.next_key(va, len).expect("there are enough keys");
    guest.windows.add_virtual(key, len, &mut guest.memslots).expect("a memslot");
    key
}

fn all_modes() -> impl Iterator<Item = (Mode, Notify)> {
    [Mode::PerPage, Mode::Full]
        .into_iter()
        .flat_map(|mode| [(mode, Notify::Ring), (mode, Notify::Sync)])
}

#[test]
fn it_is_poisoned_until_it_is_handed_out() {
    for (mode, notify) in all_modes() {
        let mut guest = Guest::new(RAM, mode, notify, None);
        let before = guest.windows.figures().unwrap();
        let key = add(&mut guest, VA, LEN);
        assert_eq!(
            key,
            VIRTUAL_UNIT + 0x12_3000,
            "behind RAM, and equal to its address modulo a unit"
        );
        let state = |guest: &Guest, at| guest.windows.model().state(at);
        for at in [key, key + 8, key + LEN - 8] {
            assert_eq!(state(&guest, at), VMALLOC_INVALID, "{mode:?} {notify:?} {at:#x}");
        }
        assert_eq!(guest.windows.model().first_bad(0, RAM), None, "RAM is as it was");

        guest.windows.unpoison(key + 0x1000, 0x1803, &mut guest.memslots).unwrap();
        let model = guest.windows.model();
        assert_eq!(model.first_bad(key + 0x1000, 0x1803), None);
        assert_eq!(model.first_bad(key + 0x1000, 0x1804), Some(key + 0x2803));
        assert_eq!(model.first_bad(key + 0xfff, 1), Some(key + 0xfff));
        guest.windows.poison(key + 0x1000, 0x2000, VMALLOC_INVALID, &mut guest.memslots).unwrap();
        assert_eq!(guest.windows.model().first_bad(key + 0x1000, 1), Some(key + 0x1000));

        let after = guest.windows.figures().unwrap();
        match mode {
            // Two units of page shadow, and the byte shadow of one page.
            Mode::PerPage => {
                assert_eq!(after.page_bytes, before.page_bytes + 2 * 4096);
                assert_eq!(after.byte_resident_bytes, 4096);
                assert_eq!((after.byte_mapped_bytes, after.byte_used_bytes), (CHUNK_BYTES, 0));
            }
            Mode::Full => {
                assert_eq!((before.page_bytes, after.page_bytes), (0, 0));
                assert_eq!(after.byte_resident_bytes, before.byte_resident_bytes + CHUNK_BYTES);
                assert_eq!(after.byte_used_bytes, before.byte_used_bytes + CHUNK_BYTES);
            }
        }
    }
}

#[test]
fn the_guest_reaches_its_shadow_when_it_has_it() {
    for (mode, notify) in all_modes() {
        let mut guest = Guest::new(RAM, mode, notify, None);
        let key = guest.windows.next_key(VA, LEN).unwrap();
        let last = key + LEN - 1;
        let places = |guest: &Guest| {
            let pages = (mode == Mode::PerPage).then(|| [key, last].map(|at| guest.page_gpa(at)));
            let bytes = [key, last].map(|at| guest.byte_gpa(at));
            pages.into_iter().flatten().chain(bytes).collect::<Vec<_>>()
        };
        for gpa in places(&guest) {
            assert!(
                !guest.windows.contains(gpa) && guest.windows.is_reserved(gpa),
                "{mode:?} {gpa:#x}"
            );
            assert!(matches!(guest.store(gpa, 1), Err(ShadowError::OutsideWindow { .. })));
        }
        let memslots = guest.memslots.live();
        add(&mut guest, VA, LEN);
        assert_eq!(guest.memslots.live(), memslots + usize::from(mode == Mode::PerPage));
        for gpa in places(&guest) {
            let before = guest.load(gpa).unwrap();
            // Byte shadow of a page that is not byte-checked is not used.
            let says_nothing = mode == Mode::PerPage && gpa >= guest.windows.byte_window().gpa;
            assert_eq!(before, if says_nothing { 0 } else { VMALLOC_INVALID }, "{mode:?} {gpa:#x}");
            let outcome = guest.store(gpa, 7).unwrap();
            assert_eq!(outcome == FaultOutcome::Tampering, notify == Notify::Sync);
            assert_eq!(guest.load(gpa).unwrap(), if notify == Notify::Sync { before } else { 7 });
        }
    }
}

#[test]
fn keys_are_handed_out_once() {
    let mut guest = Guest::new(RAM, Mode::PerPage, Notify::Ring, None);
    let all = guest.windows.model().memory().layout().virtual_bytes();
    let first = add(&mut guest, VA, 0x1000);
    let second = add(&mut guest, VA + 0x1000, 0x1000);
    assert_eq!((first - 0x12_3000, second - 0x12_4000), (VIRTUAL_UNIT, 2 * VIRTUAL_UNIT));
    assert_eq!(guest.windows.next_key(0, all - VIRTUAL_UNIT), None, "two units are gone");
    for (va, len) in
        [(0, u64::MAX), (u64::MAX, u64::MAX), (VA, all - 2 * VIRTUAL_UNIT), (0, all + 1)]
    {
        assert_eq!(guest.windows.next_key(va, len), None, "{va:#x}+{len:#x}");
    }
    let rest = add(&mut guest, 0, all - 2 * VIRTUAL_UNIT);
    assert_eq!(guest.windows.next_key(0, 1), None);
    assert_eq!(guest.windows.figures().unwrap().page_bytes, 4096 + all / 4096);
    assert_eq!(guest.windows.model().state(rest + all - 2 * VIRTUAL_UNIT - 1), VMALLOC_INVALID);
}

/// RAM bounds its own shadow. Virtual memory has no such bound, so there is a default limit.
#[test]
fn there_is_a_limit_without_one() {
    for mode in [Mode::PerPage, Mode::Full] {
        let mut guest = Guest::new(RAM, mode, Notify::Sync, None);
        let limit = guest.windows.model().memory().layout().default_limit();
        assert_eq!(limit, 3 * CHUNK_BYTES + 32 * MIB);
        let key = add(&mut guest, 0, 1 << 30);
        let refused = (0..).map(|chunk| key + chunk * CHUNK_COVERS).find_map(|at| {
            guest.windows.unpoison(at, 8, &mut guest.memslots).err().map(|error| (at, error))
        });
        let (at, error) = refused.unwrap();
        assert!(matches!(error, ShadowError::Limit { .. }), "{mode:?} {error}");
        let more = if mode == Mode::Full { 0 } else { 3 };
        assert_eq!((at - key) / CHUNK_COVERS, 32 * MIB / CHUNK_BYTES + more, "{mode:?}");
        assert!(guest.windows.figures().unwrap().byte_mapped_bytes <= limit);
    }
}

/// A memslot that KVM refuses changes nothing.
#[test]
fn a_refused_slot_is_an_error() {
    let mut guest = Guest::new(RAM, Mode::PerPage, Notify::Ring, None);
    let key = guest.windows.next_key(VA, LEN).unwrap();
    guest.memslots.refuse = true;
    let refused = guest.windows.add_virtual(key, LEN, &mut guest.memslots);
    assert!(matches!(refused, Err(ShadowError::Memslot { .. })));
    assert_eq!(guest.windows.next_key(VA, LEN), Some(key));
}
