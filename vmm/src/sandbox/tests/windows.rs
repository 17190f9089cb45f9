//! Accesses to the windows and around them, and the limit of the shadow.

use umbra_machine::vcpu::VmExit;
use umbra_shadow::abi::CallNumber;
use umbra_shadow::codes::{PAGE_BYTES, SLAB_FREE};
use vm_memory::GuestAddress;

use super::bench::*;
use crate::sandbox::Outcome;
use crate::shadow::{CHUNK_BYTES, Mode, Notify};

#[test]
fn the_first_touch_of_a_chunk_maps_it() {
    let mut bench = Bench::ring();
    let at = bench.layout.byte.gpa + CHUNK_BYTES + 5;
    assert_eq!(bench.memslots.memslots.len(), 1, "the page window");
    let (handled, value) = bench.read(at, 8);
    goes_on(handled);
    assert_eq!(value.as_deref(), Some(&[0; 8][..]));
    assert_eq!(bench.memslots.memslots[1], Some((at - 5, CHUNK_BYTES, false)));
    goes_on(bench.write(at, &[1, 2, 3]));
    assert_eq!(bench.read(at, 4).1.as_deref(), Some(&[1, 2, 3, 0][..]));
    assert_eq!((bench.exits().shadow_fault, bench.exits().mmio), (1, 0));
    // Across the end of a chunk: both.
    goes_on(bench.write(bench.layout.byte.gpa + 3 * CHUNK_BYTES - 4, &[9; 8]));
    assert_eq!(bench.memslots.memslots.len(), 4);
}

#[test]
fn outside_of_the_windows_there_is_nothing() {
    let mut bench = Bench::ring();
    let (page, byte) = (bench.layout.page, bench.layout.byte);
    for at in [0xd000_0000, page.gpa - 1, page.end(), byte.gpa - 1, byte.end(), u64::MAX] {
        let (handled, value) = bench.read(at, 1);
        goes_on(handled);
        assert_eq!(value.as_deref(), Some(&[0xff][..]), "{at:#x}");
        goes_on(bench.write(at, &[1]));
    }
    assert_eq!(bench.exits().mmio, 12);
    // Half in a window: all ones, no effect, no memslot.
    for at in [page.end() - 4, byte.end() - 4] {
        let (handled, value) = bench.read(at, 8);
        goes_on(handled);
        assert_eq!(value.as_deref(), Some(&[0xff; 8][..]));
        goes_on(bench.write(at, &[1; 8]));
    }
    assert_eq!(bench.memslots.memslots.len(), 1);
    // With the shadow off, nothing is there either.
    let mut off = Bench::new(None, Notify::Ring, None, None);
    assert_eq!(off.read(page.gpa, 8).1.as_deref(), Some(&[0xff; 8][..]));
    assert_eq!(off.exits().mmio, 1);
}

#[test]
fn the_shadow_limit_ends_the_run() {
    let mut bench =
        Bench::new(Some(Mode::PerPage), Notify::Ring, Some(CHUNK_BYTES), None).with_region();
    let byte = bench.layout.byte.gpa;
    // The chunk's first page is byte-checked, so it stays.
    goes_on(bench.write(bench.layout.page.gpa, &[PAGE_BYTES]));
    goes_on(bench.write(byte, &[1]));
    for handled in [bench.write(byte + CHUNK_BYTES, &[1]), bench.read(byte + CHUNK_BYTES, 1).0] {
        let outcome = ended(handled);
        assert!(matches!(outcome, Outcome::ShadowLimit(_)), "{outcome:?}");
        assert_eq!((outcome.word(), outcome.status(true)), ("shadow-limit", 2));
    }
    let memory_fault =
        VmExit::MemoryFault { gpa: GuestAddress(byte + CHUNK_BYTES), size: 4096, flags: 0 };
    assert!(matches!(ended(bench.exit(memory_fault)), Outcome::ShadowLimit(_)));
    assert_eq!(bench.others.stops, 3, "the last look was taken while nothing changed");
    let mut sync = Bench::new(Some(Mode::PerPage), Notify::Sync, Some(0), None).with_region();
    let handled = sync.hypercall(CallNumber::Poison, [8, 8, SLAB_FREE.into(), 0]);
    assert!(matches!(ended(handled), Outcome::ShadowLimit(_)));
}

#[test]
fn a_host_without_slots_ends_the_run() {
    let mut bench = Bench::ring();
    bench.memslots.refuse = true;
    let outcome = ended(bench.write(bench.layout.byte.gpa, &[1]));
    assert!(matches!(outcome, Outcome::Shadow(_)), "{outcome:?}");
    assert_eq!((outcome.word(), outcome.status(false)), ("host-error", 2));
}

#[test]
fn memory_faults_map_shadow_and_nothing_else() {
    let mut bench = Bench::ring();
    let fault = |gpa, size| VmExit::MemoryFault { gpa: GuestAddress(gpa), size, flags: 0 };
    let byte = bench.layout.byte.gpa;
    goes_on(bench.exit(fault(byte + 0x1000, 4096)));
    assert_eq!(bench.exits().shadow_fault, 1);
    // A second time is one too many: the access would fault for ever.
    assert!(matches!(ended(bench.exit(fault(byte + 0x1000, 4096))), Outcome::Stuck { .. }));
    for (gpa, size) in [(0x1000, 4096), (0xd000_0000, 0), (u64::MAX, u64::MAX)] {
        assert!(matches!(ended(bench.exit(fault(gpa, size))), Outcome::Stuck { .. }), "{gpa:#x}");
    }
}
