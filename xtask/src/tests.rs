//! `cargo xtask test`: everything that is checked before a change lands.

use std::process::ExitCode;

use anyhow::Result;

use crate::process::Command;
use crate::summary::Summary;
use crate::{Context, c_kernel, demo, guest, linux, setup};

/// Runs the tests, with the other checks unless only some tests are asked for, and prints the
/// counts last.
pub fn run(context: &Context, name: Option<&str>) -> ExitCode {
    let mut summary = Summary::default();
    if let Err(error) = run_all(context, name, &mut summary) {
        context.progress.finish();
        eprintln!("error: {error:#}");
        summary.failed += 1;
    }
    context.progress.finish();
    for notice in &summary.notices {
        println!("{notice}");
    }
    println!("{summary}");
    if summary.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `cargo xtask scenarios`: the tests that make the tables of docs/scenarios.md, told to write
/// them.
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

fn run_all(context: &Context, name: Option<&str>, summary: &mut Summary) -> Result<()> {
    guest::build(context)?;
    c_kernel::build(context)?;
    summary.notices = linux::build(context).notices;
    if name.is_none() {
        format(context, summary)?;
        lints(context, summary)?;
        context.progress.step("checking the documentation");
        let mut doc = context.cargo();
        // In release like everything here: build scripts and macros are compiled once.
        doc.args(["doc", "--workspace", "--no-deps", "--release"])
            .env("RUSTDOCFLAGS", "-Dwarnings");
        check(context, summary, &mut doc)?;
    }
    tests(context, name, summary)
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

/// Counts one check; what it found is shown, and the others go on.
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
    context.progress.say(&format!("SKIPPED: {what}: {why}"));
    summary.skipped += 1;
}

fn tests(context: &Context, name: Option<&str>, summary: &mut Summary) -> Result<()> {
    if let Some(problem) = demo::kvm_problem() {
        context.progress.say(&format!("tests that boot guests will be skipped: {problem}"));
    }
    let test = || {
        let mut command = context.cargo();
        command.args(["test", "--workspace", "--release", "--no-fail-fast"]);
        command
    };
    setup::browser(context)?;
    setup::packages(
        context,
        &[("qemu-system-x86_64", "qemu-system-x86")],
        "a kernel is booted without Umbra on it",
    )?;
    context.progress.step("building the tests");
    test().args(["--no-run"]).run_or_fail(&context.progress)?;
    context.progress.step("running the tests");
    context.progress.finish();
    // Passing tests' output is needed for the reasons of those that skipped themselves.
    let finished = test().args(["--", "--show-output"]).args(name).stream(|line| {
        if summary.line(line) {
            println!("{line}");
        }
    })?;
    summary.end(finished.success);
    Ok(())
}
