//! `cargo xtask linux`: the Linux kernels that the tests boot.
//!
//! Some are built from Debian's `linux-source-6.1` with our own configurations, one of them with
//! our patches; the other is Debian's stock cloud kernel from its package. Both packages are
//! unpacked below `target/linux` and not installed. A result is made again only when what it was
//! made from changes.

mod debian;
mod kernels;
mod made_from;
mod series;
mod source;
pub mod status;
pub mod suite;
mod versions;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::context::Context;
use kernels::{ACPI, Builder, COMPARED, Kernel, SMALL, UMBRA, UMBRA_MODULES, UMBRA_VMALLOC};

/// The kernels that the tests boot, besides Debian's: each takes minutes to build.
const TESTED: [Kernel; 2] = [SMALL, UMBRA];
/// With those of `cargo xtask test --all`.
const ALL: [Kernel; 5] = [SMALL, UMBRA, ACPI, UMBRA_VMALLOC, UMBRA_MODULES];

/// The result of a build.
#[derive(Default)]
pub struct Made {
    /// The kernels.
    kernels: Vec<PathBuf>,
    /// Notices, one line each: the version is not the newest one; a kernel was not built.
    pub notices: Vec<String>,
    /// Nothing is missing.
    complete: bool,
}

/// `cargo xtask linux`.
pub fn run(context: &Context) -> Result<ExitCode> {
    let made = make(context, &TESTED);
    context.progress.finish();
    for kernel in &made.kernels {
        println!("{}", kernel.display());
    }
    for notice in &made.notices {
        eprintln!("{notice}");
    }
    Ok(if made.complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the kernels that the tests boot, or `all` tests, if they are missing or old. Prints which
/// were not built, and why.
pub fn build(context: &Context, all: bool) -> Made {
    let made = make(context, if all { &ALL } else { &TESTED });
    made.say(context);
    made
}

/// The same for [`SMALL`] and Debian's kernel, which `cargo xtask bench linux` boots.
pub fn build_measured(context: &Context) {
    make(context, &[SMALL]).say(context);
}

/// Builds the kernels that are compared: without KASAN, with Linux's own (outline, inline), with
/// Umbra's. They are in `target/linux/compare-none`, `compare-outline`, `compare-inline` and
/// `compare-umbra`.
pub fn build_compared(context: &Context) -> Result<Vec<PathBuf>> {
    build_all(context, &COMPARED)
}

/// Builds kernels, all or none. Returns their folders.
fn build_all(context: &Context, kernels: &[Kernel]) -> Result<Vec<PathBuf>> {
    let builder = Builder::new(context, kernels)?;
    if let Some(notice) = &builder.notice {
        context.progress.say(notice);
    }
    kernels.iter().map(|kernel| builder.build(kernel)).collect()
}

/// Builds as many of `wanted` as possible, and fetches Debian's kernel.
fn make(context: &Context, wanted: &[Kernel]) -> Made {
    let mut made = Made { complete: true, ..Made::default() };
    match Builder::new(context, wanted) {
        Ok(builder) => {
            made.notices.extend(builder.notice.clone());
            for kernel in wanted {
                match builder.build(kernel) {
                    Ok(folder) => {
                        made.kernels.extend(["vmlinux", "bzImage"].map(|file| folder.join(file)))
                    }
                    Err(error) => made.skipped(kernel.name, &error),
                }
            }
        }
        Err(error) => {
            let names: Vec<_> = wanted.iter().map(|kernel| kernel.name).collect();
            made.skipped(&names.join(", "), &error);
        }
    }
    let folder = context.root.join("target/linux/debian");
    match debian::fetch(context, &folder) {
        Ok(()) => made.kernels.push(folder.join("bzImage")),
        Err(error) => made.skipped("debian", &error),
    }
    made
}

impl Made {
    fn say(&self, context: &Context) {
        for notice in &self.notices {
            context.progress.say(notice);
        }
    }

    fn skipped(&mut self, names: &str, error: &anyhow::Error) {
        self.complete = false;
        self.notices.push(format!("not built: the Linux kernel {names}: {error:#}"));
    }
}
