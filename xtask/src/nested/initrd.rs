//! The first root file system of a nested host.

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result};
use umbra_testkit::cpio::Archive;

use super::packages::Kernel;

/// The beginning of every host's first program.
const START: &str = include_str!("init.sh");

/// Contents of every host's first root file system.
pub struct Initrd<'a> {
    /// Statically linked; its shell runs the first program.
    pub busybox: &'a Path,
    pub kernel: &'a Kernel,
    /// The modules to load, with parameters.
    pub modules: &'a [(&'a str, &'a str)],
    /// The rest of the first program, after KVM was loaded.
    pub specific: &'a str,
    /// The devices for standard output, standard error, and control words.
    pub ports: [&'a str; 3],
    /// The script to run.
    pub script: &'a [u8],
}

impl Initrd<'_> {
    /// Begins an archive with all of these.
    pub fn write<W: Write>(&self, to: W) -> Result<Archive<W>> {
        let mut archive = Archive::new(to);
        for folder in ["dev", "proc", "sys"] {
            archive.folder(folder)?;
        }
        let busybox = fs::read(self.busybox)
            .with_context(|| format!("cannot read {}", self.busybox.display()))?;
        archive.file("bin/busybox", true, &busybox)?;
        archive.file("init", true, [START, self.specific].concat().as_bytes())?;
        let names: Vec<_> = self.modules.iter().map(|(name, _)| *name).collect();
        let mut order = String::new();
        for (name, bytes) in self.kernel.modules(&names)? {
            let parameters = self.modules.iter().find(|(module, _)| *module == name);
            let parameters = parameters.map_or("", |(_, parameters)| *parameters);
            let _ = writeln!(order, "{name} {parameters}");
            archive.file(&format!("modules/{name}.ko"), false, &bytes)?;
        }
        archive.file("modules/order", false, order.as_bytes())?;
        archive.file("job/ports", false, format!("{}\n", self.ports.join(" ")).as_bytes())?;
        archive.file("job/command", false, self.script)?;
        Ok(archive)
    }
}
