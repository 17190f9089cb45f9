//! Builds the guest. The runtime and the test kernel's allocators become one object each, without
//! instrumentation and with a `core` of their own. The rest of the test kernel is instrumented and
//! linked with both.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::process::{Command, which};
use crate::setup;
use crate::toolchain::Tools;

/// The guests' target: no operating system, no floating point.
const TARGET: &str = "x86_64-unknown-none";

/// A library that is compiled without the sanitizer and linked as one object.
struct Plain {
    /// Its folder below `target/guest`.
    part: &'static str,
    package: &'static str,
    /// Its features that are on.
    features: &'static [&'static str],
    object: &'static str,
    /// Symbols that stay global. All others become local, its `core` included.
    kept: &'static [&'static str],
    /// Symbols that get another name.
    renamed: &'static [(&'static str, &'static str)],
}

const RUNTIME: Plain = Plain {
    part: "runtime",
    package: "umbra-runtime",
    features: &[],
    object: "libumbra_rt.o",
    kept: &["umbra_*", "__asan_*", "__wrap_*"],
    // The runtime's checked memory functions get the C names, after its own unchecked ones were
    // made local.
    renamed: &[
        ("umbra_checked_memcpy", "memcpy"),
        ("umbra_checked_memmove", "memmove"),
        ("umbra_checked_memset", "memset"),
        ("umbra_checked_memcmp", "memcmp"),
        ("umbra_checked_bcmp", "bcmp"),
        ("umbra_checked_strlen", "strlen"),
    ],
};

/// The runtime of kernels whose compiler checks inline.
const RUNTIME_INLINE: Plain = Plain {
    part: "runtime-inline",
    features: &["inline"],
    object: "libumbra_rt_inline.o",
    ..RUNTIME
};

/// The test kernel's allocators.
const MEMORY: Plain = Plain {
    part: "memory",
    package: "umbra-kernel-memory",
    features: &[],
    object: "kernel-memory.o",
    kept: &["kernel_*", "kmalloc", "kfree", "kfree_sensitive", "krealloc", "ksize", "kmem_cache_*"],
    renamed: &[],
};

/// Flags for all guest code: fixed addresses in the highest 2 GiB, and frame pointers for stacks.
const COMMON: [&str; 5] = [
    "-Clinker-flavor=ld.lld",
    "-Crelocation-model=static",
    "-Ccode-model=kernel",
    "-Cforce-frame-pointers=yes",
    "-Cpanic=abort",
];

/// Flags for instrumented code: stack and globals have redzones.
///
/// A release build of rustc drops the names of variables by default; findings on a stack print
/// them.
const SANITIZER: [&str; 6] = [
    "-Zfewer-names=no",
    "-Zsanitizer=kernel-address",
    "-Zsanitizer-recover=kernel-address",
    "-Zexternal-clangrt",
    "-Cllvm-args=-asan-stack=1",
    "-Cllvm-args=-asan-globals=1",
];

/// How the compiler checks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checks {
    /// Each check is a call.
    Outline,
    /// Checks read the check shadow.
    Inline,
}

impl Checks {
    /// Flags for instrumented code, beside [`SANITIZER`].
    fn flags(self) -> [&'static str; 3] {
        match self {
            // The mapping offset makes the compiler's own stores to a stack's shadow agree with
            // the runtime's look-ups (address >>s 3, nothing added).
            Self::Outline => [
                "-Cllvm-args=-asan-instrumentation-with-call-threshold=0",
                "-Cllvm-args=-asan-mapping-offset=0xe000000000000000",
                "-Cllvm-args=-asan-max-inline-poisoning-size=0",
            ],
            // The offset is `umbra_shadow::abi::check_shadow::CHECK_OFFSET`.
            Self::Inline => [
                "-Cllvm-args=-asan-instrumentation-with-call-threshold=7000",
                "-Cllvm-args=-asan-mapping-offset=0xdffffc0000000000",
                "-Cllvm-args=-asan-max-inline-poisoning-size=64",
            ],
        }
    }

    /// The folder for the test kernel below `target/guest`, and the kernel's name there.
    fn kernel(self) -> (&'static str, &'static str) {
        match self {
            Self::Outline => ("kernel", "umbra-kernel"),
            Self::Inline => ("kernel-inline", "umbra-kernel-inline"),
        }
    }
}

/// Flags for other people's kernels in Rust. Their copies, fills and comparisons would be those of
/// `compiler_builtins`, which is linked before the runtime and checks nothing: the compiler calls
/// the runtime's by another name where it can, and the linker does for the rest.
const CHECKED_MEMORY: [&str; 4] = [
    "-Cllvm-args=-asan-kernel-mem-intrinsic-prefix=1",
    "-Clink-arg=--wrap=memcmp",
    "-Clink-arg=--wrap=bcmp",
    "-Clink-arg=--wrap=strlen",
];

/// `cargo xtask guest`.
pub fn run(context: &Context) -> Result<()> {
    let started = std::time::Instant::now();
    let kernel = Guest::new(context)?.all()?;
    context.progress.finish();
    println!("{} ({:.1} s)", kernel.display(), started.elapsed().as_secs_f64());
    Ok(())
}

/// `cargo xtask guest --lib`.
pub fn library(context: &Context) -> Result<()> {
    let folder = build_library(context)?;
    context.progress.finish();
    println!(
        "{}: libumbra_rt.a; umbra.h and umbra.mk for kernels in C; umbra.toml for kernels in Rust \
         (docs/your-kernel.md)",
        folder.display()
    );
    Ok(())
}

/// Builds what other kernels need into one folder, and returns it.
pub fn build_library(context: &Context) -> Result<PathBuf> {
    let guest = Guest::new(context)?;
    context.progress.step("building the guest runtime");
    for runtime in [&RUNTIME, &RUNTIME_INLINE] {
        let object = guest.plain(runtime)?;
        guest.archive(runtime, &object)?;
    }
    for name in ["umbra.h", "umbra.mk"] {
        install(&context.root.join("guest/c").join(name), &guest.folder.join(name))?;
    }
    write_if_new(guest.configuration().as_bytes(), &guest.folder.join("umbra.toml"))?;
    Ok(guest.folder)
}

/// Builds the runtime and the test kernel.
pub fn build(context: &Context) -> Result<()> {
    Guest::new(context)?.all().map(drop)
}

struct Guest<'a> {
    context: &'a Context,
    tools: Tools,
    /// The output folder. Always in the workspace, where Umbra's build looks for the kernel.
    folder: PathBuf,
}

impl<'a> Guest<'a> {
    fn new(context: &'a Context) -> Result<Self> {
        let tools = setup::guest_tools(context)?;
        let folder = context.root.join("target/guest");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { context, tools, folder })
    }

    /// A cargo command that compiles for the guest.
    fn cargo(&self, part: &str, flags: &[&str]) -> Command {
        let compiler = &self.tools.compiler;
        let cargo = compiler.cargo.as_ref().unwrap_or(&self.context.cargo);
        let mut command = Command::new(cargo, &self.context.root);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(disturbs) {
                command.without(&name);
            }
        }
        let mut all: Vec<String> =
            COMMON.iter().chain(flags).map(|&flag| flag.to_owned()).collect();
        all.push(format!("-Clinker={}", self.tools.linker.display()));
        all.extend(
            self.remapped()
                .iter()
                .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())),
        );
        command
            .env("CARGO_ENCODED_RUSTFLAGS", all.join("\x1f"))
            .env("RUSTC", &compiler.rustc)
            // The sanitizer and the build of `core` are unstable features.
            .env("RUSTC_BOOTSTRAP", "1")
            // One codegen unit gives fewer instructions, and one unit of debug information for each
            // crate: with 16, reading these would take most of the VMM's memory.
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .args(["rustc", "--release", "--target", TARGET, "--target-dir"])
            .args([self.folder.join(part)]);
        command
    }

    /// Names of files in debug information, the same on every machine.
    fn remapped(&self) -> Vec<(PathBuf, &'static str)> {
        let library = self.tools.compiler.library();
        let mut all = vec![(self.context.root.clone(), ""), (library.clone(), "library")];
        // A distribution's sources may be behind a link, which rustc resolves.
        if let Ok(real) = library.canonicalize()
            && real != library
        {
            all.push((real, "library"));
        }
        all
    }

    /// Builds the test kernel and its parts.
    fn all(&self) -> Result<PathBuf> {
        self.context.progress.step("building the guest runtime");
        let [outline, inline] = [&RUNTIME, &RUNTIME_INLINE].map(|runtime| self.plain(runtime));
        self.context.progress.step("building the test kernel's allocators");
        let memory = self.plain(&MEMORY)?;
        self.kernel(Checks::Inline, &[&inline?, &memory])?;
        self.kernel(Checks::Outline, &[&outline?, &memory])
    }

    /// A library as one relocatable object.
    fn plain(&self, library: &Plain) -> Result<PathBuf> {
        let progress = &self.context.progress;
        let Plain { part, package, features, kept, renamed, .. } = library;
        self.cargo(part, &[])
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .args(["--package", package, "--crate-type", "staticlib"])
            .args(["--features", &features.join(",")])
            .args([
                "-Zbuild-std=core,compiler_builtins",
                "-Zbuild-std-features=compiler-builtins-mem",
            ])
            .run_or_fail(progress)?;
        let archive = self.built(part, &format!("lib{}.a", package.replace('-', "_")));
        let object = self.folder.join(library.object);
        let mut made_from = fingerprint(&[&archive], &[&self.tools.linker, &self.tools.objcopy])?;
        made_from.push_str(&format!("{kept:?}{renamed:?}"));
        let stamp = self.folder.join(part).join("made-from");
        if object.is_file() && fs::read_to_string(&stamp).is_ok_and(|text| text == made_from) {
            return Ok(object);
        }
        let [whole, closed] = ["whole.o", "closed.o"].map(|name| self.folder.join(part).join(name));
        let mut link = Command::new(&self.tools.linker, &self.folder);
        if self.tools.linker.ends_with("rust-lld") {
            link.args(["-flavor", "gnu"]);
        }
        // Link only the members that the entry points need.
        link.args(["-r"])
            .args(kept.iter().map(|name| format!("--undefined-glob={name}")))
            .args([&archive])
            .args(["-o"])
            .args([&whole])
            .run_or_fail(progress)?;
        let objcopy = || Command::new(&self.tools.objcopy, &self.folder);
        objcopy()
            .args(["--wildcard"])
            .args(kept.iter().map(|name| format!("--keep-global-symbol={name}")))
            .args([&whole, &closed])
            .run_or_fail(progress)?;
        objcopy()
            .args(renamed.iter().map(|(from, to)| format!("--redefine-sym={from}={to}")))
            .args([&closed, &whole])
            .run_or_fail(progress)?;
        install(&whole, &object)?;
        fs::write(&stamp, made_from)
            .with_context(|| format!("cannot write {}", stamp.display()))?;
        Ok(object)
    }

    /// Whether cargo takes this compiler anyway. Then the configuration does not name it, so that
    /// another toolchain, such as a nightly one, can use its own.
    fn is_usual_compiler(&self) -> bool {
        let mut usual = std::process::Command::new("rustc");
        let Ok(output) = usual.args(["--print", "sysroot"]).output() else { return false };
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        !sysroot.is_empty() && self.tools.compiler.rustc.starts_with(sysroot)
    }

    /// cargo's configuration for kernels in Rust: the flags, and the compiler if it is not the one
    /// that cargo takes anyway.
    fn configuration(&self) -> String {
        let rustc = format!("{:?}", self.tools.compiler.rustc.display().to_string());
        let linked = |what: &str, path: &Path| format!("{:?}", format!("{what}{}", path.display()));
        let checks = Checks::Outline.flags();
        let flags = COMMON.iter().chain(&SANITIZER).chain(&checks).chain(&CHECKED_MEMORY);
        let mut flags: Vec<String> = flags.map(|flag| format!("{flag:?}")).collect();
        flags.push(linked("-Clinker=", &self.tools.linker));
        flags.push(linked("-Clink-arg=", &self.folder.join("libumbra_rt.a")));
        format!(
            "# For kernels that Umbra checks: `RUSTC_BOOTSTRAP=1 cargo build --release --config \
             umbra.toml`.\n\
             # Made by `cargo xtask guest --lib` for this machine.\n\n\
             [build]\n{}target = {TARGET:?}\n\n\
             [unstable]\nbuild-std = [\"core\", \"alloc\", \"compiler_builtins\"]\n\n\
             [target.{TARGET}]\nrustflags = [\n    {},\n]\n",
            if self.is_usual_compiler() { String::new() } else { format!("rustc = {rustc}\n") },
            flags.join(",\n    ")
        )
    }

    /// The runtime as an archive, for kernels in any language. Its memory functions are weak there.
    /// A kernel may have its own, which are checked only as far as they are instrumented.
    fn archive(&self, runtime: &Plain, object: &Path) -> Result<()> {
        let ar = which("ar")
            .or_else(|| which("llvm-ar"))
            .context("ar was not found: install binutils")?;
        let name = runtime.object.replace(".o", ".a");
        let folder = self.folder.join(runtime.part);
        let [member, archive] = ["libumbra_rt.o", &name].map(|name| folder.join(name));
        Command::new(&self.tools.objcopy, &self.folder)
            .args(RUNTIME.renamed.iter().map(|(_, name)| format!("--weaken-symbol={name}")))
            .args([object, &member])
            .run_or_fail(&self.context.progress)?;
        // `ar` would add to an archive that is there.
        match fs::remove_file(&archive) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", archive.display()));
            }
            _ => {}
        }
        // `D`: no timestamps, so that the same runtime gives the same archive.
        Command::new(ar, &self.folder)
            .args(["crsD"])
            .args([&archive, &member])
            .run_or_fail(&self.context.progress)?;
        install(&archive, &self.folder.join(name))
    }

    /// Links the test kernel with these objects.
    fn kernel(&self, checks: Checks, objects: &[&Path]) -> Result<PathBuf> {
        let progress = &self.context.progress;
        let (part, name) = checks.kernel();
        let flags: Vec<&str> = SANITIZER.into_iter().chain(checks.flags()).collect();
        progress.step("building the test kernel");
        let script = self.context.root.join("guest/kernel/link.ld");
        // Cargo does not track files that only the linker reads. A fingerprint of them in the
        // arguments makes it link again when they change, and compile only the kernel's own crate.
        let files: Vec<&Path> = objects.iter().copied().chain([script.as_path()]).collect();
        let linked_with = fingerprint(&files, &[])?;
        self.cargo(part, &flags)
            .args(["--package", "umbra-kernel", "--bin", "umbra-kernel", "--features", "guest"])
            .args(["-Zbuild-std=core,alloc,compiler_builtins", "--"])
            .args(["--cfg".to_owned(), format!("umbra_linked_with=\"{linked_with}\"")])
            // Findings print where a global variable is declared; line tables alone do not have
            // that.
            .args(["-Cdebuginfo=full"])
            .args(objects.iter().map(|object| link_argument("", object)))
            .args([link_argument("-T", &script)])
            .args(
                ["--gc-sections", "-no-pie", "-z", "norelro"]
                    .map(|argument| format!("-Clink-arg={argument}")),
            )
            .run_or_fail(progress)?;
        let kernel = self.folder.join(name);
        install(&self.built(part, "umbra-kernel"), &kernel)?;
        Ok(kernel)
    }

    /// Path of a result of cargo.
    fn built(&self, part: &str, name: &str) -> PathBuf {
        self.folder.join(part).join(TARGET).join("release").join(name)
    }
}

fn link_argument(option: &str, file: &Path) -> String {
    format!("-Clink-arg={option}{}", file.display())
}

/// Whether an environment variable, set for the host's build or by the outer cargo, would change
/// the guest's build.
fn disturbs(name: &str) -> bool {
    let settings =
        ["CARGO_BUILD_", "CARGO_TARGET_", "CARGO_PROFILE_", "CARGO_UNSTABLE_", "CARGO_PKG_"];
    let single = [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_INCREMENTAL",
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_PATH",
        // Set by `cargo run`: the libraries of another toolchain.
        "LD_LIBRARY_PATH",
    ];
    single.contains(&name) || settings.iter().any(|prefix| name.starts_with(prefix))
}

/// A short text that depends on the files' contents and on the names.
fn fingerprint(files: &[&Path], names: &[&Path]) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    names.hash(&mut hasher);
    for file in files {
        fs::read(file)
            .with_context(|| format!("cannot read {}", file.display()))?
            .hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// Copies a file atomically, and only if it differs: a new timestamp would rebuild what depends on
/// it.
fn install(from: &Path, to: &Path) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    write_if_new(&content, to)
}

/// Writes a file atomically, and only if it differs.
fn write_if_new(content: &[u8], to: &Path) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let partial = to.with_extension(format!("new-{}", std::process::id()));
    fs::write(&partial, content)
        .and_then(|()| fs::rename(&partial, to))
        .with_context(|| format!("cannot write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_host_do_not_reach_the_guest() {
        for name in
            ["RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "CARGO_PROFILE_RELEASE_LTO"]
        {
            assert!(disturbs(name), "{name}");
        }
        for name in ["PATH", "CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_PROXY", "HOME"] {
            assert!(!disturbs(name), "{name}");
        }
    }

    #[test]
    fn a_fingerprint_follows_content_and_names() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "one").unwrap();
        let one = fingerprint(&[&file], &[Path::new("ld")]).unwrap();
        assert_eq!(fingerprint(&[&file], &[Path::new("ld")]).unwrap(), one);
        assert_ne!(fingerprint(&[&file], &[Path::new("lld")]).unwrap(), one);
        fs::write(&file, "two").unwrap();
        assert_ne!(fingerprint(&[&file], &[Path::new("ld")]).unwrap(), one);
        assert!(fingerprint(&[&folder.path().join("none")], &[]).is_err());
    }

    #[test]
    fn installing_the_same_again_leaves_the_time() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        fs::write(&from, "kernel").unwrap();
        install(&from, &to).unwrap();
        fs::File::open(&to).unwrap().set_modified(long_ago).unwrap();
        install(&from, &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().modified().unwrap(), long_ago);
        fs::write(&from, "another").unwrap();
        install(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "another");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left over");
    }
}
