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
    /// Its functions: name, address, bytes. They are in the first segment.
    pub functions: Vec<(Vec<u8>, u64, u64)>,
    /// Sections that are not loaded, such as debug information: name and contents.
    pub sections: Vec<(&'static str, Vec<u8>)>,
}

impl ElfBuilder {
    /// An x86_64 executable without segments.
    pub fn new(entry: u64) -> Self {
        Self {
            class: 2,
            endian: 1,
            kind: 2,
            machine: 62,
            entry,
            segments: Vec::new(),
            functions: Vec::new(),
            sections: Vec::new(),
        }
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

    /// Adds a function of so many bytes to the symbol table. Its name may be any bytes but zero.
    #[must_use]
    pub fn function(mut self, name: impl Into<Vec<u8>>, address: u64, bytes: u64) -> Self {
        self.functions.push((name.into(), address, bytes));
        self
    }

    /// Adds a section that is not loaded.
    #[must_use]
    pub fn section(mut self, name: &'static str, contents: impl Into<Vec<u8>>) -> Self {
        self.sections.push((name, contents.into()));
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
        if !self.functions.is_empty() || !self.sections.is_empty() {
            self.add_sections(&mut image);
        }
        image
    }

    /// Adds all sections and the table of them: the first segment as `.text`, the symbols, and the
    /// others.
    fn add_sections(&self, image: &mut Vec<u8>) {
        let (mut symbols, mut names) = (vec![0; 24], vec![0]);
        for (name, address, bytes) in &self.functions {
            symbols.extend((names.len() as u32).to_le_bytes());
            // A global function in section 1.
            symbols.extend([0x12, 0, 1, 0]);
            symbols.extend([*address, *bytes].map(u64::to_le_bytes).concat());
            names.extend_from_slice(name);
            names.push(0);
        }
        let text = self.segments.first();
        let (text_at, text_bytes) = text.map_or((0, 0), |s| (s.gva, s.bytes.len() as u64));
        let text_offset = (HEADER + PROGRAM_HEADER * self.segments.len()) as u64;
        // Name, type, flags, address, offset, bytes, link, info, bytes of an entry.
        type Row = (&'static str, u32, u64, u64, u64, u64, u32, u32, u64);
        let mut rows: Vec<Row> = vec![("", 0, 0, 0, 0, 0, 0, 0, 0)];
        rows.push((".text", 1, 6, text_at, text_offset, text_bytes, 0, 0, 0));
        let mut add = |name, kind, link, entry, contents: &[u8]| {
            rows.push((
                name,
                kind,
                0,
                0,
                image.len() as u64,
                contents.len() as u64,
                link,
                u32::from(kind == 2),
                entry,
            ));
            image.extend_from_slice(contents);
        };
        add(".symtab", 2, 3, 24, &symbols);
        add(".strtab", 3, 0, 0, &names);
        for (name, contents) in &self.sections {
            add(name, 1, 0, 0, contents);
        }
        let mut all: Vec<u8> = vec![0];
        let names_of = self.sections.iter().map(|(name, _)| *name);
        for name in [".text", ".symtab", ".strtab"].into_iter().chain(names_of).chain([".shstrtab"])
        {
            all.extend(name.bytes().chain([0]));
        }
        add(".shstrtab", 3, 0, 0, &all);
        image.resize(image.len().next_multiple_of(8), 0);
        let table = image.len() as u64;
        image[40..48].copy_from_slice(&table.to_le_bytes());
        for (field, value) in [(58, 64), (60, rows.len() as u16), (62, rows.len() as u16 - 1)] {
            image[field..field + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        let mut name_at = 1;
        for (name, kind, flags, address, offset, bytes, link, info, entry) in rows {
            let at = if name.is_empty() { 0 } else { name_at };
            name_at += if name.is_empty() { 0 } else { name.len() as u32 + 1 };
            image.extend([at, kind].map(u32::to_le_bytes).concat());
            image.extend([flags, address, offset, bytes].map(u64::to_le_bytes).concat());
            image.extend([link, info].map(u32::to_le_bytes).concat());
            image.extend([1, entry].map(u64::to_le_bytes).concat());
        }
    }
}

/// A 64-bit ELF file with a section `name` that holds `content`.
pub fn with_section(name: &str, content: &[u8]) -> Vec<u8> {
    let mut file = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let section = file.add_section(Vec::new(), name.into(), SectionKind::ReadOnlyData);
    file.set_section_data(section, content, 1);
    file.write().expect("a file of one section")
}
