//! Installs what is missing on a machine. If it cannot, one sentence says what to do.

use std::path::Path;

use anyhow::{Result, bail};

use crate::apt::Apt;
use crate::context::Context;
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

/// Advice for the user.
fn advice(missing: Missing) -> String {
    match missing {
        Missing::Compiler => format!(
            "the guest's core library is built from source, and no rustc of version {}.{} or \
             later has it: run `rustup component add rust-src`, or as root `apt-get update && \
             apt-get install rustc-web rust-web-src`",
            OLDEST.0, OLDEST.1
        ),
        Missing::Linker => {
            "no linker for the guest kernel was found: install lld (`apt-get install lld`), or a \
             Rust toolchain by rustup, which has rust-lld"
                .into()
        }
        Missing::Objcopy => {
            "objcopy was not found: install binutils (`apt-get install binutils`)".into()
        }
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
    // An old list may be good enough.
    apt.command("apt-get", &context.root).args(["update", "-qq"]).run(&context.progress)?;
    drop(apt);
    for (compiler, sources) in PACKAGES {
        let policy = Command::new("apt-cache", &context.root)
            .args(["policy", compiler, sources])
            .env("LC_ALL", "C")
            .stream(|_| {})?;
        if let Some(version) = matching_pair(&policy.output) {
            context.progress.step(&format!(
                "installing Debian's {compiler} and {sources} {version}: the guest's core library \
                 is built from source, which rustup could not provide"
            ));
            let names = [format!("{compiler}={version}"), format!("{sources}={version}")];
            return apt_install(context, &names.each_ref().map(String::as_str));
        }
    }
    Ok(())
}

/// The version that apt would install of both packages, if it is the same and new enough. `policy`
/// is the output of `apt-cache policy` for both.
fn matching_pair(policy: &str) -> Option<&str> {
    let mut candidates = policy.lines().filter_map(|line| line.trim().strip_prefix("Candidate: "));
    let (compiler, sources) = (candidates.next()?, candidates.next()?);
    (compiler == sources && Version::parse(compiler)? >= OLDEST).then_some(compiler)
}

/// Installs packages, if there is apt-get and the right to use it. If not, does nothing: the check
/// that follows tells the user what to do. Never removes a package.
fn apt_install(context: &Context, packages: &[&str]) -> Result<()> {
    if let Some(apt) = Apt::find(context) {
        let install = || {
            let mut command = apt.command("apt-get", &context.root);
            command
                .args(["install", "-y", "-qq", "--no-install-recommends", "--no-remove"])
                .args(packages);
            command.run(&context.progress)
        };
        // The list of packages may be missing, or too old to download from.
        let update =
            || apt.command("apt-get", &context.root).args(["update", "-qq"]).run(&context.progress);
        let installed = install()?.success || (update()?.success && install()?.success);
        if !installed {
            context.progress.say(&format!("apt-get could not install {}", packages.join(" ")));
        }
    }
    Ok(())
}

/// Whether programs are there. Tries to install missing ones from Debian packages of the same
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

/// Installs the Debian packages of missing programs and files, if it can. Returns those that are
/// still missing. `why` is shown to the user.
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

/// Installs a browser for the tests of the `--html` page. Without one they are skipped.
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

/// Whether a part of the toolchain that cargo calls (`fmt`, `clippy`) is there. Tries to install it
/// with rustup.
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
                "{name}:\n  Installed: (none)\n  Candidate: {version}\n  Version table:\n     \
                 {version} 500\n"
            )
        };
        of("rustc-web", compiler) + &of("rust-web-src", sources)
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
