//! 64-bit ELF kernels.

use std::io::Cursor;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{LoadError, LoadedKernel, StartState, foreign_format, layout, u16_at, u32_at, u64_at};
use crate::memory::Ram;

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
/// The note with the PVH entry point, and its owner (Xen, xen/include/public/elfnote.h).
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";

/// Whether a file starts as an ELF file.
pub(super) fn is_one(image: &[u8]) -> bool {
    image.starts_with(ELF_MAGIC)
}

/// One `PT_LOAD` program header.
struct Segment {
    index: usize,
    gpa: u64,
    end: u64,
    gva: u64,
}

/// Checks all fields of `image` that are needed to load it into `ram`. Changes nothing.
pub(super) fn check(ram: &Ram, image: &[u8]) -> Result<LoadedKernel, LoadError> {
    if !is_one(image) {
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
    Ok(LoadedKernel {
        entry: GuestAddress(entry),
        state: StartState::Linux64,
        start: GuestAddress(start),
        end: GuestAddress(end),
    })
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
                LoadError::OutsideMemory { index, gpa, bytes: memory, is_virtual: gpa == gva }
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

/// The parts of the file in program headers of one type, as far as they are in the file.
fn parts(image: &[u8], kind: u32) -> impl Iterator<Item = &[u8]> {
    let (offset, count) = (u64_at(image, 32), u16_at(image, 56));
    (0..usize::from(count)).filter_map(move |index| {
        let at = usize::try_from(offset).ok()?.checked_add(index * PHDR_BYTES)?;
        let header = image.get(at..)?.get(..PHDR_BYTES)?;
        let (start, bytes) = (u64_at(header, 8), u64_at(header, 32));
        let end = start.checked_add(bytes)?;
        (u32_at(header, 0) == kind).then(|| image.get(start as usize..end as usize)).flatten()
    })
}

/// Whether an ELF file holds the line that Linux prints first.
pub(super) fn has_linux_banner(image: &[u8]) -> bool {
    is_one(image)
        && parts(image, SEGMENT_LOAD)
            .any(|part| memchr::memmem::find(part, b"Linux version ").is_some())
}

/// The entry point in an ELF file's PVH note, if it has one.
pub(super) fn pvh_entry(image: &[u8]) -> Option<u64> {
    if !is_one(image) {
        return None;
    }
    parts(image, SEGMENT_NOTE).find_map(|mut notes| {
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
            notes =
                body.get(name.checked_next_multiple_of(4)? + bytes.checked_next_multiple_of(4)?..)?;
        }
    })
}

/// The PVH entry point, which must be in the kernel.
pub(super) fn check_pvh_entry(ram: &Ram, image: &[u8]) -> Result<GuestAddress, LoadError> {
    let entry = pvh_entry(image).ok_or(LoadError::NoPvhNote)?;
    let inside = segments(ram, image)?.iter().any(|s| (s.gpa..s.end).contains(&entry));
    // The CPU starts with 32-bit addresses.
    if inside && u32::try_from(entry).is_ok() {
        Ok(GuestAddress(entry))
    } else {
        Err(LoadError::EntryOutside(entry))
    }
}

/// Copies the segments to their addresses.
pub(super) fn load(ram: &Ram, image: &[u8]) -> Result<(), LoadError> {
    Elf::load(ram.inner(), None, &mut Cursor::new(image), None).map_err(LoadError::Loader)?;
    Ok(())
}
