//! Kernels and initrds that the loader puts into guest memory: ELF files, PVH notes, bzImages, and
//! whatever else a file may be, in memory and on disk.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};
use rustix::fs::{MemfdFlags, memfd_create};
use umbra::machine::layout;
use umbra::machine::loader::{
    Boot, DiskFile, Limit, LoadedKernel, Protocol, Source, StartState, is_bzimage, is_linux, load,
};
use umbra::machine::memory::Ram;
use umbra::sandbox::instrumentation::warnings;
use umbra_testkit::elf::{ElfBuilder, Segment};

use crate::{request, show};

/// Guest memory.
const RAM: u64 = 4 << 20;
/// Bytes of a bzImage's setup code.
const SETUP: usize = 1024;

/// A kernel and its options.
#[derive(Debug, Arbitrary)]
struct Parts {
    options: Options,
    kind: Kind,
    /// Bytes that are changed at last.
    patches: Vec<(u16, u8)>,
}

/// All but the kernel.
#[derive(Clone, Copy, Debug, Default, Arbitrary)]
struct Options {
    protocol: u8,
    unpack: bool,
    cmdline: u16,
    zero: bool,
    /// Bytes of an initrd, in units of 64.
    initrd: Option<u16>,
    on_disk: bool,
    /// A power of two to which the file is extended by a hole.
    sparse: Option<u8>,
}

#[derive(Debug, Arbitrary)]
enum Kind {
    Elf { entry: Address, kind: u8, segments: Vec<Part>, note: Option<Note> },
    BzImage { header: Header, code: Vec<u8>, packed: Option<Vec<u8>> },
    Bytes(Vec<u8>),
}

/// A number that is often an address of guest memory.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Address {
    Near(u16),
    High(u16),
    End(i8),
    Any(u64),
}

impl Address {
    fn value(self) -> u64 {
        match self {
            Self::Near(more) => layout::KERNEL_START + u64::from(more),
            Self::High(more) => 0xffff_ffff_8000_0000 + layout::KERNEL_START + u64::from(more),
            Self::End(more) => RAM.wrapping_add_signed(more.into()),
            Self::Any(value) => value,
        }
    }
}

/// A segment.
#[derive(Debug, Arbitrary)]
struct Part {
    kind: u8,
    gpa: Address,
    gva: Address,
    bytes: Vec<u8>,
    file_size: Option<u64>,
    memory: Option<u32>,
    offset: Option<u64>,
}

/// A note as of PVH.
#[derive(Debug, Arbitrary)]
struct Note {
    name: u32,
    size: u32,
    kind: u8,
    entry: Address,
    before: Vec<u8>,
}

/// Fields of a bzImage's header.
#[derive(Debug, Arbitrary)]
struct Header {
    sectors: u8,
    size: u16,
    length: u8,
    version: u16,
    flags: u8,
    preferred: Address,
    init: u32,
    initrd: u32,
    offset: u16,
    payload: u32,
}

/// Loads what the bytes are or describe.
pub fn run(data: &[u8]) {
    let is_file = data.starts_with(b"\x7fELF") || data.get(0x202..0x206) == Some(b"HdrS");
    if is_file {
        let unpack = Options { unpack: true, ..Options::default() };
        let both = Options { initrd: Some(3), on_disk: true, ..Options::default() };
        [unpack, both].iter().for_each(|options| boot(data, options));
        return;
    }
    let Ok(parts) = Parts::arbitrary_take_rest(Unstructured::new(data)) else { return };
    show(&parts);
    let mut file = match &parts.kind {
        Kind::Elf { entry, kind, segments, note } => {
            elf(entry.value(), *kind, segments, note.as_ref())
        }
        Kind::BzImage { header, code, packed } => bzimage(header, code, packed.as_deref()),
        Kind::Bytes(bytes) => bytes.clone(),
    };
    for (at, byte) in &parts.patches {
        if let Some(place) = file.get_mut(usize::from(*at)) {
            *place = *byte;
        }
    }
    boot(&file, &parts.options);
}

fn elf(entry: u64, kind: u8, segments: &[Part], note: Option<&Note>) -> Vec<u8> {
    let mut elf = ElfBuilder::new(entry);
    elf.kind = 2 + u16::from(kind & 1);
    for part in segments {
        elf.segments.push(Segment {
            kind: [1, 1, 1, 4, 2, 3, 6, 7][usize::from(part.kind % 8)],
            gpa: part.gpa.value(),
            gva: part.gva.value(),
            bytes: part.bytes.clone(),
            file_size: part.file_size,
            memory_size: part.memory.map(u64::from),
            offset: part.offset,
        });
    }
    if let Some(note) = note {
        let mut bytes = note.before.clone();
        for field in [note.name, note.size, 16 + u32::from(note.kind % 4)] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(b"Xen\0");
        bytes.extend(note.entry.value().to_le_bytes());
        elf = elf.segment(0, bytes).with(|segment| segment.kind = 4);
    }
    elf.build()
}

fn bzimage(header: &Header, code: &[u8], packed: Option<&[u8]>) -> Vec<u8> {
    let mut file = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[header.sectors]);
    put(0x1f4, &u32::from(header.size).to_le_bytes());
    put(0x201, &[header.length]);
    put(0x202, b"HdrS");
    put(0x206, &header.version.to_le_bytes());
    put(0x211, &[header.flags]);
    put(0x22c, &header.initrd.to_le_bytes());
    put(0x236, &[header.flags, 0]);
    put(0x248, &u32::from(header.offset).to_le_bytes());
    put(0x24c, &header.payload.to_le_bytes());
    put(0x258, &header.preferred.value().to_le_bytes());
    put(0x260, &header.init.to_le_bytes());
    file.extend_from_slice(code);
    if let Some(packed) = packed {
        // The payload, where the header may say that it is.
        let at = SETUP + usize::from(header.offset);
        file.resize(file.len().max(at), 0);
        file.extend(0x184c_2102u32.to_le_bytes());
        file.extend((packed.len() as u32).to_le_bytes());
        file.extend_from_slice(packed);
        file.extend(header.init.to_le_bytes());
    }
    // More than the size in the header, so that there is no checksum.
    file.resize(file.len().max(SETUP + usize::from(header.size) * 16 + 17), 0x90);
    file
}

/// A file on disk, or in what the host takes for one.
fn on_disk(bytes: &[u8], sparse: Option<u8>) -> Option<(File, DiskFile)> {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?);
    file.write_all(bytes).ok()?;
    if let Some(power) = sparse {
        file.set_len((bytes.len() as u64).max(1 << (power % 43))).ok()?;
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Some((file, DiskFile::open("kernel", Path::new(&path)).ok()?))
}

/// Boots a file as far as the loader goes.
fn boot(file: &[u8], options: &Options) {
    let disk = options.on_disk.then(|| on_disk(file, options.sparse)).flatten();
    if options.on_disk && disk.is_none() {
        return;
    }
    let image = disk.as_ref().map_or(Source::from(file), |(_, file)| Source::Disk(file));
    let initrd = options.initrd.map(|bytes| vec![0x55; usize::from(bytes) * 64]);
    let mut cmdline = "x".repeat(usize::from(options.cmdline) % 2100);
    if options.zero {
        cmdline.push('\0');
    }
    let protocols = [Protocol::Auto, Protocol::Elf, Protocol::Pvh, Protocol::BzImage];
    let boot = Boot {
        image,
        cmdline: &cmdline,
        initrd: initrd.as_deref().map(Source::from),
        protocol: protocols[usize::from(options.protocol) % 4],
        unpack: options.unpack,
        limit: Limit::default(),
    };
    let ram = Ram::new(RAM).expect("there is host memory");
    let linux = request(|| is_linux(&ram, image, &boot.limit));
    let compressed = request(|| is_bzimage(image));
    let warnings = request(|| warnings(image, &boot.limit));
    assert!(warnings.is_err() || warnings.is_ok_and(|all| all.len() <= 1));
    assert!(compressed.is_err() || !compressed.is_ok_and(|is| is) || linux.is_ok_and(|is| is));
    match request(|| load(&ram, &boot)) {
        Ok(kernel) => check(&ram, &kernel),
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    }
}

/// A loaded kernel lies in memory, above what the loader writes for it.
fn check(ram: &Ram, kernel: &LoadedKernel) {
    let LoadedKernel { entry, state, start, end } = *kernel;
    assert!(layout::KERNEL_START <= start.0 && start < end && end.0 <= ram.end(), "{kernel:x?}");
    assert!(start <= entry && entry < end, "{kernel:x?}");
    if state == StartState::Pvh {
        assert!(entry.0 < 1 << 32, "{kernel:x?}");
    }
}
