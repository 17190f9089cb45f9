//! Free pages of the guest, and pages of its quarantine, are reclaimed.

use umbra_shadow::abi::{self, CallNumber, GuestFlags};
use umbra_shadow::codes::{FREE_PAGE, SLAB_FREE, SLAB_FREE_TRACK, SLAB_REDZONE};
use vm_memory::GuestAddress;

use super::RAM;
use super::bench::*;

#[test]
fn free_pages_are_reclaimed_where_the_guest_allows_it() {
    for flags in [0, GuestFlags::FREE_PAGES_UNUSED.bits() | 1 << 63] {
        let mut bench = Bench::sync();
        assert_ne!(
            bench.call(CallNumber::Hello, [abi::VERSION.into(), flags, 0, 0]),
            abi::ERR_VERSION
        );
        for at in [0x5000u64, 0x6000, 0x7000] {
            bench.ram.write(GuestAddress(at), &at.to_le_bytes()).unwrap();
        }
        assert_eq!(bench.call(CallNumber::Poison, [0x5000, 0x1000, FREE_PAGE.into(), 0]), 0);
        assert_eq!(bench.call(CallNumber::Poison, [0x6000, 0x1000, 0xfe, 0]), 0);
        let stops = bench.others.stops;
        assert_eq!(bench.ram.read_u64(GuestAddress(0x5000)).unwrap(), 0x5000, "not at once");
        // A pass begins with the rings.
        bench.state.shadow.skip_reclaim_pause();
        assert_eq!(bench.call(CallNumber::Poison, [0x8000, 0x1000, 0xfe, 0]), 0);
        assert_eq!(bench.call(CallNumber::Poison, [0x7000, 0x1000, FREE_PAGE.into(), 0]), 0);
        assert_eq!(bench.others.stops > stops, flags != 0, "the other CPUs may be using pages");
        let left = [0x5000, 0x6000, 0x7000].map(|at| bench.ram.read_u64(GuestAddress(at)).unwrap());
        let (gone, released) = if flags == 0 { (0x5000, 0) } else { (0, 0x1000) };
        assert_eq!(left, [gone, 0x6000, 0x7000], "the last one was poisoned after the look");
        assert_eq!(bench.state.shadow.reclaimed_guest_bytes(), released);
    }
}

#[test]
fn pages_of_the_quarantine_are_reclaimed_where_the_guest_allows_it() {
    let free_pages = GuestFlags::FREE_PAGES_UNUSED.bits();
    for flags in [free_pages, free_pages | GuestFlags::QUARANTINE_UNUSED.bits()] {
        let mut bench = Bench::sync();
        bench.call(CallNumber::Hello, [abi::VERSION.into(), flags, 0, 0]);
        for at in (0x4000u64..0x9000).step_by(0x1000) {
            bench.ram.write(GuestAddress(at), &at.to_le_bytes()).unwrap();
        }
        // An object of a whole page, two that share the next, one with the allocator's own mark in
        // it, one in use, a redzone alone.
        for (start, bytes, code) in [
            (0x4000u64, 0x1000u64, SLAB_FREE_TRACK),
            (0x5000, 0x700, SLAB_FREE_TRACK),
            (0x5700, 0x100, SLAB_REDZONE),
            (0x5800, 0x800, SLAB_FREE_TRACK),
            (0x6000, 0x800, SLAB_FREE_TRACK),
            (0x6800, 0x800, SLAB_FREE),
            (0x7000, 0xff8, SLAB_FREE_TRACK),
            (0x8000, 0x1000, SLAB_REDZONE),
        ] {
            assert_eq!(bench.call(CallNumber::Poison, [start, bytes, code.into(), 0]), 0);
        }
        bench.state.shadow.skip_reclaim_pause();
        for _ in 0..2 {
            assert_eq!(bench.call(CallNumber::Poison, [0x9000, 0x1000, SLAB_REDZONE.into(), 0]), 0);
        }
        let left: Vec<u64> =
            (4..9u64).map(|page| bench.ram.read_u64(GuestAddress(page << 12)).unwrap()).collect();
        let goes = flags != free_pages;
        let [first, second] = if goes { [0, 0] } else { [0x4000, 0x5000] };
        assert_eq!(left, [first, second, 0x6000, 0x7000, 0x8000]);
        assert_eq!(bench.state.shadow.reclaimed_guest_bytes(), if goes { 0x2000 } else { 0 });
    }
}

#[test]
fn a_second_kernel_keeps_what_the_first_had_freed() {
    let mut bench = Bench::sync();
    let hello = [abi::VERSION.into(), GuestFlags::FREE_PAGES_UNUSED.bits(), 0, 0];
    bench.call(CallNumber::Hello, hello);
    bench.ram.write(GuestAddress(0x5000), &[7]).unwrap();
    assert_eq!(bench.call(CallNumber::Poison, [0x5000, 0x1000, FREE_PAGE.into(), 0]), 0);
    bench.call(CallNumber::Hello, hello);
    bench.state.shadow.skip_reclaim_pause();
    for _ in 0..2 {
        assert_eq!(bench.call(CallNumber::Poison, [0x9000, 0x1000, FREE_PAGE.into(), 0]), 0);
    }
    assert_eq!(
        (
            bench.ram.read_u64(GuestAddress(0x5000)).unwrap(),
            bench.state.shadow.reclaimed_guest_bytes()
        ),
        (7, 0)
    );
}

/// A guest of which every second page is free: 2,048 runs.
fn in_many_pieces() -> Bench {
    let mut bench = Bench::ring();
    bench
        .call(CallNumber::Hello, [abi::VERSION.into(), GuestFlags::FREE_PAGES_UNUSED.bits(), 0, 0]);
    for page in (0..RAM >> 12).step_by(2) {
        bench.ram.write(GuestAddress(page << 12), &[7]).unwrap();
        goes_on(bench.write(bench.layout.page.gpa + page, &[FREE_PAGE]));
    }
    bench
}

#[test]
fn free_pages_in_many_pieces_take_many_steps() {
    let mut bench = in_many_pieces();
    bench.state.shadow.skip_reclaim_pause();
    // The first step is that of the rings.
    for step in 0..=(RAM >> 13) / 32 {
        goes_on(bench.read(bench.layout.page.gpa, 1).0);
        assert_eq!(bench.state.shadow.reclaimed_guest_bytes() >> 12, 32 * step);
    }
    // Nothing is left, and the others run on.
    let stops = bench.others.stops;
    for _ in 0..3 {
        goes_on(bench.read(bench.layout.page.gpa, 1).0);
        bench.state.shadow.skip_reclaim_pause();
    }
    assert_eq!(bench.others.stops, stops);
}
