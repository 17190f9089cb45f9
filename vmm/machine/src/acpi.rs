//! The ACPI tables: CPUs, interrupt lines, power off and reset (ACPI Specification 6.5). Kernels
//! without ACPI find the CPUs in the MP table (`mptable.rs`).

use acpi_tables::aml::{Name, Package};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::GuestAddress;

use super::devices::{ACPI_PM1_CONTROL, ACPI_PM1_EVENT, RESET_CONTROL, RESET_CPU};
use super::irqchip::{TIMER, TIMER_PIN};
use super::layout;
use super::memory::{NotRam, Ram};

/// The tables' OEM id.
const OEM: [u8; 6] = *b"UMBRA ";
const TABLE: [u8; 8] = *b"SANDBOX ";
const REVISION: u32 = 1;
/// Length of a table that has only its header (section 5.2.6).
const HEADER: u32 = 36;
/// The interrupt of power management, as on a PC. It never comes.
const SCI: u8 = 9;
/// The value of the sleep type field that switches the machine off: its only sleep state.
const SLEEP_TYPE_OFF: u8 = 5;
/// FADT, IA-PC boot architecture flags (table 5.11): legacy devices, no VGA, no message-signalled
/// interrupts. (8042 is not set: the machine has only its reset.)
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 3;
/// No C2 and C3 states: latencies above their limits (section 5.2.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The bytes of a table.
fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The FADT: fixed hardware, power off and reset (section 5.2.9).
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, TABLE, REVISION).firmware_ctrl_64(facs).dsdt_64(dsdt);
    table.sci_int = u16::from(SCI).into();
    // No SMI_CMD: it is in ACPI mode from the start.
    table.pm1a_evt_blk = u32::from(ACPI_PM1_EVENT).into();
    table.pm1_evt_len = 4;
    table.pm1a_cnt_blk = u32::from(ACPI_PM1_CONTROL).into();
    table.pm1_cnt_len = 2;
    table.p_lvl2_lat = NO_C2.into();
    table.p_lvl3_lat = NO_C3.into();
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.reset_reg =
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_CONTROL.into());
    table.reset_value = RESET_CPU;
    // `wbinvd` and `hlt` work; there are neither buttons nor a clock that wakes.
    for flag in [
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::ResetRegSup,
    ] {
        table = table.flag(flag);
    }
    bytes(&table.finalize())
}

/// The CPUs and interrupt controllers (section 5.2.12), as KVM has them: line n goes to pin n, but
/// for the timer's. (The crate's own MADT knows neither its flags nor all of these entries.)
fn madt(cpus: u8) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u8 = 1;
    const ALL_CPUS: u8 = 0xff;
    /// Active high, level-triggered.
    const HIGH_LEVEL: u8 = 0xd;
    let mut table = Sdt::new(*b"APIC", HEADER, 5, OEM, TABLE, REVISION);
    table.append_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus {
        table.append_slice(&[0, 8, id, id, ENABLED, 0, 0, 0]);
    }
    let [a, b, c, d] = layout::IO_APIC.to_le_bytes();
    table.append_slice(&[1, 12, cpus, 0, a, b, c, d, 0, 0, 0, 0]);
    table.append_slice(&[2, 10, 0, TIMER, TIMER_PIN, 0, 0, 0, 0, 0]);
    table.append_slice(&[2, 10, 0, SCI, SCI, 0, 0, 0, HIGH_LEVEL, 0]);
    table.append_slice(&[4, 6, ALL_CPUS, 0, 0, 1]);
    table.as_slice().to_vec()
}

/// The AML: only the sleep state that switches off (section 7.4.2).
fn dsdt() -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER, 2, OEM, TABLE, REVISION);
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF, &0u8, &0u8]);
    table.append_slice(&bytes(&Name::new("_S5_".into(), &off)));
    table.as_slice().to_vec()
}

/// All tables as in memory from [`layout::ACPI`] on, the root pointer first.
fn tables(cpus: u8) -> Vec<u8> {
    /// The alignment of FACS, which is larger than any other's.
    const ALIGN: usize = 64;
    let mut all = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let mut add = |table: &[u8]| {
        let at = all.len();
        all.vec(table);
        all.resize(all.len().next_multiple_of(ALIGN), 0);
        layout::ACPI + at as u64
    };
    let facs = add(&bytes(&FACS::new()));
    let dsdt = add(&dsdt());
    let fadt = add(&fadt(facs, dsdt));
    let madt = add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&bytes(&xsdt));
    all[..Rsdp::len()].copy_from_slice(&bytes(&Rsdp::new(OEM, xsdt)));
    all
}

/// Writes the tables for a machine with `cpus` CPUs, whose APIC ids are 0 to `cpus` - 1. Returns
/// the address of the root pointer.
pub(super) fn write(ram: &Ram, cpus: u8) -> Result<GuestAddress, NotRam> {
    let root = GuestAddress(layout::ACPI);
    ram.write(root, &tables(cpus))?;
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address, checked.
    fn table<'a>(all: &'a [u8], gpa: u64, signature: &[u8; 4]) -> &'a [u8] {
        let at = usize::try_from(gpa - layout::ACPI).unwrap();
        let table = &all[at..][..u32_at(all, at + 4) as usize];
        assert_eq!(&table[..4], signature);
        if signature != b"FACS" {
            assert_eq!(sum(table), 0, "{signature:?}");
        }
        table
    }

    #[test]
    fn all_is_found_from_the_root() {
        for cpus in [1, 2, layout::MAX_CPUS] {
            let all = tables(cpus);
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
            let xsdt = table(&all, u64_at(&all, 24), b"XSDT");
            assert_eq!(xsdt.len(), 36 + 2 * 8);
            let fadt = table(&all, u64_at(xsdt, 36), b"FACP");
            let facs = u64_at(fadt, 132);
            assert!(facs.is_multiple_of(64));
            table(&all, facs, b"FACS");
            let dsdt = table(&all, u64_at(fadt, 140), b"DSDT");
            // Name (_S5, Package (4) {5, 5, 0, 0}); 0 is an opcode of its own.
            assert_eq!(&dsdt[36..], b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00");

            let madt = table(&all, u64_at(xsdt, 44), b"APIC");
            let (mut at, mut seen) = (44, [0u8; 5]);
            while at < madt.len() {
                let kind = usize::from(madt[at]);
                if kind == 0 {
                    assert_eq!((madt[at + 2], madt[at + 3]), (seen[0], seen[0]), "ids in order");
                }
                seen[kind] += 1;
                at += usize::from(madt[at + 1]);
            }
            assert_eq!((at, seen), (madt.len(), [cpus, 1, 2, 0, 1]));
            assert!(madt.windows(10).any(|entry| entry == [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]));
        }
    }

    #[test]
    fn registers_are_those_of_the_devices() {
        let all = tables(1);
        let xsdt = table(&all, u64_at(&all, 24), b"XSDT");
        let fadt = table(&all, u64_at(xsdt, 36), b"FACP");
        assert_eq!((u32_at(fadt, 56), u32_at(fadt, 64)), (0x600, 0x604));
        assert_eq!((fadt[88], fadt[89]), (4, 2), "their bytes");
        assert_eq!(u32_at(fadt, 48), 0, "no SMI_CMD");
        assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xcf9, 4), "reset");
        assert_eq!(u32_at(fadt, 112) & 1 << 20, 0, "not reduced to less than a PC");
    }

    #[test]
    fn they_fit_below_the_mp_table() {
        let max = tables(layout::MAX_CPUS).len() as u64;
        assert!(
            layout::ACPI >= layout::LOW_RAM_END && layout::ACPI + max <= layout::MP_TABLE,
            "{max}"
        );
        assert!(layout::ACPI.is_multiple_of(16), "where kernels look");
    }
}
