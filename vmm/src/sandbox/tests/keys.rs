//! Calls about virtual memory with shadow of its own, and what is found there.

use umbra_report::Finding;
use umbra_shadow::abi::{self, CallNumber, MemoryUse, NameKind, Slot, VIRTUAL_UNIT};
use umbra_shadow::codes::{STACK_LEFT, STACK_RIGHT, VMALLOC_INVALID};
use vm_memory::GuestAddress;

use super::RAM;
use super::bench::*;
use crate::shadow::{Mode, Notify};

const VA: u64 = 0xffff_c900_0000_3000;
const LEN: u64 = 0x20_0000;
/// The first key, for `VA`, with this much RAM.
const KEY: u64 = RAM + 0x3000;

#[test]
fn virtual_memory_gets_a_key_once() {
    for mode in [Mode::PerPage, Mode::Full] {
        let mut bench = Bench::new(Some(mode), Notify::Sync, None, None).with_region();
        let all = bench.layout.virtual_bytes();
        for [va, len] in [
            [VA + 1, LEN],
            [VA, LEN + 8],
            [VA, 0],
            [u64::MAX - 0xfff, 0x2000],
            [RAM - 0x1000, 0x2000],
        ] {
            assert_eq!(
                bench.call(CallNumber::VirtualAdd, [va, len, 0, 0]),
                abi::ERR_ARGUMENT,
                "{va:#x}+{len:#x}"
            );
        }
        for len in [all, all + VIRTUAL_UNIT, 1 << 45] {
            assert_eq!(
                bench.call(CallNumber::VirtualAdd, [VA, len, 0, 0]),
                abi::ERR_LIMIT,
                "{len:#x}"
            );
        }
        assert_eq!(bench.call(CallNumber::VirtualAdd, [VA, LEN, 0, 0]), KEY);
        assert_eq!(
            bench.call(CallNumber::VirtualAdd, [VA, LEN, 0, 0]),
            abi::ERR_ARGUMENT,
            "it has one"
        );
        assert_eq!(
            bench.call(CallNumber::RegionAdd, [VA + 0x1000, 0x1000, 0, 0]),
            abi::ERR_ARGUMENT
        );
        assert_eq!(
            bench.call(CallNumber::VirtualAdd, [VA + LEN, 0x1000, 0, 0]),
            RAM + VIRTUAL_UNIT + 0x20_3000
        );
        // A ring cannot lie behind a key, and a name must be mapped.
        assert_eq!(
            bench.call(CallNumber::Name, [NameKind::Task.into(), VA, 4 | 8 << 32, 0]),
            abi::ERR_ARGUMENT
        );
    }
    let mut off = Bench::new(None, Notify::Ring, None, None);
    assert_eq!(off.call(CallNumber::VirtualAdd, [VA, LEN, 0, 0]), abi::ERR_MODE);
    let mut ring = Bench::ring();
    assert_eq!(ring.call(CallNumber::VirtualAdd, [VA & !0x3fff, LEN, 0, 0]), RAM);
    assert_eq!(ring.call(CallNumber::RingSetup, [VA, 128, 0, 0]), abi::ERR_ARGUMENT);
}

/// A kind, a first bad address, and an object's start and size.
type Found = (&'static str, u64, Option<(u64, u64)>);

/// The findings.
fn found(bench: &Bench) -> Vec<Found> {
    let heard = bench.heard.0.lock().unwrap();
    let object = |f: &Finding| f.object.as_ref().map(|o| (o.start, o.size));
    heard.iter().map(|f| (f.kind, f.shadow.first_bad, object(f))).collect()
}

#[test]
fn findings_there_name_the_allocation() {
    for mode in [Mode::PerPage, Mode::Full] {
        let mut bench = Bench::new(Some(mode), Notify::Sync, None, None).with_region();
        assert_eq!(bench.call(CallNumber::VirtualAdd, [VA, LEN, 0, 0]), KEY);
        let slot = Slot { bytes: 0x2000, code: VMALLOC_INVALID }.to_register();
        assert_eq!(bench.call(CallNumber::Allocated, [VA + 0x1000, 0x1ff3, 0, slot]), 0);
        let mut reports = 0;
        let mut report = |bench: &mut Bench, at, size| {
            reports += 1;
            assert_eq!(bench.call(CallNumber::Report, [at, size, 0, 0x10_0000 + reports]), 0);
        };
        // The tail of the last page, the guard page behind it, both from inside, and the end of
        // all.
        report(&mut bench, VA + 0x2ff3, 1);
        report(&mut bench, VA + 0x3000, 8);
        report(&mut bench, VA + 0x2000, 0x2000);
        report(&mut bench, VA + LEN - 4, 8);
        report(&mut bench, VA + LEN, 1);
        assert_eq!(bench.call(CallNumber::Freed, [VA + 0x1000, 0, 0, slot]), 0);
        report(&mut bench, VA + 0x1010, 1);
        let object = Some((VA + 0x1000, 0x1ff3));
        assert_eq!(
            found(&bench),
            [
                ("vmalloc-out-of-bounds", VA + 0x2ff3, object),
                ("vmalloc-out-of-bounds", VA + 0x3000, object),
                ("vmalloc-out-of-bounds", VA + 0x2ff3, object),
                ("vmalloc-out-of-bounds", VA + LEN - 4, None),
                ("wild-memory-access", VA + LEN, None),
                ("vmalloc-out-of-bounds", VA + 0x1010, object),
            ],
            "{mode:?}"
        );
        let heard = bench.heard.0.lock().unwrap();
        assert!(heard[0].freed.is_none() && heard[5].freed.is_some());
    }
}

/// The code of unallocated virtual memory is that of a variable out of scope. It is the latter
/// where there is a stack frame.
#[test]
fn a_stack_there_has_variables_out_of_scope() {
    for mode in [Mode::PerPage, Mode::Full] {
        for (guarded, kind) in [(false, "use-after-scope"), (true, "vmalloc-out-of-bounds")] {
            let mut bench = Bench::new(Some(mode), Notify::Sync, None, None);
            // Without paging the frame is read where the guest's RAM is, so that is where this
            // guest has it.
            const STACK: u64 = 0x4_8000;
            assert_eq!(bench.call(CallNumber::VirtualAdd, [0, LEN, 0, 0]), RAM);
            let magic = umbra_report::frame::FRAME_MAGIC;
            for (at, word) in [(0, magic), (8, 0x100), (16, 0x10_0000)] {
                bench.ram.write(GuestAddress(STACK + 0x1000 + at), &word.to_le_bytes()).unwrap();
            }
            bench.ram.write(GuestAddress(0x100), b"1 32 8 4 gone\0").unwrap();
            assert_eq!(
                bench.call(CallNumber::Unpoison, [STACK, 0x4000, MemoryUse::Stack.into(), 0]),
                0
            );
            for (at, code) in
                [(0x1000, STACK_LEFT), (0x1020, VMALLOC_INVALID), (0x1040, STACK_RIGHT)]
            {
                assert_eq!(bench.call(CallNumber::Poison, [STACK + at, 32, code.into(), 0]), 0);
            }
            let mut at = STACK + 0x1020;
            if guarded {
                // Behind the stack and a page that belongs to nobody.
                assert_eq!(
                    bench.call(
                        CallNumber::Poison,
                        [STACK + 0x2000, 0x1000, VMALLOC_INVALID.into(), 0]
                    ),
                    0
                );
                at = STACK + 0x3010;
                assert_eq!(
                    bench.call(CallNumber::Poison, [at, 0x18, VMALLOC_INVALID.into(), 0]),
                    0
                );
            }
            assert_eq!(bench.call(CallNumber::Report, [at, 8, 0, 0x10_0000]), 0);
            assert_eq!(bench.kinds(), [kind], "{mode:?}");
            let heard = bench.heard.0.lock().unwrap();
            let names = heard[0].stack_frame.as_ref().map(|f| f.variables[0].name.clone());
            assert_eq!(names.as_deref(), (!guarded).then_some("gone"), "{mode:?}");
        }
    }
}
