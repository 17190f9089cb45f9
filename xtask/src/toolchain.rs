//! Finds the tools for the guest: a rustc with the sources of its library, since the guest's `core`
//! and `alloc` are compiled with the guest's flags; a linker; objcopy.

use std::path::{Path, PathBuf};

use crate::process::{ask, which};

/// The oldest supported rustc.
pub const OLDEST: Version = Version(1, 95, 0);

/// A release of Rust.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Reads `1.96.0`, with or without something behind it (`-nightly`, a packager's suffix).
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers =
            text.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??, numbers.next()??))
    }
}

/// A compiler and the sources of its library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// Its installation folder.
    pub sysroot: PathBuf,
    /// The compiler.
    pub rustc: PathBuf,
    /// The cargo that came with it, if any; another one also works.
    pub cargo: Option<PathBuf>,
}

impl Compiler {
    /// The library's sources.
    pub fn library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }
}

/// The compiler of the first sysroot that has a fitting one with sources. `release` returns a
/// compiler's version.
pub fn find(sysroots: &[PathBuf], release: impl Fn(&Path) -> Option<Version>) -> Option<Compiler> {
    sysroots.iter().find_map(|sysroot| {
        let rustc = sysroot.join("bin/rustc");
        let cargo = sysroot.join("bin/cargo");
        // A distribution's cargo may insist on the distribution's crates.
        let cargo = (sysroot != Path::new("/usr") && cargo.is_file()).then_some(cargo);
        let compiler = Compiler { sysroot: sysroot.clone(), rustc, cargo };
        let library = compiler.library();
        if !library.join("Cargo.lock").is_file() || !library.join("core").is_dir() {
            return None;
        }
        let version = release(&compiler.rustc)?;
        let of_sources = source_version(&library);
        (version >= OLDEST && of_sources.is_none_or(|sources| sources == version))
            .then_some(compiler)
    })
}

/// The version of the sources, if they have one. rustup's have none and always match; a
/// distribution's packages of compiler and sources may have different versions.
fn source_version(library: &Path) -> Option<Version> {
    Version::parse(&std::fs::read_to_string(library.parent()?.join("src/version")).ok()?)
}

/// Sysroots to search: of the active compiler, of rustup's toolchains, of the system.
pub fn sysroots() -> Vec<PathBuf> {
    let rustc = std::env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from);
    let mut all: Vec<PathBuf> =
        ask(&rustc, &["--print", "sysroot"]).map(PathBuf::from).into_iter().collect();
    all.extend(
        rustup_home().map(|home| rustup_toolchains(&home.join("toolchains"))).unwrap_or_default(),
    );
    all.push("/usr".into());
    all
}

/// Where rustup keeps its toolchains.
fn rustup_home() -> Option<PathBuf> {
    let home = || std::env::home_dir().map(|home| home.join(".rustup"));
    std::env::var_os("RUSTUP_HOME").map(PathBuf::from).or_else(home)
}

/// The toolchains in a folder, numbered and stable ones first: a nightly may change unstable flags.
fn rustup_toolchains(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    let name = |path: &Path| {
        path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    all.sort_by_key(|path| {
        let name = name(path);
        (!name.starts_with("stable"), !name.starts_with(|c: char| c.is_ascii_digit()), name)
    });
    all
}

/// A compiler's version.
pub fn release(rustc: &Path) -> Option<Version> {
    let version = ask(rustc, &["-vV"])?;
    Version::parse(version.lines().find_map(|line| line.strip_prefix("release: "))?)
}

/// Every tool that the guest's build uses.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The compiler.
    pub compiler: Compiler,
    /// LLVM's linker, by the name that makes it behave as `ld.lld` or `rust-lld`.
    pub linker: PathBuf,
    /// GNU's or LLVM's objcopy.
    pub objcopy: PathBuf,
}

/// A linker: a toolchain's, or the system's. `on_path` searches for a program.
pub fn find_linker(
    sysroots: &[PathBuf],
    on_path: impl Fn(&str) -> Option<PathBuf>,
) -> Option<PathBuf> {
    shipped(sysroots, "rust-lld").or_else(|| ["rust-lld", "ld.lld"].into_iter().find_map(on_path))
}

/// An objcopy: the system's, which comes with its C compiler, or a toolchain's.
pub fn find_objcopy(
    sysroots: &[PathBuf],
    on_path: impl Fn(&str) -> Option<PathBuf>,
) -> Option<PathBuf> {
    ["objcopy", "llvm-objcopy"]
        .into_iter()
        .find_map(on_path)
        .or_else(|| shipped(sysroots, "rust-objcopy"))
}

fn shipped(sysroots: &[PathBuf], name: &str) -> Option<PathBuf> {
    let place =
        |sysroot: &PathBuf| sysroot.join("lib/rustlib/x86_64-unknown-linux-gnu/bin").join(name);
    sysroots.iter().map(place).find(|file| file.is_file())
}

/// A missing tool for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A compiler with the sources of its library.
    Compiler,
    /// A linker.
    Linker,
    /// objcopy.
    Objcopy,
}

/// Looks for all tools.
pub fn look() -> Result<Tools, Missing> {
    let sysroots = sysroots();
    let compiler = find(&sysroots, release).ok_or(Missing::Compiler)?;
    let linker = find_linker(&sysroots, which).ok_or(Missing::Linker)?;
    let objcopy = find_objcopy(&sysroots, which).ok_or(Missing::Objcopy)?;
    Ok(Tools { compiler, linker, objcopy })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A folder with something that looks like a compiler, and sources as asked.
    fn sysroot(home: &Path, name: &str, sources: bool, source_version: Option<&str>) -> PathBuf {
        let root = home.join(name);
        let rust = root.join("lib/rustlib/src/rust");
        for folder in ["bin", "lib/rustlib/x86_64-unknown-linux-gnu/bin"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("bin/rustc"), "").unwrap();
        fs::write(root.join("bin/cargo"), "").unwrap();
        if sources {
            fs::create_dir_all(rust.join("library/core")).unwrap();
            fs::write(rust.join("library/Cargo.lock"), "").unwrap();
        }
        if let Some(version) = source_version {
            fs::create_dir_all(rust.join("src")).unwrap();
            fs::write(rust.join("src/version"), version).unwrap();
        }
        root
    }

    #[test]
    fn the_first_compiler_with_sources_of_its_own_version_is_taken() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let bare = sysroot(home, "bare", false, None);
        let old = sysroot(home, "old", true, None);
        let mixed = sysroot(home, "mixed", true, Some("1.95.0\n"));
        let matching = sysroot(home, "matching", true, Some("1.96.0\n"));
        let rustup = sysroot(home, "rustup", true, None);
        let release = |rustc: &Path| {
            Version::parse(if rustc.starts_with(&old) { "1.94.2" } else { "1.96.0" })
        };

        let all = [bare.clone(), old.clone(), mixed.clone(), matching.clone(), rustup.clone()];
        assert_eq!(find(&all, release).unwrap().sysroot, matching);
        assert_eq!(
            find(&[bare.clone(), rustup.clone(), matching], release).unwrap().sysroot,
            rustup
        );
        assert_eq!(find(&[bare, old.clone(), mixed], release), None);
        assert_eq!(
            find(std::slice::from_ref(&rustup), |_| None),
            None,
            "a compiler that does not run"
        );
        assert_eq!(
            find(std::slice::from_ref(&rustup), release).unwrap().cargo,
            Some(rustup.join("bin/cargo"))
        );
    }

    #[test]
    fn versions_are_read_whatever_follows() {
        assert_eq!(Version::parse("1.96.0"), Some(Version(1, 96, 0)));
        assert_eq!(Version::parse("1.97.0-nightly"), Some(Version(1, 97, 0)));
        assert_eq!(Version::parse("1.85.0+dfsg3-1~deb12u3"), Some(Version(1, 85, 0)));
        assert_eq!(Version::parse("(none)"), None);
        assert_eq!(Version::parse("1.96"), None);
        assert!(Version(1, 100, 0) > OLDEST && Version(1, 94, 9) < OLDEST);
    }

    #[test]
    fn stable_toolchains_come_first() {
        let home = tempfile::tempdir().unwrap();
        for name in ["nightly-x", "1.96.0-x", "stable-x"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        let found = rustup_toolchains(home.path());
        assert_eq!(found, ["stable-x", "1.96.0-x", "nightly-x"].map(|name| home.path().join(name)));
        assert!(rustup_toolchains(&home.path().join("none")).is_empty());
    }

    #[test]
    fn a_toolchains_linker_goes_before_the_systems_and_objcopy_the_other_way() {
        let home = tempfile::tempdir().unwrap();
        let bare = sysroot(home.path(), "bare", false, None);
        let full = sysroot(home.path(), "full", false, None);
        let tools = full.join("lib/rustlib/x86_64-unknown-linux-gnu/bin");
        fs::write(tools.join("rust-lld"), "").unwrap();
        fs::write(tools.join("rust-objcopy"), "").unwrap();
        // Debian's rust-lld may be a link to a program that is not installed.
        std::os::unix::fs::symlink(
            "/nowhere/lld",
            bare.join("lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-lld"),
        )
        .unwrap();
        let system = |name: &str| Some(PathBuf::from("/usr/bin").join(name));
        let all = [bare.clone(), full];

        assert_eq!(find_linker(&all, system), Some(tools.join("rust-lld")));
        assert_eq!(
            find_linker(std::slice::from_ref(&bare), system),
            Some("/usr/bin/rust-lld".into())
        );
        assert_eq!(find_linker(std::slice::from_ref(&bare), |_| None), None);
        assert_eq!(find_objcopy(&all, system), Some("/usr/bin/objcopy".into()));
        assert_eq!(find_objcopy(&all, |_| None), Some(tools.join("rust-objcopy")));
        assert_eq!(find_objcopy(&[bare], |_| None), None);
    }
}
