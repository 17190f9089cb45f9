//! The structures of the PVH boot protocol (Xen, docs/misc/pvh.pandoc).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
};
use vm_memory::GuestAddress;

use super::params::e820;
use super::{Initrd, layout};
use crate::memory::{NotRam, Ram};

/// The field of `hvm_start_info` for the ACPI root pointer's address, 8 bytes.
pub(super) const ACPI_ROOT: u64 = layout::BOOT_PARAMS + 32;
const MODULES: u64 = layout::BOOT_PARAMS + 0x40;
const MEMORY_MAP: u64 = layout::BOOT_PARAMS + 0x80;

/// Writes `hvm_start_info` to the page that is otherwise `boot_params`, with the module list and
/// the memory map.
pub(super) fn write_start_info(ram: &Ram, initrd: Option<&Initrd>) -> Result<(), NotRam> {
    let map = e820(ram);
    let mut info = Vec::new();
    for word in [XEN_HVM_START_MAGIC_VALUE, 1, 0, u32::from(initrd.is_some())] {
        info.extend(word.to_le_bytes());
    }
    // Modules, command line, the ACPI tables (if any), the memory map.
    for address in [if initrd.is_some() { MODULES } else { 0 }, layout::CMDLINE, 0, MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u64).to_le_bytes());
    ram.write(GuestAddress(layout::BOOT_PARAMS), &info)?;
    if let Some(Initrd { gpa, bytes }) = initrd {
        let entry: Vec<_> =
            [*gpa, *bytes, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write(GuestAddress(MODULES), &entry)?;
    }
    for (i, (start, bytes, usable)) in map.into_iter().enumerate() {
        let kind = if usable { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED };
        let entry: Vec<_> =
            [start, bytes, kind.into()].iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write(GuestAddress(MEMORY_MAP + 24 * i as u64), &entry)?;
    }
    Ok(())
}
