//! An archive as Linux unpacks it into its first root file system
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::io::{self, Write};

/// The kind of an entry, as in `st_mode`.
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

/// Writes an archive in the "newc" format.
pub struct Archive<W: Write> {
    to: W,
    /// The names in it.
    paths: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(to: W) -> Self {
        Self { to, paths: BTreeSet::new() }
    }

    /// Adds a folder and its parents, where they are missing; or fails as writing does.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent)?;
        }
        self.entry(path, FOLDER | 0o755, &[])
    }

    /// Adds a file, executable or not, unless it is there; or fails as writing does.
    pub fn file(&mut self, path: &str, executable: bool, contents: &[u8]) -> io::Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent)?;
        }
        self.entry(path, FILE | if executable { 0o755 } else { 0o644 }, contents)
    }

    /// Ends the archive, or fails as writing does.
    pub fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        if !self.paths.insert(path.to_owned()) {
            return Ok(());
        }
        let inode = u32::try_from(self.paths.len()).map_err(io::Error::other)?;
        let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
        let name = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        let links = 1;
        // inode, mode, uid, gid, links, mtime, size, two device numbers, name length with its NUL,
        // checksum
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name, 0];
        write!(self.to, "070701")?;
        for field in fields {
            write!(self.to, "{field:08X}")?;
        }
        // The header has 110 bytes; name and contents are filled up to 4 each.
        self.to.write_all(path.as_bytes())?;
        self.pad(110 + path.len(), 1)?;
        self.to.write_all(contents)?;
        self.pad(contents.len(), 0)
    }

    /// At least `least` zeros behind `length` bytes, up to a multiple of 4.
    fn pad(&mut self, length: usize, least: usize) -> io::Result<()> {
        let end = (length + least).next_multiple_of(4);
        self.to.write_all(&[0; 4][..end - length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_carry_their_sizes_and_come_once() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        for _ in 0..2 {
            archive.file("bin/five", true, b"12345").unwrap();
        }
        archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let field = |at: usize, n: usize| {
            let start = at + 6 + 8 * n;
            u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
        };
        // "bin" and its NUL end at 114, the next entry starts at 116.
        assert_eq!((field(0, 1), field(0, 6), field(0, 11)), (0o040_755, 0, 4));
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!((field(116, 1), field(116, 6), field(116, 11)), (0o100_755, 5, 9));
        let name = 116 + 110;
        assert_eq!(&bytes[name..name + 9], b"bin/five\0");
        let contents = (name + 9).next_multiple_of(4);
        assert_eq!(&bytes[contents..contents + 8], b"12345\0\0\0");
        assert_eq!(&bytes[contents + 8..contents + 14], b"070701");
        assert_eq!(&bytes[contents + 8 + 110..][..10], b"TRAILER!!!");
    }
}
