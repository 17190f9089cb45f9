//! Stamps: a file beside each result says what it was made from, so that it is made again only when
//! that changes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The stamp in a folder.
pub fn stamp(folder: &Path) -> PathBuf {
    folder.join("made-from")
}

/// Whether the result in `folder` was made from `wanted`.
pub fn is_made_from(folder: &Path, wanted: &str) -> bool {
    fs::read_to_string(stamp(folder)).is_ok_and(|made| made == wanted)
}

/// Replaces a folder by an empty one.
pub fn empty(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
