//! The sources of Linux: which version they are, and the trees that kernels are built from.
//!
//! All of it is below `target/linux`. `originals/VERSION` has the files that the series changes,
//! before it is applied: enough to check whether it applies. `source` has one whole tree, and
//! `source-umbra` the same with the series.

use std::cell::Cell;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::made_from::{empty, is_made_from, stamp};
use super::series::Series;
use super::versions::{self, Choice, Verdict};
use crate::context::Context;
use crate::process::{Command, which};
use crate::{apt, setup};

/// Debian's package with the sources. The archive in it and the folder in that have the same name.
pub const PACKAGE: &str = "linux-source-6.1";
/// The versions that are known to work.
const KNOWN: &str = "guest/linux/versions";
/// Tools to unpack and patch.
const NEEDED: [(&str, &str); 2] = [("patch", "patch"), ("xz", "xz-utils")];

/// The package with the sources, and the series.
pub struct Sources<'a> {
    context: &'a Context,
    /// The series.
    pub series: Series,
    /// Whether apt's lists were renewed because a package was missing.
    renewed: Cell<bool>,
    /// Another process would remove what this one builds.
    _lock: File,
}

/// Waits until no other process works below `target/linux`.
fn lock(context: &Context) -> Result<File> {
    let folder = context.root.join("target/linux");
    let file = folder.join("lock");
    let open = || {
        fs::create_dir_all(&folder)?;
        File::create(&file)
    };
    let cannot = || format!("cannot lock {}", file.display());
    let lock = open().with_context(cannot)?;
    if let Err(error) = lock.try_lock() {
        if matches!(error, TryLockError::WouldBlock) {
            context.progress.step("waiting for another `cargo xtask` that works on Linux");
        }
        lock.lock().with_context(cannot)?;
    }
    Ok(lock)
}

impl<'a> Sources<'a> {
    /// Installs the tools and reads the series. Waits while another process builds Linux here.
    pub fn new(context: &'a Context) -> Result<Self> {
        if which("apt-cache").is_none() {
            bail!("there is no apt: {PACKAGE} is a package of Debian 12");
        }
        let missing = setup::packages(context, &NEEDED, "Linux's sources are patched")?;
        if !missing.is_empty() {
            bail!("install {0} (`apt-get install {0}`)", missing.join(" "));
        }
        let series = Series::read(context)?;
        Ok(Self { context, series, renewed: Cell::new(false), _lock: lock(context)? })
    }

    /// The versions that apt offers, the newest first.
    pub fn offered(&self) -> Result<Vec<String>> {
        let ask = || -> Result<Vec<String>> {
            let mut madison = apt::reader(self.context, "apt-cache");
            let madison = madison.args(["madison", PACKAGE]).stream(|_| {})?;
            Ok(versions::offered(&madison.output, PACKAGE))
        };
        let offered = ask()?;
        if !offered.is_empty() || !self.renew()? {
            return Ok(offered);
        }
        ask()
    }

    /// The versions that are known to work.
    pub fn known(&self) -> Result<Vec<String>> {
        let file = self.context.root.join(KNOWN);
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(versions::list(&text))
    }

    /// Chooses the version to build. `try_out` tests whether one works.
    pub fn choose(&self, mut try_out: impl FnMut(&str) -> Result<Verdict>) -> Result<Choice> {
        let (offered, known) = (self.offered()?, self.known()?);
        let choice = versions::choose(&offered, &known, &mut try_out)?;
        // Apt's lists may be months old, and name neither the newest version nor one that works.
        if !choice.passed_over.is_empty() {
            self.renew()?;
        }
        let offered_now = if self.renewed.get() { self.offered()? } else { offered.clone() };
        if offered_now == offered {
            return Ok(choice);
        }
        versions::choose(&offered_now, &known, try_out)
    }

    /// Renews apt's lists, at most once. False if that was done before, or failed.
    fn renew(&self) -> Result<bool> {
        Ok(!self.renewed.replace(true) && apt::renew_lists(self.context)?)
    }

    /// A folder or file below `target/linux`.
    fn place(&self, name: &str) -> PathBuf {
        self.context.root.join("target/linux").join(name)
    }

    /// Whether the series applies to a version.
    pub fn verdict(&self, version: &str) -> Result<Verdict> {
        let Some(originals) = self.originals(version)? else { return Ok(Verdict::Gone) };
        let tree = self.place("try");
        empty(&tree)?;
        copy(&originals, &tree, &self.series)?;
        let fault = self.series.apply(self.context, &tree)?;
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
        Ok(fault.map_or(Verdict::Works, Verdict::Refused))
    }

    /// The files of a version that the series changes; none if it cannot be downloaded.
    fn originals(&self, version: &str) -> Result<Option<PathBuf>> {
        let folder = self.place("originals").join(version);
        let files: Vec<_> = self.series.files().into_iter().collect();
        let wanted = files.join("\n");
        if is_made_from(&folder, &wanted) {
            return Ok(Some(folder));
        }
        let source = self.place("source");
        if is_made_from(&source, version) {
            empty(&folder)?;
            copy(&source.join(PACKAGE), &folder, &self.series)?;
        } else {
            let Some(archive) = self.archive(version)? else { return Ok(None) };
            self.context.progress.step(&format!("reading {PACKAGE} {version}"));
            empty(&folder)?;
            let mut tar = Command::new("tar", &folder);
            tar.args(["--strip-components=1".as_ref(), "-xf".as_ref(), archive.as_os_str()]);
            tar.args(files.iter().map(|file| format!("{PACKAGE}/{file}")));
            let finished = tar.env("LC_ALL", "C").run(&self.context.progress)?;
            if !finished.success && !only_misses_files(&finished.output) {
                bail!("{PACKAGE} {version} cannot be unpacked: {}", finished.output.trim());
            }
        }
        fs::write(stamp(&folder), wanted).context("cannot write target/linux/originals")?;
        Ok(Some(folder))
    }

    /// The archive in the package; none if it cannot be downloaded. There is one at a time.
    fn archive(&self, version: &str) -> Result<Option<PathBuf>> {
        let folder = self.place("archive");
        let archive = folder.join(format!("usr/src/{PACKAGE}.tar.xz"));
        if !is_made_from(&folder, version) {
            self.context.progress.step(&format!("fetching {PACKAGE} {version}"));
            empty(&folder)?;
            let get = || apt::download(self.context, &[(PACKAGE, version)], &folder);
            let package = match get()? {
                None if self.renew()? => get()?,
                package => package,
            };
            let Some(package) = package else { return Ok(None) };
            for package in &package {
                apt::unpack_file(self.context, package, &folder)?;
            }
            fs::write(stamp(&folder), version).context("cannot write target/linux/archive")?;
        }
        Ok(Some(archive))
    }

    /// Removes the archive, which is only needed until a tree is unpacked.
    pub fn tidy(&self) -> Result<()> {
        let archive = self.place("archive");
        if archive.exists() {
            fs::remove_dir_all(&archive)
                .with_context(|| format!("cannot remove {}", archive.display()))?;
        }
        Ok(())
    }

    /// The sources of a version, unpacked.
    pub fn tree(&self, version: &str) -> Result<PathBuf> {
        let folder = self.place("source");
        let tree = folder.join(PACKAGE);
        if !is_made_from(&folder, version) {
            let archive = self.archive(version)?;
            let archive =
                archive.with_context(|| format!("{PACKAGE} {version} cannot be downloaded"))?;
            self.context.progress.step("unpacking the sources of Linux");
            empty(&folder)?;
            let mut tar = Command::new("tar", &folder);
            tar.args(["-xf".as_ref(), archive.as_os_str()]).run_or_fail(&self.context.progress)?;
            fs::write(stamp(&folder), version).context("cannot write target/linux/source")?;
            self.tidy()?;
        }
        Ok(tree)
    }

    /// The same with the series. Unchanged files are links to those of the other tree, which
    /// nothing writes to.
    pub fn patched_tree(&self, version: &str) -> Result<PathBuf> {
        let original = self.tree(version)?;
        let folder = self.place("source-umbra");
        let tree = folder.join(PACKAGE);
        let wanted = format!("{version}\n{}", self.series.text());
        if !is_made_from(&folder, &wanted) {
            self.context.progress.step("patching the sources of Linux");
            empty(&folder)?;
            let mut copy = Command::new("cp", &folder);
            copy.args(["-al".as_ref(), original.as_os_str(), folder.as_os_str()])
                .run_or_fail(&self.context.progress)?;
            if let Some(fault) = self.series.apply(self.context, &tree)? {
                bail!("{PACKAGE} {version}: {fault}");
            }
            fs::write(stamp(&folder), wanted).context("cannot write target/linux/source-umbra")?;
        }
        Ok(tree)
    }
}

/// Whether tar(1) only complains about files that are not in the archive: files that the series
/// creates are in none.
fn only_misses_files(output: &str) -> bool {
    let of_files = |line: &str| {
        line.ends_with(": Not found in archive") || line.contains("Exiting with failure status")
    };
    output.lines().all(of_files)
}

/// Copies the files of a tree that the series changes.
fn copy(from: &Path, to: &Path, series: &Series) -> Result<()> {
    for file in series.files() {
        let (from, to) = (from.join(file), to.join(file));
        if from.exists() {
            let folder = to.parent().context("a patch names no file")?;
            fs::create_dir_all(folder)
                .and_then(|()| fs::copy(&from, &to).map(drop))
                .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_the_series_makes_may_be_missing() {
        let missing = "tar: linux/mm/new.c: Not found in archive\n\
                       tar: Exiting with failure status due to previous errors\n";
        assert!(only_misses_files(missing));
        let full = "tar: linux/mm/a.c: Cannot write: No space left on device\n";
        assert!(!only_misses_files(&format!("{full}{missing}")));
    }
}
