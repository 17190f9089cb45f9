//! Debian's packages: which versions apt offers, and how to fetch them without installing.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::process::{Command, which};

/// The version of a package that apt would install; `None` where there is no apt, or no such
/// package.
pub fn candidate(context: &Context, package: &str) -> Result<Option<String>> {
    let ask = || -> Result<Option<String>> {
        let policy = reader(context, "apt-cache").args(["policy", package]).stream(|_| {})?.output;
        let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        Ok(version.filter(|version| *version != "(none)").map(str::to_owned))
    };
    if which("apt-cache").is_none() {
        return Ok(None);
    }
    let known = ask()?;
    if known.is_some() {
        return Ok(known);
    }
    // A clean machine has no list of packages.
    if renew_lists(context)? { ask() } else { Ok(None) }
}

/// The version of a package that apt would install.
///
/// # Errors
///
/// There is no apt, or no such package.
pub fn version(context: &Context, package: &str) -> Result<String> {
    let version = candidate(context, package)?;
    version.with_context(|| format!("apt does not offer {package}, a package of Debian 12"))
}

/// The first dependency of a package. For a package that only depends on the newest version of
/// something, that is this version.
pub fn dependency(context: &Context, package: &str) -> Result<String> {
    let depends = reader(context, "apt-cache").args(["depends", package]).stream(|_| {})?.output;
    let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(first.with_context(|| format!("{package} depends on nothing"))?.to_owned())
}

/// Packages, and those that apt would install for them on this machine, with versions. A package
/// that is already installed is also in the list.
pub fn with_what_is_missing(
    context: &Context,
    packages: &[&str],
) -> Result<BTreeMap<String, String>> {
    let wanted = packages.iter().map(|name| Ok(((*name).to_owned(), version(context, name)?)));
    let mut all = wanted.collect::<Result<BTreeMap<_, _>>>()?;
    let mut simulate = reader(context, "apt-get");
    simulate.args(["--simulate", "install", "--no-install-recommends"]).args(packages);
    let said = simulate.stream(|_| {})?;
    if !said.success {
        bail!("apt-get cannot say what {} needs: {}", packages.join(" "), last_line(&said.output));
    }
    all.extend(said.output.lines().filter_map(to_be_installed));
    Ok(all)
}

/// Name and version in a line of `apt-get --simulate`: `Inst NAME [OLD] (VERSION ...`.
fn to_be_installed(line: &str) -> Option<(String, String)> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let (version, _) = rest.split_once('(')?.1.split_once(' ')?;
    Some((name.to_owned(), version.to_owned()))
}

/// A program of apt that only reads its lists: the system's, or those in `target/apt`.
pub fn reader(context: &Context, program: &str) -> Command {
    reader_in(context, program, &context.root)
}

/// The same in another folder.
fn reader_in(context: &Context, program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program, folder);
    command.env("LC_ALL", "C");
    let own = own_lists(context);
    if own.is_file() {
        command.env("APT_CONFIG", own);
    }
    command
}

/// The configuration of apt for lists in `target/apt`.
fn own_lists(context: &Context) -> PathBuf {
    context.root.join("target/apt/apt.conf")
}

/// Fetches the lists of packages anew: the system's, or our own if this user may not. False if that
/// fails.
pub fn renew_lists(context: &Context) -> Result<bool> {
    context.progress.step("updating the list of packages");
    if let Some(apt) = Apt::find(context) {
        let mut update = apt.command("apt-get", &context.root);
        return Ok(update.args(["update", "-qq"]).run(&context.progress)?.success);
    }
    let file = own_lists(context);
    let folder = context.root.join("target/apt");
    for part in ["lists/partial", "cache/archives/partial"] {
        let part = folder.join(part);
        fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
    }
    let text =
        format!("Dir::State::lists \"{0}/lists\";\nDir::Cache \"{0}/cache\";\n", folder.display());
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    let update = reader(context, "apt-get").args(["update", "-qq"]).run(&context.progress)?;
    Ok(update.success)
}

/// Downloads packages of these versions into a folder; `None` if apt cannot.
pub fn download(
    context: &Context,
    packages: &[(&str, &str)],
    folder: &Path,
) -> Result<Option<Vec<PathBuf>>> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // apt-get downloads into the current folder.
    let mut get = reader_in(context, "apt-get", folder);
    get.args(["download", "-q"]);
    get.args(packages.iter().map(|(name, version)| format!("{name}={version}")));
    if !get.run(&context.progress)?.success {
        return Ok(None);
    }
    let entries = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let files: Vec<_> = entries.filter(is_package).collect();
    if files.len() < packages.len() {
        bail!("apt-get downloaded {} of {} packages", files.len(), packages.len());
    }
    Ok(Some(files))
}

/// Unpacks a downloaded package and removes the file. Installs nothing.
pub fn unpack_file(context: &Context, file: &Path, folder: &Path) -> Result<()> {
    Command::new("dpkg-deb", folder)
        .args([OsStr::new("-x"), file.as_os_str(), OsStr::new(".")])
        .run_or_fail(&context.progress)?;
    fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))
}

/// Downloads packages of these versions into an empty folder, and unpacks them there. Installs
/// nothing.
pub fn unpack(context: &Context, packages: &[(&str, &str)], folder: &Path) -> Result<()> {
    let download = || download(context, packages, folder);
    let files = match download()? {
        Some(files) => files,
        None => {
            // The list of packages may be old.
            renew_lists(context)?;
            let names: Vec<_> = packages.iter().map(|(name, _)| *name).collect();
            download()?
                .with_context(|| format!("apt-get could not download {}", names.join(", ")))?
        }
    };
    files.iter().try_for_each(|file| unpack_file(context, file, folder))
}

/// The last line of a program's output: mostly the reason why it failed.
fn last_line(output: &str) -> &str {
    output.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it did not say why").trim()
}

/// The right to install Debian's packages.
pub struct Apt {
    /// Set for a user who is not root.
    sudo: Option<PathBuf>,
    /// apt-get fails where another one runs. One thread at a time has the right.
    _alone: MutexGuard<'static, ()>,
}

impl Apt {
    /// If this user has it; waits while another thread makes use of it. Asks for no password.
    pub fn find(context: &Context) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        which("apt-get")?;
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: geteuid has no preconditions.
        if unsafe { libc::geteuid() } == 0 {
            return Some(Self { sudo: None, _alone: alone });
        }
        let sudo = which("sudo")?;
        // `-n`: there may be nobody to ask for a password.
        let may =
            Command::new(&sudo, &context.root).args(["-n", "true"]).stream(|_| {}).ok()?.success;
        may.then_some(Self { sudo: Some(sudo), _alone: alone })
    }

    /// A command that may change the system.
    pub fn command(&self, program: &str, directory: &Path) -> Command {
        let mut command = match &self.sudo {
            None => Command::new(program, directory),
            Some(sudo) => {
                let mut command = Command::new(sudo, directory);
                command.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", program]);
                command
            }
        };
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_would_install_is_read() {
        let line = "Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])";
        assert_eq!(to_be_installed(line), Some(("seabios".into(), "1.16.2-1".into())));
        let line = "Inst libfdt1 [1.6.0-1] (1.6.1-4+b1 Debian:12.15/oldstable [amd64]) []";
        assert_eq!(to_be_installed(line), Some(("libfdt1".into(), "1.6.1-4+b1".into())));
        assert_eq!(to_be_installed("Conf seabios (1.16.2-1 Debian)"), None);
        assert_eq!(to_be_installed("Inst"), None);
    }
}
