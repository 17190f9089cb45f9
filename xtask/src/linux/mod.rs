//! `cargo xtask linux`: the Linux kernels that the tests boot.
//!
//! Some are built from Debian's `linux-source-6.1` with our own configurations, one of them with
//! our patches; the other is Debian's stock cloud kernel as its package has it. Both packages are
//! unpacked below `target/linux` and not installed. Beside each result lies a file that says what
//! it was made from; as long as that is the same, it is not made again.

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

use crate::Context;
use kernels::{ACPI, Builder, COMPARED, Kernel, SMALL, UMBRA};

/// Those that the tests boot, besides Debian's.
const TESTED: [Kernel; 3] = [SMALL, ACPI, UMBRA];

/// What was made.
#[derive(Default)]
pub struct Made {
    /// The kernels that there are.
    kernels: Vec<PathBuf>,
    /// What nobody may miss, each in a line: that the version is not the newest one, and which
    /// kernels there are not.
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

/// Makes what the tests boot, as far as it is missing or old. Of what cannot be made it says why.
pub fn build(context: &Context) -> Made {
    let made = make(context, &TESTED);
    made.say(context);
    made
}

/// The same for [`SMALL`] and Debian's, which are those that `cargo xtask bench linux` boots.
pub fn build_measured(context: &Context) {
    make(context, &[SMALL]).say(context);
}

/// Builds the kernels that are compared: without KASAN, with Linux's own (outline, inline), with
/// Umbra's. They end up in `target/linux/compare-none`, `compare-outline`, `compare-inline` and
/// `compare-umbra`.
pub fn build_compared(context: &Context) -> Result<Vec<PathBuf>> {
    build_all(context, &COMPARED)
}

/// Builds kernels, or none. Returns their folders.
fn build_all(context: &Context, kernels: &[Kernel]) -> Result<Vec<PathBuf>> {
    let builder = Builder::new(context, kernels)?;
    if let Some(notice) = &builder.notice {
        context.progress.say(notice);
    }
    kernels.iter().map(|kernel| builder.build(kernel)).collect()
}

/// Makes those of `wanted` that can be made, and Debian's.
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
