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
#[cfg(test)]
mod tests;
mod unpack;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::GuestAddress;

use super::layout;
use super::memory::{NotRam, Ram};
pub use linux::{Emulated, with_defaults};
pub(super) use params::write_boot_tables;
pub use params::{GDT, GDT_PVH};

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
    #[error("{what} {path} is not a regular file")]
    NotAFile { what: &'static str, path: PathBuf },
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
    #[error("cannot load the kernel: {0}")]
    Loader(linux_loader::loader::Error),
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
    pub image: &'a [u8],
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// A file for the kernel to find in memory.
    pub initrd: Option<&'a [u8]>,
    /// How to boot.
    pub protocol: Protocol,
    /// Unpack the kernel of a bzImage here and not in the guest, if `protocol` leaves the choice.
    pub unpack: bool,
}

impl<'a> Boot<'a> {
    /// A kernel without an initrd.
    pub fn new(image: &'a [u8], cmdline: &'a str) -> Self {
        Self { image, cmdline, initrd: None, protocol: Protocol::Auto, unpack: false }
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

/// Reads a kernel or an initrd (`what`). It must be a regular file of at most [`MAX_IMAGE`] bytes.
///
/// # Errors
/// It is no regular file, too large, or cannot be read.
pub fn read_file(what: &'static str, path: &Path) -> Result<Vec<u8>, LoadError> {
    let fail = |source| LoadError::Read { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(LoadError::NotAFile { what, path: path.to_owned() });
    }
    if meta.len() > MAX_IMAGE {
        return Err(LoadError::TooLarge { what, bytes: meta.len() });
    }
    // The full size at once: growing would take twice as much for a while.
    let mut image = Vec::new();
    image
        .try_reserve_exact(meta.len() as usize + 1)
        .map_err(|error| fail(io::Error::other(error)))?;
    file.take(MAX_IMAGE).read_to_end(&mut image).map_err(fail)?;
    Ok(image)
}

/// Whether a kernel file is Linux for x86, by its header or by its banner.
pub fn is_linux(image: &[u8]) -> bool {
    bzimage::is_one(image) || elf::has_linux_banner(image)
}

/// Whether a kernel file is a Linux bzImage, by its header.
pub fn is_bzimage(image: &[u8]) -> bool {
    bzimage::is_one(image)
}

/// Checks the files of `boot`, loads them into `ram`, and writes the boot structures.
///
/// # Errors
/// A file is not what it should be, or does not fit into RAM.
pub fn load(ram: &Ram, boot: &Boot) -> Result<LoadedKernel, LoadError> {
    let &Boot { image, cmdline, initrd, protocol, unpack } = boot;
    if image.is_empty() {
        return Err(LoadError::Empty);
    }
    let unpack = unpack && protocol == Protocol::Auto;
    let protocol = match protocol {
        Protocol::Auto if bzimage::is_one(image) => Protocol::BzImage,
        Protocol::Auto if !elf::is_one(image) => {
            return Err(LoadError::NotKernel(foreign_format(image)));
        }
        Protocol::Auto if elf::pvh_entry(image).is_some() && !elf::has_linux_banner(image) => {
            Protocol::Pvh
        }
        Protocol::Auto => Protocol::Elf,
        forced => forced,
    };
    check_cmdline(cmdline)?;
    let kernel = match protocol {
        Protocol::BzImage => {
            let mut found = bzimage::check(ram, image)?;
            let unpacked =
                if unpack { unpack::kernel(image, found.code, &found.header) } else { None };
            // If its contents are not as expected, its own code unpacks it.
            let unpacked = unpacked.and_then(|elf| Some((elf::check(ram, &elf).ok()?, elf)));
            if let Some((kernel, _)) = &unpacked {
                found.kernel = *kernel;
            }
            let initrd =
                initrd.map(|initrd| place_initrd(ram, initrd, &found.kernel, found.initrd_end));
            let initrd = initrd.transpose()?;
            match unpacked {
                Some((_, elf)) => elf::load(ram, &elf)?,
                None => bzimage::load(ram, image, &found)?,
            }
            params::write_boot_params(ram, found.header, cmdline, initrd.as_ref())?;
            found.kernel
        }
        Protocol::Auto | Protocol::Elf | Protocol::Pvh => {
            let mut kernel = elf::check(ram, image)?;
            let initrd =
                initrd.map(|initrd| place_initrd(ram, initrd, &kernel, layout::HOLE_START));
            let initrd = initrd.transpose()?;
            if protocol == Protocol::Pvh {
                (kernel.entry, kernel.state) = (elf::check_pvh_entry(ram, image)?, StartState::Pvh);
            }
            elf::load(ram, image)?;
            match kernel.state {
                StartState::Linux64 => {
                    params::write_boot_params(ram, params::elf_header(), cmdline, initrd.as_ref())?;
                }
                StartState::Pvh => pvh::write_start_info(ram, initrd.as_ref())?,
            }
            kernel
        }
    };
    ram.write(GuestAddress(layout::CMDLINE), cmdline.as_bytes())?;
    ram.write(GuestAddress(layout::CMDLINE + cmdline.len() as u64), &[0])?;
    params::write_boot_tables(ram)?;
    if kernel.state == StartState::Pvh {
        params::write_gdt(ram, &GDT_PVH)?;
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

/// Copies an initrd to the end of the RAM below `limit` and below the hole, above the kernel.
fn place_initrd(
    ram: &Ram,
    initrd: &[u8],
    kernel: &LoadedKernel,
    limit: u64,
) -> Result<Initrd, LoadError> {
    let bytes = initrd.len() as u64;
    if bytes == 0 {
        return Err(LoadError::EmptyInitrd);
    }
    let top = ram.bytes().min(layout::HOLE_START).min(limit);
    let bottom = kernel.end.0.next_multiple_of(layout::PAGE);
    let free = top.saturating_sub(bottom);
    if bytes > free {
        return Err(LoadError::InitrdTooLarge { bytes, free });
    }
    // `bottom` is a page's start, so that this does not go below it.
    let gpa = (top - bytes) & !(layout::PAGE - 1);
    ram.write(GuestAddress(gpa), initrd)?;
    Ok(Initrd { gpa, bytes })
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
