//! Keeps the results: one file for each part, and `BENCHMARKS.md`, which has all of them in order.
//!
//! A part writes `results/NN-name.md`, and its plots beside it. A new part only needs a number.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

/// The folder of the parts' files.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/results");
/// All parts together.
const WHOLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../BENCHMARKS.md");

const INTRODUCTION: &str = "\
# Benchmarks

What Umbra costs, compared with a full shadow (KASAN's layout) and with the alternatives. `cargo
xtask bench` measures and writes this page, except the parts on whole hosts and on Linux. Each part
names its command, its host and its commit. Nothing here is written by hand.

How to read it:

- The first part shows what hardware will pay: it counts guest, VMM and host kernel together. All
  other parts count or time one of them. There, *instructions* are the guest's alone.
- *Two-level* (`per-page`) is Umbra's shadow: one byte for each page, and KASAN's byte shadow only
  for pages that need it. *Full* is KASAN's own layout, 1/8 of memory, from the start.
- Instructions, exits and bytes repeat exactly. Seconds and nanoseconds do not: compare them only
  within one table, where all were measured in turns.
- On a host whose KVM emulates ring 0 (PVM), an instruction of the guest costs about 0.2 µs, and an
  exit as much as 50 of them. On hardware, an instruction costs about 0.3 ns, and an exit as much as
  thousands.
- Resident memory is what the kernel reports. Figures that are only counted say so.
- A limit is what the project promises. A figure over its limit is marked.
";

/// A part of the page.
pub struct Section<'a> {
    /// The name of its file: two digits, which give its place, and a word.
    pub name: &'a str,
    /// Its heading.
    pub title: &'a str,
    /// The command that makes it.
    pub command: &'a str,
    /// What it was measured on.
    pub host: String,
    /// Its text, in Markdown. Paths in it are relative to the workspace.
    pub body: String,
}

impl Section<'_> {
    /// Writes its file, and the whole page anew.
    ///
    /// # Errors
    /// A file cannot be written or read.
    pub fn write(&self) -> Result<()> {
        let Self { name, title, command, host, body } = self;
        let text = wrapped(&format!(
            "## {title}\n\nMade by `{command}`, at {}, on {host}.\n\n{}\n",
            commit(),
            body.trim_matches('\n')
        ));
        let path = Path::new(FOLDER).join(format!("{name}.md"));
        fs::create_dir_all(FOLDER).with_context(|| format!("cannot create {FOLDER}"))?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        let whole = whole(Path::new(FOLDER))?;
        fs::write(WHOLE, whole).with_context(|| format!("cannot write {WHOLE}"))
    }
}

/// Most columns of a line of prose.
const COLUMNS: usize = 100;

/// Markdown whose paragraphs are filled up to [`COLUMNS`]. Tables, headings, lists, and all else
/// whose lines begin with something other than a word stay as they are.
fn wrapped(text: &str) -> String {
    let mut filled = String::new();
    // Columns of the last line of a paragraph; 0 if there is none to go on with.
    let mut columns = 0;
    for line in text.lines() {
        let is_prose = line.starts_with(|c: char| c.is_alphanumeric() || "(`*".contains(c))
            && !line.starts_with("* ")
            && !line.starts_with("```");
        if !is_prose {
            if columns > 0 {
                filled.push('\n');
            }
            filled.push_str(line);
            filled.push('\n');
            columns = 0;
            continue;
        }
        for word in line.split_whitespace() {
            let len = word.chars().count();
            if columns > 0 && columns + 1 + len > COLUMNS {
                filled.push('\n');
                columns = 0;
            } else if columns > 0 {
                filled.push(' ');
                columns += 1;
            }
            filled.push_str(word);
            columns += len;
        }
    }
    if columns > 0 {
        filled.push('\n');
    }
    filled
}

/// The commit that is checked out, and whether it was changed since.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(FOLDER).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(hash) = git(&["rev-parse", "--short", "HEAD"]) else {
        return "an unknown commit".into();
    };
    // The results may differ.
    let changed =
        git(&["status", "--porcelain", "--", ":/", ":!/benches/results", ":!/BENCHMARKS.md"]);
    let changed = changed.is_none_or(|changed| !changed.is_empty());
    format!("commit {hash}{}", if changed { " with changes" } else { "" })
}

/// The path of a plot, and its path on the page.
pub fn plot(name: &str) -> (PathBuf, String) {
    (Path::new(FOLDER).join(name), format!("benches/results/{name}"))
}

/// The page: all sections by name.
fn whole(folder: &Path) -> Result<String> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    files.sort();
    let mut text = INTRODUCTION.to_owned();
    for file in files {
        let section =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        text.push('\n');
        text.push_str(section.trim_end());
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_what_its_parts_are() {
        let page = fs::read_to_string(WHOLE).expect("BENCHMARKS.md is in the repository");
        assert_eq!(page, whole(Path::new(FOLDER)).unwrap(), "BENCHMARKS.md was edited by hand");
    }

    #[test]
    fn paragraphs_are_filled() {
        let long = "word ".repeat(30);
        let text = format!("## {long}\n\nOne\ntwo {long}\n\n| a {long} |\n\n*New*: three\n");
        let filled = wrapped(&text);
        let lines: Vec<_> = filled.lines().collect();
        assert_eq!(lines[0], format!("## {long}"));
        assert!(lines[2].starts_with("One two word word") && lines[2].ends_with("word"));
        assert!((96..=COLUMNS).contains(&lines[2].len()), "{}", lines[2]);
        assert_eq!(lines[5..], [&format!("| a {long} |"), "", "*New*: three"]);
        assert_eq!(wrapped(&filled), filled);
        let fits = format!("{} b\n", "a".repeat(COLUMNS - 2));
        assert_eq!(wrapped(&fits), fits);
        assert_eq!(wrapped(&format!("{} bc\n", "a".repeat(COLUMNS - 2))).lines().count(), 2);
    }

    #[test]
    fn sections_come_by_name() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("20-b.md", "## b\n"), ("10-a.md", "## a\n\n"), ("a.svg", "<svg/>")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(whole(folder.path()).unwrap(), format!("{INTRODUCTION}\n## a\n\n## b\n"));
    }
}
