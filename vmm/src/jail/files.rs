//! Landlock: which files the process can still open.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::JailError;

/// The newest rights that are asked for. An older kernel gives those that it knows.
const RIGHTS: ABI = ABI::V6;

/// Restricts this thread, and those that it starts, to files below `read`, files to be made below
/// `write`, and those of `devices` that are there. Returns what the host lacks.
pub(super) fn restrict<'a>(
    read: impl IntoIterator<Item = &'a Path>,
    write: impl IntoIterator<Item = &'a Path>,
    devices: impl IntoIterator<Item = &'a Path>,
) -> Result<Option<String>, JailError> {
    let host = |error: RulesetError| JailError::Host {
        what: "make a Landlock domain",
        source: std::io::Error::other(error),
    };
    let folder = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::WriteFile;
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut domain = Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(RIGHTS)))
        .and_then(|rules| rules.scope(Scope::from_all(RIGHTS)))
        .and_then(Ruleset::create)
        .map_err(host)?;
    for path in read {
        domain = allow(domain, path, reading)?;
    }
    for path in write {
        domain = allow(domain, path, folder)?;
    }
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    for path in devices.into_iter().filter(|path| path.exists()) {
        domain = allow(domain, path, device)?;
    }
    let status = domain.restrict_self().map_err(host)?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Some(
            "Landlock is not enabled on this host (lsm=landlock,... on its command line)".into(),
        ),
        (RulesetStatus::NotEnforced, _) => Some("this kernel has no Landlock (Linux 5.13)".into()),
        _ => None,
    })
}

/// Checks, when all privileges are dropped, whether files can be made and renamed in the folders.
pub(super) fn check_writable(folders: &[PathBuf]) -> Result<(), JailError> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let writable = |folder: &PathBuf| {
        accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
    };
    match folders.iter().find(|folder| !writable(folder)) {
        Some(folder) => Err(JailError::Privileged(folder.clone())),
        None => Ok(()),
    }
}

/// Allows `rights` at `path` and below it.
fn allow(
    domain: RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, JailError> {
    let fail = |reason: String| JailError::Path { path: path.to_owned(), reason };
    let place = PathFd::new(path).map_err(|error| fail(error.to_string()))?;
    // A file has no folder's rights.
    let rights = if path.is_dir() { rights } else { rights & AccessFs::from_file(RIGHTS) };
    domain.add_rule(PathBeneath::new(place, rights)).map_err(|error| fail(error.to_string()))
}
