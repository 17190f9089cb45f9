//! The kernel inside a bzImage, unpacked before the guest runs.
//!
//! The code in front of it does the same in the guest, with some 90 million instructions for a
//! distribution's kernel: over a minute where ring 0 is emulated. That code also moves the kernel
//! to a random address, which is not done here.

use linux_loader::loader::bootparam::setup_header;

use super::source::Source;
use super::{LoadError, u32_at};

/// Magic number of LZ4's legacy frames, which Linux uses (lz4, doc/lz4_Frame_format.md).
const LZ4_LEGACY: u32 = 0x184c_2102;
/// Most bytes of an unpacked block.
const LZ4_BLOCK: usize = 8 << 20;
/// Bytes of the unpacked size, which Linux puts behind the packed data (Linux,
/// scripts/Makefile.lib).
const SIZE: usize = 4;

/// Most bytes of a kernel that is unpacked here. A larger one is left to its own code. A
/// distribution's kernel has less than a fifth of it.
const UNPACKED_MAX: u32 = 512 << 20;

/// The unpacked kernel of `image`, whose protected-mode code is at `code`; `None` if the format is
/// not known here, or the data is wrong: then its own code may try.
///
/// # Errors
/// The file cannot be read.
pub(super) fn kernel(
    image: Source,
    code: u64,
    header: &setup_header,
) -> Result<Option<Vec<u8>>, LoadError> {
    let Some(start) = code.checked_add(header.payload_offset.into()) else { return Ok(None) };
    let bytes = u64::from(header.payload_length);
    let end = start.saturating_add(bytes);
    if end > image.bytes() || bytes < (4 + SIZE) as u64 || bytes > UNPACKED_MAX.into() {
        return Ok(None);
    }
    let magic = u32_at(&image.part(start, 4)?, 0);
    let size = u32_at(&image.part(end - SIZE as u64, SIZE as u64)?, 0);
    // The size is that of guest memory at most.
    if magic != LZ4_LEGACY || size > header.init_size.min(UNPACKED_MAX) {
        return Ok(None);
    }
    let packed = image.part(start + 4, bytes - (4 + SIZE) as u64)?;
    Ok(lz4(&packed, size as usize))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A payload of so many whole blocks of zeros that claims to have `size` bytes unpacked.
    fn payload(blocks: usize, size: u32) -> Vec<u8> {
        let block = lz4_flex::block::compress(&vec![0; LZ4_BLOCK]);
        let mut payload = LZ4_LEGACY.to_le_bytes().to_vec();
        for _ in 0..blocks {
            payload.extend((block.len() as u32).to_le_bytes());
            payload.extend(&block);
        }
        payload.extend(size.to_le_bytes());
        payload
    }

    /// Bytes of the unpacked kernel, if it is unpacked.
    fn unpacked(payload: &[u8]) -> Option<usize> {
        let header = setup_header {
            payload_length: payload.len() as u32,
            init_size: u32::MAX,
            ..setup_header::default()
        };
        kernel(payload.into(), 0, &header).unwrap().map(|kernel| kernel.len())
    }

    #[test]
    fn what_is_unpacked_is_bounded() {
        let most = UNPACKED_MAX as usize;
        assert_eq!(unpacked(&payload(most / LZ4_BLOCK, UNPACKED_MAX)), Some(most));
        assert_eq!(unpacked(&payload(most / LZ4_BLOCK + 1, UNPACKED_MAX + 1)), None);
        // A bomb: more than it says.
        assert_eq!(unpacked(&payload(2, LZ4_BLOCK as u32)), None);
        assert_eq!(unpacked(&payload(1, LZ4_BLOCK as u32 + 1)), None, "less");
    }
}
