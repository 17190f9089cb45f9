//! The guest's CPUID table: KVM's supported leaves with some changed bits, and the caller's leaves.

use std::arch::x86_64::__cpuid;
use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use thiserror::Error;

/// One CPUID leaf of the caller's own, without sub-leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// The leaf: `eax` before the instruction.
    pub function: u32,
    /// `eax` after it.
    pub eax: u32,
    /// `ebx` after it.
    pub ebx: u32,
    /// `ecx` after it.
    pub ecx: u32,
    /// `edx` after it.
    pub edx: u32,
}

/// Why there is no CPUID table.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CpuidError {
    #[error("CPUID leaf {0:#x} is KVM's own")]
    Taken(u32),
    #[error("{0} CPUID leaves are more than KVM takes ({KVM_MAX_CPUID_ENTRIES})")]
    TooMany(usize),
}

/// Virtualisation inside of the guest, Intel's and AMD's. Both are large interfaces of KVM that no
/// kernel under test needs, and with them come their model-specific registers (`IA32_VMX_*`,
/// `EFER.SVME`, `VM_HSAVE_PA`), which KVM has only for a guest that is told of the feature.
const LEAF1_ECX_VMX: u32 = 1 << 5;
const EXTENDED_ECX_SVM: u32 = 1 << 2;
/// AMD's leaves of what SVM can do, and of encrypted guests.
const SVM_FEATURES: u32 = 0x8000_000a;
const ENCRYPTION_FEATURES: u32 = 0x8000_001f;
const LEAF1_ECX_CX16: u32 = 1 << 13;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_APIC: u32 = 1 << 9;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// KVM's own features (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// The ones that are kept: its clock, which needs no calibration; that ports need no delay; and
/// that the end of an interrupt needs no exit. The others are hypercalls, which never return on a
/// host that emulates ring 0 (such as `KVM_FEATURE_PV_SEND_IPI` and `PV_UNHALT`, without which
/// Linux uses its local APIC), or are for a host that swaps guests out.
const KVM_FEATURES_KEPT: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 24;

/// The CPU of a table, and the number of all CPUs. They are the cores of one package, one thread
/// each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTopology {
    /// Its APIC id: 0 to `cpus` - 1.
    pub id: u8,
    /// CPUs of the machine, at least 1.
    pub cpus: u8,
}

impl CpuTopology {
    /// Bits of the APIC id that number the cores of a package.
    fn core_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}

/// Adds the timer that waits for a value of the time-stamp counter to what KVM supports: KVM tells
/// of it by a capability, and leaves this bit to the VMM (Linux, Documentation/virt/kvm/api.rst,
/// 4.46).
pub(super) fn add_tsc_deadline(supported: &mut CpuId) {
    for entry in supported.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
    }
}

/// Builds the table for a vCPU from what KVM supports.
///
/// # Errors
/// A leaf of `extra` is KVM's own, or there are too many.
pub fn table(
    supported: &CpuId,
    extra: &[CpuidLeaf],
    irqchip: bool,
    place: CpuTopology,
) -> Result<CpuId, CpuidError> {
    const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
    let mut entries = Vec::new();
    for entry in supported.as_slice() {
        if !TOPOLOGY.contains(&entry.function) {
            entries.push(changed(*entry, irqchip, place));
        }
    }
    // The host's topology leaves describe its own CPU, or are empty.
    for leaf in TOPOLOGY {
        if supported.as_slice().iter().any(|e| e.function == leaf) {
            entries.extend(topology(leaf, place));
        }
    }
    for leaf in extra {
        if entries.iter().any(|e| e.function == leaf.function) {
            return Err(CpuidError::Taken(leaf.function));
        }
        entries.push(kvm_cpuid_entry2 {
            function: leaf.function,
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany(entries.len()))
}

/// An entry of KVM's, as the guest sees it.
fn changed(mut entry: kvm_cpuid_entry2, irqchip: bool, place: CpuTopology) -> kvm_cpuid_entry2 {
    let (id, cpus) = (u32::from(place.id), u32::from(place.cpus));
    let ids = 1 << place.core_bits();
    match entry.function {
        1 => {
            // The CPU's APIC id, and in bits 16..24 the number of ids in the package.
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | ids << 16;
            // Those bits count, if there is more than one.
            entry.edx &= !LEAF1_EDX_HTT;
            if cpus > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
            // Makes a guest look for hypervisor leaves.
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            // KVM's instruction emulator has no cmpxchg16b: on a host that emulates ring 0 each is
            // an exit.
            entry.ecx &= !LEAF1_ECX_CX16;
            entry.ecx &= !LEAF1_ECX_VMX;
            if !irqchip {
                // Without the in-kernel interrupt controller there is no local APIC,
                entry.edx &= !LEAF1_EDX_APIC;
                // nor its newer interface,
                entry.ecx &= !LEAF1_ECX_X2APIC;
                // nor its timer.
                entry.ecx &= !LEAF1_ECX_TSC_DEADLINE;
            }
        }
        // Intel's caches: the APIC ids that share each (the last level: all), and the cores of the
        // package.
        4 if entry.eax & 0x1f != 0 => {
            let shared = if entry.eax >> 5 & 7 >= 3 { ids } else { 1 };
            entry.eax = entry.eax & 0x3fff | (shared - 1) << 14 | (ids - 1) << 26;
        }
        0x8000_0001 => entry.ecx &= !EXTENDED_ECX_SVM,
        SVM_FEATURES | ENCRYPTION_FEATURES => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        KVM_FEATURES => entry.eax &= KVM_FEATURES_KEPT,
        // AMD's number of cores, and the bits of the APIC id for them; reserved on Intel's.
        0x8000_0008 if entry.ecx != 0 => entry.ecx = (cpus - 1) | place.core_bits() << 12,
        // AMD's APIC id, core (with one thread), and node (the only one).
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
    entry
}

/// The levels of a topology leaf: one thread in each core, and all cores in one package (Intel SDM
/// volume 2, CPUID leaf 0BH: level types 1 and 2).
fn topology(function: u32, place: CpuTopology) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let levels = [
        (0, 0, 1, 1 << 8),
        (1, place.core_bits(), place.cpus.into(), 2 << 8 | 1),
        (2, 0, 0, 2), // no further level
    ];
    levels.into_iter().map(move |(index, eax, ebx, ecx)| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: place.id.into(),
        ..Default::default()
    })
}

/// Whether KVM may emulate a guest's ring 0 here: the CPU has neither VMX nor SVM, or the kernel
/// has the KVM that needs none (`kvm_pvm`). It takes no guest to find out, as
/// [`emulates_ring0`](super::stats::emulates_ring0) does.
pub fn may_emulate_ring0() -> bool {
    !has_virtualisation() || Path::new("/sys/module/kvm_pvm").exists()
}

/// Whether this CPU has VMX or SVM.
fn has_virtualisation() -> bool {
    __cpuid(1).ecx & LEAF1_ECX_VMX != 0
        || __cpuid(0x8000_0000).eax > 0x8000_0000
            && __cpuid(0x8000_0001).ecx & EXTENDED_ECX_SVM != 0
}

/// The bits in which `got` differs from `wanted`, as "leaf 0x1.0 ecx 0x2000", for the log. Hosts
/// that run the guest's user mode natively bring back bits that were cleared.
pub fn differences(wanted: &CpuId, got: &CpuId) -> Vec<String> {
    let mut found = Vec::new();
    for want in wanted.as_slice() {
        let Some(have) =
            got.as_slice().iter().find(|e| e.function == want.function && e.index == want.index)
        else {
            found.push(format!("leaf {:#x}.{} is missing", want.function, want.index));
            continue;
        };
        for (name, a, b) in [
            ("eax", want.eax, have.eax),
            ("ebx", want.ebx, have.ebx),
            ("ecx", want.ecx, have.ecx),
            ("edx", want.edx, have.edx),
        ] {
            if a != b {
                found.push(format!("leaf {:#x}.{} {name} {:#x}", want.function, want.index, a ^ b));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf =
            |function, ecx, edx| kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() };
        let kvm = kvm_cpuid_entry2 { function: KVM_FEATURES, eax: !0, ..Default::default() };
        CpuId::from_entries(&[leaf(1, !0, !0), leaf(0xb, 0, 0), leaf(0x4000_0000, 0, 0), kvm])
            .unwrap()
    }

    const ALONE: CpuTopology = CpuTopology { id: 0, cpus: 1 };

    #[test]
    fn bits_and_leaves() {
        let extra = [CpuidLeaf { function: 0x4000_0100, eax: 1, ebx: 2, ecx: 3, edx: 4 }];
        let table = super::table(&supported(), &extra, false, ALONE).unwrap();
        let find = |f| *table.as_slice().iter().find(|e| e.function == f).unwrap();
        assert_eq!(find(1).ecx & (LEAF1_ECX_CX16 | LEAF1_ECX_X2APIC), 0);
        assert_eq!(find(1).edx & (LEAF1_EDX_APIC | LEAF1_EDX_HTT), 0);
        assert_eq!((find(0x4000_0100).eax, find(0x4000_0100).edx), (1, 4));
        assert_eq!(find(KVM_FEATURES).eax, KVM_FEATURES_KEPT);
        assert_eq!(find(1).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        let with_chip = super::table(&supported(), &[], true, ALONE).unwrap();
        assert_ne!(with_chip.as_slice()[0].edx & LEAF1_EDX_APIC, 0);
    }

    #[test]
    fn no_guest_is_offered_virtualisation() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let leaves = [1, 0x8000_0001, SVM_FEATURES, ENCRYPTION_FEATURES].map(all);
        let supported = CpuId::from_entries(&leaves).unwrap();
        let table = super::table(&supported, &[], true, ALONE).unwrap();
        let leaf = |i: usize| table.as_slice()[i];
        assert_eq!(leaf(0).ecx, !(LEAF1_ECX_VMX | LEAF1_ECX_CX16));
        assert_eq!((leaf(1).ecx, leaf(1).edx), (!EXTENDED_ECX_SVM, !0));
        for i in [2, 3] {
            let leaf = leaf(i);
            assert_eq!((leaf.eax, leaf.ebx, leaf.ecx, leaf.edx), (0, 0, 0, 0));
        }
    }

    #[test]
    fn the_deadline_timer_comes_with_the_interrupt_controllers() {
        let mut supported = supported();
        supported.as_mut_slice()[0].ecx = 0;
        let has = |supported: &CpuId, irqchip| {
            let table = super::table(supported, &[], irqchip, ALONE).unwrap();
            table.as_slice()[0].ecx & LEAF1_ECX_TSC_DEADLINE != 0
        };
        assert!(!has(&supported, true), "KVM does not have it");
        add_tsc_deadline(&mut supported);
        assert!(has(&supported, true) && !has(&supported, false));
        assert_eq!(supported.as_slice()[1].ecx, 0, "no other leaf");
    }

    #[test]
    fn every_cpu_is_a_core_with_an_id() {
        let table = super::table(&supported(), &[], true, CpuTopology { id: 5, cpus: 6 }).unwrap();
        let find =
            |f, i| *table.as_slice().iter().find(|e| (e.function, e.index) == (f, i)).unwrap();
        assert_eq!((find(1, 0).ebx >> 24, find(1, 0).ebx >> 16 & 0xff), (5, 8));
        assert_ne!(find(1, 0).edx & LEAF1_EDX_HTT, 0);
        // A core's bits are those above a thread's, a package's those above the cores'.
        assert_eq!((find(0xb, 0).eax, find(0xb, 0).ebx), (0, 1));
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx), (3, 6));
        assert_eq!(find(0xb, 2).ebx, 0);
        assert!((0..3).all(|level| find(0xb, level).edx == 5));
        assert!(!table.as_slice().iter().any(|e| e.function == 0x1f), "only where the host has it");
    }

    #[test]
    fn a_leaf_of_kvm_is_not_replaced() {
        let extra = [CpuidLeaf { function: 0x4000_0000, ..Default::default() }];
        let taken = table(&supported(), &extra, false, ALONE).unwrap_err();
        assert_eq!(taken, CpuidError::Taken(0x4000_0000));
        let many: Vec<_> = (0..300)
            .map(|i| CpuidLeaf { function: 0x4000_0100 + i, ..Default::default() })
            .collect();
        assert_eq!(table(&supported(), &many, false, ALONE).unwrap_err(), CpuidError::TooMany(306));
    }

    #[test]
    fn differences_name_leaf_register_and_bits() {
        let a = supported();
        let mut b = supported();
        b.as_mut_slice()[0].ecx ^= LEAF1_ECX_CX16;
        assert_eq!(differences(&a, &b), ["leaf 0x1.0 ecx 0x2000"]);
        assert!(differences(&a, &a).is_empty());
    }
}
