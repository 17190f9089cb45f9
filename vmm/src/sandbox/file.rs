//! Kernels and initrds. A file is read when it is copied into guest memory, and a kernel again when
//! a report needs its symbols. Files on disk are not kept in memory in between.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use umbra_machine::loader::{LoadError, read_file};
use umbra_report::symbols::Contents;

/// The contents of a file.
#[derive(Clone, Debug)]
pub enum GuestFile {
    /// In memory.
    Memory(Arc<[u8]>),
    /// On disk.
    Disk(DiskFile),
}

/// A file on disk, with its state when it was first opened.
#[derive(Clone, Debug)]
pub struct DiskFile {
    what: &'static str,
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Default for GuestFile {
    fn default() -> Self {
        Self::Memory(Arc::from([]))
    }
}

impl From<Arc<[u8]>> for GuestFile {
    fn from(bytes: Arc<[u8]>) -> Self {
        Self::Memory(bytes)
    }
}

impl From<&[u8]> for GuestFile {
    fn from(bytes: &[u8]) -> Self {
        Self::Memory(bytes.into())
    }
}

impl GuestFile {
    /// The file at `path`. Messages call it `what`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, LoadError> {
        let fail = |source| LoadError::Read { what, path: path.to_owned(), source };
        let (bytes, modified) = state(&path.metadata().map_err(fail)?);
        Ok(Self::Disk(DiskFile { what, path: path.to_owned(), bytes, modified }))
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Disk(file) => file.bytes,
        }
    }

    /// Its contents; a file on disk is read later.
    ///
    /// # Errors
    /// It cannot be opened, or has changed.
    pub fn contents(&self) -> Result<Contents, LoadError> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone().into()),
            Self::Disk(file) => {
                let fail =
                    |source| LoadError::Read { what: file.what, path: file.path.clone(), source };
                let opened = File::open(&file.path).map_err(fail)?;
                file.is_the_same(&opened.metadata().map_err(fail)?)?;
                Contents::disk(opened).map_err(fail)
            }
        }
    }

    /// Its contents.
    ///
    /// # Errors
    /// It cannot be read, or has changed.
    pub fn read(&self) -> Result<Arc<[u8]>, LoadError> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone()),
            Self::Disk(file) => {
                let contents = read_file(file.what, &file.path)?;
                let fail =
                    |source| LoadError::Read { what: file.what, path: file.path.clone(), source };
                file.is_the_same(&file.path.metadata().map_err(fail)?)?;
                Ok(contents.into())
            }
        }
    }
}

impl DiskFile {
    fn is_the_same(&self, now: &Metadata) -> Result<(), LoadError> {
        if state(now) == (self.bytes, self.modified) {
            return Ok(());
        }
        let source = io::Error::other("the file has changed meanwhile");
        Err(LoadError::Read { what: self.what, path: self.path.clone(), source })
    }
}

/// State that changes when a file is written.
fn state(meta: &Metadata) -> (u64, Option<SystemTime>) {
    (meta.len(), meta.modified().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_it_was_named_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        assert!(GuestFile::open("kernel", &path).is_err());
        std::fs::write(&path, b"abc").unwrap();
        let file = GuestFile::open("kernel", &path).unwrap();
        assert_eq!((file.bytes(), &*file.read().unwrap()), (3, &b"abc"[..]));
        std::fs::write(&path, b"abcd").unwrap();
        for error in [file.read().unwrap_err(), file.contents().unwrap_err()] {
            let error = std::error::Error::source(&error).unwrap().to_string();
            assert!(error.contains("changed"), "{error}");
        }
        let folder = GuestFile::open("kernel", dir.path()).unwrap();
        assert!(matches!(folder.read(), Err(LoadError::NotAFile { .. })));
    }
}
