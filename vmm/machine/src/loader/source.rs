//! The bytes of a kernel or an initrd: in memory, or on disk.
//!
//! A file on disk is never held as a whole. Its headers are read, and then its segments, straight
//! into guest memory. It is read and not mapped, since a mapped file that shrinks would kill the
//! process.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Instant, SystemTime};

use vm_memory::GuestAddress;

use super::{LoadError, MAX_IMAGE};
use crate::memory::Ram;

/// Bytes that are read at once, between two looks at the [`Limit`].
const BLOCK: u64 = 128 << 10;

/// When the loader is to give up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limit<'a> {
    /// Set when the user wants no more of it.
    pub stop: Option<&'a AtomicBool>,
    /// The end of the time for it.
    pub deadline: Option<Instant>,
}

impl Limit<'_> {
    /// # Errors
    /// The loader is to give up.
    pub(super) fn check(&self) -> Result<(), LoadError> {
        if self.stop.is_some_and(|stop| stop.load(Relaxed)) {
            return Err(LoadError::Interrupted);
        }
        match self.deadline {
            Some(at) if at <= Instant::now() => Err(LoadError::TimeLimit),
            _ => Ok(()),
        }
    }
}

/// A regular file on disk, open, with its state when it was opened.
#[derive(Debug)]
pub struct DiskFile {
    what: &'static str,
    path: PathBuf,
    file: File,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl DiskFile {
    /// Opens a kernel or an initrd (`what`). It must be a regular file of at most [`MAX_IMAGE`]
    /// bytes. Nothing else is even opened: that could wait for ever, or have an effect.
    ///
    /// # Errors
    /// It is no regular file, too large, or cannot be opened.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, LoadError> {
        let fail = |source| LoadError::Read { what, path: path.to_owned(), source };
        if path.as_os_str() == "-" {
            return Err(LoadError::StandardInput { what });
        }
        regular(what, path, &path.metadata().map_err(fail)?)?;
        // It may have been replaced since.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        regular(what, path, &meta)?;
        let (bytes, modified) = state(&meta);
        if bytes > MAX_IMAGE {
            return Err(LoadError::TooLarge { what, bytes });
        }
        Ok(Self { what, path: path.to_owned(), file, bytes, modified })
    }

    /// Its size when it was opened, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file, for another reader.
    ///
    /// # Errors
    /// It was written since it was opened, or the process has too many open files.
    pub fn try_clone(&self) -> Result<File, LoadError> {
        self.check()?;
        self.file.try_clone().map_err(|source| self.error(source))
    }

    /// Fails if the file was written since it was opened.
    fn check(&self) -> Result<(), LoadError> {
        let now = self.file.metadata().map_err(|source| self.error(source))?;
        if state(&now) == (self.bytes, self.modified) { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> LoadError {
        self.error(io::Error::other("the file has changed meanwhile"))
    }

    /// An error of reading it, with its path.
    pub fn error(&self, source: io::Error) -> LoadError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return self.changed();
        }
        LoadError::Read { what: self.what, path: self.path.clone(), source }
    }
}

/// State that changes when a file is written.
fn state(meta: &Metadata) -> (u64, Option<SystemTime>) {
    (meta.len(), meta.modified().ok())
}

fn regular(what: &'static str, path: &Path, meta: &Metadata) -> Result<(), LoadError> {
    let kind = meta.file_type();
    let found = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(LoadError::NotAFile { what, path: path.to_owned(), found })
}

/// The bytes of a file to load.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// In memory.
    Memory(&'a [u8]),
    /// On disk.
    Disk(&'a DiskFile),
}

impl<'a> From<&'a [u8]> for Source<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Memory(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Source<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Self::Memory(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Source<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        Self::Memory(bytes)
    }
}

impl<'a> From<&'a DiskFile> for Source<'a> {
    fn from(file: &'a DiskFile) -> Self {
        Self::Disk(file)
    }
}

impl Source<'_> {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Disk(file) => file.bytes,
        }
    }

    /// Fills `to` with the bytes from `at` on.
    ///
    /// # Errors
    /// They are not all in the file, or it cannot be read.
    pub fn read(&self, at: u64, to: &mut [u8]) -> Result<(), LoadError> {
        let (need, have) = (u128::from(at) + to.len() as u128, self.bytes());
        if need > u128::from(have) {
            return Err(LoadError::CutOff { what: "a part of it".into(), need, have });
        }
        match self {
            // The range was checked.
            Self::Memory(bytes) => to.copy_from_slice(&bytes[at as usize..][..to.len()]),
            Self::Disk(file) => file.file.read_exact_at(to, at).map_err(|e| file.error(e))?,
        }
        Ok(())
    }

    /// The first bytes, at most `max`.
    pub(super) fn head(&self, max: usize) -> Result<Vec<u8>, LoadError> {
        self.part(0, max as u64)
    }

    /// The bytes from `at` on, at most `max`, as far as they are in the file.
    pub(super) fn part(&self, at: u64, max: u64) -> Result<Vec<u8>, LoadError> {
        let mut bytes = vec![0; self.bytes().saturating_sub(at).min(max) as usize];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Passes the bytes in `range` to `block`, some at a time, until it returns false. Each block
    /// but the first repeats the last `overlap` bytes (few) of the one before it.
    ///
    /// # Errors
    /// They are not all in the file, it cannot be read, or the time is over.
    pub fn blocks(
        &self,
        range: Range<u64>,
        overlap: usize,
        limit: &Limit,
        mut block: impl FnMut(&[u8]) -> bool,
    ) -> Result<(), LoadError> {
        let most = range.end.saturating_sub(range.start).min(BLOCK);
        let mut buffer = vec![0; overlap + most as usize];
        let (mut at, mut kept) = (range.start, 0);
        while at < range.end {
            limit.check()?;
            let more = (range.end - at).min(BLOCK);
            let end = kept + more as usize;
            self.read(at, &mut buffer[kept..end])?;
            if !block(&buffer[..end]) {
                break;
            }
            at += more;
            kept = end.min(overlap);
            buffer.copy_within(end - kept..end, 0);
        }
        Ok(())
    }

    /// Copies the bytes in `range` to guest memory.
    ///
    /// # Errors
    /// They are not all in the file, do not fit there, the file cannot be read or has changed, or
    /// the time is over.
    pub(super) fn copy(
        &self,
        range: Range<u64>,
        ram: &Ram,
        gpa: u64,
        limit: &Limit,
    ) -> Result<(), LoadError> {
        let file = match self {
            Self::Disk(file) => file,
            Self::Memory(_) => {
                let mut to = gpa;
                let mut written = Ok(());
                self.blocks(range, 0, limit, |block| {
                    written = ram.write(GuestAddress(to), block);
                    to += block.len() as u64;
                    written.is_ok()
                })?;
                return Ok(written?);
            }
        };
        let mut at = range.start;
        while at < range.end {
            limit.check()?;
            let to = GuestAddress(gpa + (at - range.start));
            match ram.read_file(to, &file.file, at, (range.end - at).min(BLOCK)) {
                Ok(0) => return Err(file.changed()),
                Ok(bytes) => at += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(file.error(error)),
            }
        }
        file.check()
    }
}
