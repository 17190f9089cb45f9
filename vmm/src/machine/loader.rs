//! Loads a 64-bit ELF kernel and the structures of the Linux 64-bit boot protocol into guest RAM.
//!
//! Every field of the image that loading depends on is checked first, so that a file that is no kernel, or not
//! one for this machine, is refused with the value that is wrong.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use super::memory::{NotRam, Ram};

/// Largest kernel file, in bytes. Debug information makes kernels big, but not this big.
pub const MAX_IMAGE: u64 = 4 << 30;

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_DYNAMIC: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;

/// Why a kernel was not loaded.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum LoadError {
    #[error("cannot read kernel {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("kernel {path} is not a regular file")]
    NotAFile { path: PathBuf },
    #[error("kernel of {bytes} bytes is larger than {MAX_IMAGE} bytes")]
    TooLarge { bytes: u64 },
    #[error("the kernel file is empty")]
    Empty,
    #[error("the kernel is not an ELF file: {0}")]
    NotElf(String),
    #[error("the ELF header is cut off: the file has {0} bytes")]
    HeaderCutOff(usize),
    #[error("the kernel is a 32-bit ELF file: a 64-bit one is needed")]
    Not64Bit,
    #[error("the kernel is a big-endian ELF file")]
    BigEndian,
    #[error("the kernel is for ELF machine {0}: x86_64 (62) is needed")]
    ForeignMachine(u16),
    #[error("ELF type {0} cannot be booted: an executable (2) or a static PIE (3) is needed")]
    NotExecutable(u16),
    #[error("the ELF program headers ({count} of {size} bytes at {offset:#x}) are not valid")]
    BadProgramHeaders { offset: u64, size: u16, count: u16 },
    #[error("the kernel file is cut off: {what} needs bytes up to {need:#x}, the file has {have:#x}")]
    CutOff { what: String, need: u128, have: u64 },
    #[error("the kernel has no segment to load")]
    NoSegment,
    #[error("segment {index}: {file:#x} bytes in the file are more than its {memory:#x} bytes in memory")]
    FileLargerThanMemory { index: usize, file: u64, memory: u64 },
    #[error("segment {index} ({bytes:#x} bytes at {gpa:#x}) wraps around the end of the address space")]
    Wraps { index: usize, gpa: u64, bytes: u64 },
    #[error("segment {index} starts at {gpa:#x}: kernels are loaded at {:#x} or above", layout::KERNEL_START)]
    BootArea { index: usize, gpa: u64 },
    #[error("segment {index} ({bytes:#x} bytes at {gpa:#x}) lies outside of guest memory")]
    OutsideMemory { index: usize, gpa: u64, bytes: u64 },
    #[error("the kernel needs {need} bytes of guest memory, the guest has {have}")]
    MemoryTooSmall { need: u64, have: u64 },
    #[error("segments {first} and {second} overlap in memory")]
    Overlap { first: usize, second: usize },
    #[error("the entry point {0:#x} lies in no loaded segment")]
    EntryOutside(u64),
    #[error("the command line has {have} bytes, at most {max} are possible")]
    CmdlineTooLong { have: usize, max: usize },
    #[error("the command line holds a NUL byte")]
    CmdlineNul,
    #[error("cannot load the kernel: {0}")]
    Loader(linux_loader::loader::Error),
    #[error("cannot write the boot structures: {0}")]
    BootStructures(#[from] NotRam),
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Where it starts, guest-physical; mapped one to one at that moment.
    pub entry: GuestAddress,
    /// Lowest guest-physical address it occupies.
    pub start: GuestAddress,
    /// First guest-physical address above all it occupies, zero-initialised data included.
    pub end: GuestAddress,
}

/// Reads a kernel file. It must be a regular file of at most [`MAX_IMAGE`] bytes.
pub fn read_image(path: &Path) -> Result<Vec<u8>, LoadError> {
    let fail = |source| LoadError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(LoadError::NotAFile { path: path.to_owned() });
    }
    if meta.len() > MAX_IMAGE {
        return Err(LoadError::TooLarge { bytes: meta.len() });
    }
    let mut image = Vec::new();
    file.take(MAX_IMAGE).read_to_end(&mut image).map_err(fail)?;
    Ok(image)
}

/// Checks `image`, loads it into `ram`, and writes `boot_params`, command line, page tables and GDT.
pub fn load(ram: &Ram, image: &[u8], cmdline: &str) -> Result<LoadedKernel, LoadError> {
    let kernel = check(ram, image)?;
    check_cmdline(cmdline)?;
    Elf::load(ram.inner(), None, &mut Cursor::new(image), None).map_err(LoadError::Loader)?;
    ram.write(GuestAddress(layout::CMDLINE), cmdline.as_bytes())?;
    ram.write(GuestAddress(layout::CMDLINE + cmdline.len() as u64), &[0])?;
    write_boot_params(ram, cmdline)?;
    write_boot_tables(ram)?;
    Ok(kernel)
}

/// One `PT_LOAD` program header.
struct Segment {
    index: usize,
    gpa: u64,
    end: u64,
    gva: u64,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// Checks everything about `image` that loading it into `ram` depends on; changes nothing.
pub fn check(ram: &Ram, image: &[u8]) -> Result<LoadedKernel, LoadError> {
    if image.is_empty() {
        return Err(LoadError::Empty);
    }
    if !image.starts_with(ELF_MAGIC) {
        return Err(LoadError::NotElf(foreign_format(image)));
    }
    if image.len() < EHDR_BYTES {
        return Err(LoadError::HeaderCutOff(image.len()));
    }
    if image[4] != CLASS_64 {
        return Err(LoadError::Not64Bit);
    }
    if image[5] != DATA_LITTLE_ENDIAN {
        return Err(LoadError::BigEndian);
    }
    let (kind, machine) = (u16_at(image, 16), u16_at(image, 18));
    if machine != MACHINE_X86_64 {
        return Err(LoadError::ForeignMachine(machine));
    }
    if kind != TYPE_EXECUTABLE && kind != TYPE_DYNAMIC {
        return Err(LoadError::NotExecutable(kind));
    }
    let segments = segments(ram, image)?;
    let (Some(start), Some(end)) =
        (segments.iter().map(|s| s.gpa).min(), segments.iter().map(|s| s.end).max())
    else {
        return Err(LoadError::NoSegment);
    };
    let entry = u64_at(image, 24);
    // Linux gives a physical entry point, other kernels a virtual one.
    let entry = segments
        .iter()
        .find_map(|s| (s.gpa..s.end).contains(&entry).then_some(entry))
        .or_else(|| {
            segments.iter().find_map(|s| {
                let offset = entry.checked_sub(s.gva)?;
                (offset < s.end - s.gpa).then_some(s.gpa + offset)
            })
        })
        .ok_or(LoadError::EntryOutside(entry))?;
    Ok(LoadedKernel { entry: GuestAddress(entry), start: GuestAddress(start), end: GuestAddress(end) })
}

/// What a file that is no ELF file is instead, for the formats that users take for one.
fn foreign_format(image: &[u8]) -> String {
    match image {
        [0x1f, 0x8b, ..] => "it is gzip-compressed".into(),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is zstd-compressed".into(),
        _ if image.get(0x202..0x206) == Some(b"HdrS") => {
            "it is a Linux bzImage; give the vmlinux inside it".into()
        }
        _ => {
            let head: Vec<_> = image.iter().take(4).map(|b| format!("{b:02x}")).collect();
            format!("it starts with {}", head.join(" "))
        }
    }
}

fn segments(ram: &Ram, image: &[u8]) -> Result<Vec<Segment>, LoadError> {
    let (offset, size, count) = (u64_at(image, 32), u16_at(image, 54), u16_at(image, 56));
    if count == 0 {
        return Err(LoadError::NoSegment);
    }
    if usize::from(size) != PHDR_BYTES || offset < EHDR_BYTES as u64 {
        return Err(LoadError::BadProgramHeaders { offset, size, count });
    }
    let in_file = |what: String, offset: u64, bytes: u64| {
        let (need, have) = (u128::from(offset) + u128::from(bytes), image.len() as u64);
        if need > u128::from(have) { Err(LoadError::CutOff { what, need, have }) } else { Ok(()) }
    };
    in_file("the program header table".into(), offset, u64::from(count) * PHDR_BYTES as u64)?;
    let mut found: Vec<Segment> = Vec::new();
    for index in 0..usize::from(count) {
        let header = &image[offset as usize + index * PHDR_BYTES..][..PHDR_BYTES];
        let kind = u32_at(header, 0);
        let (file_offset, gva, gpa) = (u64_at(header, 8), u64_at(header, 16), u64_at(header, 24));
        let (file, memory) = (u64_at(header, 32), u64_at(header, 40));
        // The loader reads notes too.
        if kind == SEGMENT_LOAD || kind == SEGMENT_NOTE {
            in_file(format!("segment {index}"), file_offset, file)?;
        }
        if kind != SEGMENT_LOAD {
            continue;
        }
        if file > memory {
            return Err(LoadError::FileLargerThanMemory { index, file, memory });
        }
        if memory == 0 {
            continue;
        }
        let end = gpa.checked_add(memory).ok_or(LoadError::Wraps { index, gpa, bytes: memory })?;
        if gpa < layout::KERNEL_START {
            return Err(LoadError::BootArea { index, gpa });
        }
        if !ram.contains(GuestAddress(gpa), memory) {
            let have = ram.bytes();
            return Err(if end <= layout::HOLE_START {
                LoadError::MemoryTooSmall { need: end, have }
            } else {
                LoadError::OutsideMemory { index, gpa, bytes: memory }
            });
        }
        found.push(Segment { index, gpa, end, gva });
    }
    found.sort_by_key(|s| s.gpa);
    for pair in found.windows(2) {
        if pair[0].end > pair[1].gpa {
            return Err(LoadError::Overlap { first: pair[0].index, second: pair[1].index });
        }
    }
    Ok(found)
}

fn check_cmdline(cmdline: &str) -> Result<(), LoadError> {
    let max = layout::CMDLINE_BYTES as usize - 1;
    if cmdline.len() > max {
        return Err(LoadError::CmdlineTooLong { have: cmdline.len(), max });
    }
    if cmdline.contains('\0') {
        return Err(LoadError::CmdlineNul);
    }
    Ok(())
}

/// The E820 memory map of `ram`: (start, bytes, is usable).
fn e820(ram: &Ram) -> Vec<(u64, u64, bool)> {
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

fn write_boot_params(ram: &Ram, cmdline: &str) -> Result<(), NotRam> {
    const E820_RAM: u32 = 1;
    const E820_RESERVED: u32 = 2;
    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.version = 0x020f;
    params.hdr.type_of_loader = 0xff; // "undefined"
    params.hdr.loadflags = 1; // loaded high
    params.hdr.kernel_alignment = 0x0100_0000;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    let map = e820(ram);
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (entry, (addr, size, usable)) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: if usable { E820_RAM } else { E820_RESERVED } };
    }
    params.e820_table = table;
    let gpa = GuestAddress(layout::BOOT_PARAMS);
    ram.inner().write_obj(params, gpa).map_err(|_| NotRam { gpa, len: size_of::<boot_params>() })
}

/// Writes page tables that map the first 4 GiB one to one, and the boot GDT.
pub(super) fn write_boot_tables(ram: &Ram) -> Result<(), NotRam> {
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
    for (i, descriptor) in GDT.iter().enumerate() {
        entry(layout::GDT + 8 * i as u64, *descriptor)?;
    }
    Ok(())
}

/// The boot GDT. The protocol wants code at selector 0x10 and data at 0x18.
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[cfg(test)]
mod tests {
    use super::super::tests::elf;
    use super::*;

    const BASE: u64 = layout::KERNEL_START;

    fn ram() -> Ram {
        Ram::new(4 << 20).unwrap()
    }

    /// A small valid kernel with `change` applied to its bytes.
    fn broken(change: impl FnOnce(&mut Vec<u8>)) -> LoadError {
        let mut image = elf(BASE + 4, &[(BASE, BASE, &[0x90; 64], 128), (BASE + 0x1000, 0, &[1; 16], 16)]);
        check(&ram(), &image).expect("valid before the change");
        change(&mut image);
        check(&ram(), &image).expect_err("not valid after it")
    }

    fn put(at: usize, bytes: impl AsRef<[u8]>) -> impl FnOnce(&mut Vec<u8>) {
        move |image| image[at..at + bytes.as_ref().len()].copy_from_slice(bytes.as_ref())
    }

    fn put64(at: usize, value: u64) -> impl FnOnce(&mut Vec<u8>) {
        put(at, value.to_le_bytes())
    }

    #[test]
    fn every_broken_image_is_refused() {
        use LoadError as E;
        assert!(matches!(broken(Vec::clear), E::Empty));
        assert!(matches!(broken(put(0, b"#!/b")), E::NotElf(_)));
        assert!(matches!(broken(|i| i.truncate(63)), E::HeaderCutOff(63)));
        assert!(matches!(broken(put(4, [1])), E::Not64Bit));
        assert!(matches!(broken(put(5, [2])), E::BigEndian));
        assert!(matches!(broken(put(18, [183, 0])), E::ForeignMachine(183)));
        assert!(matches!(broken(put(16, [1, 0])), E::NotExecutable(1)));
        assert!(matches!(broken(put(54, [55])), E::BadProgramHeaders { .. }));
        assert!(matches!(broken(put64(32, 0)), E::BadProgramHeaders { .. }));
        assert!(matches!(broken(put64(32, u64::MAX)), E::CutOff { .. }));
        assert!(matches!(broken(put(56, [255, 255])), E::CutOff { .. }));
        assert!(matches!(broken(put(56, [0, 0])), E::NoSegment));
        assert!(matches!(broken(|i| (put(64, [6])(i), put(120, [6])(i)).0), E::NoSegment));
        assert!(matches!(broken(put64(64 + 8, u64::MAX)), E::CutOff { .. }), "p_offset");
        assert!(matches!(broken(|i| i.truncate(i.len() - 1)), E::CutOff { .. }));
        assert!(matches!(broken(put64(64 + 40, 63)), E::FileLargerThanMemory { file: 64, memory: 63, .. }));
        assert!(matches!(broken(put64(64 + 24, u64::MAX - 8)), E::Wraps { .. }));
        assert!(matches!(broken(put64(64 + 40, u64::MAX)), E::Wraps { .. }));
        assert!(matches!(broken(put64(64 + 24, BASE - 1)), E::BootArea { index: 0, .. }));
        assert!(matches!(broken(put64(64 + 24, 0)), E::BootArea { .. }));
        assert!(matches!(broken(put64(64 + 24, (4 << 20) - 127)), E::MemoryTooSmall { need, .. }
            if need == (4 << 20) + 1));
        assert!(matches!(broken(put64(64 + 40, 1 << 40)), E::OutsideMemory { index: 0, .. }));
        assert!(matches!(broken(put64(120 + 24, BASE + 127)), E::Overlap { first: 0, second: 1 }));
        assert!(matches!(broken(put64(24, BASE + 128)), E::EntryOutside(_)));
        // A note that lies outside of the file, or is garbage.
        assert!(matches!(broken(|i| (put(120, [4])(i), put64(120 + 8, 1 << 40)(i)).0), E::CutOff { .. }));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let image = elf(BASE, &[(BASE, BASE, &[0x90; 64], 128)]);
        let ram = ram();
        for at in 0..image.len() {
            for value in [0, 1, 4, 0x7f, 0x80, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                let _ = load(&ram, &image, "");
            }
            let _ = load(&ram, &image[..at], "");
        }
    }

    #[test]
    fn a_virtual_entry_point_is_translated() {
        let high = 0xffff_ffff_8010_0000;
        let image = elf(high + 8, &[(BASE, high, &[0x90; 64], 64)]);
        let kernel = check(&ram(), &image).unwrap();
        assert_eq!(kernel.entry, GuestAddress(BASE + 8));
        assert_eq!((kernel.start.0, kernel.end.0), (BASE, BASE + 64));
    }

    #[test]
    fn boot_structures() {
        let ram = Ram::new(layout::HOLE_START + (8 << 20)).unwrap();
        let image = elf(BASE, &[(BASE, BASE, b"code", 4)]);
        load(&ram, &image, "a=b").unwrap();
        let mut text = [0; 4];
        ram.read(GuestAddress(BASE), &mut text).unwrap();
        assert_eq!(&text, b"code");
        ram.read(GuestAddress(layout::CMDLINE), &mut text).unwrap();
        assert_eq!(&text, b"a=b\0");
        let mut page = [0; 4096];
        ram.read(GuestAddress(layout::BOOT_PARAMS), &mut page).unwrap();
        assert_eq!(page[0x1e8], 4, "E820 entries");
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(u32_at(&page, 0x228), layout::CMDLINE as u32);
        let entry =
            |i: usize| (u64_at(&page, 0x2d0 + 20 * i), u64_at(&page, 0x2d8 + 20 * i), page[0x2e0 + 20 * i]);
        assert_eq!(entry(0), (0, 0x9_fc00, 1));
        assert_eq!(entry(1), (0x9_fc00, 0x6_0400, 2));
        assert_eq!(entry(2), (BASE, layout::HOLE_START - BASE, 1));
        assert_eq!(entry(3), (layout::HOLE_END, 8 << 20, 1));
    }

    #[test]
    fn command_lines() {
        let image = elf(BASE, &[(BASE, BASE, &[0], 1)]);
        let fits = "x".repeat(2047);
        load(&ram(), &image, &fits).unwrap();
        let error = load(&ram(), &image, &(fits + "x")).unwrap_err();
        assert!(matches!(error, LoadError::CmdlineTooLong { have: 2048, max: 2047 }));
        assert!(matches!(load(&ram(), &image, "a\0b"), Err(LoadError::CmdlineNul)));
    }

    #[test]
    fn files() {
        let dir = tempfile::tempdir().unwrap();
        let missing = read_image(&dir.path().join("none")).unwrap_err();
        assert!(missing.to_string().starts_with("cannot read kernel"), "{missing}");
        assert!(matches!(read_image(dir.path()), Err(LoadError::NotAFile { .. })));
        let path = dir.path().join("kernel");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(read_image(&path).unwrap(), b"abc");
    }
}
