//! Lines of source files, where those are on this machine.
//!
//! The kernel's debug information names the files. It may come from anybody, and the page may go to
//! others. So only regular files with the name of a source file are opened, relative names are
//! looked for in a few folders and never above them, and the amount is bounded.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

/// Lines shown before, and after, the line itself.
const AROUND: usize = 3;
/// Files of this size or larger are not read.
const FILE_MAX: u64 = 1 << 20;
/// Most files that are opened.
const FILES: usize = 256;
/// Most characters of a line.
const LINE_MAX: usize = 200;
/// Most bytes of all excerpts of a page.
const BUDGET: usize = 4 << 20;
/// Directories above the kernel's own in which a relative name may begin.
const ABOVE: usize = 4;
/// The endings of source files.
const SUFFIXES: [&str; 17] = [
    "rs", "c", "h", "cc", "cpp", "cxx", "hh", "hpp", "hxx", "inc", "inl", "s", "S", "asm", "zig",
    "d", "ada",
];

/// Lines of a file.
pub struct Excerpt<'a> {
    /// The number of the first one, from 1.
    pub first: u32,
    /// The lines, cut to a bounded length.
    pub lines: Vec<&'a str>,
    /// The file was changed after the kernel was built: these may be other lines.
    pub changed: bool,
}

struct Source {
    text: String,
    changed: bool,
}

/// The source files of a kernel.
pub struct Sources {
    roots: Vec<PathBuf>,
    built: Option<SystemTime>,
    files: HashMap<String, Option<Source>>,
    left: usize,
}

impl Sources {
    /// Looks for relative names in the current directory, in that of `kernel`, and in a few above
    /// that.
    pub fn new(kernel: Option<&Path>) -> Self {
        let mut roots: Vec<PathBuf> = std::env::current_dir().into_iter().collect();
        if let Some(kernel) = kernel.and_then(|kernel| kernel.canonicalize().ok()) {
            roots.extend(kernel.ancestors().skip(1).take(1 + ABOVE).map(Path::to_path_buf));
        }
        Self { roots, built: kernel.and_then(modified), files: HashMap::new(), left: BUDGET }
    }

    /// The lines around `line` of the file that the debug information calls `path`; `None` if there
    /// are none to show.
    pub fn excerpt(&mut self, path: &str, line: u32) -> Option<Excerpt<'_>> {
        if !self.files.contains_key(path) {
            if self.files.len() >= FILES {
                return None;
            }
            let source = self.open(Path::new(path));
            self.files.insert(path.to_owned(), source);
        }
        let source = self.files.get(path)?.as_ref()?;
        let at = usize::try_from(line).ok()?.checked_sub(1)?;
        let skip = at.saturating_sub(AROUND);
        let lines: Vec<&str> =
            source.text.lines().skip(skip).take(at - skip + 1 + AROUND).map(cut).collect();
        let bytes: usize = lines.iter().map(|line| line.len()).sum();
        if lines.len() <= at - skip || bytes > self.left {
            return None;
        }
        self.left -= bytes;
        Some(Excerpt { first: u32::try_from(skip).ok()? + 1, lines, changed: source.changed })
    }

    /// Whether excerpts may be missing because there were too many.
    pub fn exhausted(&self) -> bool {
        self.left < FILE_MAX as usize / 64 || self.files.len() >= FILES
    }

    fn open(&self, path: &Path) -> Option<Source> {
        let suffix = path.extension()?.to_str()?;
        if !SUFFIXES.contains(&suffix) {
            return None;
        }
        if path.is_absolute() {
            return self.read(path);
        }
        if path.components().any(|part| !matches!(part, Component::CurDir | Component::Normal(_))) {
            return None;
        }
        self.roots.iter().find_map(|root| self.read(&root.join(path)))
    }

    fn read(&self, path: &Path) -> Option<Source> {
        let fits = |data: &fs::Metadata| data.is_file() && data.len() < FILE_MAX;
        // A device is not even opened. The second look is for a file that has just become one.
        if !fits(&fs::metadata(path).ok()?) {
            return None;
        }
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .ok()?;
        let data = file.metadata().ok().filter(fits)?;
        let mut bytes = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))?;
        let changed = match (self.built, data.modified()) {
            (Some(built), Ok(modified)) => modified > built,
            _ => false,
        };
        Some(Source { text, changed })
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}

fn cut(line: &str) -> &str {
    line.char_indices().nth(LINE_MAX).map_or(line, |(end, _)| &line[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_source_files_that_fit_are_shown() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let kernel = folder.path().join("build/kernel");
        fs::create_dir_all(folder.path().join("build")).expect("a directory");
        let text: String = (1..=20).map(|i| format!("line {i}\n")).collect();
        for name in ["build/kernel", "a.rs", "secret", "secret.txt"] {
            fs::write(folder.path().join(name), &text).expect("a file");
        }
        let kernel_file = fs::File::open(&kernel).expect("it is there");
        kernel_file.set_modified(SystemTime::UNIX_EPOCH).expect("our own file");
        fs::write(folder.path().join("large.rs"), vec![b'\n'; 1 << 20]).expect("a file");
        fs::write(folder.path().join("binary.c"), "a\0b\n").expect("a file");
        fs::write(folder.path().join("long.c"), "é".repeat(1000)).expect("a file");
        fs::create_dir(folder.path().join("d.rs")).expect("a directory");
        let mut sources = Sources::new(Some(&kernel));
        let mut shown = |path: &str, line| {
            sources
                .excerpt(path, line)
                .map(|e| (e.first, e.lines.len(), e.lines[0].to_owned(), e.changed))
        };
        assert_eq!(shown("a.rs", 10), Some((7, 7, "line 7".into(), true)));
        assert_eq!(shown("./a.rs", 1), Some((1, 4, "line 1".into(), true)));
        assert_eq!(shown("a.rs", 20), Some((17, 4, "line 17".into(), true)));
        assert_eq!(shown("long.c", 1).map(|(_, _, line, _)| line.chars().count()), Some(LINE_MAX));
        let absolute = folder.path().join("a.rs");
        assert_eq!(shown(absolute.to_str().expect("UTF-8"), 2).map(|e| e.0), Some(1));
        for (path, line) in [
            ("a.rs", 21),
            ("a.rs", 0),
            ("a.rs", u32::MAX),
            ("secret", 1),
            ("secret.txt", 1),
            ("large.rs", 1),
            ("binary.c", 1),
            ("d.rs", 1),
            ("none.rs", 1),
            ("build/../a.rs", 1),
            ("../a.rs", 1),
            ("/dev/zero", 1),
        ] {
            assert_eq!(shown(path, line), None, "{path}:{line}");
        }
    }

    #[test]
    fn excerpts_are_bounded() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let file = folder.path().join("a.c");
        fs::write(&file, "x".repeat(150).as_str().to_owned() + "\n").expect("a file");
        let (mut sources, mut bytes) = (Sources::new(None), 0);
        while let Some(excerpt) = sources.excerpt(file.to_str().expect("UTF-8"), 1) {
            bytes += excerpt.lines[0].len();
        }
        assert!(bytes <= BUDGET && bytes > BUDGET - LINE_MAX);
        assert!(sources.exhausted());
    }
}
