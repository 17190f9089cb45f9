//! `cargo xtask linux`: the Linux kernels that the tests boot.
//!
//! Some are built from Debian's `linux-source-6.1` with our own configurations, one of them with
//! our patches; the other is Debian's stock cloud kernel as its package has it. Both packages are
//! unpacked below `target/linux` and not installed. Beside each result lies a file that says what
//! it was made from; as long as that is the same, it is not made again.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::process::Command;
use crate::{Context, setup};

/// Debian's package with the sources, which is also the name of the archive in it and of the folder
/// in that.
const SOURCE: &str = "linux-source-6.1";
/// The package that names Debian's newest cloud kernel.
const STOCK: &str = "linux-image-cloud-amd64";
/// What a kernel is built with: programs, a header, and their packages.
const NEEDED: [(&str, &str); 9] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("patch", "patch"),
    ("xz", "xz-utils"),
    ("lz4", "lz4"),
    ("/usr/include/libelf.h", "libelf-dev"),
];

/// A kernel that is built.
pub struct Kernel {
    /// The folder below target/linux that it ends up in.
    pub name: &'static str,
    /// Fragments of configuration, in guest/linux/config, one after the other on top of `make
    /// tinyconfig`.
    config: &'static [&'static str],
    /// Whether guest/linux/patches are applied.
    patched: bool,
}

/// Those that the tests boot.
const BUILT: [Kernel; 3] = [SMALL, ACPI, UMBRA];
/// One that nobody changed.
const SMALL: Kernel = Kernel { name: "small", config: &["small"], patched: false };
/// The same with ACPI.
const ACPI: Kernel = Kernel { name: "acpi", config: &["small", "acpi"], patched: false };
/// The one that Umbra checks, with Linux's own tests of KASAN in it.
pub const UMBRA: Kernel =
    Kernel { name: "umbra", config: &["small", "kasan", "umbra", "replay"], patched: true };
/// The same with shadow for virtual memory: only for its own test.
pub const UMBRA_VMALLOC: Kernel = Kernel {
    name: "umbra-vmalloc",
    config: &["small", "kasan", "umbra", "replay", "vmalloc"],
    patched: true,
};
/// What [`UMBRA`] is compared with: no KASAN, and Linux's own.
pub const COMPARED: [Kernel; 2] = [
    Kernel { name: "compare-none", config: &["small", "replay"], patched: true },
    Kernel { name: "compare-kasan", config: &["small", "kasan", "replay"], patched: true },
];
/// The same with Linux's own KASAN, and nothing of ours.
pub const STOCK_KASAN: Kernel =
    Kernel { name: "kasan", config: &["small", "kasan"], patched: false };

/// `cargo xtask linux`.
pub fn run(context: &Context) -> Result<ExitCode> {
    let kernels = build(context)?;
    context.progress.finish();
    for kernel in &kernels {
        println!("{}", kernel.display());
    }
    Ok(if kernels.len() == 2 * BUILT.len() + 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Makes what is missing or old. Returns the kernels that there are; of the others it says why not.
pub fn build(context: &Context) -> Result<Vec<PathBuf>> {
    build_these(context, &BUILT)
}

/// The same for [`SMALL`] and Debian's, which are those that `cargo xtask bench linux` boots.
pub fn build_measured(context: &Context) -> Result<()> {
    build_these(context, &[SMALL]).map(drop)
}

/// Makes `built` and Debian's.
fn build_these(context: &Context, built: &[Kernel]) -> Result<Vec<PathBuf>> {
    let root = context.root.join("target/linux");
    let mut kernels = Vec::new();
    for kernel in built {
        match build_one(context, kernel) {
            Ok(folder) => kernels.extend(["vmlinux", "bzImage"].map(|file| folder.join(file))),
            Err(error) => skipped(context, kernel.name, &error),
        }
    }
    let folder = root.join("debian");
    match stock(context, &folder) {
        Ok(()) => kernels.push(folder.join("bzImage")),
        Err(error) => skipped(context, "debian", &error),
    }
    Ok(kernels)
}

fn skipped(context: &Context, name: &str, error: &anyhow::Error) {
    context.progress.say(&format!("not built: the Linux kernel {name}: {error:#}"));
}

/// The file that says what the kernel beside it was made from.
fn stamp(folder: &Path) -> PathBuf {
    folder.join("made-from")
}

/// Whether the kernel in `folder` was made from `wanted`.
fn is_made_from(folder: &Path, wanted: &str) -> bool {
    fs::read_to_string(stamp(folder)).is_ok_and(|made| made == wanted)
}

/// An empty folder in place of whatever there is.
fn empty(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// The sources of a version, unpacked.
fn source(context: &Context, version: &str) -> Result<PathBuf> {
    let folder = context.root.join("target/linux/source");
    let tree = folder.join(SOURCE);
    if !is_made_from(&folder, version) {
        context
            .progress
            .step(&format!("fetching {SOURCE} {version}: the small Linux is built from it"));
        empty(&folder)?;
        setup::unpack(context, SOURCE, version, &folder)?;
        context.progress.step("unpacking the sources of Linux");
        let archive = folder.join(format!("usr/src/{SOURCE}.tar.xz"));
        let mut tar = Command::new("tar", &folder);
        tar.args(["-xf".as_ref(), archive.as_os_str()]).run_or_fail(&context.progress)?;
        fs::remove_dir_all(folder.join("usr")).context("cannot remove the sources' archive")?;
        fs::write(stamp(&folder), version).context("cannot write target/linux/source")?;
    }
    Ok(tree)
}

/// The patches, in order.
fn patches(context: &Context) -> Result<Vec<PathBuf>> {
    let folder = context.root.join("guest/linux/patches");
    let read =
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut patches = read
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()
        .with_context(|| format!("cannot read {}", folder.display()))?;
    patches.retain(|path| path.extension().is_some_and(|ext| ext == "patch"));
    patches.sort();
    Ok(patches)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The sources of a version with our patches. What the patches leave alone are links to the files
/// of the unpatched tree, which nothing writes to.
fn patched_source(context: &Context, version: &str, wanted: &str) -> Result<PathBuf> {
    let original = source(context, version)?;
    let folder = context.root.join("target/linux/source-umbra");
    let tree = folder.join(SOURCE);
    if !is_made_from(&folder, wanted) {
        context.progress.step("patching the sources of Linux");
        empty(&folder)?;
        let mut copy = Command::new("cp", &folder);
        copy.args(["-al".as_ref(), original.as_os_str(), folder.as_os_str()])
            .run_or_fail(&context.progress)?;
        for file in patches(context)? {
            let mut patch = Command::new("patch", &tree);
            patch.args(["-p1", "--quiet", "--no-backup-if-mismatch", "--fuzz=0", "-i"]);
            patch.args([file]).run_or_fail(&context.progress)?;
        }
        fs::write(stamp(&folder), wanted).context("cannot write target/linux/source-umbra")?;
    }
    Ok(tree)
}

/// Builds a kernel, unless it is there. Returns the folder with `vmlinux`, `bzImage` and `config`.
pub fn build_one(context: &Context, kernel: &Kernel) -> Result<PathBuf> {
    let folder = context.root.join("target/linux").join(kernel.name);
    let mut fragment = String::new();
    for name in kernel.config {
        fragment += &read(&context.root.join(format!("guest/linux/config/{name}.config")))?;
    }
    let version = setup::version(context, SOURCE)?;
    let mut source_of = format!("{SOURCE} {version}\n");
    if kernel.patched {
        for file in patches(context)? {
            source_of += &read(&file)?;
        }
    }
    let wanted = format!("{source_of}{fragment}");
    if is_made_from(&folder, &wanted) {
        return Ok(folder);
    }
    let name = kernel.name;
    let missing = setup::packages(context, &NEEDED, "Linux is built with them")?;
    if !missing.is_empty() {
        bail!("install {0} (`apt-get install {0}`)", missing.join(" "));
    }
    let tree = if kernel.patched {
        patched_source(context, &version, &source_of)?
    } else {
        source(context, &version)?
    };
    empty(&folder)?;
    let build = folder.join("build");
    let make = || {
        let mut make = Command::new("make", &tree);
        // So that a build says nothing of who made it when and where.
        for (name, value) in [("USER", "umbra"), ("HOST", "umbra"), ("TIMESTAMP", "1970-01-01")] {
            make.env(&format!("KBUILD_BUILD_{name}"), value);
        }
        make.args([format!("O={}", build.display())]);
        make
    };
    context.progress.step(&format!("configuring Linux {version}, {name}"));
    make().args(["tinyconfig"]).run_or_fail(&context.progress)?;
    let config_file = build.join(".config");
    let read = || fs::read_to_string(&config_file).context("make left no .config");
    fs::write(&config_file, read()? + &fragment).context("cannot write .config")?;
    make().args(["olddefconfig"]).run_or_fail(&context.progress)?;
    let config = read()?;
    let lost = lost(&fragment, &config);
    if !lost.is_empty() {
        bail!(
            "guest/linux/config asks for what Linux does not keep in {name}: {}",
            lost.join(", ")
        );
    }
    context.progress.step(&format!("building Linux {version}, {name}: a few minutes"));
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    make()
        .args([format!("-j{jobs}").as_str(), "vmlinux", "bzImage"])
        .run_or_fail(&context.progress)?;
    for (from, to) in
        [("vmlinux", "vmlinux"), ("arch/x86/boot/bzImage", "bzImage"), (".config", "config")]
    {
        let (from, to) = (build.join(from), folder.join(to));
        fs::rename(&from, &to).with_context(|| format!("make left no {}", from.display()))?;
    }
    fs::remove_dir_all(&build).context("cannot remove the build's folder")?;
    fs::write(stamp(&folder), wanted)
        .with_context(|| format!("cannot write {}", folder.display()))?;
    Ok(folder)
}

/// The lines of a fragment that a configuration does not have. What one line says of an option, a
/// later one may change.
fn lost<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let kept: HashSet<_> = config.lines().collect();
    let set: HashSet<_> = config.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    let mut said = HashMap::new();
    for line in fragment.lines() {
        let not_set = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set"));
        let name = not_set.or_else(|| Some(line.split_once('=')?.0));
        if let Some(name) = name.filter(|name| name.starts_with("CONFIG_")) {
            // What has no name any more is not set either.
            let is_kept = if not_set.is_some() { !set.contains(name) } else { kept.contains(line) };
            said.insert(name, (line, is_kept));
        }
    }
    let mut lost: Vec<_> =
        said.into_values().filter(|(_, is_kept)| !is_kept).map(|(line, _)| line).collect();
    lost.sort_unstable();
    lost
}

fn stock(context: &Context, folder: &Path) -> Result<()> {
    let version = setup::version(context, STOCK)?;
    let wanted = format!("{STOCK} {version}");
    if is_made_from(folder, &wanted) {
        return Ok(());
    }
    let package = setup::dependency(context, STOCK)?;
    context.progress.step(&format!("fetching {package} {version}: the tests boot it"));
    empty(folder)?;
    let unpacked = folder.join("unpacked");
    setup::unpack(context, &package, &version, &unpacked)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_loses_is_told() {
        let fragment = "# A comment about CONFIG_A is not set\nCONFIG_A=y\nCONFIG_B=4\n# CONFIG_C is not set\n\
                        # CONFIG_D is not set\n";
        assert!(lost(fragment, "CONFIG_A=y\nCONFIG_B=4\n# CONFIG_C is not set\n").is_empty());
        let kept = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_DD=y\n";
        assert_eq!(lost(fragment, kept), ["# CONFIG_C is not set", "CONFIG_B=4"]);
        assert!(lost("CONFIG_A=y\n# CONFIG_A is not set\n", "").is_empty(), "the last word counts");
        assert_eq!(lost("# CONFIG_A is not set\nCONFIG_A=y\n", ""), ["CONFIG_A=y"]);
    }
}
