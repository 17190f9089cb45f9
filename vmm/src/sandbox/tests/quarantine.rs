//! Freed memory that waits, and the calls that fetch it.

use umbra_shadow::abi::{self, CallNumber, Owner, Slot};
use umbra_shadow::codes::SLAB_FREE;
use vm_memory::GuestAddress;

use super::RAM;
use super::bench::*;
use crate::shadow::{Mode, Notify};

#[test]
fn what_waits_is_fetched_when_it_is_due() {
    let quarantine = 64 << 10;
    let mut bench = Bench::with(Mode::PerPage, Notify::Sync, quarantine, false).with_region();
    let owner = Owner { allocator: 1, note: 9 };
    let wait = u64::from(owner.to_bits());
    let free = |bench: &mut Bench, at: u64| {
        bench.call(
            CallNumber::Freed,
            [0x2_0000 + at, 0, wait, Slot { bytes: 1024, code: SLAB_FREE }.to_register()],
        )
    };
    // A batch is 4 KiB; 44 KiB are kept.
    let due: Vec<_> = (0..49).map(|i| free(&mut bench, i * 1024)).collect();
    assert_eq!((due.iter().position(|due| *due != 0), due[48]), (Some(48), 1));
    let to = 0x1_0000;
    assert_eq!(bench.call(CallNumber::Quarantine, [0, to, 2, 0]), 2);
    assert_eq!(bench.call(CallNumber::Quarantine, [0, to + 32, 100, 0]), 3);
    for i in 0..5u64 {
        let mut bytes = [0; 16];
        bench.ram.read(GuestAddress(to + 16 * i), &mut bytes).unwrap();
        let expected = abi::Released::new(0x2_0000 + 1024 * i, 1024, owner);
        assert_eq!(bytes, expected.encode());
    }
    assert_eq!(bench.call(CallNumber::Quarantine, [0, to, 100, 0]), 0);
    assert_eq!(bench.call(CallNumber::Quarantine, [0, to, 0, 0]), 0);
    assert_eq!(bench.call(CallNumber::Quarantine, [1, to, 100, 0]), 44);
    assert_eq!(bench.state.provenance.quarantine().figures().bytes, 0);
    // A free that does not wait does not ask for an eviction.
    assert_eq!(
        bench.call(
            CallNumber::Freed,
            [0x2_0000, 0, 0, Slot { bytes: 1024, code: SLAB_FREE }.to_register()]
        ),
        0
    );
    assert_eq!(bench.state.provenance.quarantine().figures().held, 49);
}

#[test]
fn arrays_for_what_leaves_the_quarantine_lie_in_ram() {
    let mut bench = Bench::ring();
    for (at, count) in
        [(RAM - 8, 0), (RAM - 16, 2), (RAM, 1), (u64::MAX, 0), (0, abi::RELEASED_MAX + 1)]
    {
        assert_eq!(
            bench.call(CallNumber::Quarantine, [1, at, count, 0]),
            abi::ERR_ARGUMENT,
            "{at:#x}"
        );
    }
    assert_eq!(bench.call(CallNumber::Quarantine, [1, RAM - 16, 1, 0]), 0);
    assert_eq!(bench.call(CallNumber::Related, [0x1000, 0, 0, 0]), abi::ERR_MODE);
    let mut off = Bench::new(None, Notify::Ring, None, None).with_region();
    assert_eq!(off.call(CallNumber::Quarantine, [1, 0, 1, 0]), abi::ERR_MODE);
}
