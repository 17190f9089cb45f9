//! Lines of source files, where those are on this machine.
//!
//! The kernel's debug information names the files. It may come from anybody, and a page with their
//! lines may go to others. So files come only from folders that the user named; they are opened
//! below these, without links; only regular files with the name of a source file are read; and the
//! work is bounded.

mod files;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub(crate) use self::files::{Excerpt, Place, Shown, SourceFiles};
use crate::worker::{self, Client, Failure, Request, Response, Setup};

/// Longest wait for all lines of a page.
const TIME: Duration = Duration::from_secs(10);
/// Longest wait for one excerpt.
const EXCERPT_TIME: Duration = Duration::from_secs(2);
/// Most times that the process which reads the files is started again.
const FAILURES_MAX: u32 = 3;
/// Most folders.
pub const ROOTS_MAX: usize = 32;

/// The folders that source files may come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceRoots(Vec<PathBuf>);

impl SourceRoots {
    /// These folders.
    ///
    /// # Errors
    /// One of them is no folder or cannot be read, or there are more than [`ROOTS_MAX`]. The path
    /// is that of the bad one.
    pub fn new(folders: &[PathBuf]) -> Result<Self, (PathBuf, io::Error)> {
        let root = |path: &PathBuf| {
            let folder = path.canonicalize().and_then(|folder| {
                std::fs::read_dir(&folder)?;
                Ok(folder)
            });
            folder.map_err(|error| (path.clone(), error))
        };
        if let Some(path) = folders.get(ROOTS_MAX) {
            let error = io::Error::other(format!("there are more than {ROOTS_MAX} folders"));
            return Err((path.clone(), error));
        }
        folders.iter().map(root).collect::<Result<_, _>>().map(Self)
    }

    /// The top of the Git tree that has the current directory (the nearest folder upwards with
    /// `.git`), or else the current directory. None if that cannot be read, or is `/`.
    pub fn of_current_directory() -> Self {
        let folder = files::default_root(Path::new("."));
        Self(folder.ok().flatten().into_iter().collect())
    }

    /// The folders, by their canonical paths.
    pub fn folders(&self) -> &[PathBuf] {
        &self.0
    }
}

/// The source files of a kernel, for one page.
pub(crate) struct Sources<'a> {
    roots: &'a SourceRoots,
    reader: Reader,
    /// When all waiting is over.
    end: Instant,
    outside: bool,
    exhausted: bool,
    unsupported: bool,
    /// Why a file could not be read.
    failed: Option<String>,
    /// No more files are read.
    over: bool,
}

/// Who reads the files.
enum Reader {
    Here(Box<SourceFiles>),
    Worker(Client, u32),
}

impl<'a> Sources<'a> {
    /// Looks for files below `roots`. `kernel` is the kernel's file, to compare times.
    pub(crate) fn new(roots: &'a SourceRoots, kernel: Option<&Path>) -> Self {
        let built = kernel.and_then(modified);
        let reader = if worker::is_offered() {
            let built = built.and_then(|built| built.duration_since(UNIX_EPOCH).ok());
            let setup = Setup { roots: roots.0.clone(), built, ..Setup::default() };
            Reader::Worker(Client::new(setup, None), 0)
        } else {
            Reader::Here(Box::new(SourceFiles::new(&roots.0, built)))
        };
        Self {
            roots,
            reader,
            end: Instant::now() + TIME,
            outside: false,
            exhausted: false,
            unsupported: false,
            failed: None,
            over: false,
        }
    }

    /// The lines around `line` of the file that the debug information calls `path`, and frames
    /// show as `file`; `None` if there are none to show.
    pub(crate) fn excerpt(&mut self, path: &str, file: Option<&str>, line: u32) -> Option<Excerpt> {
        // It is known already, or there is no use in asking.
        if self.unsupported || self.over || self.roots.0.is_empty() {
            self.outside |= self.roots.0.is_empty();
            return None;
        }
        let place = Place { path: path.to_owned(), file: file.map(str::to_owned), line };
        match self.ask(place) {
            Shown::Lines(excerpt) => return Some(excerpt),
            Shown::Outside => self.outside = true,
            Shown::Exhausted => self.exhausted = true,
            Shown::Unsupported => self.unsupported = true,
            Shown::Nothing => {}
        }
        None
    }

    fn ask(&mut self, place: Place) -> Shown {
        let until = self.end.min(Instant::now() + EXCERPT_TIME);
        if until <= Instant::now() {
            return Shown::Exhausted;
        }
        let (client, failures) = match &mut self.reader {
            Reader::Here(files) => return files.show(&place),
            Reader::Worker(client, failures) => (client, failures),
        };
        let left = || until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        match client.ask(Request::Source(place), &left) {
            Ok(Response::Source(shown)) => shown,
            Err(Failure::Start(error)) => {
                let why = format!("the process that reads them cannot be started: {error}");
                (self.failed, self.over) = (Some(why), true);
                Shown::Nothing
            }
            Ok(Response::Symbols(_)) | Err(Failure::Died | Failure::Late) => {
                *failures += 1;
                self.over = *failures >= FAILURES_MAX;
                self.failed = Some("the process that reads them did not answer".to_owned());
                Shown::Nothing
            }
        }
    }

    /// What a reader of the page should know about lines that are missing, a sentence each.
    pub(crate) fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        if self.outside {
            let roots: Vec<_> = self.roots.0.iter().map(|root| root.to_string_lossy()).collect();
            let where_to = match roots.as_slice() {
                [] => "No folder of sources is named, so no lines are shown".to_owned(),
                roots => format!("Sources outside of {} are not shown", roots.join(", ")),
            };
            remarks.push(format!(
                "{where_to}: the option --source-root of umbra names a folder that has them."
            ));
        }
        if self.unsupported {
            remarks.push(
                "Sources are not shown: this host's Linux lacks openat2, which version 5.6 has."
                    .to_owned(),
            );
        }
        if let Some(why) = &self.failed {
            remarks.push(format!("Some places are shown without their lines: {why}."));
        }
        if self.exhausted {
            remarks.push(
                "There were too many places in the source: some are shown without their lines."
                    .to_owned(),
            );
        }
        remarks
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|data| data.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_few_and_there() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().to_owned();
        let roots = SourceRoots::new(&vec![path.clone(); ROOTS_MAX]).expect("folders");
        assert_eq!(roots.folders()[0], path.canonicalize().expect("it is there"));
        let file = path.join("file");
        std::fs::write(&file, "").expect("a file");
        for bad in [vec![path.clone(); ROOTS_MAX + 1], vec![path.join("none")], vec![file]] {
            assert!(SourceRoots::new(&bad).is_err(), "{bad:?}");
        }
    }
}
