//! `cargo xtask bench`: builds what a part of the benchmarks needs, and executes it.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::nested::{self, Ended, Host, Job, Output};
use crate::{guest, linux, programs, setup};

/// The parts of the benchmarks that need no guest.
const NATIVE: [&str; 2] = ["replay", "native"];

/// Runs the parts that the arguments name.
pub fn run(context: &Context, arguments: &[String]) -> Result<ExitCode> {
    if let Some((first, rest)) = arguments.split_first()
        && first == "nested"
    {
        let rest = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest);
        return whole_host(context, rest);
    }
    let without = |first: &String| {
        NATIVE.contains(&first.as_str()) || first == "linux" || first.starts_with('-')
    };
    if !arguments.first().is_some_and(without) {
        guest::build(context)?;
    }
    let (suite, arguments) = match arguments.split_first() {
        Some((first, rest)) if first == "linux" => {
            linux::build_measured(context);
            let qemu = [("qemu-system-x86_64", "qemu-system-x86")];
            setup::packages(context, &qemu, "its figures stand beside")?;
            ("linux", rest)
        }
        _ => ("core", arguments),
    };
    context.progress.step("running the benchmarks");
    context.progress.finish();
    context
        .cargo()
        .args(["bench", "--package", "umbra-benches", "--bench", suite, "--"])
        .args(arguments)
        .env("UMBRA_BENCH_FROM", std::env::current_dir().context("the current folder is gone")?)
        .replace()
}

/// `cargo xtask bench nested`: measures in the nested host, and reports on the machine.
fn whole_host(context: &Context, arguments: &[String]) -> Result<ExitCode> {
    let umbra = programs::umbra(context)?;
    let named = |part| arguments.iter().any(|argument| argument == part);
    if named("linux") || named("programs") || !named("small") {
        linux::build_compared(context)?;
    }
    context.progress.step("building the benchmarks");
    let bench = bench_program(context)?;
    let host = Host::prepare(context)?;
    let folder = context.root.join("target/bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut command: Vec<OsString> = vec![bench.clone().into(), "--bench".into()];
    command.extend(["--measure".into(), umbra.into()]);
    command.extend(["--folder".into(), folder.into()]);
    command.extend(arguments.iter().map(OsString::from));
    let job = Job {
        script: nested::in_this_place(&command)?,
        icount: true,
        memory_mib: 4096,
        timeout: Duration::from_secs(3600),
    };
    context.progress.step("booting the nested host");
    match host.run(&job, &context.progress, Output::PassedOn)? {
        Ended::Exit(0) => {}
        Ended::Exit(status) => return Ok(ExitCode::from(status)),
        Ended::Trouble(reason) => bail!("{reason}"),
    }
    let mut report = context.program(&bench);
    report.args(["--bench", "--versions", &host.versions()]).args(arguments).replace()
}

/// Builds the benchmark of whole hosts. Returns its program.
fn bench_program(context: &Context) -> Result<PathBuf> {
    let mut command = context.cargo();
    command.args(["bench", "--package", "umbra-benches", "--bench", "nested", "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    let output = command.run_or_fail(&context.progress)?;
    let messages = output.lines().filter(|line| line.starts_with('{'));
    let mut values =
        messages.filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program = values.find_map(|message| {
        let is_it = message.pointer("/target/name")? == "nested";
        is_it.then(|| message.pointer("/executable")?.as_str().map(PathBuf::from))?
    });
    program.context("cargo built no benchmark of whole hosts")
}
