//! Kernels that start by PVH, as QEMU and other hypervisors start an ELF file (Xen,
//! docs/misc/pvh.pandoc).

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSegment as _, ObjectSymbol as _};

/// The code before its entry, its boot parameters and its command line lie behind the memory that
/// the test kernel gets: it expects zeroes there, and firmware clears low memory. The boot
/// parameters have this offset.
const PARAMS: usize = 0x1000;
const COMMAND_LINE: usize = 0x2000;
/// Additional memory for these, in bytes; firmware uses the end of all memory.
pub const MORE: u64 = 16 << 20;

/// A segment: its address, its bytes in the file, and its size in memory.
type Segment<'a> = (u64, &'a [u8], u64);

/// An ELF file with a PVH note.
fn file(entry: u64, segments: &[Segment]) -> Vec<u8> {
    const HEADER: u64 = 56;
    const NOTE: u64 = 12 + 4 + 8;
    let note_at = 64 + HEADER * (segments.len() as u64 + 1);
    // Elf64_Ehdr: ELF, 64 bits, little endian, version 1; executable, x86_64, version 1; entry,
    // program headers, section headers; flags, sizes of this header and of a program header, how
    // many of these there are, no sections.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [entry, 64, 0] {
        file.extend_from_slice(&u64::to_le_bytes(word));
    }
    file.extend_from_slice(&[
        0,
        0,
        0,
        0,
        64,
        0,
        HEADER as u8,
        0,
        segments.len() as u8 + 1,
        0,
        64,
        0,
        0,
        0,
        0,
        0,
    ]);
    // Elf64_Phdr: kind, flags; offset, addresses, bytes in file and memory, alignment.
    let mut header = |kind: u32, at: u64, address: u64, bytes: u64, memory: u64, alignment: u64| {
        file.extend_from_slice(&[kind, 7].map(u32::to_le_bytes).concat());
        let words = [at, address, address, bytes, memory, alignment];
        file.extend_from_slice(&words.map(u64::to_le_bytes).concat());
    };
    header(4, note_at, 0, NOTE, NOTE, 4);
    let mut at = note_at + NOTE;
    for (address, bytes, memory) in segments {
        header(1, at, *address, bytes.len() as u64, *memory, 1);
        at += bytes.len() as u64;
    }
    // XEN_ELFNOTE_PHYS32_ENTRY (Xen, xen/include/public/elfnote.h).
    file.extend_from_slice(&[4u32, 8, 18].map(u32::to_le_bytes).concat());
    file.extend_from_slice(b"Xen\0");
    file.extend_from_slice(&entry.to_le_bytes());
    segments.iter().for_each(|(_, bytes, _)| file.extend_from_slice(bytes));
    file
}

/// A kernel of 14 bytes that prints one line on the serial port.
pub fn says_a_line() -> Vec<u8> {
    const LOAD: u64 = 1 << 20;
    // mov edx, COM1; mov al, '!'; out dx, al; mov al, '\n'; out dx, al; hlt; jmp back
    let code = [0xba, 0xf8, 3, 0, 0, 0xb0, b'!', 0xee, 0xb0, b'\n', 0xee, 0xf4, 0xeb, 0xfd];
    file(LOAD, &[(LOAD, &code, code.len() as u64)])
}

/// The test kernel, with a few instructions in front that lead from PVH's start to the Linux boot
/// protocol, and with boot parameters for `memory` bytes. The machine needs [`MORE`] bytes more.
///
/// # Errors
/// It is not a kernel as expected, or `memory` is not below 1 GiB.
pub fn test_kernel(kernel: &[u8], memory: u64, command_line: &str) -> Result<Vec<u8>> {
    let elf = object::File::parse(kernel).context("the test kernel is not an ELF file")?;
    // Its own page tables map the first GiB one to one as well.
    let tables = elf.symbols().find(|symbol| symbol.name() == Ok("boot_pml4"));
    let tables =
        tables.context("the test kernel has no page tables")?.address() as u32 & 0x7fff_ffff;
    ensure!(
        command_line.len() < 4096 && memory < 1 << 30,
        "too much memory, or too long a command line"
    );
    let at = memory as u32;
    let mut start = code(at, tables, u32::try_from(elf.entry())?);
    start.resize(COMMAND_LINE, 0);
    start.extend_from_slice(command_line.as_bytes());
    start.push(0);
    // `boot_params`: the memory map, which has an entry for memory below 1 MiB and one above, and
    // the command line.
    let params = &mut start[PARAMS..];
    params[0x1e8] = 2;
    params[0x228..0x22c].copy_from_slice(&(at + COMMAND_LINE as u32).to_le_bytes());
    for (i, (at, bytes)) in [(0, 0x9_fc00), (1 << 20, memory - (1 << 20))].into_iter().enumerate() {
        let entry = [u64::to_le_bytes(at), u64::to_le_bytes(bytes)].concat();
        params[0x2d0 + 20 * i..][..16].copy_from_slice(&entry);
        params[0x2d0 + 20 * i + 16] = 1;
    }
    let mut segments = vec![(memory, start.as_slice(), start.len() as u64)];
    for segment in elf.segments() {
        // The image is linked for the upper half and lies at the same place in physical memory.
        segments.push((segment.address() & 0x7fff_ffff, segment.data()?, segment.size()));
    }
    Ok(file(memory, &segments))
}

/// From 32-bit protected mode to a 64-bit entry, for address `at`.
fn code(at: u32, tables: u32, entry: u32) -> Vec<u8> {
    const CODE: u32 = 0x10;
    let (gdt, far) = (at + 0x80, at + 0x60);
    let mut code = Vec::new();
    let mut put = |opcode: &[u8], value: Option<u32>| {
        code.extend_from_slice(opcode);
        value.iter().for_each(|value| code.extend_from_slice(&value.to_le_bytes()));
    };
    put(&[0xb8], Some(tables)); // mov eax, tables
    put(&[0x0f, 0x22, 0xd8], None); // mov cr3, eax
    put(&[0xb8], Some(1 << 5)); // mov eax, PAE
    put(&[0x0f, 0x22, 0xe0], None); // mov cr4, eax
    put(&[0xb9], Some(0xc000_0080)); // mov ecx, EFER
    put(&[0x0f, 0x32, 0x0d], Some(1 << 8)); // rdmsr; or eax, LME
    put(&[0x0f, 0x30], None); // wrmsr
    put(&[0x0f, 0x01, 0x15], Some(gdt)); // lgdt [gdt]
    put(&[0xb8], Some(1 << 31 | 1 << 4 | 1)); // mov eax, PG | ET | PE
    put(&[0x0f, 0x22, 0xc0], None); // mov cr0, eax
    put(&[0xea], Some(far)); // jmp CODE:far
    put(&[CODE as u8, 0], None);
    code.resize(0x60, 0xcc);
    let mut put = |opcode: u8, value: u32| {
        code.push(opcode);
        code.extend_from_slice(&value.to_le_bytes());
    };
    put(0xbe, at + PARAMS as u32); // mov esi, params
    put(0xb8, entry); // mov eax, entry
    code.extend_from_slice(&[0xff, 0xe0]); // jmp rax
    code.resize(0x80, 0xcc);
    // The limit and the address of the descriptors behind it: two null ones, 64-bit code, data.
    code.extend_from_slice(&31u16.to_le_bytes());
    code.extend_from_slice(&(gdt + 8).to_le_bytes());
    code.extend_from_slice(&[0, 0]);
    for descriptor in [0, 0, 0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff] {
        code.extend_from_slice(&descriptor.to_le_bytes());
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let code = [0x90; 5];
        let file = file(1 << 20, &[(1 << 20, &code, 4096), (8 << 20, &[1, 2], 2)]);
        let elf = object::File::parse(file.as_slice()).unwrap();
        let segments: Vec<_> =
            elf.segments().map(|s| (s.address(), s.data().unwrap().to_vec(), s.size())).collect();
        assert_eq!(segments, [(1 << 20, code.to_vec(), 4096), (8 << 20, vec![1, 2], 2)]);
        assert_eq!(elf.entry(), 1 << 20);
        assert!(test_kernel(&file, 256 << 20, "").unwrap_err().to_string().contains("page tables"));
        assert!(test_kernel(b"no kernel", 256 << 20, "").is_err());
    }
}
