//! `cargo xtask fuzz`: builds the fuzzers, and runs each on its seeds and on what it makes of them.
//!
//! The fuzzers are libFuzzer's. What tells it which code an input reached are calls that LLVM adds
//! to the code, for which a stable compiler has flags, too.

use std::fs;
use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::setup;
use crate::summary::Summary;

/// Makes LLVM add the calls, as `-Zsanitizer` and cargo-fuzz would.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// With its name, build scripts and macros are built without these flags.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// Seconds after which an input counts as one that hangs. A guest of 200 exits takes milliseconds.
const HANG: u32 = 20;
/// Most memory of a fuzzer, in MiB. An input that needs it is a finding.
const MEMORY: u32 = 2048;

/// How long to fuzz.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Effort {
    /// Time for each target, in seconds, or such as 90s, 10m or 2h
    #[arg(long, value_parser = time, default_value = "60s")]
    pub time: Duration,
    /// Most inputs of each target; 0 for no limit but the time
    #[arg(long, default_value_t = 0)]
    pub runs: u64,
}

impl Effort {
    /// The default.
    pub const MINUTE: Self = Self { time: Duration::from_secs(60), runs: 0 };
}

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Targets, which are the folders in fuzz/seeds; all if none is named
    targets: Vec<String>,
    #[command(flatten)]
    effort: Effort,
    /// Run these files once each, without fuzzing, and print what they mean: the inputs of an
    /// earlier crash
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["time", "runs"])]
    input: Vec<PathBuf>,
}

/// Fuzzes, and prints what came of each target.
pub fn main(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.input.is_empty() {
        let [target] = arguments.targets.as_slice() else {
            bail!("name one target for the inputs, such as `cargo xtask fuzz loader --input FILE`")
        };
        check_name(context, target)?;
        let program = build(context)?.join(target);
        context.progress.finish();
        let mut program = context.program(&program);
        return program.args(&arguments.input).env("UMBRA_FUZZ_SHOW", "1").replace();
    }
    let mut checks = Summary::default();
    run(context, &arguments.targets, arguments.effort, &mut checks)?;
    context.progress.finish();
    println!("{checks}");
    Ok(if checks.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Fuzzes `targets`, or all if there are none, as many at a time as there are processors, each as
/// long as `effort` says. Counts each as a check. All are skipped on a machine without a C++
/// compiler.
///
/// # Errors
/// A target does not exist, or the fuzzers cannot be built.
pub fn run(
    context: &Context,
    targets: &[String],
    effort: Effort,
    checks: &mut Summary,
) -> Result<()> {
    for target in targets {
        check_name(context, target)?;
    }
    let targets = if targets.is_empty() { all(context)? } else { targets.to_vec() };
    let compiler = [("g++", "g++")];
    if !setup::packages(context, &compiler, "libFuzzer is built with it")?.is_empty() {
        context.progress.say(&umbra_skip::line("the fuzzers", "g++ is not installed"));
        checks.skipped += targets.len();
        return Ok(());
    }
    let programs = build(context)?;
    let workers = thread::available_parallelism().map_or(1, NonZero::get).min(targets.len());
    let left = Mutex::new(targets.iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Result<Summary> {
        let mut checks = Summary::default();
        let context = context.beside();
        while let Some(target) = next() {
            let passes = one(&context, &programs, target, effort)?;
            checks.passed += usize::from(passes);
            checks.failed += usize::from(!passes);
        }
        context.progress.finish();
        Ok(checks)
    };
    context.progress.finish();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            checks.add(&worker.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        }
        Ok(())
    })
}

/// The names of all targets.
fn all(context: &Context) -> Result<Vec<String>> {
    let folder = context.root.join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder);
    let entries = entries.with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some(path.file_stem()?.to_str()?.to_owned())
        })
        .collect();
    names.sort();
    Ok(names)
}

fn check_name(context: &Context, target: &str) -> Result<()> {
    let all = all(context)?;
    if !all.iter().any(|name| name == target) {
        bail!("there is no target {target}: there are {}", all.join(", "));
    }
    Ok(())
}

/// Builds the fuzzers. Returns the folder with their programs.
fn build(context: &Context) -> Result<PathBuf> {
    context.progress.step("building the fuzzers");
    let folder = context.root.join("target/fuzz/build");
    let mut command = context.cargo();
    command.args(["build", "--profile", "fuzz", "--package", "umbra-fuzz", "--bins"]);
    command.args(["--features", "libfuzzer", "--target", PLATFORM, "--target-dir"]);
    // Those of the user would be for all other builds.
    command.args([&folder]).env("RUSTFLAGS", FLAGS).without("CARGO_ENCODED_RUSTFLAGS");
    command.run_or_fail(&context.progress)?;
    Ok(folder.join(PLATFORM).join("fuzz"))
}

/// Fuzzes a target. False if it found an input that fails.
fn one(context: &Context, programs: &Path, target: &str, effort: Effort) -> Result<bool> {
    let folder = context.root.join("target/fuzz").join(target);
    let (corpus, found) = (folder.join("corpus"), folder.join("found"));
    for path in [&corpus, &found] {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    context.progress.step(&format!("fuzzing {target}"));
    let mut command = context.program(&programs.join(target));
    let seconds = effort.time.as_secs().max(1);
    command.args([format!("-max_total_time={seconds}"), format!("-timeout={HANG}")]);
    command.args([format!("-rss_limit_mb={MEMORY}"), "-print_final_stats=1".into()]);
    command.args([format!("-artifact_prefix={}/", found.display())]);
    if effort.runs > 0 {
        command.args([format!("-runs={}", effort.runs)]);
    }
    // New inputs go into the first folder; seeds stay as they are.
    command.args([&corpus, &context.root.join("fuzz/seeds").join(target)]);
    let finished = command.run(&context.progress)?;
    let Figures { inputs, requests, coverage } = Figures::read(&finished.output);
    let line = format!("{target}: {inputs} inputs, coverage {coverage}, {requests}");
    context.progress.say(&line);
    if finished.success {
        return Ok(true);
    }
    if !context.progress.verbose() {
        context.progress.show(&tail(&finished.output));
    }
    match artifact(&finished.output) {
        Some(path) => {
            let again = format!("cargo xtask fuzz {target} --input {path}");
            context.progress.say(&format!("failed: {target}. Run it again with `{again}`"));
        }
        None => context.progress.say(&format!("failed: {target}, without an input")),
    }
    Ok(false)
}

/// What a fuzzer says of its work.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures<'a> {
    inputs: &'a str,
    requests: &'a str,
    coverage: &'a str,
}

impl<'a> Figures<'a> {
    fn read(output: &'a str) -> Self {
        let mut figures = Self { inputs: "?", requests: "requests: ?", coverage: "?" };
        for line in output.lines() {
            if let Some(inputs) = line.strip_prefix("stat::number_of_executed_units:") {
                figures.inputs = inputs.trim();
            } else if line.starts_with("requests: ") {
                figures.requests = line;
            } else if let Some((_, rest)) = line.split_once(" cov: ") {
                figures.coverage = rest.split(' ').next().unwrap_or_default();
            }
        }
        figures
    }
}

/// The file with the input that failed.
fn artifact(output: &str) -> Option<&str> {
    output.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim()))
}

/// The output from the failure on.
fn tail(output: &str) -> String {
    let lines: Vec<&str> = output.lines().collect();
    let begins = |line: &&str| line.contains("panicked at") || line.contains("ERROR: libFuzzer");
    let from = lines.iter().position(begins).unwrap_or(lines.len().saturating_sub(20));
    lines[from..].iter().take(40).map(|line| format!("{line}\n")).collect()
}

/// A time, as a number with a unit or in seconds.
fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    let seconds = number.parse::<u32>().map_err(|_| "not a time such as 90s, 10m or 2h")?;
    Ok(Duration::from_secs(u64::from(seconds) * unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let seconds = |text| time(text).map(|time| time.as_secs());
        let given = ["60s", "90", "10m", "2h"].map(|text| seconds(text).ok());
        assert_eq!(given, [60, 90, 600, 7200].map(Some));
        for bad in ["", "s", "1d", "-1s", "1.5h"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_fuzzer_says_is_read() {
        let output = "#2\tINITED cov: 8 ft: 8\n#9\tDONE   cov: 11 ft: 12 corp: 4/28b\n\
                      stat::number_of_executed_units: 9\nrequests: 70\n";
        let read = Figures::read(output);
        let expected = Figures { inputs: "9", requests: "requests: 70", coverage: "11" };
        assert_eq!(read, expected);
        let crash = "x\nthread panicked at a.rs\nwhy\n\
                     artifact_prefix='/f/'; Test unit written to /f/crash-1\n";
        assert_eq!(artifact(crash), Some("/f/crash-1"));
        assert!(tail(crash).starts_with("thread panicked") && tail(crash).ends_with("crash-1\n"));
        assert_eq!(artifact(output), None);
    }
}
