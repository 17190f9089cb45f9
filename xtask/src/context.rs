//! State that every task needs.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::process::Command;
use crate::progress::Progress;

/// The workspace, its cargo, and where progress is shown.
pub struct Context {
    /// The workspace's root.
    pub root: PathBuf,
    /// The cargo that started this.
    pub cargo: PathBuf,
    pub progress: Progress,
}

impl Context {
    pub fn new(verbose: bool) -> Result<Self> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let manifest = manifest.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).to_owned());
        let root = manifest.parent().context("xtask is not in a workspace")?.to_owned();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into();
        Ok(Self { root, cargo, progress: Progress::new(verbose) })
    }

    /// The same, for what is done at the same time.
    pub fn beside(&self) -> Self {
        Self {
            root: self.root.clone(),
            cargo: self.cargo.clone(),
            progress: self.progress.beside(),
        }
    }

    /// A command for another program, in the workspace's folder.
    pub fn program(&self, path: &Path) -> Command {
        Command::new(path, &self.root)
    }

    /// A cargo command for the host.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo, &self.root);
        // Without this variable, the kernel that was just built is embedded
        // (`target/guest/umbra-kernel`).
        command.without("UMBRA_KERNEL");
        command
    }
}
