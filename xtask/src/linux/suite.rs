//! Linux's own tests of KASAN: in the kernel that Umbra checks, and in one with Linux's own KASAN
//! for the expected results.

use std::fmt::Write as _;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use umbra_testkit::ktap;

use super::kernels::{STOCK_KASAN, UMBRA, UMBRA_VMALLOC};
use super::{build_all, build_compared};
use crate::context::Context;
use crate::process::Command;
use crate::setup;

/// The list of expected results.
const LIST: &str = "tests/data/kasan-suite.txt";
/// Linux restarts the machine after the suite.
const CMDLINE: &str = "console=ttyS0 panic=-1 reboot=k kunit_shutdown=reboot";

/// `cargo xtask linux test`.
pub fn test(context: &Context) -> Result<ExitCode> {
    build_all(context, &[UMBRA, UMBRA_VMALLOC])?;
    context.progress.step("running Linux's tests of KASAN");
    context.progress.finish();
    let arguments = ["test", "--release", "--package", "umbra-tests", "--test", "linux_kasan"];
    context.cargo().args(arguments).replace()
}

/// `cargo xtask linux expected`: runs the suite with Linux's own KASAN, on QEMU's software CPU, and
/// writes the list.
pub fn expected(context: &Context) -> Result<ExitCode> {
    let folders = build_all(context, &[STOCK_KASAN])?;
    let folder = folders.first().context("no kernel was built")?;
    setup::packages(
        context,
        &[("qemu-system-x86_64", "qemu-system-x86")],
        "Linux's own KASAN runs on it",
    )?;
    context.progress.step("running Linux's tests of KASAN with Linux's own KASAN, under QEMU");
    let mut qemu = Command::new("qemu-system-x86_64", folder);
    qemu.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "128",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]);
    qemu.args(["-no-reboot", "-kernel", "bzImage", "-append", CMDLINE]);
    let console = qemu.run_or_fail(&context.progress)?;
    let cases = ktap::cases(&console);
    if cases.is_empty() {
        bail!("the kernel said nothing of a suite:\n{console}");
    }
    let version = fs::read_to_string(folder.join("made-from"))?;
    let version = version.lines().next().context("no version in made-from")?;
    let mut list = format!(
        "# Results of Linux's own tests of KASAN with Linux's own KASAN (generic, outline), and \
         the number of\n# reports of each.\n\
         # Written by `cargo xtask linux expected` from {version}.\n"
    );
    for case in cases {
        writeln!(list, "{case}")?;
    }
    fs::write(context.root.join(LIST), list).with_context(|| format!("cannot write {LIST}"))?;
    context.progress.finish();
    println!("{LIST}");
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask linux compare`.
pub fn compare(context: &Context, arguments: &[String]) -> Result<ExitCode> {
    build_compared(context)?;
    context.progress.step("running the benchmarks");
    context.progress.finish();
    let bench = ["bench", "--package", "umbra-benches", "--bench", "linux-kasan", "--"];
    context.cargo().args(bench).args(arguments).replace()
}
