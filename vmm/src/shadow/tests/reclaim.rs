//! Reclaim of byte shadow that no page uses.

use super::*;

#[test]
fn release_takes_only_what_nobody_uses() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, None);
    // Eight shadow pages across the edge of two chunks; behind each, one guest page of another
    // class.
    let start = CHUNK_COVERS - 4 * 8 * 4096;
    let classes = [PAGE_BYTES, PAGE_BUSY, FREE_PAGE, 0, 0xfe, FREE_PAGE, PAGE_BUSY, PAGE_BYTES];
    let shadow_pages: Vec<u64> = (0..8).map(|i| start + i * 8 * 4096).collect();
    for (i, (addr, class)) in shadow_pages.iter().zip(classes).enumerate() {
        guest.set_bytes(*addr, 4096, SLAB_FREE);
        guest.set_pages(addr + i as u64 * 4096, 1, class);
    }
    let before = guest.windows.figures().unwrap();
    assert_eq!((before.byte_resident_bytes, before.byte_used_bytes), (8 * 4096, 2 * 512));

    assert_eq!(reclaim_all(&mut guest.windows), 4 * 4096);
    let after = guest.windows.figures().unwrap();
    assert_eq!((after.byte_resident_bytes, after.byte_peak_resident_bytes), (4 * 4096, 8 * 4096));
    assert_eq!((after.released_bytes, after.byte_mapped_bytes), (4 * 4096, 2 * CHUNK_BYTES));
    assert_eq!(after.byte_unused_bytes, 4 * 4096 - 2 * 512);

    // Nothing is left to reclaim.
    assert_eq!(reclaim_all(&mut guest.windows), 0);
    for (i, addr) in shadow_pages.iter().enumerate() {
        let gpa = guest.byte_gpa(*addr);
        let expected = if (2..6).contains(&i) { 0 } else { SLAB_FREE };
        for at in [0, 511, 4095] {
            assert_eq!(guest.load(gpa + at).unwrap(), expected, "shadow page {i}, byte {at}");
        }
    }
    // Reclaimed shadow can be written again without an exit.
    let gpa = guest.byte_gpa(shadow_pages[3]);
    assert_eq!(guest.store(gpa, 5).unwrap(), FaultOutcome::AlreadyMapped);
    assert_eq!(guest.load(gpa).unwrap(), 5);
}

#[test]
fn a_step_of_reclaim_is_bounded() {
    const RAM: u64 = 400 * MIB;
    let mut guest = Guest::new(RAM, Mode::PerPage, Notify::Ring, None);
    let resident = |guest: &mut Guest| guest.windows.figures().unwrap().byte_resident_bytes;
    let steps = |guest: &mut Guest| {
        let mut steps = vec![];
        loop {
            let unused = guest.windows.find_unused().unwrap();
            let end = unused.end_of_pass;
            steps.push(guest.windows.reclaim(unused).unwrap());
            if let Some(found) = end {
                return (steps, found);
            }
        }
    };
    // All of it is unused, or every other page of shadow.
    for step in [1, 2] {
        for addr in (0..RAM).step_by(step * 8 * 4096) {
            guest.set_bytes(addr, 1, SLAB_FREE);
        }
        let all = RAM / 64 / step as u64 * 8;
        assert_eq!(resident(&mut guest), all);
        let (steps, found) = steps(&mut guest);
        assert!(found && steps.len() > 10 && steps.iter().all(|bytes| *bytes <= 5 * MIB / 4));
        assert_eq!((steps.iter().sum::<u64>(), resident(&mut guest)), (all, 0));
    }
    assert_eq!(steps(&mut guest), (vec![0; 4], false), "64 chunks a step");
    assert_eq!(guest.windows.figures().unwrap().byte_peak_resident_bytes, RAM / 8);
}

#[test]
fn what_is_used_by_the_time_it_is_reclaimed_stays() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, None);
    for addr in [0, 3 * 8 * 4096] {
        guest.set_bytes(addr, 512, SLAB_FREE);
    }
    let unused = guest.windows.find_unused().unwrap();
    assert_eq!(unused.end_of_pass, Some(true));
    guest.set_pages(0, 1, PAGE_BUSY);
    assert_eq!(guest.windows.reclaim(unused).unwrap(), 4096);
    assert_eq!((guest.byte(0), guest.byte(3 * 8 * 4096)), (SLAB_FREE, 0));
}
