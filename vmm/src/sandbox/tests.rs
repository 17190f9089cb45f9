//! The dispatcher, fed with exits that no guest made, over a vCPU and memory slots that do not
//! exist.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_sregs};
use proptest::prelude::*;
use umbra_machine::complete::Cpu;
use umbra_machine::devices::{COM1, Devices};
use umbra_machine::memory::Ram;
use umbra_machine::vcpu::{Data, VcpuError, VmExit, XsaveArea};
use umbra_provenance::{Objects, Provenance, Quarantine};
use umbra_report::Finding;
use umbra_report::symbols::Symbols;
use umbra_shadow::Shadow as _;
use umbra_shadow::abi::{
    self, Access, CallNumber, ExitReason, Features, NameKind, Owner, PORT, RecordKind, Slot,
};
use umbra_shadow::codes::{PAGE_BYTES, SLAB_FREE};
use vm_memory::GuestAddress;

use super::console::ConsoleWatch;
use super::context::{ExitContext, Flow, GuestCpu, OtherVcpus};
use super::discovery::{Settings, leaves};
use super::dispatch::{Dispatcher, Parts};
use super::guest_info::GuestInfo;
use super::marks::Marks;
use super::session::Session;
use super::shadow_host::ShadowHost;
use super::watch::Watch;
use super::{Observer, Outcome, ShadowMode};
use crate::shadow::{CHUNK_BYTES, Layout, Mode, Notify, SlotError, Slots, Windows, WindowsConfig};

mod bench;
mod guest_pages;
mod keys;

use bench::*;

const RAM: u64 = 16 << 20;
/// The vCPU that makes all exits.
const CPU: u8 = 2;

#[test]
fn hello_tells_the_features_that_cpuid_tells() {
    let modes = [
        (Some(Mode::PerPage), ShadowMode::PerPage, Features::PER_PAGE),
        (Some(Mode::Full), ShadowMode::Full, Features::FULL),
        (None, ShadowMode::Off, Features::default()),
    ];
    for (mode, shadow, bit) in modes {
        for (notify, how) in [(Notify::Ring, Features::RING), (Notify::Sync, Features::SYNC)] {
            let mut bench = Bench::new(mode, notify, None, None);
            let off = bit == Features::default();
            let expected = if off { 0 } else { (bit | how).bits() };
            assert_eq!(
                bench.call(CallNumber::Hello, [abi::VERSION.into(), 0, 0, 0]),
                u64::from(expected)
            );
            assert_eq!(bench.call(CallNumber::Hello, [9, 0, 0, 0]), abi::ERR_VERSION);
            let settings =
                Settings { quarantine: 5 << 32 | 7, quarantine_batch: 9, ..Settings::default() };
            let leaves = leaves(shadow, notify, settings, &bench.layout);
            let told = if off { (0, 0, 0) } else { (9, 7, 5) };
            assert_eq!((leaves[5].eax, leaves[5].ecx, leaves[5].edx), told);
            assert_eq!((leaves[1].eax, leaves[1].ebx, leaves[1].ecx), (1, PORT.into(), expected));
            assert_eq!([leaves[0].ebx, leaves[0].ecx, leaves[0].edx], abi::CPUID_SIGNATURE);
        }
    }
}

#[test]
fn a_call_changes_rax_and_nothing_else() {
    let mut bench = Bench::ring();
    (bench.cpu.regs.rbx, bench.cpu.regs.rdx, bench.cpu.regs.rflags) = (1, 2, 3);
    assert_eq!(bench.call(99u32, [4, 5, 6, 7]), abi::ERR_CALL);
    let expected = kvm_regs {
        rax: abi::ERR_CALL,
        rbx: 1,
        rdx: 2,
        rflags: 3,
        rdi: 4,
        rsi: 5,
        rcx: 6,
        r8: 7,
        rip: 0x10_0000,
        rsp: 0x20_0000,
        ..kvm_regs::default()
    };
    assert_eq!(bench.cpu.regs, expected);
    assert_eq!((bench.exits().total, bench.exits().hypercall, bench.events().refused), (2, 2, 1));
}

#[test]
fn only_32_bits_to_the_port_are_a_call() {
    let mut bench = Bench::ring();
    for data in [&[11u8][..], &[11, 0], &[11, 0, 0, 0, 0, 0, 0, 0]] {
        goes_on(bench.exit(VmExit::IoOut { port: PORT, data: Data::new(data) }));
    }
    goes_on(bench.exit(VmExit::IoOut { port: PORT + 1, data: Data::new(&[11, 0, 0, 0]) }));
    assert_eq!((bench.exits().hypercall, bench.exits().io), (1, 4));
}

#[test]
fn calls_of_the_other_mode_are_refused() {
    let sync = [CallNumber::Poison, CallNumber::Unpoison, CallNumber::Allocated, CallNumber::Freed];
    let ring = [CallNumber::RingSetup, CallNumber::RingDrain];
    let arguments = |number| match number {
        CallNumber::RingSetup => [0x1000, 128, 0, 0],
        CallNumber::Poison => [0x1000, 8, 0xfc, 0],
        CallNumber::RingDrain => [0; 4],
        _ => [0x1000, 8, 0, 0],
    };
    for (notify, fits, others) in
        [(Notify::Ring, &ring[..], &sync[..]), (Notify::Sync, &sync, &ring)]
    {
        for mode in [Mode::PerPage, Mode::Full] {
            let mut bench = Bench::new(Some(mode), notify, None, None).with_region();
            for number in fits {
                assert_eq!(bench.call(*number, arguments(*number)), 0, "{number:?} in {notify:?}");
            }
            for number in others {
                assert_eq!(
                    bench.call(*number, arguments(*number)),
                    abi::ERR_MODE,
                    "{number:?} in {notify:?}"
                );
            }
        }
    }
    let mut off = Bench::new(None, Notify::Ring, None, None).with_region();
    for number in ring.iter().chain(&sync).chain(&[CallNumber::Report]) {
        assert_eq!(
            off.call(*number, arguments(*number)),
            abi::ERR_MODE,
            "{number:?} with shadow off"
        );
    }
}

#[test]
fn exits_of_the_guest_end_the_run() {
    let end = |arguments| ended(Bench::ring().hypercall(CallNumber::Exit, arguments));
    assert!(matches!(end([ExitReason::Done.into(), 0, 0, 0]), Outcome::Done));
    assert!(matches!(end([ExitReason::Done.into(), 1 << 63, 0, 0]), Outcome::Failed));
    assert!(matches!(end([ExitReason::Panic.into(), 0, 0, 0]), Outcome::Panic));
    let fault = end([ExitReason::Fault.into(), 14 | 2 << 32, 0xabc, 0xdef]);
    let text = fault.to_string();
    assert!(
        matches!(fault, Outcome::Fault { vector: 14, error: 2, address: 0xdef, .. }),
        "{fault:?}"
    );
    assert!(text.contains("page fault") && text.contains("rip 0xabc"), "{text}");
    assert_eq!(Bench::ring().call(CallNumber::Exit, [3, 0, 0, 0]), abi::ERR_ARGUMENT);
}

#[test]
fn sync_calls_write_the_shadow() {
    let mut bench = Bench::sync();
    assert_eq!(bench.call(CallNumber::Poison, [0x3000, 0x1008, SLAB_FREE.into(), 0]), 0);
    let bad = |bench: &Bench, at| bench.state.shadow.model().unwrap().first_bad(at, 1).is_some();
    assert_eq!(
        [0x2fff, 0x3000, 0x4007, 0x4008].map(|at| bad(&bench, at)),
        [false, true, true, false]
    );
    assert_eq!(bench.call(CallNumber::Unpoison, [0x3000, 5, 0, 0]), 0);
    assert_eq!([0x3000, 0x3004, 0x3005].map(|at| bad(&bench, at)), [false, false, true]);
    for (va, len) in [(RAM, 1), (RAM - 8, 9), (u64::MAX, 1), (0, RAM + 1)] {
        assert_eq!(
            bench.call(CallNumber::Poison, [va, len, SLAB_FREE.into(), 0]),
            abi::ERR_ARGUMENT,
            "{va:#x}+{len:#x}"
        );
    }
}

#[test]
fn one_call_allocates_and_one_frees() {
    let mut bench = Bench::sync();
    let state = |bench: &Bench, at| bench.state.shadow.model().map(|model| model.state(at));
    assert_eq!(bench.call(CallNumber::Poison, [0x5000, 4096, 0xff, 0]), 0);
    assert_eq!(
        bench.call(
            CallNumber::Allocated,
            [0x5000, 50, 0, Slot { bytes: 64, code: 0xfc }.to_register()]
        ),
        0
    );
    let states: Vec<_> = [0x5000, 0x5030, 0x5038, 0x5040].map(|at| state(&bench, at)).into();
    assert_eq!(states, [Some(0), Some(2), Some(0xfc), Some(0xff)]);
    assert_eq!(
        bench.call(CallNumber::Freed, [0x5000, 0, 0, Slot { bytes: 64, code: 0xfb }.to_register()]),
        0
    );
    let states: Vec<_> = [0x5000, 0x5030, 0x5038, 0x5040].map(|at| state(&bench, at)).into();
    assert_eq!(states, [Some(0xfb), Some(0xfb), Some(0xfb), Some(0xff)]);
    assert_eq!((bench.events().allocations, bench.events().frees), (1, 1));
    // Past the end of memory nothing changes and nothing is counted.
    let end = bench.ram.end() - 64;
    assert_eq!(
        bench.call(
            CallNumber::Allocated,
            [end, 50, 0, Slot { bytes: 128, code: 0xfc }.to_register()]
        ),
        abi::ERR_ARGUMENT
    );
    assert_eq!(
        bench.call(CallNumber::Freed, [end, 0, 0, Slot { bytes: 128, code: 0xfc }.to_register()]),
        abi::ERR_ARGUMENT
    );
    assert_eq!((bench.events().allocations, bench.events().frees), (1, 1));
}

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
        bytes[24..24 + name.len()].copy_from_slice(name);
        bench.ram.write(GuestAddress(at), &bytes).unwrap();
    };
    write(0x8040, RecordKind::Cache, 7, 0, b"my\ncache");
    write(0x8080, RecordKind::Allocated, 0, 0x6000, &[]);
    // Longer than there is room for.
    write(0x80c0, RecordKind::Cache, 41, 0, &[b'x'; 40]);
    bench.ram.write(GuestAddress(0x8000), &3u64.to_le_bytes()).unwrap();
    assert_eq!(bench.call(CallNumber::Report, [0x6008, 1, 0, 0x100]), 0);
    let object = bench.heard.0.lock().unwrap()[0].object.clone().unwrap();
    assert_eq!((object.start, object.cache.as_deref()), (0x6000, Some("my?cach")));
    assert_eq!((bench.events().allocations, bench.events().refused), (1, 1));
}

#[test]
fn the_first_touch_of_a_chunk_maps_it() {
    let mut bench = Bench::ring();
    let at = bench.layout.byte.gpa + CHUNK_BYTES + 5;
    assert_eq!(bench.slots.slots.len(), 1, "the page window");
    let (flow, value) = bench.read(at, 8);
    goes_on(flow);
    assert_eq!(value.as_deref(), Some(&[0; 8][..]));
    assert_eq!(bench.slots.slots[1], Some((at - 5, CHUNK_BYTES, false)));
    goes_on(bench.write(at, &[1, 2, 3]));
    assert_eq!(bench.read(at, 4).1.as_deref(), Some(&[1, 2, 3, 0][..]));
    assert_eq!((bench.exits().shadow_fault, bench.exits().mmio), (1, 0));
    // Across the end of a chunk: both.
    goes_on(bench.write(bench.layout.byte.gpa + 3 * CHUNK_BYTES - 4, &[9; 8]));
    assert_eq!(bench.slots.slots.len(), 4);
}

#[test]
fn outside_of_the_windows_there_is_nothing() {
    let mut bench = Bench::ring();
    let (page, byte) = (bench.layout.page, bench.layout.byte);
    for at in [0xd000_0000, page.gpa - 1, page.end(), byte.gpa - 1, byte.end(), u64::MAX] {
        let (flow, value) = bench.read(at, 1);
        goes_on(flow);
        assert_eq!(value.as_deref(), Some(&[0xff][..]), "{at:#x}");
        goes_on(bench.write(at, &[1]));
    }
    assert_eq!(bench.exits().mmio, 12);
    // Half in a window: all ones, no effect, no slot.
    for at in [page.end() - 4, byte.end() - 4] {
        let (flow, value) = bench.read(at, 8);
        goes_on(flow);
        assert_eq!(value.as_deref(), Some(&[0xff; 8][..]));
        goes_on(bench.write(at, &[1; 8]));
    }
    assert_eq!(bench.slots.slots.len(), 1);
    // With the shadow off, nothing is there either.
    let mut off = Bench::new(None, Notify::Ring, None, None);
    assert_eq!(off.read(page.gpa, 8).1.as_deref(), Some(&[0xff; 8][..]));
    assert_eq!(off.exits().mmio, 1);
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
fn the_shadow_limit_ends_the_run() {
    let mut bench =
        Bench::new(Some(Mode::PerPage), Notify::Ring, Some(CHUNK_BYTES), None).with_region();
    let byte = bench.layout.byte.gpa;
    // The chunk's first page is byte-checked, so it stays.
    goes_on(bench.write(bench.layout.page.gpa, &[PAGE_BYTES]));
    goes_on(bench.write(byte, &[1]));
    for flow in [bench.write(byte + CHUNK_BYTES, &[1]), bench.read(byte + CHUNK_BYTES, 1).0] {
        let outcome = ended(flow);
        assert!(matches!(outcome, Outcome::ShadowLimit(_)), "{outcome:?}");
        assert_eq!((outcome.word(), outcome.status(true)), ("shadow-limit", 2));
    }
    let memory_fault =
        VmExit::MemoryFault { gpa: GuestAddress(byte + CHUNK_BYTES), size: 4096, flags: 0 };
    assert!(matches!(ended(bench.exit(memory_fault)), Outcome::ShadowLimit(_)));
    assert_eq!(bench.others.stops, 3, "the last look was taken while nothing changed");
    let mut sync = Bench::new(Some(Mode::PerPage), Notify::Sync, Some(0), None).with_region();
    let flow = sync.hypercall(CallNumber::Poison, [8, 8, SLAB_FREE.into(), 0]);
    assert!(matches!(ended(flow), Outcome::ShadowLimit(_)));
}

#[test]
fn a_host_without_slots_ends_the_run() {
    let mut bench = Bench::ring();
    bench.slots.refuse = true;
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

#[test]
fn reset_ports_end_the_run() {
    for (port, data, word) in
        [(0x64, &[0xfe][..], "reset"), (0xcf9, &[6], "reset"), (0x604, &[0, 0x20], "power-off")]
    {
        let outcome = ended(Bench::ring().exit(VmExit::IoOut { port, data: Data::new(data) }));
        assert_eq!((outcome.word(), outcome.status(false)), (word, 0), "{outcome:?}");
    }
    for (port, data) in [(0x64, &[0xf0][..]), (0xcf9, &[2]), (0x604, &[0, 0x10])] {
        goes_on(Bench::ring().exit(VmExit::IoOut { port, data: Data::new(data) }));
    }
}

/// Prints a line on the console. Returns what the last exit of it came to.
fn prints(bench: &mut Bench, line: &str) -> Flow {
    let byte = |byte: u8| VmExit::IoOut { port: COM1, data: Data::new(&[byte]) };
    for b in line.bytes() {
        goes_on(bench.exit(byte(b)));
    }
    bench.exit(byte(b'\n'))
}

#[test]
fn a_linux_console_tells_how_the_run_ends() {
    let linux =
        || Bench::with(Mode::PerPage, Notify::Ring, Quarantine::new(0, 1), true).with_region();
    assert_eq!(ended(prints(&mut linux(), "[    1.0] reboot: Power down\r")).word(), "power-off");
    assert_eq!(ended(prints(&mut linux(), "reboot: System halted")).status(false), 0);
    goes_on(prints(&mut linux(), "reboot: Restarting system"));

    let mut bench = linux();
    goes_on(prints(&mut bench, "[    1.0] Kernel panic - not syncing: why"));
    for end in [Outcome::Reset, Outcome::TimeLimit(Duration::from_secs(1)), Outcome::Halted] {
        let outcome = bench.state.watch().correct(end);
        assert_eq!((outcome.word(), outcome.status(false)), ("panic", 3));
        assert_eq!(outcome.to_string(), "the guest panicked: why");
    }
    assert_eq!(bench.state.watch().correct(Outcome::Interrupted).word(), "interrupted");
    let end = ended(prints(&mut bench, "[    1.0] ---[ end Kernel panic - not syncing: why ]---"));
    assert_eq!(bench.state.watch().correct(end).to_string(), "the guest panicked: why");

    let halted = || Outcome::HaltedForGood { place: "rip 0x0".into() };
    assert_eq!(linux().state.watch().correct(halted()).status(false), 3);
    assert_eq!(Bench::ring().state.watch().correct(halted()).word(), "halted");
    goes_on(prints(&mut Bench::ring(), "reboot: Power down"));
}

#[test]
fn port_reads_are_answered() {
    let mut bench = Bench::ring();
    for (port, len, expected) in
        [(0x1234, 4, vec![0xff; 4]), (0x64, 1, vec![0]), (0xfff0, 255, vec![0xff; 8])]
    {
        goes_on(bench.exit(VmExit::IoIn { port, len }));
        assert_eq!(bench.cpu.read.take(), Some(expected));
    }
    assert_eq!(bench.exits().io, 3);
}

#[test]
fn known_instructions_are_completed_and_others_end_the_run() {
    let mut bench = Bench::ring();
    let failed = |bytes: &[u8]| {
        let mut padded = [0; 15];
        padded[..bytes.len()].copy_from_slice(bytes);
        VmExit::EmulationFailed { bytes: padded, len: bytes.len() as u8 }
    };
    bench.cpu.regs.rcx = 0xff;
    goes_on(bench.exit(failed(&[0xf3, 0x48, 0x0f, 0xb8, 0xc1]))); // popcnt rax, rcx
    assert_eq!((bench.cpu.regs.rax, bench.cpu.regs.rip), (8, 0x10_0005));
    goes_on(bench.exit(failed(&[0xcc])));
    assert_eq!(bench.cpu.injected, [3]);
    assert_eq!(bench.exits().completed.get("popcnt"), Some(&1));
    let outcome = ended(bench.exit(failed(&[0x0f, 0xa2])));
    assert!(matches!(outcome, Outcome::Instruction { .. }), "{outcome:?}");
    let text = outcome.to_string();
    assert!(text.contains("cpuid (0f a2) at rip 0x100006"), "{text}");
    // The bytes are read from memory if KVM gave none; that may be impossible.
    bench.cpu.regs.rip = 0xffff_0000_0000;
    let outcome = ended(bench.exit(failed(&[])));
    assert_eq!(outcome.word(), "unknown-instruction");
    // A length beyond the array.
    let long = VmExit::EmulationFailed { bytes: [0x90; 15], len: 255 };
    bench.cpu.regs.rip = 0;
    bench.exit(long);
}

#[test]
fn every_other_exit_has_an_outcome() {
    let end = |exit| {
        let outcome = ended(Bench::ring().exit(exit));
        (outcome.word(), outcome.status(true), outcome.to_string())
    };
    assert_eq!(end(VmExit::Hlt).0, "halted");
    let (word, status, text) = end(VmExit::Shutdown);
    assert_eq!((word, status), ("triple-fault", 3));
    assert!(text.contains("rip 0x100000"), "{text}");
    assert_eq!(end(VmExit::SystemEvent { kind: 2 }).0, "reset");
    for (exit, part) in [
        (VmExit::FailEntry { reason: 0x8000_0021 }, "0x80000021"),
        (VmExit::InternalError { suberror: 3 }, "internal error 3"),
        (VmExit::Unsupported { reason: 44 }, "exit 44"),
    ] {
        let (word, status, text) = end(exit);
        assert_eq!((word, status), ("stuck", 3));
        assert!(text.contains(part) && text.contains("rip 0x100000"), "{text}");
    }
    goes_on(Bench::ring().exit(VmExit::Interrupted));
}

#[test]
fn what_waits_is_fetched_when_it_is_due() {
    let quarantine = Quarantine::new(64 << 10, 1);
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
    // A free that does not wait says nothing of what is due.
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

#[test]
fn a_vcpu_that_fails_is_a_host_error() {
    let mut bench = Bench::sync();
    bench.cpu.broken = true;
    let byte = bench.layout.byte.gpa;
    for flow in [
        bench.hypercall(CallNumber::Hello, [1, 0, 0, 0]),
        bench.write(byte, &[1]),
        bench.exit(VmExit::EmulationFailed { bytes: [0xcc; 15], len: 1 }),
    ] {
        let outcome = ended(flow);
        assert!(matches!(outcome, Outcome::Host(_)), "{outcome:?}");
    }
    // Where only a message would name the place, the outcome stays what it is.
    assert!(matches!(ended(bench.exit(VmExit::Shutdown)), Outcome::TripleFault { .. }));
}

/// Guest-physical addresses near everything there is.
fn addresses() -> impl Strategy<Value = u64> {
    let layout = Layout::new(RAM).unwrap();
    let edges = [
        0,
        RAM,
        layout.page.gpa,
        layout.page.end(),
        layout.byte.gpa,
        layout.byte.end(),
        1 << 47,
        1 << 63,
    ];
    prop_oneof![
        any::<u64>(),
        (prop::sample::select(edges.to_vec()), -9..10i64)
            .prop_map(|(at, more)| at.wrapping_add_signed(more)),
        (0..layout.byte.bytes).prop_map(move |at| layout.byte.gpa + at),
        0..RAM,
    ]
}

fn exits() -> impl Strategy<Value = VmExit> {
    let data = prop::collection::vec(any::<u8>(), 0..9).prop_map(|bytes| Data::new(&bytes));
    let call = (0..17u32).prop_map(|number| Data::new(&number.to_le_bytes()));
    let gpa = || addresses().prop_map(GuestAddress);
    prop_oneof![
        8 => call.prop_map(|data| VmExit::IoOut { port: PORT, data }),
        1 => (any::<u16>(), data.clone()).prop_map(|(port, data)| VmExit::IoOut { port, data }),
        1 => (any::<u16>(), any::<u8>()).prop_map(|(port, len)| VmExit::IoIn { port, len }),
        3 => (gpa(), any::<u8>()).prop_map(|(gpa, len)| VmExit::MmioRead { gpa, len }),
        3 => (gpa(), data).prop_map(|(gpa, data)| VmExit::MmioWrite { gpa, data }),
        1 => (gpa(), addresses(), any::<u64>())
            .prop_map(|(gpa, size, flags)| VmExit::MemoryFault { gpa, size, flags }),
        1 => (any::<[u8; 15]>(), any::<u8>()).prop_map(|(bytes, len)| VmExit::EmulationFailed { bytes, len }),
        1 => prop::sample::select(vec![
            VmExit::Hlt, VmExit::Shutdown, VmExit::Interrupted, VmExit::SystemEvent { kind: 1 },
            VmExit::FailEntry { reason: 1 }, VmExit::InternalError { suberror: 2 },
            VmExit::Unsupported { reason: 3 },
        ]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever exits come with whatever registers: no panic, figures that fit, one-line outcomes.
    #[test]
    fn random_exits_never_panic(
        mode in prop::sample::select(vec![None, Some(Mode::PerPage), Some(Mode::Full)]),
        sync in any::<bool>(),
        limit in prop::sample::select(vec![None, Some(0), Some(CHUNK_BYTES)]),
        steps in prop::collection::vec((exits(), prop::array::uniform5(addresses())), 1..60),
    ) {
        let notify = if sync { Notify::Sync } else { Notify::Ring };
        let limit = limit.filter(|_| mode != Some(Mode::Full));
        let mut bench = Bench::new(mode, notify, limit, None).with_region();
        let mut exits = 1;
        for (exit, [rdi, rsi, rcx, r8, rbp]) in steps {
            (bench.cpu.regs.rdi, bench.cpu.regs.rsi, bench.cpu.regs.rcx) = (rdi, rsi, rcx);
            (bench.cpu.regs.r8, bench.cpu.regs.rbp) = (r8, rbp);
            exits += 1;
            if let Flow::End(outcome) = bench.exit(exit) {
                prop_assert!(!outcome.to_string().contains('\n'));
            }
        }
        bench.state.drain_all(&bench.ram);
        prop_assert_eq!(bench.exits().total, exits);
        let heard = bench.heard.0.lock().unwrap().len();
        prop_assert_eq!(bench.state.session.findings().distinct(), heard);
        if let (Some(windows), Some(limit)) = (bench.state.shadow.windows_mut(), limit) {
            prop_assert!(windows.figures().unwrap().byte_mapped_bytes <= limit);
        }
    }
}
