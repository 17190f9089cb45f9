//! The source files below some folders, and nothing else of the host.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Lines shown before, and after, the line itself.
const AROUND: usize = 3;
/// Files of this size or larger are not read, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// Most files that are read.
const FILES_MAX: usize = 256;
/// Most bytes of all files that are read.
const READ_MAX: u64 = 16 << 20;
/// Most names that are looked for.
const NAMES_MAX: usize = 4096;
/// Most characters of a line.
const LINE_MAX: usize = 200;
/// Most bytes of all excerpts.
const EXCERPTS_MAX: usize = 4 << 20;
/// The endings of source files.
const SUFFIXES: [&str; 17] = [
    "rs", "c", "h", "cc", "cpp", "cxx", "hh", "hpp", "hxx", "inc", "inl", "s", "S", "asm", "zig",
    "d", "ada",
];

/// A place that the debug information names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The path when it was compiled.
    pub path: String,
    /// The path as it is shown, without the folder that the compiler ran in.
    pub file: Option<String>,
    /// The line, from 1.
    pub line: u32,
}

/// Lines of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Excerpt {
    /// The number of the first one, from 1.
    pub first: u32,
    /// The lines, cut to a bounded length.
    pub lines: Vec<String>,
    /// The file was changed after the kernel was built: these may be other lines.
    pub changed: bool,
}

/// What there is to show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Shown {
    /// These lines.
    Lines(Excerpt),
    /// Nothing: no folder has the file.
    Outside,
    /// Nothing: it is no source file that can be shown, or it has no such line.
    Nothing,
    /// Nothing: too much was shown or read.
    Exhausted,
    /// Nothing at all: this host's Linux cannot open files below a folder only.
    Unsupported,
}

/// A file that was read.
struct Source {
    text: String,
    /// Where each line begins.
    starts: Vec<u32>,
    changed: bool,
}

/// A folder, open, with its canonical path.
struct Root {
    path: PathBuf,
    folder: OwnedFd,
}

/// The source files of a kernel.
pub(crate) struct SourceFiles {
    /// None if this host lacks `openat2`.
    roots: Option<Vec<Root>>,
    built: Option<SystemTime>,
    /// By the names that the debug information has for them.
    sources: HashMap<(String, Option<String>), Result<Source, Shown>>,
    files: usize,
    bytes: u64,
    excerpts: usize,
}

impl SourceFiles {
    /// Looks for files below these folders, given by their canonical paths. Links in them are not
    /// followed. `built` is when the kernel was.
    pub(crate) fn new(roots: &[PathBuf], built: Option<SystemTime>) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = roots.iter().filter_map(|path| {
            let folder = open(path, flags, Mode::empty()).ok()?;
            Some(Root { path: path.clone(), folder })
        });
        Self {
            roots: is_supported().then(|| opened.collect()),
            built,
            sources: HashMap::new(),
            files: 0,
            bytes: 0,
            excerpts: 0,
        }
    }

    /// The lines around a place.
    pub(crate) fn show(&mut self, place: &Place) -> Shown {
        let key = (place.path.clone(), place.file.clone());
        if !self.sources.contains_key(&key) {
            if self.sources.len() >= NAMES_MAX {
                return Shown::Exhausted;
            }
            let source = self.read(place);
            self.sources.insert(key.clone(), source);
        }
        let excerpt = match self.sources.get(&key) {
            Some(Ok(source)) => source.around(place.line),
            Some(Err(why)) => return why.clone(),
            None => None,
        };
        let Some(excerpt) = excerpt else { return Shown::Nothing };
        self.excerpts += excerpt.lines.iter().map(String::len).sum::<usize>();
        if self.excerpts > EXCERPTS_MAX { Shown::Exhausted } else { Shown::Lines(excerpt) }
    }

    fn read(&mut self, place: &Place) -> Result<Source, Shown> {
        let roots = self.roots.as_ref().ok_or(Shown::Unsupported)?;
        let suffix = Path::new(&place.path).extension().and_then(|suffix| suffix.to_str());
        if !suffix.is_some_and(|suffix| SUFFIXES.contains(&suffix)) {
            return Err(Shown::Nothing);
        }
        if self.files >= FILES_MAX || self.bytes >= READ_MAX {
            return Err(Shown::Exhausted);
        }
        let mut names = names(place, roots);
        let file = names.find_map(|(root, name)| open_below(&root.folder, &name));
        drop(names);
        let file = file.ok_or(Shown::Outside)?;
        let data = file.metadata().map_err(|_| Shown::Nothing)?;
        if data.len() >= FILE_MAX {
            return Err(Shown::Nothing);
        }
        self.files += 1;
        let mut bytes = Vec::new();
        let read = file.take(FILE_MAX).read_to_end(&mut bytes);
        self.bytes += bytes.len() as u64;
        let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
        let (Ok(_), Some(text)) = (read, text) else { return Err(Shown::Nothing) };
        let changed = match (self.built, data.modified()) {
            (Some(built), Ok(modified)) => modified > built,
            _ => false,
        };
        Ok(Source { starts: starts(&text), text, changed })
    }
}

/// The names below roots that a place may mean, best first.
fn names<'a>(
    place: &'a Place,
    roots: &'a [Root],
) -> impl Iterator<Item = (&'a Root, PathBuf)> + use<'a> {
    let path = lexical(&place.path);
    let relative = path.clone().filter(|_| !place.path.starts_with('/'));
    let below = move |root: &Root| {
        let path = path.as_ref().filter(|_| place.path.starts_with('/'))?;
        Some(Path::new("/").join(path).strip_prefix(&root.path).ok()?.to_owned())
    };
    let stripped = place.file.as_deref().filter(|file| !file.starts_with('/')).and_then(lexical);
    let anywhere = [relative, stripped].into_iter().flatten();
    let anywhere = anywhere.flat_map(move |name| roots.iter().map(move |r| (r, name.clone())));
    roots.iter().filter_map(move |root| Some((root, below(root)?))).chain(anywhere)
}

/// A path without `.` and `..`, and without a slash in front. `None` if it leads above its start.
fn lexical(path: &str) -> Option<PathBuf> {
    let mut parts = PathBuf::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                if !parts.pop() {
                    return None;
                }
            }
            part => parts.push(part),
        }
    }
    (!parts.as_os_str().is_empty()).then_some(parts)
}

/// How a name below a folder is resolved: never to anything outside of it, and over no link.
const BELOW: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Opens a regular file below a folder.
fn open_below(root: &OwnedFd, name: &Path) -> Option<File> {
    let open = |flags| openat2(root, name, flags | OFlags::CLOEXEC, Mode::empty(), BELOW);
    let is_file = |file: &File| file.metadata().is_ok_and(|data| data.is_file());
    // A device is not even opened. The second look is for a file that has just become one.
    let place = File::from(open(OFlags::PATH).ok()?);
    if !is_file(&place) {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    open(flags).ok().map(File::from).filter(is_file)
}

/// Whether this host has `openat2` (Linux 5.6), and lets us use it.
fn is_supported() -> bool {
    let tried = openat2(CWD, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), BELOW);
    !matches!(tried, Err(Errno::NOSYS | Errno::PERM))
}

/// Where lines begin.
fn starts(text: &str) -> Vec<u32> {
    let behind = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
    // Files are shorter than 4 GiB.
    let mut starts: Vec<u32> = [0].into_iter().chain(behind.map(|(at, _)| at as u32 + 1)).collect();
    // No line begins behind the last line end.
    if starts.last().is_some_and(|last| *last as usize == text.len()) {
        starts.pop();
    }
    starts
}

impl Source {
    /// The lines around a line; `None` if there is no such line.
    fn around(&self, line: u32) -> Option<Excerpt> {
        let at = usize::try_from(line).ok()?.checked_sub(1)?;
        if at >= self.starts.len() {
            return None;
        }
        let first = at.saturating_sub(AROUND);
        let last = (at + AROUND).min(self.starts.len() - 1);
        let lines = (first..=last).filter_map(|i| self.line(i)).map(cut);
        Some(Excerpt {
            first: u32::try_from(first).ok()? + 1,
            lines: lines.collect(),
            changed: self.changed,
        })
    }

    fn line(&self, i: usize) -> Option<&str> {
        let start = *self.starts.get(i)? as usize;
        let end = self.starts.get(i + 1).map_or(self.text.len(), |next| *next as usize);
        let line = self.text.get(start..end)?;
        let line = line.strip_suffix('\n').unwrap_or(line);
        Some(line.strip_suffix('\r').unwrap_or(line))
    }
}

fn cut(line: &str) -> String {
    line.char_indices().nth(LINE_MAX).map_or(line, |(end, _)| &line[..end]).to_owned()
}

/// The folder of sources where none is named: the top of the Git tree that has `folder`, or
/// `folder` itself. None if that is the root of all files.
///
/// # Errors
/// The folder cannot be read.
pub(super) fn default_root(folder: &Path) -> io::Result<Option<PathBuf>> {
    let folder = folder.canonicalize()?;
    let top = folder.ancestors().find(|folder| folder.join(".git").exists());
    let root = top.unwrap_or(&folder);
    Ok(root.parent().map(|_| root.to_owned()))
}

#[cfg(test)]
mod tests;
