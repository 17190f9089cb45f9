//! The parts of the nested host, from Debian's packages: QEMU, a kernel with its modules, and
//! busybox. They are unpacked below `target/nested` and kept there, not installed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::apt;
use crate::context::Context;
use crate::process::{Command, which};

/// The package that names Debian's newest kernel with all its modules.
const KERNEL: &str = "linux-image-amd64";
/// The program that emulates the nested host's CPU, and its package.
const QEMU: (&str, &str) = ("qemu-system-x86_64", "qemu-system-x86");
/// The other emulator with one of its displays, its firmware, and what makes a CD that boots.
const BOCHS: [&str; 7] =
    ["bochs", "bochs-term", "bochsbios", "vgabios", "grub-pc-bin", "grub-common", "xorriso"];
/// The shell and tools of the first root file system, and their package. Linked statically.
const BUSYBOX: (&str, &str) = ("bin/busybox", "busybox-static");

/// An emulator, unpacked or installed.
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Variables that it needs to find its libraries, and options that lead it to its data.
    pub variables: Vec<(&'static str, OsString)>,
    /// Folders with its firmware.
    pub data: Vec<PathBuf>,
    /// Its version, in its own words.
    pub version: String,
}

/// A kernel and modules for it.
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
    modules: BTreeMap<String, PathBuf>,
}

/// QEMU: the installed one, or Debian's package with those of its dependencies that this machine
/// lacks.
pub fn qemu(context: &Context) -> Result<Program> {
    let mut program = match which(QEMU.0) {
        Some(path) => {
            Program { path, variables: Vec::new(), data: Vec::new(), version: String::new() }
        }
        None => unpacked_qemu(context)?,
    };
    let mut ask = Command::new(&program.path, &context.root);
    for (name, value) in &program.variables {
        ask.env(name, value);
    }
    let said = ask.args(["--version"]).stream(|_| {})?;
    if !said.success {
        bail!("{} does not start: {}", program.path.display(), said.output.trim());
    }
    program.version = said.output.lines().next().unwrap_or_default().trim().to_owned();
    Ok(program)
}

/// QEMU from Debian's packages.
fn unpacked_qemu(context: &Context) -> Result<Program> {
    let folder = unpacked(context, QEMU.1, &[QEMU.1])?;
    let path = program_in(&folder, QEMU.0)?;
    let modules = folder.join("usr/lib/x86_64-linux-gnu/qemu").into_os_string();
    let data = ["usr/share/qemu", "usr/share/seabios"].map(|data| folder.join(data)).into();
    let variables = vec![libraries(&folder)?, ("QEMU_MODULE_DIR", modules)];
    Ok(Program { path, variables, data, version: String::new() })
}

/// Bochs and what makes a CD for it, in a folder as if it were `/`. Installed programs are unpacked
/// too, so that the place of their data is known.
pub fn bochs(context: &Context) -> Result<PathBuf> {
    let folder = unpacked(context, "bochs", &BOCHS)?;
    for program in ["bochs-bin", "grub-mkrescue", "xorriso"] {
        program_in(&folder, program)?;
    }
    Ok(folder)
}

/// Unpacks packages, with those of their dependencies that this machine lacks, into a folder of
/// this name.
fn unpacked(context: &Context, name: &str, packages: &[&str]) -> Result<PathBuf> {
    let folder = folder(context).join(name);
    if !folder.join(DONE).is_file() {
        let packages: Vec<_> = apt::with_what_is_missing(context, packages)?.into_iter().collect();
        fetch(context, &packages, &folder)?;
    }
    Ok(folder)
}

/// A program of unpacked packages.
fn program_in(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join("usr/bin").join(name);
    if !path.is_file() {
        bail!("Debian's packages hold no {name}: remove {} and try again", folder.display());
    }
    Ok(path)
}

/// The environment variable for the libraries of unpacked packages.
pub fn libraries(folder: &Path) -> Result<(&'static str, OsString)> {
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib"];
    let libraries = std::env::join_paths(libraries.map(|library| folder.join(library)))
        .with_context(|| format!("{} cannot be in a search path", folder.display()))?;
    Ok(("LD_LIBRARY_PATH", libraries))
}

/// Debian's kernel.
pub fn kernel(context: &Context) -> Result<Kernel> {
    let folder = folder(context).join(KERNEL);
    if !folder.join(DONE).is_file() {
        let version = apt::version(context, KERNEL)?;
        let package = apt::dependency(context, KERNEL)?;
        fetch(context, &[(package, version)], &folder)?;
    }
    let image = file_in(&folder.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let release = image.file_name().unwrap_or_default().to_string_lossy();
    let release = release.trim_start_matches("vmlinuz-").to_owned();
    let mut modules = BTreeMap::new();
    collect_modules(&folder.join("lib/modules").join(&release).join("kernel"), &mut modules)?;
    Ok(Kernel { image, release, modules })
}

/// Debian's static busybox.
pub fn busybox(context: &Context) -> Result<PathBuf> {
    let folder = folder(context).join(BUSYBOX.1);
    if !folder.join(DONE).is_file() {
        let version = apt::version(context, BUSYBOX.1)?;
        fetch(context, &[(BUSYBOX.1.to_owned(), version)], &folder)?;
    }
    Ok(folder.join(BUSYBOX.0))
}

impl Kernel {
    /// These modules and their dependencies, in the order to load them.
    ///
    /// # Errors
    ///
    /// The kernel has no such module.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(name, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if order.iter().any(|(other, _)| other == name) {
            return Ok(());
        }
        let path = self.modules.get(name);
        let path = path.with_context(|| format!("Linux {} has no module {name}", self.release))?;
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        for needed in needs(&bytes) {
            self.add(&needed, order)?;
        }
        order.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// Present in a folder whose packages are all there.
const DONE: &str = "complete";

/// The folder for all of it.
fn folder(context: &Context) -> PathBuf {
    context.root.join("target/nested")
}

/// Unpacks packages into a folder, one after the other.
fn fetch(context: &Context, packages: &[(String, String)], folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    let what = folder.file_name().unwrap_or_default().to_string_lossy();
    let what = match packages {
        [(package, version)] => format!("{package} {version}"),
        many => format!("{what} and the {} packages it needs", many.len() - 1),
    };
    context.progress.step(&format!("fetching {what} for the nested host"));
    let packages: Vec<_> = packages.iter().map(|(name, version)| (&**name, &**version)).collect();
    apt::unpack(context, &packages, folder)?;
    fs::write(folder.join(DONE), "").with_context(|| format!("cannot write {}", folder.display()))
}

/// A file in a folder, by its name.
fn file_in(folder: &Path, is_it: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let found =
        paths.find(|path| path.file_name().is_some_and(|name| is_it(&name.to_string_lossy())));
    found.with_context(|| format!("the package left no kernel in {}", folder.display()))
}

/// All modules below a folder, by name. Linux calls `kvm-amd.ko` `kvm_amd` elsewhere.
fn collect_modules(folder: &Path, modules: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect_modules(&path, modules)?;
        } else if path.extension().is_some_and(|extension| extension == "ko")
            && let Some(name) = path.file_stem()
        {
            modules.insert(name.to_string_lossy().replace('-', "_"), path);
        }
    }
    Ok(())
}

/// A module's dependencies: `depends=a,b` in its `.modinfo` (`scripts/mod/modpost.c`).
fn needs(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let list = &module[start + key.len()..];
    let list = list.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(list).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        assert_eq!(needs(b"x\0license=GPL\0depends=kvm,ccp\0name=kvm_amd\0"), ["kvm", "ccp"]);
        assert_eq!(needs(b"\0depends=a-b\0"), ["a_b"]);
        assert!(needs(b"\0depends=\0name=irqbypass\0").is_empty());
        assert!(needs(b"nothing").is_empty());
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let folder = tempfile::tempdir().unwrap();
        for (name, needs) in
            [("kvm-amd", "kvm,ccp"), ("kvm", "irqbypass"), ("irqbypass", ""), ("ccp", "")]
        {
            let text = format!("\0depends={needs}\0");
            fs::write(folder.path().join(format!("{name}.ko")), text).unwrap();
        }
        let mut modules = BTreeMap::new();
        collect_modules(folder.path(), &mut modules).unwrap();
        let kernel = Kernel { image: PathBuf::new(), release: "6".into(), modules };
        let order = kernel.modules(&["kvm_amd", "kvm"]).unwrap();
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
        assert!(kernel.modules(&["9p"]).unwrap_err().to_string().contains("no module 9p"));
    }
}
