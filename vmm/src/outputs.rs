//! The files that the command line names for what a run leaves.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use umbra_report::{SourceRoots, Target};

/// Opens a file to write, or standard output for `-`.
pub(crate) fn output(path: &Path) -> Result<Box<dyn Write + Send>> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(io::stdout()));
    }
    let file =
        umbra_report::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Box::new(BufWriter::new(file)))
}

/// Checks before the run whether a file can be written to `path` when it has ended.
pub(crate) fn target(path: Option<&Path>) -> Result<Option<Target>> {
    let target =
        |path: &Path| Target::new(path).with_context(|| format!("cannot write {}", path.display()));
    path.map(target).transpose()
}

/// The folders that source lines may come from: those that are named, or else that of the current
/// directory.
pub(crate) fn source_roots(folders: &[PathBuf]) -> Result<SourceRoots> {
    if folders.is_empty() {
        return Ok(SourceRoots::of_current_directory());
    }
    SourceRoots::new(folders).map_err(|(path, error)| {
        anyhow::Error::new(error).context(format!("cannot read --source-root {}", path.display()))
    })
}

/// Fails if two options name one file: only one of them would be left.
///
/// # Errors
/// They do.
pub(crate) fn one_file_each(files: &[(&str, Option<&Path>)]) -> Result<()> {
    let mut seen: Vec<(&str, &Path)> = Vec::new();
    for &(option, path) in files {
        let Some(path) = path.filter(|path| path.as_os_str() != "-") else { continue };
        if let Some((other, _)) = seen.iter().find(|(_, named)| *named == path) {
            bail!("{other} and {option} name the same file: {}", path.display());
        }
        seen.push((option, path));
    }
    Ok(())
}
