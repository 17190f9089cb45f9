//! The kernel inside a bzImage, unpacked before the guest runs.
//!
//! The code in front of it does the same in the guest, with some 90 million instructions for a
//! distribution's kernel: over a minute where ring 0 is emulated. That code also moves the kernel
//! to a random address, which is not done here.

use linux_loader::loader::bootparam::setup_header;

use super::u32_at;

/// Magic number of LZ4's legacy frames, which Linux uses (lz4, doc/lz4_Frame_format.md).
const LZ4_LEGACY: u32 = 0x184c_2102;
/// Most bytes of an unpacked block.
const LZ4_BLOCK: usize = 8 << 20;
/// Bytes of the unpacked size, which Linux puts behind the packed data (Linux,
/// scripts/Makefile.lib).
const SIZE: usize = 4;

/// The unpacked kernel of `image`, whose protected-mode code is at `code`; `None` if the format is
/// not known here, or the data is wrong: then its own code may try.
pub(super) fn kernel(image: &[u8], code: u64, header: &setup_header) -> Option<Vec<u8>> {
    let start = usize::try_from(code).ok()?.checked_add(header.payload_offset as usize)?;
    let payload = image.get(start..)?.get(..header.payload_length as usize)?;
    let packed = payload.get(..payload.len().checked_sub(SIZE)?)?;
    let size = u32_at(payload, packed.len());
    // The size is that of guest memory at most.
    if size > header.init_size || u32_at(packed, 0) != LZ4_LEGACY {
        return None;
    }
    lz4(packed.get(4..)?, size as usize)
}

/// Unpacks blocks of LZ4, each with its packed size in front, to `size` bytes.
fn lz4(mut packed: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut unpacked = vec![0; size];
    let mut done = 0;
    while !packed.is_empty() {
        let (bytes, rest) = packed.split_first_chunk()?;
        let block = rest.get(..u32::from_le_bytes(*bytes) as usize)?;
        let end = size.min(done + LZ4_BLOCK);
        done += lz4_flex::block::decompress_into(block, &mut unpacked[done..end]).ok()?;
        packed = &rest[block.len()..];
    }
    (done == size).then_some(unpacked)
}
