//! A file that appears as a whole or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tempfile::NamedTempFile;

/// `ENXIO`: nobody has opened the pipe for reading, or there is no device.
const NO_READER: i32 = rustix::io::Errno::NXIO.raw_os_error();

/// A path to write to later. It was writable when this was made.
pub struct Target {
    path: PathBuf,
    to: To,
}

enum To {
    /// A new file beside the one that it will become.
    Beside(NamedTempFile),
    /// Standard output.
    Stdout,
    /// A file that is not regular. It is written in place, since a new file cannot replace it.
    Into(File),
}

impl Target {
    /// Checks that `path` can be written; `-` is standard output. Changes nothing there yet.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(path: &Path) -> io::Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self { path: path.to_owned(), to: To::Stdout });
        }
        let path = match fs::metadata(path) {
            Ok(data) if data.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(data) => {
                // A write-protected file must not be replaced either.
                let file = open(File::options().write(true), path)?;
                if !data.is_file() {
                    return Ok(Self { path: path.to_owned(), to: To::Into(file) });
                }
                // A link stays one.
                path.canonicalize()?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(error),
        };
        if path.file_name().is_none() {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        fs::metadata(folder)?;
        // The error names the temporary file; its kind is enough.
        let file = tempfile::Builder::new()
            .prefix(".umbra-")
            // As any new file: less what the user's mask takes away.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(|error| io::Error::from(error.kind()))?;
        Ok(Self { path, to: To::Beside(file) })
    }

    /// The folder in which the file is made and renamed; none if it is written in place.
    pub fn folder(&self) -> Option<&Path> {
        match &self.to {
            To::Beside(file) => file.path().parent(),
            To::Stdout | To::Into(_) => None,
        }
    }

    /// Writes the file.
    ///
    /// # Errors
    /// An error of `write` or of the disk. Then the old file is still there.
    pub fn write(self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        match self.to {
            To::Stdout => {
                let mut out = BufWriter::new(io::stdout().lock());
                write(&mut out)?;
                out.flush()
            }
            To::Into(mut file) => {
                let mut out = BufWriter::new(&mut file);
                write(&mut out)?;
                out.flush()
            }
            To::Beside(mut file) => {
                let mut out = BufWriter::new(&mut file);
                write(&mut out)?;
                out.flush()?;
                drop(out);
                file.persist(self.path).map(drop).map_err(|error| error.error)
            }
        }
    }
}

/// Creates `path`, or empties the file there, and opens it for writing.
///
/// # Errors
/// It cannot be written: a pipe that nobody reads, a socket, and a directory among others.
pub fn create(path: &Path) -> io::Result<File> {
    open(File::options().write(true).create(true).truncate(true), path)
}

/// Opens a file for writing without waiting: a pipe's reader may never come.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = options.custom_flags(flags.bits().cast_signed()).open(path).map_err(|error| {
        match fs::metadata(path).map(|data| data.file_type()) {
            Ok(kind) if kind.is_socket() => io::Error::other("it is a socket"),
            Ok(kind) if kind.is_fifo() && error.raw_os_error() == Some(NO_READER) => {
                io::Error::other("nobody reads this pipe: start its reader first")
            }
            _ => error,
        }
    })?;
    // From here on, a reader that is slow is waited for.
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).expect("a directory").count()
    }

    #[test]
    fn a_file_is_replaced_at_once_or_left_alone() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().join("page.html");
        fs::write(&path, "old").expect("a file");
        drop(Target::new(&path).expect("writable"));
        let failed = Target::new(&path).expect("writable").write(|out| {
            out.write_all(b"half")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(failed.is_err());
        assert_eq!(
            (fs::read_to_string(&path).expect("it is there"), names(folder.path())),
            ("old".into(), 1)
        );
        Target::new(&path).expect("writable").write(|out| out.write_all(b"new")).expect("written");
        assert_eq!(
            (fs::read_to_string(&path).expect("it is there"), names(folder.path())),
            ("new".into(), 1)
        );
    }

    #[test]
    fn links_and_devices_stay_what_they_are() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let [real, link] = ["real", "link"].map(|name| folder.path().join(name));
        fs::write(&real, "").expect("a file");
        std::os::unix::fs::symlink(&real, &link).expect("a link");
        Target::new(&link).expect("writable").write(|out| out.write_all(b"x")).expect("written");
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&real).expect("it is there"), "x");
        Target::new(Path::new("/dev/null"))
            .expect("writable")
            .write(|out| out.write_all(b"x"))
            .expect("written");
        assert!(!fs::metadata("/dev/null").expect("it is there").is_file());
    }

    #[test]
    fn what_cannot_be_written_is_told_before() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let error = |path: &Path| {
            Target::new(path).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(error(folder.path()).contains("directory"));
        let nowhere = error(&folder.path().join("none/page.html"));
        assert!(nowhere.contains("No such file") && !nowhere.contains(".umbra-"), "{nowhere}");
        assert!(!error(Path::new("")).is_empty());
    }
}
