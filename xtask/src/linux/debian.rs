//! Debian's own kernel, from its package.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::made_from::{empty, is_made_from, stamp};
use crate::apt;
use crate::context::Context;

/// The package that names Debian's newest cloud kernel.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Puts its bzImage into a folder, unless it is there.
pub fn fetch(context: &Context, folder: &Path) -> Result<()> {
    let version = apt::version(context, PACKAGE)?;
    let wanted = format!("{PACKAGE} {version}");
    if is_made_from(folder, &wanted) {
        return Ok(());
    }
    let package = apt::dependency(context, PACKAGE)?;
    context.progress.step(&format!("fetching {package} {version}: the tests boot it"));
    empty(folder)?;
    let unpacked = folder.join("unpacked");
    apt::unpack(context, &[(&package, &version)], &unpacked)?;
    let image = fs::read_dir(unpacked.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        })
        .with_context(|| format!("{package} holds no kernel"))?;
    fs::rename(image, folder.join("bzImage")).context("cannot move Debian's kernel")?;
    fs::remove_dir_all(&unpacked).context("cannot remove what Debian's package holds besides")?;
    fs::write(stamp(folder), wanted).with_context(|| format!("cannot write {}", folder.display()))
}
