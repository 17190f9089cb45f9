//! The structures of the Linux boot protocol in low memory: `boot_params`, page tables, GDT.

use std::mem::offset_of;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{Initrd, layout};
use crate::memory::{NotRam, Ram};

/// The field of `boot_params` for the ACPI root pointer's address, 8 bytes.
pub(super) const ACPI_ROOT: u64 =
    layout::BOOT_PARAMS + offset_of!(boot_params, acpi_rsdp_addr) as u64;

/// The E820 memory map of `ram`: (start, bytes, is usable).
pub(super) fn e820(ram: &Ram) -> Vec<(u64, u64, bool)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, true),
        (layout::LOW_RAM_END, layout::KERNEL_START - layout::LOW_RAM_END, false),
    ];
    for (gpa, bytes) in layout::ram_ranges(ram.bytes()) {
        let start = gpa.0.max(layout::KERNEL_START);
        map.push((start, gpa.0 + bytes - start, true));
    }
    map
}

/// The setup header of a kernel whose file has none.
pub(super) fn elf_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1, // loaded high
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

/// Writes `boot_params` with a kernel's setup header, completed.
pub(super) fn write_boot_params(
    ram: &Ram,
    header: setup_header,
    cmdline: &str,
    initrd: Option<&Initrd>,
) -> Result<(), NotRam> {
    const E820_RAM: u32 = 1;
    const E820_RESERVED: u32 = 2;
    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.type_of_loader = 0xff; // "undefined"
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    // How much a kernel takes, which it says itself. Without that, what there is with its NUL, as
    // other VMMs do: OSTD looks for the NUL in so many bytes.
    if params.hdr.cmdline_size == 0 {
        params.hdr.cmdline_size = cmdline.len() as u32 + 1;
    }
    if let Some(initrd) = initrd {
        // Below the hole, so 32 bits are enough.
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) =
            (initrd.gpa as u32, initrd.bytes as u32);
    }
    let map = e820(ram);
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (entry, (addr, size, usable)) in table.iter_mut().zip(map) {
        *entry =
            boot_e820_entry { addr, size, r#type: if usable { E820_RAM } else { E820_RESERVED } };
    }
    params.e820_table = table;
    let gpa = GuestAddress(layout::BOOT_PARAMS);
    ram.inner().write_obj(params, gpa).map_err(|_| NotRam { gpa, len: size_of::<boot_params>() })
}

/// Writes page tables that map the first 4 GiB one to one, and the boot GDT.
pub(crate) fn write_boot_tables(ram: &Ram) -> Result<(), NotRam> {
    const PRESENT_WRITE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let entry = |gpa: u64, value: u64| ram.write(GuestAddress(gpa), &value.to_le_bytes());
    entry(layout::BOOT_PML4, layout::BOOT_PDPT | PRESENT_WRITE)?;
    let mut directories = Vec::with_capacity((layout::BOOT_PDS * layout::PAGE) as usize);
    for i in 0..layout::BOOT_PDS * 512 {
        directories.extend_from_slice(&(i << 21 | LARGE | PRESENT_WRITE).to_le_bytes());
    }
    for i in 0..layout::BOOT_PDS {
        entry(layout::BOOT_PDPT + 8 * i, (layout::BOOT_PD + i * layout::PAGE) | PRESENT_WRITE)?;
    }
    ram.write(GuestAddress(layout::BOOT_PD), &directories)?;
    write_gdt(ram, &GDT)
}

/// Writes a boot GDT.
pub(super) fn write_gdt(ram: &Ram, gdt: &[u64; 4]) -> Result<(), NotRam> {
    let bytes: Vec<_> = gdt.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    ram.write(GuestAddress(layout::GDT), &bytes)
}

/// The boot GDT. The protocol wants code at selector 0x10 and data at 0x18.
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// The same for a kernel that starts by PVH: the code is 32-bit.
pub const GDT_PVH: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
