//! The kernels that are built, and how.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context as _, Result, bail};

use super::made_from::{empty, is_made_from, stamp};
use super::source::{PACKAGE, Sources};
use super::versions::{Choice, Verdict};
use crate::context::Context;
use crate::process::Command;
use crate::setup;

/// Build dependencies of a kernel: programs, a header, and their packages.
const NEEDED: [(&str, &str); 7] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("lz4", "lz4"),
    ("/usr/include/libelf.h", "libelf-dev"),
];

/// Sources of modules.
const MODULES: &str = "guest/linux/modules";

/// A kernel that is built.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Its folder below target/linux.
    pub name: &'static str,
    /// Fragments of configuration, in guest/linux/config, one after the other on top of `make
    /// tinyconfig`.
    config: &'static [&'static str],
    /// Whether guest/linux/patches are applied.
    patched: bool,
    /// Whether the modules of guest/linux/modules are built for it, too.
    modules: bool,
}

const fn unpatched(name: &'static str, config: &'static [&'static str]) -> Kernel {
    Kernel { name, config, patched: false, modules: false }
}

const fn patched(name: &'static str, config: &'static [&'static str]) -> Kernel {
    Kernel { name, config, patched: true, modules: false }
}

/// A small unpatched kernel.
pub const SMALL: Kernel = unpatched("small", &["small"]);
/// The same with ACPI.
pub const ACPI: Kernel = unpatched("acpi", &["small", "acpi"]);
/// The kernel that Umbra checks, with Linux's own tests of KASAN.
pub const UMBRA: Kernel = patched("umbra", &["small", "kasan", "umbra", "replay", "provoke"]);
/// The same with shadow for virtual memory: only for its own test.
pub const UMBRA_VMALLOC: Kernel =
    patched("umbra-vmalloc", &["small", "kasan", "umbra", "replay", "provoke", "vmalloc"]);
/// The same with modules: only for their tests.
pub const UMBRA_MODULES: Kernel = Kernel {
    modules: true,
    ..patched("umbra-modules", &["small", "kasan", "umbra", "vmalloc", "modules"])
};
/// The same as [`UMBRA`] with Linux's own KASAN, unpatched.
pub const STOCK_KASAN: Kernel = unpatched("kasan", &["small", "kasan"]);
/// The compared kernels: without KASAN, with Linux's own (outline, inline), with Umbra's. They are
/// optimized as the kernels of distributions are.
pub const COMPARED: [Kernel; 4] = [
    patched("compare-none", &["small", "compare", "replay"]),
    patched("compare-outline", &["small", "kasan", "compare", "replay"]),
    patched("compare-inline", &["small", "kasan", "inline", "compare", "replay"]),
    patched("compare-umbra", &["small", "kasan", "umbra", "compare", "replay"]),
];

impl Kernel {
    fn folder(&self, context: &Context) -> PathBuf {
        context.root.join("target/linux").join(self.name)
    }

    /// The configuration on top of tinyconfig.
    fn fragment(&self, context: &Context) -> Result<String> {
        let mut fragment = String::new();
        for name in self.config {
            let file = context.root.join(format!("guest/linux/config/{name}.config"));
            fragment += &fs::read_to_string(&file)
                .with_context(|| format!("cannot read {}", file.display()))?;
        }
        Ok(fragment)
    }
}

/// Builds kernels, all from one version of the sources.
pub struct Builder<'a> {
    context: &'a Context,
    sources: Sources<'a>,
    version: String,
    /// A notice about the version: it is not the newest one, or has no patches.
    pub notice: Option<String>,
    patches_work: bool,
}

impl<'a> Builder<'a> {
    /// Chooses a version that the patches work with. If there is none, unpatched kernels are built
    /// from the newest one available.
    ///
    /// To find out whether an unknown version works, the patched kernels among `wanted` are built
    /// at once.
    pub fn new(context: &'a Context, wanted: &[Kernel]) -> Result<Self> {
        let sources = Sources::new(context)?;
        remove_objects(context)?;
        let known = sources.known()?;
        let choice = sources.choose(|version| {
            let verdict = sources.verdict(version)?;
            if verdict != Verdict::Works || known.iter().any(|one| one == version) {
                return Ok(verdict);
            }
            for kernel in wanted.iter().filter(|kernel| kernel.patched) {
                if !is_built(context, &sources, version, kernel)? {
                    tools(context)?;
                    if let Err(error) = build(context, &sources, version, kernel) {
                        return Ok(Verdict::Refused(format!("{error:#}")));
                    }
                }
            }
            Ok(Verdict::Works)
        })?;
        let notice = choice.notice(PACKAGE);
        let patches_work = choice.version.is_some();
        let Some(version) = version(choice) else {
            bail!("{}", notice.unwrap_or_default());
        };
        Ok(Self { context, sources, version, notice, patches_work })
    }

    /// Builds a kernel, unless it is up to date. Returns the folder with `vmlinux`, `bzImage` and
    /// `config`.
    pub fn build(&self, kernel: &Kernel) -> Result<PathBuf> {
        if kernel.patched && !self.patches_work {
            bail!("guest/linux/patches work with no version of {PACKAGE} that apt offers");
        }
        if !is_built(self.context, &self.sources, &self.version, kernel)? {
            tools(self.context)?;
            build(self.context, &self.sources, &self.version, kernel)?;
        }
        Ok(kernel.folder(self.context))
    }
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        // At worst they stay until the next build.
        let _ = remove_objects(self.context);
    }
}

/// The version for unpatched kernels.
fn version(choice: Choice) -> Option<String> {
    let passed_over = choice.passed_over.into_iter();
    let mut there = passed_over.filter(|(_, verdict)| *verdict != Verdict::Gone);
    choice.version.or_else(|| Some(there.next()?.0))
}

/// Installs the build dependencies.
fn tools(context: &Context) -> Result<()> {
    let missing = setup::packages(context, &NEEDED, "Linux is built with them")?;
    if !missing.is_empty() {
        bail!("install {0} (`apt-get install {0}`)", missing.join(" "));
    }
    Ok(())
}

/// A kernel's stamp: version, patches and configuration.
fn ingredients(
    context: &Context,
    sources: &Sources<'_>,
    version: &str,
    kernel: &Kernel,
) -> Result<String> {
    let patches = if kernel.patched { sources.series.text() } else { String::new() };
    let mut text = format!("{PACKAGE} {version}\n{patches}{}", kernel.fragment(context)?);
    if kernel.modules {
        for (name, source) in module_sources(context)? {
            text += &format!("{name}\n{source}");
        }
    }
    Ok(text)
}

fn is_built(
    context: &Context,
    sources: &Sources<'_>,
    version: &str,
    kernel: &Kernel,
) -> Result<bool> {
    let wanted = ingredients(context, sources, version, kernel)?;
    Ok(is_made_from(&kernel.folder(context), &wanted))
}

fn build(context: &Context, sources: &Sources<'_>, version: &str, kernel: &Kernel) -> Result<()> {
    let (folder, name) = (kernel.folder(context), kernel.name);
    let trees = if kernel.patched { "patched" } else { "as-it-is" };
    let build = objects(context).join(version).join(trees);
    let wanted = ingredients(context, sources, version, kernel)?;
    let tree =
        if kernel.patched { sources.patched_tree(version)? } else { sources.tree(version)? };
    empty(&folder)?;
    fs::create_dir_all(&build).with_context(|| format!("cannot create {}", build.display()))?;
    let make = || {
        let mut make = Command::new("make", &tree);
        // Makes builds reproducible: no user, host and time.
        for (name, value) in
            [("USER", "umbra"), ("HOST", "umbra"), ("TIMESTAMP", "1970-01-01"), ("VERSION", "1")]
        {
            make.env(&format!("KBUILD_BUILD_{name}"), value);
        }
        make.args([format!("O={}", build.display())]);
        make
    };
    context.progress.step(&format!("configuring Linux {version}, {name}"));
    make().args(["tinyconfig"]).run_or_fail(&context.progress)?;
    configure(context, kernel, &build.join(".config"), &make)?;
    context.progress.step(&format!("building Linux {version}, {name}: a few minutes"));
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = format!("-j{jobs}");
    make().args([&jobs, "vmlinux", "bzImage"]).run_or_fail(&context.progress)?;
    if kernel.modules {
        make().args([&jobs, "modules"]).run_or_fail(&context.progress)?;
        build_modules(context, &build.join("umbra-modules"), &folder, &make)?;
    }
    for (from, to) in
        [("vmlinux", "vmlinux"), ("arch/x86/boot/bzImage", "bzImage"), (".config", "config")]
    {
        let (from, to) = (build.join(from), folder.join(to));
        fs::rename(&from, &to).with_context(|| format!("make left no {}", from.display()))?;
    }
    fs::write(stamp(&folder), wanted).with_context(|| format!("cannot write {}", folder.display()))
}

/// The files of guest/linux/modules by their names.
fn module_sources(context: &Context) -> Result<Vec<(String, String)>> {
    let folder = context.root.join(MODULES);
    let read = || {
        let mut files = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            files.push((name, fs::read_to_string(entry.path())?));
        }
        files.sort();
        io::Result::Ok(files)
    };
    read().with_context(|| format!("cannot read {}", folder.display()))
}

/// Builds the modules, in a folder, for the kernel that was just built. Puts them beside it.
fn build_modules(
    context: &Context,
    sources: &Path,
    folder: &Path,
    make: &impl Fn() -> Command,
) -> Result<()> {
    let files = module_sources(context)?;
    let copy = || {
        fs::create_dir_all(sources)?;
        for (name, text) in &files {
            fs::write(sources.join(name), text)?;
        }
        io::Result::Ok(())
    };
    copy().context("cannot copy the sources of modules")?;
    make()
        .args([format!("M={}", sources.display()).as_str(), "modules"])
        .run_or_fail(&context.progress)?;
    for file in ["umbra_stray.ko", "umbra_shelf.ko"] {
        fs::rename(sources.join(file), folder.join(file))
            .with_context(|| format!("make left no {file}"))?;
    }
    Ok(())
}

/// Adds a kernel's configuration to the one in a file. An option that Linux does not keep is an
/// error.
fn configure(
    context: &Context,
    kernel: &Kernel,
    file: &Path,
    make: &impl Fn() -> Command,
) -> Result<()> {
    let fragment = kernel.fragment(context)?;
    let read = || fs::read_to_string(file).context("make left no .config");
    fs::write(file, read()? + &fragment).context("cannot write .config")?;
    make().args(["olddefconfig"]).run_or_fail(&context.progress)?;
    let config = read()?;
    let lost = lost(&fragment, &config);
    if !lost.is_empty() {
        bail!(
            "guest/linux/config asks for what Linux does not keep in {}: {}",
            kernel.name,
            lost.join(", ")
        );
    }
    Ok(())
}

/// Where kernels are built. Those of the same sources are built one after the other in the same
/// folder: they share what their configurations have in common.
fn objects(context: &Context) -> PathBuf {
    context.root.join("target/linux/objects")
}

/// Removes what was built on the way to kernels. What an earlier call left behind may be of other
/// sources, whose files are older than it.
fn remove_objects(context: &Context) -> Result<()> {
    match fs::remove_dir_all(objects(context)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context("cannot remove what is left of an earlier build of Linux")
        }
        _ => Ok(()),
    }
}

/// The lines of a fragment that are missing in a configuration. A later line may override an
/// earlier one.
fn lost<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let kept: HashSet<_> = config.lines().collect();
    let set: HashSet<_> = config.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    let mut said = HashMap::new();
    for line in fragment.lines() {
        let not_set = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set"));
        let name = not_set.or_else(|| Some(line.split_once('=')?.0));
        if let Some(name) = name.filter(|name| name.starts_with("CONFIG_")) {
            // An option that no longer exists is not set either.
            let is_kept = if not_set.is_some() { !set.contains(name) } else { kept.contains(line) };
            said.insert(name, (line, is_kept));
        }
    }
    let mut lost: Vec<_> =
        said.into_values().filter(|(_, is_kept)| !is_kept).map(|(line, _)| line).collect();
    lost.sort_unstable();
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_loses_is_told() {
        let fragment = "# A comment about CONFIG_A is not set\nCONFIG_A=y\nCONFIG_B=4\n\
                        # CONFIG_C is not set\n# CONFIG_D is not set\n";
        assert!(lost(fragment, "CONFIG_A=y\nCONFIG_B=4\n# CONFIG_C is not set\n").is_empty());
        let kept = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_DD=y\n";
        assert_eq!(lost(fragment, kept), ["# CONFIG_C is not set", "CONFIG_B=4"]);
        assert!(lost("CONFIG_A=y\n# CONFIG_A is not set\n", "").is_empty(), "the last word counts");
        assert_eq!(lost("# CONFIG_A is not set\nCONFIG_A=y\n", ""), ["CONFIG_A=y"]);
    }

    #[test]
    fn kernels_without_patches_are_built_where_no_version_works_with_them() {
        let refused = Verdict::Refused("patch 0002 does not apply".into());
        let passed_over = vec![("3-1".to_owned(), Verdict::Gone), ("2-1".to_owned(), refused)];
        let choice = |version: Option<&str>| Choice {
            version: version.map(str::to_owned),
            passed_over: passed_over.clone(),
        };
        assert_eq!(version(choice(Some("1-1"))).as_deref(), Some("1-1"), "the same for all");
        assert_eq!(version(choice(None)).as_deref(), Some("2-1"), "the newest that can be had");
        assert_eq!(version(Choice { version: None, passed_over: vec![] }), None);
    }
}
