//! Findings: reports, the records that are drained before them, and tampering.

use umbra_shadow::abi::{Access, CallNumber, FREE_REFUSED, NameKind, RecordKind, Slot};
use vm_memory::GuestAddress;

use super::CPU;
use super::bench::*;
use crate::sandbox::Outcome;
use crate::shadow::{Mode, Notify};

#[test]
fn a_report_becomes_a_finding_with_its_object() {
    let mut bench = Bench::sync();
    bench.ram.write(GuestAddress(0x100), b"cachetask").unwrap();
    assert_eq!(bench.call(CallNumber::Name, [NameKind::Cache.into(), 0x100, 5 | 3 << 32, 64]), 0);
    assert_eq!(bench.call(CallNumber::Name, [NameKind::Task.into(), 0x105, 4 | 8 << 32, 0]), 0);
    assert_eq!(bench.call(CallNumber::Allocated, [0x5000, 50, 3 | 8 << 32, 0]), 0);
    assert_eq!(bench.call(CallNumber::Poison, [0x5038, 8, 0xfc, 0]), 0);
    // The guest says that it is CPU 1.
    let who = u64::from(Access::Write) | 1 << 16 | 8 << 32;
    assert_eq!(bench.call(CallNumber::Report, [0x5034, 8, who, 0x10_0005]), 0);
    let heard = bench.heard.0.lock().unwrap().clone();
    let [finding] = heard.as_slice() else { panic!("{heard:?}") };
    assert_eq!(
        (finding.kind, finding.address, finding.size, finding.ip),
        ("slab-out-of-bounds", 0x5034, 8, 0x10_0005)
    );
    assert_eq!((finding.cpu, finding.task.name.as_str()), (CPU.into(), "task"));
    let object = finding.object.as_ref().unwrap();
    assert_eq!((object.start, object.size, object.cache.as_deref()), (0x5000, 50, Some("cache")));
    assert_eq!(object.offset, 0x38, "of the first bad byte");
    assert_eq!(finding.allocated.as_ref().unwrap().task.name, "task");
    assert_eq!((bench.events().allocations, bench.events().frees), (1, 0));
}

#[test]
fn the_run_ends_after_enough_different_findings() {
    let mut bench = Bench::new(Some(Mode::PerPage), Notify::Ring, None, Some(2)).with_region();
    assert_eq!(bench.call(CallNumber::Report, [0x1000, 1, 0, 0x100]), 0);
    assert_eq!(bench.call(CallNumber::Report, [0x1000, 1, 0, 0x100]), 0, "a repeat does not count");
    let outcome = ended(bench.hypercall(CallNumber::Report, [0x1000, 1, 0, 0x200]));
    assert!(matches!(outcome, Outcome::FindingLimit(2)), "{outcome:?}");
    assert_eq!(bench.heard.0.lock().unwrap().len(), 2);
}

#[test]
fn a_bad_byte_is_searched_in_a_bounded_part_of_an_access() {
    let mut bench = Bench::sync();
    let far = 4 << 20;
    for (at, size, expected) in
        [(far - 64, 128, far), (far - (1 << 20), 2 << 20, far), (0x1000, 8 << 20, 0x1000)]
    {
        assert_eq!(bench.call(CallNumber::Poison, [far, 8, 0xfc, 0]), 0);
        assert_eq!(bench.call(CallNumber::Report, [at, size, 0, at]), 0);
        let heard = bench.heard.0.lock().unwrap();
        assert_eq!(heard.last().map(|finding| finding.shadow.first_bad), Some(expected));
    }
}

#[test]
fn rings_are_drained_before_a_report() {
    let mut bench = Bench::ring();
    assert_eq!(bench.call(CallNumber::RingSetup, [0x8000, 64 * 5, 0, 0]), 0);
    let mut record = [0u8; 64];
    record[0] = 1;
    record[8..12].copy_from_slice(&0x6000u32.to_le_bytes());
    record[16..20].copy_from_slice(&40u32.to_le_bytes());
    bench.ram.write(GuestAddress(0x8040), &record).unwrap();
    // The second one makes no sense: no such kind.
    record[0] = 77;
    bench.ram.write(GuestAddress(0x8080), &record).unwrap();
    bench.ram.write(GuestAddress(0x8000), &2u64.to_le_bytes()).unwrap();
    assert_eq!(bench.others.stops, 0);
    assert_eq!(bench.call(CallNumber::Report, [0x6008, 1, 0, 0x100]), 0);
    assert_eq!(bench.others.stops, 1, "the other CPUs write to their rings");
    let object = bench.heard.0.lock().unwrap()[0].object.clone().unwrap();
    assert_eq!((object.start, object.size, object.offset), (0x6000, 40, 8));
    let events = bench.events();
    assert_eq!((events.allocations, events.frees, events.refused), (1, 0, 1));
    assert_eq!(
        bench.ram.read_u64(GuestAddress(0x8000)).unwrap(),
        2,
        "its CPU may be about to store a 3"
    );
    // None is taken twice; its CPU's own call empties the ring.
    assert_eq!(bench.call(CallNumber::RingDrain, [0, 0, 0, 0]), 0);
    assert_eq!(bench.ram.read_u64(GuestAddress(0x8000)).unwrap(), 0);
    assert_eq!(bench.events().allocations, 1);
}

#[test]
fn a_record_names_a_cache() {
    let mut bench = Bench::ring();
    assert_eq!(bench.call(CallNumber::RingSetup, [0x8000, 64 * 5, 0, 0]), 0);
    let write = |at: u64, kind: RecordKind, depth: u8, low: u32, name: &[u8]| {
        let mut bytes = [0u8; 64];
        (bytes[0], bytes[1], bytes[2]) = (kind.into(), depth, 3);
        bytes[8..12].copy_from_slice(&low.to_le_bytes());
        bytes[16..20].copy_from_slice(&40u32.to_le_bytes());
        bytes[28..28 + name.len()].copy_from_slice(name);
        bench.ram.write(GuestAddress(at), &bytes).unwrap();
    };
    write(0x8040, RecordKind::Cache, 7, 0, b"my\ncache");
    write(0x8080, RecordKind::Allocated, 0, 0x6000, &[]);
    // Longer than there is room for.
    write(0x80c0, RecordKind::Cache, 37, 0, &[b'x'; 36]);
    bench.ram.write(GuestAddress(0x8000), &3u64.to_le_bytes()).unwrap();
    assert_eq!(bench.call(CallNumber::Report, [0x6008, 1, 0, 0x100]), 0);
    let object = bench.heard.0.lock().unwrap()[0].object.clone().unwrap();
    assert_eq!((object.start, object.cache.as_deref()), (0x6000, Some("my?cach")));
    assert_eq!((bench.events().allocations, bench.events().refused), (1, 1));
}

#[test]
fn stores_to_read_only_windows_are_found_and_have_no_effect() {
    let mut bench = Bench::sync();
    bench.cpu.regs.rip = 0x1234;
    let (page, byte) = (bench.layout.page.gpa + 0x20, bench.layout.byte.gpa + 0x20);
    for at in [page, byte] {
        goes_on(bench.write(at, &[0xff; 8]));
        assert_eq!(bench.read(at, 8).1.as_deref(), Some(&[0; 8][..]));
        bench.cpu.regs.rip += 8;
    }
    assert_eq!(bench.kinds(), ["shadow-tampering"; 2]);
    let heard = bench.heard.0.lock().unwrap();
    assert_eq!((heard[0].ip, heard[0].size, heard[0].address), (0x1234, 8, 0x20_000 >> 12));
    assert_eq!(heard[1].address, 0x100 >> 3);
}

#[test]
fn a_module_names_its_functions() {
    let mut bench = Bench::sync();
    let words = |at: u64, words: &[u64]| {
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bench.ram.write(GuestAddress(at), &bytes).unwrap();
    };
    bench.ram.write(GuestAddress(0x1000), b"my_module").unwrap();
    words(0x1000 + 56, &[0x10_0000, 0x1000, 0, 0, 0x2000, 3, 0x3000]);
    // Name, type and address: a function, a variable, and a function of another module.
    words(0x2000, &[1 | 2 << 32, 0x10_0040, 0x20]);
    words(0x2018, &[6 | 1 << 32, 0x10_0800, 8]);
    words(0x2030, &[1 | 2 << 32, 0x20_0000, 8]);
    bench.ram.write(GuestAddress(0x3000), b"\0func\0data\0").unwrap();
    assert_eq!(bench.call(CallNumber::Module, [0x1000, 0, 0, 0]), 0);
    for ip in [0x10_0050, 0x20_0004] {
        assert_eq!(bench.call(CallNumber::Report, [0x5000, 1, 0, ip]), 0);
    }
    let heard = bench.heard.0.lock().unwrap().clone();
    let frame = &heard[0].frames[0];
    assert_eq!(
        (frame.symbol.as_deref(), frame.module.as_deref()),
        (Some("func"), Some("my_module"))
    );
    assert_eq!((frame.offset, frame.size), (0x10, 0x20));
    assert_eq!(heard[1].frames[0].symbol, None);
    // Addresses of nothing are refused, or the module has no symbols.
    assert!(bench.call(CallNumber::Module, [1 << 40, 0, 0, 0]) >= umbra_shadow::abi::ERR_MIN);
    bench.ram.write(GuestAddress(0x1000 + 56 + 32), &[0xff; 24]).unwrap();
    assert_eq!(bench.call(CallNumber::Module, [0x1000, 0, 0, 0]), 0);
}

#[test]
fn a_free_inside_a_live_object_is_found_and_changes_nothing() {
    let mut bench = Bench::sync();
    let slot = Slot { bytes: 64, code: 0xfc }.to_register();
    assert_eq!(bench.call(CallNumber::Allocated, [0x5000, 64, 0, slot]), 0);
    let inside = Slot { bytes: 16, code: 0xfb }.to_register();
    assert_eq!(bench.call(CallNumber::Freed, [0x5010, 0, 0, inside]), FREE_REFUSED);
    assert_eq!(bench.kinds(), ["invalid-free"]);
    let free = bench.heard.0.lock().unwrap()[0].clone();
    let object = free.object.unwrap();
    assert_eq!((object.start, object.offset, free.address), (0x5000, 16, 0x5010));
    assert_eq!(bench.call(CallNumber::Freed, [0x5000, 0, 0, slot]), 0);
    assert_eq!(bench.kinds().len(), 1);
}

#[test]
fn a_record_of_a_wrong_free_may_end_the_run() {
    wrong_free_in_a_ring(|bench| bench.hypercall(CallNumber::RingDrain, [0, 0, 0, 0]));
    // The collector finds it, too.
    wrong_free_in_a_ring(|bench| {
        let mut others = FakeOthers::default();
        let collected = bench.state.collect(&bench.ram, &mut others).map(drop);
        assert_eq!((others.stops, bench.events().collected), (1, 2));
        collected
    });
}

fn wrong_free_in_a_ring(drain: impl FnOnce(&mut Bench) -> Result<(), Outcome>) {
    let mut bench = Bench::new(Some(Mode::PerPage), Notify::Ring, None, Some(1)).with_region();
    assert_eq!(bench.call(CallNumber::RingSetup, [0x8000, 64 * 5, 0, 0]), 0);
    let records = [(RecordKind::Allocated, 0x6000u32, 40u32), (RecordKind::Freed, 0x6010, 0)];
    for (i, (kind, low, size)) in (1u64..).zip(records) {
        let mut bytes = [0u8; 64];
        bytes[0] = kind.into();
        bytes[8..12].copy_from_slice(&low.to_le_bytes());
        bytes[16..20].copy_from_slice(&size.to_le_bytes());
        bytes[20] = i as u8;
        bench.ram.write(GuestAddress(0x8000 + 64 * i), &bytes).unwrap();
    }
    bench.ram.write(GuestAddress(0x8000), &2u64.to_le_bytes()).unwrap();
    let outcome = ended(drain(&mut bench));
    assert!(matches!(outcome, Outcome::FindingLimit(1)), "{outcome:?}");
    let heard = bench.heard.0.lock().unwrap();
    assert_eq!((heard[0].kind, heard[0].address), ("invalid-free", 0x6010));
    assert!(heard[0].notes.iter().any(|note| note.contains("records were read")));
}
