//! The MP table: CPUs and interrupt lines, by the Intel MultiProcessor Specification 1.4 (document
//! 242016-006). A kernel without ACPI looks for its *floating pointer* in a few ranges of low
//! memory.

use kvm_bindings::CpuId;
use vm_memory::GuestAddress;

use super::irqchip::{CASCADE, io_apic_pin};
use super::layout;
use super::memory::{NotRam, Ram};

/// "Version 1.4 of the specification", in both structures.
const SPEC_REVISION: u8 = 4;
/// Version of KVM's local APIC: an integrated one.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// Version of KVM's I/O APIC.
const IO_APIC_VERSION: u8 = 0x11;
/// The only bus: ISA, number 0.
const ISA: u8 = 0;
/// ISA's interrupt lines.
const ISA_IRQS: u8 = 16;
/// Interrupt types (table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// A local interrupt that goes to all CPUs.
const ALL_CPUS: u8 = 0xff;

/// The checksum: all bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// The configuration table (section 4.2) for CPUs with the local APIC ids 0 to `cpus` - 1, of which
/// 0 boots. `signature` and `features` are `eax` and `edx` of CPUID leaf 1.
fn configuration(cpus: u8, signature: u32, features: u32) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..cpus {
        // Enabled; the first is the one that boots (4.3.1).
        let flags = if id == 0 { 3 } else { 1 };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[0, id, LOCAL_APIC_VERSION, flags]);
        entry[4..8].copy_from_slice(&signature.to_le_bytes());
        entry[8..12].copy_from_slice(&features.to_le_bytes());
        add(&entry);
    }
    add(&[1, ISA, b'I', b'S', b'A', b' ', b' ', b' ']); // 4.3.2
    // An id that no CPU has (4.3.3).
    let io_apic = cpus;
    let [a, b, c, d] = layout::IO_APIC.to_le_bytes();
    add(&[2, io_apic, IO_APIC_VERSION, 1, a, b, c, d]);
    // 4.3.4. Polarity and trigger are the bus' own.
    for irq in (0..ISA_IRQS).filter(|irq| *irq != CASCADE) {
        add(&[3, INT, 0, 0, ISA, irq, io_apic, io_apic_pin(irq)]);
    }
    // The old interrupt controllers are at the first CPU's pin 0, NMI is at pin 1 of all (4.3.5).
    add(&[4, EXT_INT, 0, 0, ISA, 0, 0, 0]);
    add(&[4, NMI, 0, 0, ISA, 0, ALL_CPUS, 1]);

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&[SPEC_REVISION, 0]); // checksum: below
    table.extend_from_slice(b"UMBRA   SANDBOX     "); // 8 bytes of maker, 12 of product
    table.extend_from_slice(&[0; 6]); // no table of the maker's own
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended entries
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The floating pointer (section 4.1) to a configuration table at `at`.
fn floating_pointer(at: u32) -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&at.to_le_bytes());
    pointer[8] = 1; // its own length, in units of 16 bytes
    pointer[9] = SPEC_REVISION;
    pointer[10] = checksum(&pointer);
    pointer
}

/// Writes pointer and table to [`layout::MP_TABLE`] for a machine with `cpus` CPUs of the kind that
/// `cpuid` describes.
pub(super) fn write(ram: &Ram, cpus: u8, cpuid: &CpuId) -> Result<(), NotRam> {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 1);
    let (signature, features) = leaf.map_or((0, 0), |leaf| (leaf.eax, leaf.edx));
    let at = layout::MP_TABLE + 16;
    ram.write(GuestAddress(layout::MP_TABLE), &floating_pointer(at as u32))?;
    ram.write(GuestAddress(at), &configuration(cpus, signature, features))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_describes_itself() {
        for cpus in [1, 2, layout::MAX_CPUS] {
            let table = configuration(cpus, 0x123, 0x456);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(sum(&table), 0);
            let (mut at, mut seen, mut boots) = (44, [0u16; 5], 0);
            while at < table.len() {
                let kind = table[at];
                seen[usize::from(kind)] += 1;
                if kind == 0 {
                    assert_eq!(u16::from(table[at + 1]), seen[0] - 1, "ids in order");
                    boots += table[at + 3] >> 1;
                }
                at += if kind == 0 { 20 } else { 8 };
            }
            assert_eq!((at, boots), (table.len(), 1));
            assert_eq!(seen, [cpus.into(), 1, 1, 15, 2]);
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), seen.iter().sum::<u16>());
        }
    }

    #[test]
    fn it_fits_between_the_boot_structures_and_the_kernel() {
        let most = 16 + configuration(layout::MAX_CPUS, 0, 0).len() as u64;
        assert!(
            layout::MP_TABLE >= layout::LOW_RAM_END
                && layout::MP_TABLE + most <= layout::KERNEL_START
        );
        assert!(layout::MP_TABLE.is_multiple_of(16), "where kernels look");
        assert_eq!(sum(&floating_pointer(0xf_0010)), 0);
    }
}
