//! The layout of guest-physical memory: the boot structures below 1 MiB, RAM, and the hole below 4
//! GiB.

use vm_memory::GuestAddress;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Boot GDT: null, unused, flat 64-bit code, flat data.
pub const GDT: u64 = 0x500;
/// Top of the stack that the guest starts on. The boot protocol promises none; it grows down to
/// 0x1000.
pub const BOOT_STACK: u64 = 0x6ff0;
/// Linux's `boot_params` ("zero page"), one page. `rsi` points here at the start.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Boot page tables: one PML4,
pub const BOOT_PML4: u64 = 0x9000;
/// one page-directory-pointer table,
pub const BOOT_PDPT: u64 = 0xa000;
/// and [`BOOT_PDS`] page directories of 2 MiB pages, which map the first 4 GiB one to one.
pub const BOOT_PD: u64 = 0xb000;
/// Number of boot page directories; each maps 1 GiB.
pub const BOOT_PDS: u64 = 4;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes reserved for the command line with its NUL (Linux's `COMMAND_LINE_SIZE` on x86).
pub const CMDLINE_BYTES: u64 = 2048;
/// End of usable low memory in the E820 map; a PC keeps its extended BIOS data area from here on.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, their root pointer first, where a PC has its BIOS (`acpi.rs`). Not usable in
/// the E820 map.
pub const ACPI: u64 = 0xe_0000;
/// The MP table, where a PC has its BIOS (`mptable.rs`). Not usable in the E820 map.
pub const MP_TABLE: u64 = 0xf_0000;
/// The lowest address of a kernel. Memory below belongs to the boot structures and to legacy
/// devices.
pub const KERNEL_START: u64 = MIB;
/// The I/O APIC's registers. KVM has them here, in the hole.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Each CPU's local APIC's registers, until it moves them.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages in the hole for a task-state segment, which KVM needs on old Intel CPUs.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Start of the hole in RAM: interrupt controllers and firmware have their addresses here on a PC.
pub const HOLE_START: u64 = 3 * GIB;
/// End of the hole.
pub const HOLE_END: u64 = 4 * GIB;

/// Least RAM of a machine: the boot area and 1 MiB for a kernel.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// Most RAM of a machine.
pub const MAX_MEMORY: u64 = 64 * GIB;
/// Most CPUs of a machine. Their APIC ids are their numbers, in 8 bits; some values mean several
/// CPUs.
pub const MAX_CPUS: u8 = 64;

/// The RAM of a machine with `memory_bytes` of it, as (start, bytes), split around the hole.
///
/// [`crate::memory::Ram::new`] accepts `memory_bytes`.
pub fn ram_ranges(memory_bytes: u64) -> Vec<(GuestAddress, u64)> {
    if memory_bytes <= HOLE_START {
        vec![(GuestAddress(0), memory_bytes)]
    } else {
        vec![(GuestAddress(0), HOLE_START), (GuestAddress(HOLE_END), memory_bytes - HOLE_START)]
    }
}

/// The first guest-physical address above all RAM.
pub fn ram_end(memory_bytes: u64) -> u64 {
    if memory_bytes <= HOLE_START { memory_bytes } else { HOLE_END + (memory_bytes - HOLE_START) }
}

const _: () = assert!(GDT + 0x20 <= 0x1000);
const _: () = assert!(BOOT_STACK < BOOT_PARAMS && BOOT_PARAMS + PAGE <= BOOT_PML4);
const _: () = assert!(BOOT_PD + BOOT_PDS * PAGE <= CMDLINE);
const _: () = assert!(CMDLINE + CMDLINE_BYTES <= LOW_RAM_END && LOW_RAM_END < KERNEL_START);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(ram_ranges(HOLE_START), [(GuestAddress(0), HOLE_START)]);
        assert_eq!(ram_end(HOLE_START), HOLE_START);
        let more = HOLE_START + PAGE;
        assert_eq!(
            ram_ranges(more),
            [(GuestAddress(0), HOLE_START), (GuestAddress(HOLE_END), PAGE)]
        );
        assert_eq!(ram_end(more), HOLE_END + PAGE);
        assert_eq!(ram_ranges(MAX_MEMORY).iter().map(|r| r.1).sum::<u64>(), MAX_MEMORY);
    }
}
