//! The files of `/proc/self` that tell of this process's memory. They are opened once, before a
//! jail that could not open them later.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// The open files.
#[derive(Debug)]
pub(crate) struct ProcFiles {
    pub(crate) smaps: File,
    pub(crate) status: File,
}

static FILES: OnceLock<ProcFiles> = OnceLock::new();

/// The files; the first call opens them.
///
/// # Errors
/// One of them cannot be opened.
pub(crate) fn files() -> io::Result<&'static ProcFiles> {
    if let Some(files) = FILES.get() {
        return Ok(files);
    }
    let files = ProcFiles {
        smaps: File::open("/proc/self/smaps")?,
        status: File::open("/proc/self/status")?,
    };
    Ok(FILES.get_or_init(|| files))
}

/// Reads a file from its start, as if it were opened anew.
pub(crate) struct FromStart {
    file: &'static File,
    at: u64,
}

impl FromStart {
    pub(crate) fn new(file: &'static File) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for FromStart {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read_at(to, self.at)?;
        self.at += bytes as u64;
        Ok(bytes)
    }
}
