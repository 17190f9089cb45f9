//! Kernels and initrds. A file on disk is opened once. It is read when it is copied into guest
//! memory, and a kernel again when a report needs its symbols.

use std::path::Path;
use std::sync::Arc;

use umbra_machine::loader::{DiskFile, LoadError, Source};
use umbra_report::symbols::Contents;

/// Most bytes of a test kernel's file. They are about a tenth.
const TEST_KERNEL_MAX: u64 = 64 << 20;

/// The contents of a file.
#[derive(Clone, Debug)]
pub enum GuestFile {
    /// In memory.
    Memory(Arc<[u8]>),
    /// On disk.
    Disk(Arc<DiskFile>),
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
    /// Opens the file at `path`. Messages call it `what`.
    ///
    /// # Errors
    /// It is no regular file, too large, or cannot be opened.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, LoadError> {
        DiskFile::open(what, path).map(|file| Self::Disk(Arc::new(file)))
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.source().bytes()
    }

    /// Its contents, for the loader.
    pub fn source(&self) -> Source<'_> {
        match self {
            Self::Memory(bytes) => Source::Memory(bytes),
            Self::Disk(file) => Source::Disk(file),
        }
    }

    /// All of it, if it is a test kernel: no larger than [`TEST_KERNEL_MAX`].
    pub(crate) fn test_kernel(&self) -> Option<Arc<[u8]>> {
        match self {
            Self::Memory(bytes) => Some(bytes.clone()),
            Self::Disk(file) if file.bytes() <= TEST_KERNEL_MAX => {
                let mut bytes = vec![0; file.bytes() as usize];
                self.source().read(0, &mut bytes).ok()?;
                Some(bytes.into())
            }
            Self::Disk(_) => None,
        }
    }

    /// Its contents, for its symbols; a file on disk is read later.
    ///
    /// # Errors
    /// It has changed.
    pub fn contents(&self) -> Result<Contents, LoadError> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone().into()),
            Self::Disk(file) => {
                Contents::disk(file.try_clone()?).map_err(|source| file.error(source))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_it_was_opened_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        assert!(GuestFile::open("kernel", &path).is_err());
        std::fs::write(&path, b"abc").unwrap();
        let file = GuestFile::open("kernel", &path).unwrap();
        let mut read = [0; 3];
        file.source().read(0, &mut read).unwrap();
        assert_eq!((file.bytes(), &read), (3, b"abc"));
        assert!(file.contents().is_ok());
        std::fs::write(&path, b"abcd").unwrap();
        let error = file.contents().unwrap_err();
        let error = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.contains("changed"), "{error}");
        assert!(matches!(GuestFile::open("kernel", dir.path()), Err(LoadError::NotAFile { .. })));
    }
}
