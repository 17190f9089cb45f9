//! Loads a kernel, its initrd and its command line into guest RAM, with the structures of the boot
//! protocol.
//!
//! There are three ways to boot: a 64-bit ELF file or a Linux bzImage, by the Linux 64-bit boot
//! protocol, and a 64-bit ELF file with a PVH note, entered in 32-bit mode. All fields that are
//! needed are checked first. A file that is no kernel, or not one for this machine, is refused with
//! the wrong value.

mod bzimage;
mod elf;
mod linux;
mod params;
mod pvh;
mod source;
#[cfg(test)]
mod tests;
mod unpack;

use std::path::PathBuf;

use thiserror::Error;
use vm_memory::GuestAddress;

use super::layout;
use super::memory::{NotRam, Ram};
pub use linux::{Emulated, with_defaults};
pub(super) use params::write_boot_tables;
pub use params::{GDT, GDT_PVH};
pub use source::{DiskFile, Limit, Source};

/// Largest kernel file or initrd, in bytes. Debug information makes kernels big, but not this big.
pub const MAX_IMAGE: u64 = 4 << 30;

/// What to do about a segment whose physical address is its virtual one.
const VIRTUAL: &str = ": its physical address is its virtual one; give it another with AT() in the \
                       linker script";

/// Why a kernel was not loaded.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum LoadError {
    #[error("cannot read {what} {path}: {source}")]
    Read { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{what} {path} is not a regular file but {found}: copy its contents to a file first")]
    NotAFile { what: &'static str, path: PathBuf, found: &'static str },
    #[error("the {what} cannot come from standard input: write it to a file first")]
    StandardInput { what: &'static str },
    #[error("{what} of {bytes} bytes is larger than {MAX_IMAGE} bytes")]
    TooLarge { what: &'static str, bytes: u64 },
    #[error("the kernel file is empty")]
    Empty,
    #[error("the kernel is not an ELF file: {0}")]
    NotElf(String),
    #[error("the kernel is neither an ELF file nor a bzImage: {0}")]
    NotKernel(String),
    #[error("the kernel is not a bzImage: {0}")]
    NotBzImage(String),
    #[error("the ELF header is cut off: the file has {0} bytes")]
    HeaderCutOff(usize),
    #[error("the kernel is a 32-bit one: a 64-bit one is needed")]
    Not64Bit,
    #[error("the kernel is a big-endian ELF file")]
    BigEndian,
    #[error("the kernel is for ELF machine {0}: x86_64 (62) is needed")]
    ForeignMachine(u16),
    #[error("ELF type {0} cannot be booted: an executable (2) or a static PIE (3) is needed")]
    NotExecutable(u16),
    #[error("the ELF program headers ({count} of {size} bytes at {offset:#x}) are not valid")]
    BadProgramHeaders { offset: u64, size: u16, count: u16 },
    #[error(
        "the kernel has {0} program headers, at most {max} are possible: link it again",
        max = elf::MAX_HEADERS
    )]
    ManyProgramHeaders(u16),
    #[error(
        "the kernel file is cut off: {what} needs bytes up to {need:#x}, the file has {have:#x}"
    )]
    CutOff { what: String, need: u128, have: u64 },
    #[error("the kernel has no segment to load")]
    NoSegment,
    #[error(
        "segment {index}: {file:#x} bytes in the file are more than its {memory:#x} bytes in memory"
    )]
    FileLargerThanMemory { index: usize, file: u64, memory: u64 },
    #[error(
        "segment {index} ({bytes:#x} bytes at {gpa:#x}) wraps around the end of the address space"
    )]
    Wraps { index: usize, gpa: u64, bytes: u64 },
    #[error(
        "segment {index} starts at {gpa:#x}: kernels are loaded at {:#x} or above",
        layout::KERNEL_START
    )]
    BootArea { index: usize, gpa: u64 },
    #[error(
        "segment {index} ({bytes:#x} bytes at {gpa:#x}) lies outside of guest memory{}",
        if *is_virtual { VIRTUAL } else { "" }
    )]
    OutsideMemory { index: usize, gpa: u64, bytes: u64, is_virtual: bool },
    #[error("the kernel needs {need} bytes of guest memory, the guest has {have}")]
    MemoryTooSmall { need: u64, have: u64 },
    #[error("segments {first} and {second} overlap in memory")]
    Overlap { first: usize, second: usize },
    #[error("the entry point {0:#x} lies in no loaded segment")]
    EntryOutside(u64),
    #[error("the kernel has no PVH note: it cannot be booted that way")]
    NoPvhNote,
    #[error(
        "the bzImage has boot protocol {0:#x}: at least 0x20c is needed, which came with Linux 3.8"
    )]
    OldProtocol(u16),
    #[error("the bzImage's header is not valid: {0}")]
    BadHeader(&'static str),
    #[error("the bzImage is damaged: its checksum is wrong")]
    Checksum,
    #[error("the initrd is empty")]
    EmptyInitrd,
    #[error(
        "the initrd of {bytes} bytes does not fit into guest memory: {free} bytes are free beside \
         the kernel"
    )]
    InitrdTooLarge { bytes: u64, free: u64 },
    #[error("the command line has {have} bytes, at most {max} are possible")]
    CmdlineTooLong { have: usize, max: usize },
    #[error("the command line holds a NUL byte")]
    CmdlineNul,
    #[error("interrupted")]
    Interrupted,
    #[error("the time limit is over")]
    TimeLimit,
    #[error("cannot write the boot structures: {0}")]
    BootStructures(#[from] NotRam),
}

/// How to boot a kernel file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// As the file requires: a bzImage as such; an ELF file by the Linux protocol, unless it is not
    /// Linux and has a PVH note.
    #[default]
    Auto,
    /// An ELF file, entered by the Linux 64-bit boot protocol.
    Elf,
    /// An ELF file, entered by its PVH note.
    Pvh,
    /// A Linux bzImage, whose own code unpacks the kernel in the guest.
    BzImage,
}

/// The files to load.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// The kernel file.
    pub image: Source<'a>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// A file for the kernel to find in memory.
    pub initrd: Option<Source<'a>>,
    /// How to boot.
    pub protocol: Protocol,
    /// Unpack the kernel of a bzImage here and not in the guest, if `protocol` leaves the choice.
    pub unpack: bool,
    /// When to give up.
    pub limit: Limit<'a>,
}

impl<'a> Boot<'a> {
    /// A kernel without an initrd.
    pub fn new(image: impl Into<Source<'a>>, cmdline: &'a str) -> Self {
        let (image, limit) = (image.into(), Limit::default());
        Self { image, cmdline, initrd: None, protocol: Protocol::Auto, unpack: false, limit }
    }
}

/// The state of the CPU at a kernel's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartState {
    /// Long mode, `rsi` at `boot_params`.
    Linux64,
    /// 32-bit protected mode without paging, `ebx` at `hvm_start_info`.
    Pvh,
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Its guest-physical entry point; mapped one to one then.
    pub entry: GuestAddress,
    /// The state at the entry.
    pub state: StartState,
    /// Lowest guest-physical address it occupies.
    pub start: GuestAddress,
    /// First guest-physical address above it and its zero-initialised data.
    pub end: GuestAddress,
}

/// Bytes at the start of a file by which its format is recognised.
const HEAD: usize = 1024;

/// Whether a kernel file is Linux for x86, by its header or by its banner. A file that cannot be
/// loaded into `ram` is not.
///
/// # Errors
/// It cannot be read, or the time is over.
pub fn is_linux(ram: &Ram, image: Source, limit: &Limit) -> Result<bool, LoadError> {
    let head = image.head(HEAD)?;
    if bzimage::is_one(&head) {
        return Ok(true);
    }
    match elf::is_one(&head).then(|| elf::check(ram, image)) {
        Some(Ok(elf)) => elf.has_linux_banner(image, limit),
        _ => Ok(false),
    }
}

/// Whether a kernel file is a Linux bzImage, by its header.
///
/// # Errors
/// It cannot be read.
pub fn is_bzimage(image: Source) -> Result<bool, LoadError> {
    Ok(bzimage::is_one(&image.head(HEAD)?))
}

/// Checks the files of `boot`, loads them into `ram`, which is zero, and writes the boot
/// structures.
///
/// # Errors
/// A file is not what it should be, or does not fit into RAM; or the time is over.
pub fn load(ram: &Ram, boot: &Boot) -> Result<LoadedKernel, LoadError> {
    let head = boot.image.head(HEAD)?;
    if head.is_empty() {
        return Err(LoadError::Empty);
    }
    check_cmdline(boot.cmdline)?;
    let kernel = match boot.protocol {
        Protocol::BzImage => load_bzimage(ram, boot)?,
        Protocol::Auto if bzimage::is_one(&head) => load_bzimage(ram, boot)?,
        Protocol::Auto if !elf::is_one(&head) => {
            return Err(LoadError::NotKernel(foreign_format(&head)));
        }
        Protocol::Auto | Protocol::Elf | Protocol::Pvh => load_elf(ram, boot)?,
    };
    let cmdline = boot.cmdline;
    ram.write(GuestAddress(layout::CMDLINE), cmdline.as_bytes())?;
    ram.write(GuestAddress(layout::CMDLINE + cmdline.len() as u64), &[0])?;
    params::write_boot_tables(ram)?;
    if kernel.state == StartState::Pvh {
        params::write_gdt(ram, &GDT_PVH)?;
    }
    Ok(kernel)
}

fn load_bzimage(ram: &Ram, boot: &Boot) -> Result<LoadedKernel, LoadError> {
    let &Boot { image, cmdline, ref limit, .. } = boot;
    let mut found = bzimage::check(ram, image, limit)?;
    let unpack = boot.unpack && boot.protocol == Protocol::Auto;
    let unpacked = if unpack { unpack::kernel(image, found.code, &found.header)? } else { None };
    // If its contents are not as expected, its own code unpacks it.
    let unpacked =
        unpacked.and_then(|bytes| Some((elf::check(ram, Source::Memory(&bytes)).ok()?, bytes)));
    if let Some((elf, _)) = &unpacked {
        found.kernel = elf.kernel;
    }
    let initrd = place_initrd(ram, boot, &found.kernel, found.initrd_end)?;
    match unpacked {
        Some((elf, bytes)) => elf.load(ram, Source::Memory(&bytes), limit)?,
        None => bzimage::load(ram, image, &found, limit)?,
    }
    params::write_boot_params(ram, found.header, cmdline, initrd.as_ref())?;
    Ok(found.kernel)
}

fn load_elf(ram: &Ram, boot: &Boot) -> Result<LoadedKernel, LoadError> {
    let &Boot { image, cmdline, ref limit, .. } = boot;
    let elf = elf::check(ram, image)?;
    let mut kernel = elf.kernel;
    let by_pvh = match boot.protocol {
        Protocol::Pvh => true,
        Protocol::Auto => elf.pvh_entry.is_some() && !elf.has_linux_banner(image, limit)?,
        Protocol::Elf | Protocol::BzImage => false,
    };
    if by_pvh {
        (kernel.entry, kernel.state) = (elf.check_pvh_entry()?, StartState::Pvh);
    }
    let initrd = place_initrd(ram, boot, &kernel, layout::HOLE_START)?;
    elf.load(ram, image, limit)?;
    match kernel.state {
        StartState::Linux64 => {
            params::write_boot_params(ram, params::elf_header(), cmdline, initrd.as_ref())?;
        }
        StartState::Pvh => pvh::write_start_info(ram, initrd.as_ref())?,
    }
    Ok(kernel)
}

/// Passes the address of the ACPI root pointer to a loaded kernel that starts in `state`.
pub(super) fn tell_acpi_root(
    ram: &Ram,
    state: StartState,
    root: GuestAddress,
) -> Result<(), NotRam> {
    let field = match state {
        StartState::Linux64 => params::ACPI_ROOT,
        StartState::Pvh => pvh::ACPI_ROOT,
    };
    ram.write(GuestAddress(field), &root.0.to_le_bytes())
}

/// An initrd in guest memory.
struct Initrd {
    gpa: u64,
    bytes: u64,
}

/// Copies the initrd, if there is one, to the end of the RAM below `end` and below the hole, above
/// the kernel.
fn place_initrd(
    ram: &Ram,
    boot: &Boot,
    kernel: &LoadedKernel,
    end: u64,
) -> Result<Option<Initrd>, LoadError> {
    let Some(initrd) = boot.initrd else { return Ok(None) };
    let bytes = initrd.bytes();
    if bytes == 0 {
        return Err(LoadError::EmptyInitrd);
    }
    let top = ram.bytes().min(layout::HOLE_START).min(end);
    let bottom = kernel.end.0.next_multiple_of(layout::PAGE);
    let free = top.saturating_sub(bottom);
    if bytes > free {
        return Err(LoadError::InitrdTooLarge { bytes, free });
    }
    // `bottom` is a page's start, so that this does not go below it.
    let gpa = (top - bytes) & !(layout::PAGE - 1);
    initrd.copy(0..bytes, ram, gpa, &boot.limit)?;
    Ok(Some(Initrd { gpa, bytes }))
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

/// The real format of a file that is no kernel, for formats that users mistake for one.
fn foreign_format(image: &[u8]) -> String {
    let what = match image {
        [0x1f, 0x8b, ..] => "it is gzip-compressed",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is zstd-compressed",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is xz-compressed",
        _ if bzimage::is_one(image) => "it is a Linux bzImage",
        _ if elf::is_one(image) => "it is an ELF file",
        // Linux, Documentation/arm64/booting.rst and Documentation/riscv/boot-image-header.rst.
        _ if image.get(0x38..0x3c) == Some(b"ARM\x64") => "it is an arm64 Linux image",
        _ if image.get(0x38..0x3c) == Some(b"RSC\x05") => "it is a riscv Linux image",
        [b'M', b'Z', ..] => "it is an EFI program",
        _ => {
            let head: Vec<_> = image.iter().take(4).map(|b| format!("{b:02x}")).collect();
            return format!("it starts with {}", head.join(" "));
        }
    };
    what.into()
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
