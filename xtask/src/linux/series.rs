//! The patches in guest/linux/patches: what they change, and whether they apply.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::process::Command;

/// The folder with them.
const FOLDER: &str = "guest/linux/patches";

/// All patches, in order.
pub struct Series {
    patches: Vec<Patch>,
}

struct Patch {
    file: PathBuf,
    text: String,
}

impl Series {
    /// Reads the series.
    pub fn read(context: &Context) -> Result<Self> {
        let folder = context.root.join(FOLDER);
        let read =
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut files = read
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()
            .with_context(|| format!("cannot read {}", folder.display()))?;
        files.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
        files.sort();
        let patch = |file: PathBuf| {
            let text = fs::read_to_string(&file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            Ok(Patch { file, text })
        };
        Ok(Self { patches: files.into_iter().map(patch).collect::<Result<_>>()? })
    }

    /// The text of all patches.
    pub fn text(&self) -> String {
        self.patches.iter().map(|patch| patch.text.as_str()).collect()
    }

    /// The files that it changes or creates.
    pub fn files(&self) -> BTreeSet<&str> {
        self.patches.iter().flat_map(|patch| files(&patch.text)).collect()
    }

    /// Applies it to a source tree, or to the files of a tree that it changes. Returns the first
    /// patch that does not apply, and why.
    pub fn apply(&self, context: &Context, tree: &Path) -> Result<Option<String>> {
        for Patch { file, .. } in &self.patches {
            let mut patch = Command::new("patch", tree);
            patch.args(["-p1", "--batch", "--forward", "--fuzz=0"]);
            patch.args(["--no-backup-if-mismatch", "--reject-file=-", "-i"]).args([file]);
            let finished = patch.env("LC_ALL", "C").run(&context.progress)?;
            if !finished.success {
                let why = fault(&finished.output);
                return Ok(Some(format!("patch {} does not apply: {why}", number(file))));
            }
        }
        Ok(None)
    }
}

/// A patch's number, with which its name begins.
fn number(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.split('-').next().unwrap_or(&name).to_owned()
}

/// The files in a patch of git.
fn files(patch: &str) -> impl Iterator<Item = &str> {
    let pairs = patch.lines().filter_map(|line| line.strip_prefix("diff --git a/"));
    pairs.filter_map(|pair| Some(pair.split_once(" b/")?.0))
}

/// patch(1)'s message about the first file that it cannot change.
fn fault(output: &str) -> String {
    let mut file = "a file";
    for line in output.lines() {
        let names = ["patching file ", "|+++ b/", "The next patch would create the file "];
        if let Some(name) = names.iter().find_map(|before| line.strip_prefix(before)) {
            file = name.trim_end_matches(',');
        }
        for (said, what) in [
            ("FAILED", "has changed"),
            ("No file to patch", "is gone"),
            ("already exists", "exists"),
        ] {
            if line.contains(said) {
                return format!("{file} {what}");
            }
        }
    }
    output.lines().last().unwrap_or("patch(1) does not say why").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_says_what_it_changes() {
        let patch = "diff --git a/mm/a.c b/mm/a.c\n--- a/mm/a.c\n+++ b/mm/a.c\n--- a/no.c\n\
                     diff --git a/mm/new.c b/mm/new.c\n--- /dev/null\n+++ b/mm/new.c\n";
        assert_eq!(files(patch).collect::<Vec<_>>(), ["mm/a.c", "mm/new.c"]);
    }

    #[test]
    fn a_patch_is_called_by_its_number() {
        assert_eq!(number(Path::new("/a/0008-mm-check-a-page.patch")), "0008");
        assert_eq!(number(Path::new("fix.patch")), "fix.patch");
    }

    #[test]
    fn why_a_patch_does_not_apply_is_told_by_file() {
        let output = "patching file mm/a.c\nHunk #1 succeeded at 9 (offset 1 line).\n\
                      patching file mm/b.c\nHunk #1 FAILED at 2.\n1 out of 1 hunk FAILED\n";
        assert_eq!(fault(output), "mm/b.c has changed");
        let output = "can't find file to patch at input line 9\nThe text was:\n--------\n\
                      |--- a/mm/c.c\n|+++ b/mm/c.c\n--------\nNo file to patch.  Skipping patch.\n";
        assert_eq!(fault(output), "mm/c.c is gone");
        let output = "The next patch would create the file mm/d.c,\n\
                      which already exists!  Skipping patch.\n";
        assert_eq!(fault(output), "mm/d.c exists");
        assert_eq!(fault("patch: **** malformed patch\n"), "patch: **** malformed patch");
    }
}
