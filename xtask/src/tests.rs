//! `cargo xtask test`: everything that is checked before a change lands.

use std::process::ExitCode;

use anyhow::Result;

use crate::context::Context;
use crate::fuzz::{self, Effort};
use crate::hosts::{self, Count, Selection};
use crate::process::Command;
use crate::summary::Summary;
use crate::{c_kernel, guest, linux, programs, setup};

/// Runs the tests, and the other checks unless only some tests are selected. Prints the counts of
/// each host, then of all hosts.
pub fn run(context: &Context, selection: &Selection) -> ExitCode {
    let mut checks = Summary::default();
    let counts = run_all(context, selection, &mut checks);
    context.progress.finish();
    let counts = counts.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        checks.failed += 1;
        Vec::new()
    });
    let mut all = Summary::default();
    println!();
    for notice in &checks.notices {
        println!("{notice}");
    }
    for count in counts.iter().chain([&Count { host: "checks", summary: checks }]) {
        println!("{:<8} {}", count.host, count.summary);
        all.add(&count.summary);
    }
    println!("{all}");
    if all.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `cargo xtask scenarios`: runs the tests that make the tables of docs/scenarios.md, and lets them
/// write the file.
pub fn write_tables(context: &Context) -> Result<ExitCode> {
    guest::build(context)?;
    c_kernel::build(context)?;
    context.progress.step("running every scenario in every configuration");
    context.progress.finish();
    context
        .cargo()
        .args([
            "test",
            "--release",
            "--package",
            "umbra-tests",
            "--test",
            "scenarios",
            "--test",
            "c_kernel",
        ])
        .args(["--", "the table is true"])
        .env("UMBRA_WRITE_TABLES", "1")
        .replace()
}

fn run_all(context: &Context, selection: &Selection, checks: &mut Summary) -> Result<Vec<Count>> {
    checks.notices = build_guests(context, selection.all)?;
    if selection.name.is_none() {
        format(context, checks)?;
        lints(context, checks)?;
        context.progress.step("checking the documentation");
        let mut doc = context.cargo();
        // In release like everything here: build scripts and macros are compiled once.
        doc.args(["doc", "--workspace", "--no-deps", "--release"])
            .env("RUSTDOCFLAGS", "-Dwarnings");
        check(context, checks, &mut doc)?;
        fuzz::run(context, &[], Effort::MINUTE, checks)?;
    }
    setup::browser(context)?;
    let qemu = [("qemu-system-x86_64", "qemu-system-x86")];
    setup::packages(context, &qemu, "it is the nested host, and boots kernels without Umbra")?;
    hosts::run(context, selection)
}

/// Builds the guests of the tests. Returns notices about Linux.
fn build_guests(context: &Context, all: bool) -> Result<Vec<String>> {
    std::thread::scope(|scope| {
        // Our own use a single processor most of the time. So does Linux at first, while its
        // sources are fetched and unpacked.
        let ours = scope.spawn(|| {
            let beside = context.beside();
            let built = guest::build(&beside)
                .and_then(|()| c_kernel::build(&beside))
                .and_then(|_| programs::build(&beside));
            beside.progress.finish();
            if let Err(error) = &built {
                // Linux takes minutes more.
                beside.progress.say(&format!("failed: {error:#}"));
            }
            built
        });
        let notices = linux::build(context, all).notices;
        ours.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(notices)
    })
}

fn format(context: &Context, summary: &mut Summary) -> Result<()> {
    if !setup::component(context, "fmt", "rustfmt")? {
        skip(context, summary, "format", "rustfmt is not installed");
        return Ok(());
    }
    context.progress.step("checking the format");
    check(context, summary, context.cargo().args(["fmt", "--all", "--check"]))
}

fn lints(context: &Context, summary: &mut Summary) -> Result<()> {
    if !setup::component(context, "clippy", "clippy")? {
        skip(context, summary, "lints", "clippy is not installed");
        return Ok(());
    }
    context.progress.step("checking lints");
    let mut clippy = context.cargo();
    clippy.args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--release",
        "--keep-going",
        "--",
        "-Dwarnings",
    ]);
    check(context, summary, &mut clippy)
}

/// Counts one check and shows what it found. A failed check does not end the others.
fn check(context: &Context, summary: &mut Summary, command: &mut Command) -> Result<()> {
    let finished = command.run(&context.progress)?;
    if finished.success {
        summary.passed += 1;
    } else {
        summary.failed += 1;
        if !context.progress.verbose() {
            context.progress.show(&finished.output);
        }
        context.progress.say(&format!("failed: {}", context.progress.current()));
    }
    Ok(())
}

fn skip(context: &Context, summary: &mut Summary, what: &str, why: &str) {
    context.progress.say(&umbra_skip::line(what, why));
    summary.skipped += 1;
}
