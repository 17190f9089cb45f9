//! The bytes of the kernel's file: in memory, or on disk. From disk they are read on demand, since
//! a kernel's debug information may be larger than all other memory of Umbra.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use object::read::ReadCacheOps;
use rustix::fs::{MemfdFlags, memfd_create};

/// Bytes that are read from disk at once.
const BLOCK: usize = 4096;
/// Blocks that are kept. A block's number decides its place.
const BLOCKS: usize = 32;

/// A file.
#[derive(Debug)]
pub enum Contents {
    /// In memory.
    Memory(Arc<[u8]>),
    /// On disk, open.
    Disk {
        /// The file.
        file: File,
        /// Its bytes when it was opened.
        bytes: u64,
        /// Its time of modification then.
        modified: Option<SystemTime>,
    },
}

impl From<Arc<[u8]>> for Contents {
    fn from(bytes: Arc<[u8]>) -> Self {
        Self::Memory(bytes)
    }
}

impl From<Vec<u8>> for Contents {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Memory(bytes.into())
    }
}

impl Contents {
    /// A file on disk in its present state.
    ///
    /// # Errors
    /// The size of the file cannot be read.
    pub fn disk(file: File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self::Disk { bytes: meta.len(), modified: meta.modified().ok(), file })
    }

    /// The same in a file, for another process.
    pub(super) fn into_file(self) -> io::Result<Self> {
        let Self::Memory(bytes) = self else { return Ok(self) };
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC)?);
        file.write_all(&bytes)?;
        Self::disk(file)
    }

    /// The open file, if it is one.
    pub(super) fn to_file(&self) -> io::Result<File> {
        match self {
            Self::Memory(_) => Err(io::ErrorKind::Unsupported.into()),
            Self::Disk { file, .. } => file.try_clone(),
        }
    }

    /// Its bytes.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Disk { bytes, .. } => *bytes,
        }
    }

    /// Whether it was written to since it was opened.
    pub(super) fn changed(&self) -> bool {
        match self {
            Self::Memory(_) => false,
            Self::Disk { file, bytes, modified } => !file
                .metadata()
                .is_ok_and(|now| now.len() == *bytes && now.modified().ok() == *modified),
        }
    }

    /// Fills `buffer` from `at` on.
    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => {
                let part =
                    usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..buffer.len()));
                buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::Disk { file, .. } => file.read_exact_at(buffer, at),
        }
    }
}

/// A file, as `object` reads it.
pub(super) struct Cursor<'a> {
    pub contents: &'a Contents,
    pub at: u64,
}

impl ReadCacheOps for Cursor<'_> {
    fn len(&mut self) -> Result<u64, ()> {
        Ok(self.contents.len())
    }

    fn seek(&mut self, at: u64) -> Result<u64, ()> {
        self.at = at;
        Ok(at)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ()> {
        let left = usize::try_from(self.contents.len().saturating_sub(self.at)).map_err(|_| ())?;
        let len = left.min(buffer.len());
        self.read_exact(buffer.get_mut(..len).ok_or(())?)?;
        Ok(len)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ()> {
        self.contents.read(self.at, buffer).map_err(|_| ())?;
        self.at += buffer.len() as u64;
        Ok(())
    }
}

/// A block's number and its bytes; the last one of a file may be short.
type Block = (usize, Vec<u8>);

/// A file, and some blocks of it that are kept.
#[derive(Debug)]
pub(super) struct Blocks {
    contents: Arc<Contents>,
    len: usize,
    kept: Mutex<Vec<Block>>,
}

impl Blocks {
    pub(super) fn new(contents: Arc<Contents>) -> Self {
        let len = usize::try_from(contents.len()).unwrap_or(usize::MAX);
        Self { contents, len, kept: Mutex::default() }
    }

    /// The file's bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Passes the bytes from `at` up to `range.end` to `part`, piece by piece, until it returns
    /// false.
    ///
    /// # Errors
    /// The range is not in the file, or the file cannot be read.
    pub(super) fn read(
        &self,
        range: Range<usize>,
        mut part: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<()> {
        if range.start > range.end || range.end > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Contents::Memory(bytes) = &*self.contents {
            part(bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
            return Ok(());
        }
        // After a panic the blocks are still good: a block gets its number last.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = range.start;
        while at < range.end {
            let number = at / BLOCK;
            let start = number * BLOCK;
            let place = number % BLOCKS;
            if kept.len() <= place {
                kept.resize(place + 1, (usize::MAX, Vec::new()));
            }
            let block = kept.get_mut(place).ok_or(io::ErrorKind::Other)?;
            if block.0 != number {
                block.0 = usize::MAX;
                block.1.resize(BLOCK.min(self.len - start), 0);
                self.contents.read(start as u64, &mut block.1)?;
                block.0 = number;
            }
            let end = range.end.min(start + BLOCK);
            let piece = block.1.get(at - start..end - start).ok_or(io::ErrorKind::UnexpectedEof)?;
            if !part(piece) {
                break;
            }
            at = end;
        }
        Ok(())
    }

    /// The zero-terminated string at `at`, cut at `max` bytes.
    pub(super) fn string(&self, at: usize, max: usize) -> Option<Vec<u8>> {
        let mut string = Vec::new();
        let end = at.checked_add(max)?.min(self.len);
        let take = |piece: &[u8]| {
            let zero = piece.iter().position(|byte| *byte == 0);
            string.extend_from_slice(piece.get(..zero.unwrap_or(piece.len())).unwrap_or_default());
            zero.is_none()
        };
        self.read(at..end, take).ok()?;
        Some(string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_disk(bytes: &[u8]) -> (File, Blocks) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let other = file.try_clone().unwrap();
        (other, Blocks::new(Arc::new(Contents::disk(file).unwrap())))
    }

    #[test]
    fn a_file_on_disk_reads_as_it_does_in_memory() {
        // More than is kept, and a short last block.
        let bytes: Vec<u8> =
            (0..BLOCK * (BLOCKS + 3) + 17).map(|i| (i / 7 + i / 4099) as u8).collect();
        let memory = Blocks::new(Arc::new(bytes.clone().into()));
        let (_, disk) = on_disk(&bytes);
        let len = bytes.len();
        for range in
            [0..0, 0..1, 0..len, len - 20..len, BLOCK - 1..BLOCK + 1, 5..3 * BLOCK, len..len]
        {
            for blocks in [&memory, &disk] {
                let mut read = Vec::new();
                blocks
                    .read(range.clone(), |piece| {
                        read.extend_from_slice(piece);
                        true
                    })
                    .unwrap();
                assert!(read == bytes[range.clone()], "{range:?}");
            }
        }
        for blocks in [&memory, &disk] {
            assert!(blocks.read(0..len + 1, |_| true).is_err());
            assert!(blocks.read(Range { start: 2, end: 1 }, |_| true).is_err());
        }
    }

    #[test]
    fn strings_end_at_a_zero_at_the_limit_or_with_the_file() {
        let mut bytes = vec![b'a'; BLOCK + 10];
        bytes[BLOCK + 4] = 0;
        let (_, disk) = on_disk(&bytes);
        assert_eq!(disk.string(BLOCK - 2, 100).unwrap(), b"aaaaaa");
        assert_eq!(disk.string(BLOCK - 2, 3).unwrap(), b"aaa");
        assert_eq!(disk.string(BLOCK + 5, 100).unwrap(), b"aaaaa");
        assert_eq!(disk.string(BLOCK + 11, 100), None);
        assert_eq!(disk.string(usize::MAX, 100), None);
    }

    #[test]
    fn what_was_cut_off_meanwhile_is_an_error() {
        let (file, disk) = on_disk(&[1; 3 * BLOCK]);
        assert!(disk.read(0..10, |_| true).is_ok() && !disk.contents.changed());
        file.set_len(10).unwrap();
        assert!(disk.contents.changed());
        assert!(disk.read(2 * BLOCK..2 * BLOCK + 1, |_| true).is_err());
        assert!(disk.read(2 * BLOCK..2 * BLOCK + 1, |_| true).is_err(), "it is not taken for read");
    }
}
