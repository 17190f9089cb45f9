//! Small ELF executables, good and broken ones.

use object::write::Object;
use object::{Architecture, BinaryFormat, Endianness, SectionKind};

/// Type of a segment that is loaded.
pub const PT_LOAD: u32 = 1;
/// Bytes of the ELF header, and of one program header behind it.
pub const HEADER: usize = 64;
/// Bytes of one program header.
pub const PROGRAM_HEADER: usize = 56;

/// One segment.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its type.
    pub kind: u32,
    /// Guest-physical address.
    pub gpa: u64,
    /// Guest-virtual address.
    pub gva: u64,
    /// Its contents in the file.
    pub bytes: Vec<u8>,
    /// The file size in the header; the true one if `None`.
    pub file_size: Option<u64>,
    /// Bytes in memory; as many as in the file if `None`.
    pub memory_size: Option<u64>,
    /// The file offset in the header; the true one if `None`.
    pub offset: Option<u64>,
}

/// Builds an ELF file from its parts, each of which may be wrong. Libraries such as `object` write
/// good files only.
#[derive(Clone, Debug)]
pub struct ElfBuilder {
    /// 1: 32 bit, 2: 64 bit.
    pub class: u8,
    /// 1: little endian, 2: big endian.
    pub endian: u8,
    /// 2: executable, 3: position-independent.
    pub kind: u16,
    /// 62: x86_64.
    pub machine: u16,
    /// The entry point.
    pub entry: u64,
    /// Its segments.
    pub segments: Vec<Segment>,
}

impl ElfBuilder {
    /// An x86_64 executable without segments.
    pub fn new(entry: u64) -> Self {
        Self { class: 2, endian: 1, kind: 2, machine: 62, entry, segments: Vec::new() }
    }

    /// Adds `bytes` at `gpa`, which is their virtual address too.
    #[must_use]
    pub fn segment(mut self, gpa: u64, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        self.segments.push(Segment {
            kind: PT_LOAD,
            gpa,
            gva: gpa,
            bytes,
            file_size: None,
            memory_size: None,
            offset: None,
        });
        self
    }

    /// Changes the segment that was added last.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Segment)) -> Self {
        if let Some(last) = self.segments.last_mut() {
            change(last);
        }
        self
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        let mut image = b"\x7fELF".to_vec();
        image.extend([self.class, self.endian, 1]);
        image.resize(16, 0);
        for field in [self.kind, self.machine] {
            image.extend(field.to_le_bytes());
        }
        image.extend(1u32.to_le_bytes());
        for field in [self.entry, HEADER as u64, 0] {
            image.extend(field.to_le_bytes());
        }
        image.extend(0u32.to_le_bytes());
        for field in [HEADER as u16, PROGRAM_HEADER as u16, self.segments.len() as u16, 0, 0, 0] {
            image.extend(field.to_le_bytes());
        }
        let mut at = (HEADER + PROGRAM_HEADER * self.segments.len()) as u64;
        for segment in &self.segments {
            let have = segment.bytes.len() as u64;
            let file = segment.file_size.unwrap_or(have);
            image.extend(segment.kind.to_le_bytes());
            image.extend(7u32.to_le_bytes());
            let (offset, memory) =
                (segment.offset.unwrap_or(at), segment.memory_size.unwrap_or(file));
            for field in [offset, segment.gva, segment.gpa, file, memory, 4096] {
                image.extend(field.to_le_bytes());
            }
            at += have;
        }
        for segment in &self.segments {
            image.extend_from_slice(&segment.bytes);
        }
        image
    }
}

/// A 64-bit ELF file with a section `name` that holds `content`.
pub fn with_section(name: &str, content: &[u8]) -> Vec<u8> {
    let mut file = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let section = file.add_section(Vec::new(), name.into(), SectionKind::ReadOnlyData);
    file.set_section_data(section, content, 1);
    file.write().expect("a file of one section")
}
