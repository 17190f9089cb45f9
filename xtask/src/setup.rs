//! Installs what a machine lacks, and says in one sentence what to do where it cannot.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::Context;
use crate::process::{Command, which};
use crate::toolchain::{self, Missing, OLDEST, Tools, Version};

/// Debian's packages of a compiler and of its library's sources, of the same version.
const PACKAGES: [(&str, &str); 2] = [("rustc-web", "rust-web-src"), ("rustc", "rust-src")];

/// The tools for the guest, installed where they are missing.
pub fn guest_tools(context: &Context) -> Result<Tools> {
    let mut tried = Vec::new();
    loop {
        let missing = match toolchain::look() {
            Ok(tools) => return Ok(tools),
            Err(missing) => missing,
        };
        if tried.contains(&missing) {
            bail!("{}", advice(missing));
        }
        tried.push(missing);
        match missing {
            Missing::Compiler => compiler(context)?,
            Missing::Linker => {
                context.progress.say("installing lld: no linker for the guest kernel was found");
                apt_install(context, &["lld"])?;
            }
            Missing::Objcopy => {
                context.progress.say("installing binutils: the guest runtime is made with objcopy");
                apt_install(context, &["binutils"])?;
            }
        }
    }
}

/// What a user must do about it.
fn advice(missing: Missing) -> String {
    match missing {
        Missing::Compiler => format!(
            "the guest's core library is built from source, and no rustc of version {}.{} or later has it: run \
             `rustup component add rust-src`, or as root `apt-get update && apt-get install rustc-web rust-web-src`",
            OLDEST.0, OLDEST.1
        ),
        Missing::Linker => {
            "no linker for the guest kernel was found: install lld (`apt-get install lld`), or a Rust toolchain by \
             rustup, which has rust-lld"
                .into()
        }
        Missing::Objcopy => "objcopy was not found: install binutils (`apt-get install binutils`)".into(),
    }
}

/// Tries to get a compiler with sources: first the sources for the active compiler, then Debian's
/// pair.
fn compiler(context: &Context) -> Result<()> {
    if let Some(rustup) = which("rustup") {
        context
            .progress
            .step("installing rust-src by rustup: the guest's core library is built from source");
        let added = Command::new(rustup, &context.root)
            .args(["component", "add", "rust-src"])
            .run(&context.progress)?
            .success;
        if added && !matches!(toolchain::look(), Err(Missing::Compiler)) {
            return Ok(());
        }
    }
    let Some(apt) = Apt::find(context) else {
        return Ok(());
    };
    context.progress.step("updating the list of packages");
    // An old list may still do.
    apt.command("apt-get", &context.root).args(["update", "-qq"]).run(&context.progress)?;
    for (compiler, sources) in PACKAGES {
        let policy = Command::new("apt-cache", &context.root)
            .args(["policy", compiler, sources])
            .env("LC_ALL", "C")
            .stream(|_| {})?;
        if let Some(version) = matching_pair(&policy.output) {
            context.progress.step(&format!(
                "installing Debian's {compiler} and {sources} {version}: the guest's core library is built from \
                 source, which rustup could not provide"
            ));
            let names = [format!("{compiler}={version}"), format!("{sources}={version}")];
            return apt_install(context, &names.each_ref().map(String::as_str));
        }
    }
    Ok(())
}

/// The version that apt would install of both packages, if it is the same and new enough. Takes
/// what `apt-cache policy` says about the two.
fn matching_pair(policy: &str) -> Option<&str> {
    let mut candidates = policy.lines().filter_map(|line| line.trim().strip_prefix("Candidate: "));
    let (compiler, sources) = (candidates.next()?, candidates.next()?);
    (compiler == sources && Version::parse(compiler)? >= OLDEST).then_some(compiler)
}

/// Installs packages, where there is apt-get and the right to use it; else does nothing, and the
/// look that follows tells the user what to do. Never removes a package for it.
fn apt_install(context: &Context, packages: &[&str]) -> Result<()> {
    if let Some(apt) = Apt::find(context) {
        let install = || {
            let mut command = apt.command("apt-get", &context.root);
            command
                .args(["install", "-y", "-qq", "--no-install-recommends", "--no-remove"])
                .args(packages);
            command.run(&context.progress)
        };
        // A list of packages that is missing or old names files that are gone.
        let update =
            || apt.command("apt-get", &context.root).args(["update", "-qq"]).run(&context.progress);
        let installed = install()?.success || (update()?.success && install()?.success);
        if !installed {
            context.progress.say(&format!("apt-get could not install {}", packages.join(" ")));
        }
    }
    Ok(())
}

/// Whether programs are there; tries to install those that are not, by Debian packages of the same
/// names.
pub fn programs(context: &Context, names: &[&str]) -> Result<bool> {
    let missing = || names.iter().copied().filter(|name| which(name).is_none()).collect::<Vec<_>>();
    let wanted = missing();
    if !wanted.is_empty() {
        context
            .progress
            .step(&format!("installing {}: C kernels are built with it", wanted.join(" and ")));
        apt_install(context, &wanted)?;
    }
    Ok(missing().is_empty())
}

/// Whether files are there; tries to install Debian's packages of those that are not, for a reason.
pub fn packages(
    context: &Context,
    wanted: &[(&str, &'static str)],
    why: &str,
) -> Result<Vec<&'static str>> {
    let there = |what: &str| {
        if what.starts_with('/') { Path::new(what).exists() } else { which(what).is_some() }
    };
    let missing = || {
        wanted
            .iter()
            .filter(|(what, _)| !there(what))
            .map(|(_, package)| *package)
            .collect::<Vec<_>>()
    };
    let packages = missing();
    if !packages.is_empty() {
        context.progress.step(&format!("installing {}: {why}", packages.join(", ")));
        apt_install(context, &packages)?;
    }
    Ok(missing())
}

/// The version of a package that apt would install; `None` where there is no apt, or no such package.
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
    update(context)?;
    ask()
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

/// The first package that a package depends on: of one that only names the newest version of
/// something, that version.
pub fn dependency(context: &Context, package: &str) -> Result<String> {
    let depends = reader(context, "apt-cache").args(["depends", package]).stream(|_| {})?.output;
    let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(first.with_context(|| format!("{package} depends on nothing"))?.to_owned())
}

/// What apt would install for a package on this machine, the package included, with versions.
pub fn would_install(context: &Context, package: &str) -> Result<Vec<(String, String)>> {
    // Makes sure that there is a list of packages.
    version(context, package)?;
    let mut simulate = reader(context, "apt-get");
    simulate.args(["--simulate", "install", "--no-install-recommends", package]);
    let said = simulate.stream(|_| {})?;
    let packages: Vec<_> = said.output.lines().filter_map(to_be_installed).collect();
    if !said.success || packages.is_empty() {
        bail!("apt-get cannot tell what {package} needs: {}", said.output.trim());
    }
    Ok(packages)
}

/// Name and version in a line of `apt-get --simulate`: `Inst NAME [OLD] (VERSION ...`.
fn to_be_installed(line: &str) -> Option<(String, String)> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let (version, _) = rest.split_once('(')?.1.split_once(' ')?;
    Some((name.to_owned(), version.to_owned()))
}

/// A program of apt that only reads its lists: the system's, or those that an ordinary user
/// fetched.
fn reader(context: &Context, program: &str) -> Command {
    let mut command = Command::new(program, &context.root);
    command.env("LC_ALL", "C");
    let own = own_lists(context);
    if own.is_file() {
        command.env("APT_CONFIG", own);
    }
    command
}

/// The configuration of apt that leads it to lists in `target/apt`.
fn own_lists(context: &Context) -> PathBuf {
    context.root.join("target/apt/apt.conf")
}

/// Fetches the lists of packages anew: the system's, or where this user may not, some of our own.
fn update(context: &Context) -> Result<()> {
    context.progress.step("updating the list of packages");
    if let Some(apt) = Apt::find(context) {
        apt.command("apt-get", &context.root).args(["update", "-qq"]).run(&context.progress)?;
        return Ok(());
    }
    let file = own_lists(context);
    let folder = file.parent().unwrap_or(&context.root);
    for part in ["lists/partial", "cache/archives/partial"] {
        let part = folder.join(part);
        std::fs::create_dir_all(&part)
            .with_context(|| format!("cannot create {}", part.display()))?;
    }
    let text =
        format!("Dir::State::lists \"{0}/lists\";\nDir::Cache \"{0}/cache\";\n", folder.display());
    std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    reader(context, "apt-get").args(["update", "-qq"]).run(&context.progress)?;
    Ok(())
}

/// Downloads a package of a version into an empty folder, and unpacks it there. Nothing is
/// installed.
pub fn unpack(context: &Context, package: &str, version: &str, folder: &Path) -> Result<()> {
    unpack_all(context, &[(package.to_owned(), version.to_owned())], folder)
}

/// The same for packages and their versions, all into one folder.
pub fn unpack_all(context: &Context, packages: &[(String, String)], folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let wanted: Vec<_> =
        packages.iter().map(|(name, version)| format!("{name}={version}")).collect();
    let download = || {
        // apt-get downloads into the current folder.
        let mut command = Command::new("apt-get", folder);
        if own_lists(context).is_file() {
            command.env("APT_CONFIG", own_lists(context));
        }
        command.args(["download", "-q"]).args(&wanted).run(&context.progress)
    };
    if !download()?.success {
        // The list of packages may be old.
        update(context)?;
        let again = download()?;
        if !again.success {
            bail!("apt-get could not download packages: {}", last_line(&again.output));
        }
    }
    let entries = std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let archives: Vec<_> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    if archives.len() < packages.len() {
        bail!("apt-get downloaded {} of {} packages", archives.len(), packages.len());
    }
    for archive in archives {
        Command::new("dpkg-deb", folder)
            .args([OsStr::new("-x"), archive.as_os_str(), OsStr::new(".")])
            .run_or_fail(&context.progress)?;
        std::fs::remove_file(&archive)
            .with_context(|| format!("cannot remove {}", archive.display()))?;
    }
    Ok(())
}

/// The last line that a program printed, which mostly is the reason why it failed.
fn last_line(output: &str) -> &str {
    output.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it did not say why").trim()
}

/// A browser for the tests of the page that `--html` writes. Without one they are skipped, and say
/// so.
pub fn browser(context: &Context) -> Result<()> {
    if which("chromium").is_some() || Apt::find(context).is_none() {
        return Ok(());
    }
    context
        .progress
        .step("installing chromium: the page that --html writes is tested in a browser");
    // Without fonts a page is nearly empty.
    apt_install(context, &["chromium", "fonts-dejavu-core"])
}

/// The way to install Debian's packages.
struct Apt {
    /// Set for a user who is not root.
    sudo: Option<PathBuf>,
}

impl Apt {
    fn find(context: &Context) -> Option<Self> {
        which("apt-get")?;
        // SAFETY: geteuid has no preconditions.
        if unsafe { libc::geteuid() } == 0 {
            return Some(Self { sudo: None });
        }
        let sudo = which("sudo")?;
        // `-n`: there may be nobody to ask for a password.
        let may =
            Command::new(&sudo, &context.root).args(["-n", "true"]).stream(|_| {}).ok()?.success;
        may.then_some(Self { sudo: Some(sudo) })
    }

    fn command(&self, program: &str, directory: &Path) -> Command {
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

/// Whether a part of the toolchain that cargo calls (`fmt`, `clippy`) is there; tries to install it
/// by rustup.
pub fn component(context: &Context, program: &str, component: &str) -> Result<bool> {
    let works = || -> Result<bool> {
        Ok(context
            .cargo()
            .args([program, "--version"])
            .stream(|_| {})
            .is_ok_and(|finished| finished.success))
    };
    if works()? {
        return Ok(true);
    }
    let Some(rustup) = which("rustup") else {
        return Ok(false);
    };
    context.progress.step(&format!("installing {component} by rustup: `cargo {program}` needs it"));
    Command::new(rustup, &context.root)
        .args(["component", "add", component])
        .run(&context.progress)?;
    works()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(compiler: &str, sources: &str) -> String {
        let of = |name: &str, version: &str| {
            format!(
                "{name}:\n  Installed: (none)\n  Candidate: {version}\n  Version table:\n     {version} 500\n"
            )
        };
        of("rustc-web", compiler) + &of("rust-web-src", sources)
    }

    #[test]
    fn what_apt_would_install_is_read() {
        let line = "Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])";
        assert_eq!(to_be_installed(line), Some(("seabios".into(), "1.16.2-1".into())));
        let line = "Inst libfdt1 [1.6.0-1] (1.6.1-4+b1 Debian:12.15/oldstable [amd64]) []";
        assert_eq!(to_be_installed(line), Some(("libfdt1".into(), "1.6.1-4+b1".into())));
        assert_eq!(to_be_installed("Conf seabios (1.16.2-1 Debian)"), None);
        assert_eq!(to_be_installed("Inst"), None);
    }

    #[test]
    fn only_a_matching_and_new_enough_pair_of_packages_is_installed() {
        let good = policy("1.96.0+dfsg1-1~deb12u2", "1.96.0+dfsg1-1~deb12u2");
        assert_eq!(matching_pair(&good), Some("1.96.0+dfsg1-1~deb12u2"));
        assert_eq!(matching_pair(&policy("1.85.0+dfsg3-1", "1.85.0+dfsg3-1")), None, "too old");
        assert_eq!(matching_pair(&policy("1.96.0+dfsg1-1", "1.97.0+dfsg1-1")), None, "different");
        assert_eq!(matching_pair(&policy("(none)", "(none)")), None);
        assert_eq!(matching_pair(""), None);
    }
}
