//! What the guest sees through `cpuid`: what KVM supports, a few bits changed, and the caller's leaves.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
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

const LEAF1_ECX_CX16: u32 = 1 << 13;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_APIC: u32 = 1 << 9;

/// Builds the table for vCPU `id` from what KVM supports.
pub fn table(supported: &CpuId, extra: &[CpuidLeaf], irqchip: bool, id: u8) -> Result<CpuId, CpuidError> {
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => {
                // The APIC id tells a kernel's CPUs apart.
                entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24;
                // A guest shall look for hypervisor leaves.
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                // KVM's instruction emulator has no cmpxchg16b, and a host that emulates ring 0 stops at it.
                entry.ecx &= !LEAF1_ECX_CX16;
                if !irqchip {
                    // Without the in-kernel interrupt controller there is no local APIC,
                    entry.edx &= !LEAF1_EDX_APIC;
                    // nor its newer interface,
                    entry.ecx &= !LEAF1_ECX_X2APIC;
                    // nor its timer.
                    entry.ecx &= !LEAF1_ECX_TSC_DEADLINE;
                }
            }
            // The x2APIC id, in both topology leaves.
            0xb | 0x1f => entry.edx = u32::from(id),
            _ => {}
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

/// Where `got` has other values than `wanted`, as "leaf 0x1.0 ecx 0x2000", for the log. Hosts that run the
/// guest's user mode natively bring back bits that were cleared.
pub fn differences(wanted: &CpuId, got: &CpuId) -> Vec<String> {
    let mut found = Vec::new();
    for want in wanted.as_slice() {
        let Some(have) = got.as_slice().iter().find(|e| e.function == want.function && e.index == want.index)
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
        let leaf = |function, ecx, edx| kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() };
        CpuId::from_entries(&[leaf(1, !0, !0), leaf(0xb, 0, 0), leaf(0x4000_0000, 0, 0)]).unwrap()
    }

    #[test]
    fn bits_and_leaves() {
        let extra = [CpuidLeaf { function: 0x4000_0100, eax: 1, ebx: 2, ecx: 3, edx: 4 }];
        let table = super::table(&supported(), &extra, false, 5).unwrap();
        let find = |f| *table.as_slice().iter().find(|e| e.function == f).unwrap();
        assert_eq!(find(1).ebx >> 24, 5);
        assert_eq!(find(1).ecx & (LEAF1_ECX_CX16 | LEAF1_ECX_X2APIC), 0);
        assert_eq!(find(1).edx & LEAF1_EDX_APIC, 0);
        assert_eq!(find(0xb).edx, 5);
        assert_eq!((find(0x4000_0100).eax, find(0x4000_0100).edx), (1, 4));
        let with_chip = super::table(&supported(), &[], true, 0).unwrap();
        assert_ne!(with_chip.as_slice()[0].edx & LEAF1_EDX_APIC, 0);
    }

    #[test]
    fn a_leaf_of_kvm_is_not_replaced() {
        let extra = [CpuidLeaf { function: 0x4000_0000, ..Default::default() }];
        assert_eq!(table(&supported(), &extra, false, 0).unwrap_err(), CpuidError::Taken(0x4000_0000));
        let many: Vec<_> =
            (0..300).map(|i| CpuidLeaf { function: 0x4000_0100 + i, ..Default::default() }).collect();
        assert_eq!(table(&supported(), &many, false, 0).unwrap_err(), CpuidError::TooMany(303));
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
