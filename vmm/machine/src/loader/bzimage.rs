//! Linux's bzImage: a setup header (Linux, Documentation/x86/boot.rst), and code that unpacks the
//! kernel.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestAddress};

use super::source::{Limit, Source};
use super::{LoadError, LoadedKernel, StartState, foreign_format, layout, u16_at, u32_at};
use crate::memory::Ram;

/// The offset of the setup header, in the file as in `boot_params`.
const HEADER: usize = 0x1f1;
/// Its magic number, "HdrS".
const MAGIC: usize = 0x202;
const MAGIC_VALUE: &[u8] = b"HdrS";
/// The offset of the byte with the header's length from [`MAGIC`] on.
const HEADER_LENGTH: usize = 0x201;
/// The end of the shortest header of protocol 2.12.
const HEADER_END: usize = 0x268;
/// More than the setup header, whose length is one byte.
const HEAD: usize = 1024;
const OLDEST_PROTOCOL: u16 = 0x20c;
const SECTOR: u64 = 512;
const PARAGRAPH: u64 = 16;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point, from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

/// A checked bzImage.
pub(super) struct BzImage {
    pub(super) header: setup_header,
    pub(super) kernel: LoadedKernel,
    /// The offset of the protected-mode code in the file.
    pub(super) code: u64,
    /// The limit of an initrd's end.
    pub(super) initrd_end: u64,
}

/// Whether a file has the setup header's magic number.
pub(super) fn is_one(image: &[u8]) -> bool {
    image.get(MAGIC..MAGIC + MAGIC_VALUE.len()) == Some(MAGIC_VALUE)
}

/// Checks all fields of `file` that are needed to load it into `ram`. Changes nothing.
pub(super) fn check(ram: &Ram, file: Source, limit: &Limit) -> Result<BzImage, LoadError> {
    let have = file.bytes();
    let image = file.head(HEAD)?;
    let header = read_header(&image, have)?;
    // 0 means 4, in kernels much older than these.
    let setup = (u64::from(match header.setup_sects {
        0 => 4,
        sectors => sectors,
    }) + 1)
        * SECTOR;
    let code = u64::from(header.syssize) * PARAGRAPH;
    // The size counts whole paragraphs, and the file may end inside the last one.
    if setup + code > have + (PARAGRAPH - 1) {
        let what = "the kernel's code".into();
        return Err(LoadError::CutOff { what, need: (setup + code).into(), have });
    }
    let (start, init) = (header.pref_address, u64::from(header.init_size));
    if code <= ENTRY_64 || code > init {
        return Err(LoadError::BadHeader("it needs less memory than it has code"));
    }
    if start < layout::KERNEL_START || !start.is_multiple_of(layout::PAGE) {
        return Err(LoadError::BadHeader("its preferred address is not one to load at"));
    }
    // The boot page tables reach to the hole. Data that is appended to the code is loaded with it.
    let appended = have.saturating_sub(setup);
    let end = start.checked_add(init.max(appended)).filter(|end| *end <= layout::HOLE_START);
    let Some(end) = end else {
        return Err(LoadError::BadHeader("its preferred address is not one to load at"));
    };
    if !ram.contains(GuestAddress(start), end - start) {
        return Err(LoadError::MemoryTooSmall { need: end, have: ram.bytes() });
    }
    // An appended signature is made after the checksum, and changes bytes that the checksum covers.
    if setup + code == have && checksum(file, limit)? != !0 {
        return Err(LoadError::Checksum);
    }
    let initrd_end = u64::from(u32_at(&image, 0x22c)) + 1;
    let kernel = LoadedKernel {
        entry: GuestAddress(start + ENTRY_64),
        state: StartState::Linux64,
        start: GuestAddress(start),
        end: GuestAddress(end),
    };
    Ok(BzImage { header, kernel, code: setup, initrd_end })
}

/// The checksum of a whole file, which is no larger than guest memory.
fn checksum(file: Source, limit: &Limit) -> Result<u32, LoadError> {
    let mut hasher = crc32fast::Hasher::new();
    file.blocks(0..file.bytes(), 0, limit, |block| {
        hasher.update(block);
        true
    })?;
    Ok(hasher.finalize())
}

/// The setup header of a file that starts with `image` and has `have` bytes.
fn read_header(image: &[u8], have: u64) -> Result<setup_header, LoadError> {
    if !is_one(image) {
        return Err(LoadError::NotBzImage(foreign_format(image)));
    }
    let cut_off =
        |what: &str, need: u64| LoadError::CutOff { what: what.into(), need: need.into(), have };
    let end = MAGIC + usize::from(image[HEADER_LENGTH]);
    if image.len() < end.max(HEADER_END) {
        return Err(cut_off("the setup header", end.max(HEADER_END) as u64));
    }
    let version = u16_at(image, 0x206);
    if version < OLDEST_PROTOCOL {
        return Err(LoadError::OldProtocol(version));
    }
    if end < HEADER_END {
        return Err(LoadError::BadHeader("it is too short for its protocol"));
    }
    let mut header = setup_header::default();
    let known = size_of::<setup_header>().min(end - HEADER);
    header.as_mut_slice()[..known].copy_from_slice(&image[HEADER..HEADER + known]);
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(LoadError::BadHeader("it is not loaded high (a zImage)"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LoadError::Not64Bit);
    }
    Ok(header)
}

/// Copies the protected-mode code to its preferred address.
pub(super) fn load(
    ram: &Ram,
    file: Source,
    found: &BzImage,
    limit: &Limit,
) -> Result<(), LoadError> {
    file.copy(found.code..file.bytes(), ram, found.kernel.start.0, limit)
}
