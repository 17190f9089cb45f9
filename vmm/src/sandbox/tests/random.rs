//! Random exits.

use proptest::prelude::*;
use umbra_machine::vcpu::{Data, VmExit};
use umbra_shadow::abi::PORT;
use vm_memory::GuestAddress;

use super::RAM;
use super::bench::*;
use crate::shadow::{CHUNK_BYTES, Layout, Mode, Notify};

/// Guest-physical addresses near all limits.
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
        1 => (any::<[u8; 15]>(), any::<u8>())
            .prop_map(|(bytes, len)| VmExit::EmulationFailed { bytes, len }),
        1 => prop::sample::select(vec![
            VmExit::Hlt, VmExit::Shutdown, VmExit::Interrupted, VmExit::SystemEvent { kind: 1 },
            VmExit::FailEntry { reason: 1 }, VmExit::InternalError { suberror: 2 },
            VmExit::Unsupported { reason: 3 },
        ]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any exits with any registers: no panic, consistent figures, one-line outcomes.
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
            if let Err(outcome) = bench.exit(exit) {
                prop_assert!(!outcome.to_string().contains('\n'));
            }
        }
        let _ = bench.state.drain_all(&bench.ram);
        prop_assert_eq!(bench.exits().total, exits);
        let heard = bench.heard.0.lock().unwrap().len();
        prop_assert_eq!(bench.state.session.findings().distinct(), heard);
        if let (Some(windows), Some(limit)) = (bench.state.shadow.windows_mut(), limit) {
            prop_assert!(windows.figures().unwrap().byte_mapped_bytes <= limit);
        }
    }
}
