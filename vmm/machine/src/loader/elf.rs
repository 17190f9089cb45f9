//! 64-bit ELF kernels.

use vm_memory::GuestAddress;

use super::source::{Limit, Source};
use super::{
    HEAD, LoadError, LoadedKernel, StartState, foreign_format, layout, u16_at, u32_at, u64_at,
};
use crate::memory::Ram;

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
/// Most program headers. Linkers write some ten for a kernel.
pub(super) const MAX_HEADERS: u16 = 64;
/// Most bytes of a segment of notes that are looked at. Linux's has less than a hundredth.
const NOTES_MAX: u64 = 64 << 10;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_DYNAMIC: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// The note with the PVH entry point, and its owner (Xen, xen/include/public/elfnote.h).
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";
/// The start of the line that Linux prints first.
const BANNER: &[u8] = b"Linux version ";

/// Whether a file starts as an ELF file.
pub(super) fn is_one(image: &[u8]) -> bool {
    image.starts_with(ELF_MAGIC)
}

/// One `PT_LOAD` program header, whose parts of the file and of memory were checked.
#[derive(Debug)]
struct Segment {
    index: usize,
    gpa: u64,
    end: u64,
    gva: u64,
    offset: u64,
    /// Its bytes in the file: at most those in memory.
    file: u64,
}

/// A checked ELF file.
#[derive(Debug)]
pub(super) struct Elf {
    pub(super) kernel: LoadedKernel,
    /// By rising address; they do not overlap. So they are no more than guest memory, together.
    segments: Vec<Segment>,
    /// The entry point in its PVH note, if it has one.
    pub(super) pvh_entry: Option<u64>,
}

/// Checks all fields of `image` that are needed to load it into `ram`. Changes nothing.
pub(super) fn check(ram: &Ram, image: Source) -> Result<Elf, LoadError> {
    let header = image.head(HEAD)?;
    if !is_one(&header) {
        return Err(LoadError::NotElf(foreign_format(&header)));
    }
    if header.len() < EHDR_BYTES {
        return Err(LoadError::HeaderCutOff(header.len()));
    }
    if header[4] != CLASS_64 {
        return Err(LoadError::Not64Bit);
    }
    if header[5] != DATA_LITTLE_ENDIAN {
        return Err(LoadError::BigEndian);
    }
    let (kind, machine) = (u16_at(&header, 16), u16_at(&header, 18));
    if machine != MACHINE_X86_64 {
        return Err(LoadError::ForeignMachine(machine));
    }
    if kind != TYPE_EXECUTABLE && kind != TYPE_DYNAMIC {
        return Err(LoadError::NotExecutable(kind));
    }
    let headers = program_headers(image, &header)?;
    let segments = segments(ram, image, &headers)?;
    let (Some(start), Some(end)) =
        (segments.iter().map(|s| s.gpa).min(), segments.iter().map(|s| s.end).max())
    else {
        return Err(LoadError::NoSegment);
    };
    let kernel = LoadedKernel {
        entry: entry(&segments, u64_at(&header, 24))?,
        state: StartState::Linux64,
        start: GuestAddress(start),
        end: GuestAddress(end),
    };
    Ok(Elf { kernel, segments, pvh_entry: pvh_entry(image, &headers)? })
}

/// The entry point. Linux gives a physical one, other kernels a virtual one.
fn entry(segments: &[Segment], entry: u64) -> Result<GuestAddress, LoadError> {
    let physical = segments.iter().any(|s| (s.gpa..s.end).contains(&entry)).then_some(entry);
    let from_virtual = |s: &Segment| {
        let offset = entry.checked_sub(s.gva)?;
        s.gpa.checked_add(offset).filter(|gpa| *gpa < s.end)
    };
    physical
        .or_else(|| segments.iter().find_map(from_virtual))
        .map(GuestAddress)
        .ok_or(LoadError::EntryOutside(entry))
}

/// The table of program headers.
fn program_headers(image: Source, header: &[u8]) -> Result<Vec<u8>, LoadError> {
    let (offset, size, count) = (u64_at(header, 32), u16_at(header, 54), u16_at(header, 56));
    if count == 0 {
        return Err(LoadError::NoSegment);
    }
    if count > MAX_HEADERS {
        return Err(LoadError::ManyProgramHeaders(count));
    }
    if usize::from(size) != PHDR_BYTES || offset < EHDR_BYTES as u64 {
        return Err(LoadError::BadProgramHeaders { offset, size, count });
    }
    let bytes = usize::from(count) * PHDR_BYTES;
    in_file(image, "the program header table".into(), offset, bytes as u64)?;
    let mut table = vec![0; bytes];
    image.read(offset, &mut table)?;
    Ok(table)
}

fn in_file(image: Source, what: String, offset: u64, bytes: u64) -> Result<(), LoadError> {
    let (need, have) = (u128::from(offset) + u128::from(bytes), image.bytes());
    if need > u128::from(have) { Err(LoadError::CutOff { what, need, have }) } else { Ok(()) }
}

fn segments(ram: &Ram, image: Source, headers: &[u8]) -> Result<Vec<Segment>, LoadError> {
    let mut found: Vec<Segment> = Vec::new();
    for (index, header) in headers.chunks_exact(PHDR_BYTES).enumerate() {
        let kind = u32_at(header, 0);
        let (offset, gva, gpa) = (u64_at(header, 8), u64_at(header, 16), u64_at(header, 24));
        let (file, memory) = (u64_at(header, 32), u64_at(header, 40));
        // Notes are read, too.
        if kind == SEGMENT_LOAD || kind == SEGMENT_NOTE {
            in_file(image, format!("segment {index}"), offset, file)?;
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
                LoadError::OutsideMemory { index, gpa, bytes: memory, is_virtual: gpa == gva }
            });
        }
        found.push(Segment { index, gpa, end, gva, offset, file });
    }
    found.sort_by_key(|s| s.gpa);
    for pair in found.windows(2) {
        if pair[0].end > pair[1].gpa {
            return Err(LoadError::Overlap { first: pair[0].index, second: pair[1].index });
        }
    }
    Ok(found)
}

impl Elf {
    /// Whether the file holds the line that Linux prints first.
    pub(super) fn has_linux_banner(&self, image: Source, limit: &Limit) -> Result<bool, LoadError> {
        let mut found = false;
        for segment in &self.segments {
            let range = segment.offset..segment.offset + segment.file;
            image.blocks(range, BANNER.len() - 1, limit, |block| {
                found = memchr::memmem::find(block, BANNER).is_some();
                !found
            })?;
            if found {
                break;
            }
        }
        Ok(found)
    }

    /// The PVH entry point, which must be in the kernel.
    pub(super) fn check_pvh_entry(&self) -> Result<GuestAddress, LoadError> {
        let entry = self.pvh_entry.ok_or(LoadError::NoPvhNote)?;
        let inside = self.segments.iter().any(|s| (s.gpa..s.end).contains(&entry));
        // The CPU starts with 32-bit addresses.
        if inside && u32::try_from(entry).is_ok() {
            Ok(GuestAddress(entry))
        } else {
            Err(LoadError::EntryOutside(entry))
        }
    }

    /// Copies the segments to their addresses. The rest of their memory is zero already.
    pub(super) fn load(&self, ram: &Ram, image: Source, limit: &Limit) -> Result<(), LoadError> {
        for segment in &self.segments {
            let range = segment.offset..segment.offset + segment.file;
            image.copy(range, ram, segment.gpa, limit)?;
        }
        Ok(())
    }
}

/// The entry point in a PVH note, if there is one.
fn pvh_entry(image: Source, headers: &[u8]) -> Result<Option<u64>, LoadError> {
    for header in headers.chunks_exact(PHDR_BYTES) {
        if u32_at(header, 0) == SEGMENT_NOTE {
            let (offset, bytes) = (u64_at(header, 8), u64_at(header, 32));
            if let Some(entry) = entry_in_notes(&image.part(offset, bytes.min(NOTES_MAX))?) {
                return Ok(Some(entry));
            }
        }
    }
    Ok(None)
}

/// The entry point in a segment of notes.
fn entry_in_notes(mut notes: &[u8]) -> Option<u64> {
    // Name and description are padded to 4 bytes each (System V ABI, "Note Section").
    loop {
        let (name, bytes) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize);
        let body = notes.get(12..)?;
        let description = body.get(name.checked_next_multiple_of(4)?..)?.get(..bytes)?;
        if u32_at(notes, 8) == NOTE_PHYS32_ENTRY && body.get(..name)? == NOTE_OWNER {
            return match bytes {
                4 => Some(u32_at(description, 0).into()),
                8 => Some(u64_at(description, 0)),
                _ => None,
            };
        }
        let padded = name.checked_next_multiple_of(4)?;
        notes = body.get(padded.checked_add(bytes.checked_next_multiple_of(4)?)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_looked_at_to_a_limit() {
        let note = |kind: u32, name: &[u8], description: &[u8]| {
            let numbers = [name.len() as u32, description.len() as u32, kind];
            [&numbers.map(u32::to_le_bytes).concat(), name, description].concat()
        };
        let entry = note(NOTE_PHYS32_ENTRY, NOTE_OWNER, &0x10_0000u32.to_le_bytes());
        // Before it, another note of so many bytes.
        let entry_behind = |bytes: u64| {
            let description = vec![0; bytes as usize - 16];
            let notes = [note(1, b"abc\0", &description), entry.clone()].concat();
            let mut header = vec![0; PHDR_BYTES];
            header[..4].copy_from_slice(&SEGMENT_NOTE.to_le_bytes());
            header[32..40].copy_from_slice(&(notes.len() as u64).to_le_bytes());
            pvh_entry(notes.as_slice().into(), &header).unwrap()
        };
        let last = NOTES_MAX - entry.len() as u64;
        assert_eq!(entry_behind(last), Some(0x10_0000));
        assert_eq!(entry_behind(last + 4), None, "it ends beyond the limit");
    }
}
