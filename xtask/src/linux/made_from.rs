//! A result that is kept knows what it was made from, so that it is made again only when that
//! changes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The file that says what was made from what, in the folder with it.
pub fn stamp(folder: &Path) -> PathBuf {
    folder.join("made-from")
}

/// Whether what is in `folder` was made from `wanted`.
pub fn is_made_from(folder: &Path, wanted: &str) -> bool {
    fs::read_to_string(stamp(folder)).is_ok_and(|made| made == wanted)
}

/// An empty folder in place of whatever there is.
pub fn empty(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
