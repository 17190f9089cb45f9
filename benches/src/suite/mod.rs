//! The figures of the core, and the command that measures them.

mod checks;
mod costs;
mod process;
mod workload;

use std::fs;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::figure::{Figure, Verdict, table};
use crate::meter::Meter;
use crate::program::Program;

/// Where the figures go, and what the programs that are run read and write.
pub(crate) const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench");

/// Measures what Umbra promises and prints it beside the promise. Exit status: 0, 1 when a figure is over its limit and that is
/// not known already, 2 when something cannot be measured.
#[derive(Parser)]
#[command(name = "core")]
struct Arguments {
    /// Only these parts; all if none is named.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Measure by the clock, as on a host that does not count guest instructions, in so many rounds.
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, default_missing_value = "2000000",
          value_parser = clap::value_parser!(u64).range(1..))]
    clock: Option<u64>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What each check costs.
    Checks,
    /// What allocations, events and calls cost.
    Costs,
    /// Boot, churn, and the shadow of both beside a full one.
    Workload,
    /// Memory and start of the program.
    Process,
}

/// What the figures were measured on.
#[derive(Serialize)]
pub(crate) struct Host {
    instructions_counted: bool,
    kind: &'static str,
    cpus: usize,
    cpu: String,
}

impl Host {
    pub(crate) fn new(counted: bool) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            instructions_counted: counted,
            kind: if counted {
                "PVM or another host that emulates ring 0: guest instructions are counted exactly"
            } else {
                "guest instructions are not counted: times instead, and limits in instructions do not apply"
            },
            cpus: available_parallelism().map_or(1, usize::from),
            cpu: cpu.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned()),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {} CPUs ({})", self.kind, self.cpus, self.cpu)
    }
}

/// What `core.json` holds.
#[derive(Serialize)]
struct Results<'a> {
    host: &'a Host,
    figures: &'a [Figure],
}

/// The program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !arguments.bench {
        // `cargo test --all-targets` starts it too.
        println!("nothing is measured without --bench: use `cargo bench -p umbra-benches`");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let kernel: Arc<[u8]> = umbra::kernel::test_kernel()
        .context("there is no test kernel in this build: `cargo xtask bench` builds both")?
        .into();
    let folder = Path::new(FOLDER);
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{spinner} [{elapsed}] guest {pos}: {wide_msg}")?);
    bar.enable_steady_tick(Duration::from_millis(100));
    let ticking = bar.clone();
    let tick = move |what: &str| {
        ticking.inc(1);
        ticking.set_message(what.to_owned());
    };
    let meter = Meter::new(kernel.clone(), arguments.clock, Box::new(tick))?;
    let host = Host::new(meter.counts());
    println!("{host}");
    let mut figures = Vec::new();
    let wanted = |part| arguments.parts.is_empty() || arguments.parts.contains(&part);
    if wanted(Part::Process) {
        bar.set_message("building umbra, and starting it");
        figures.extend(process::figures(&Program::build(folder)?, &kernel)?);
    }
    if wanted(Part::Workload) {
        figures.extend(workload::figures(&meter)?);
    }
    if wanted(Part::Checks) {
        figures.extend(checks::figures(&meter)?);
    }
    if wanted(Part::Costs) {
        figures.extend(costs::figures(&meter)?);
    }
    bar.finish_and_clear();
    print!("{}", table(&figures));
    let file = folder.join("core.json");
    let json = serde_json::to_string_pretty(&Results { host: &host, figures: &figures })?;
    fs::write(&file, json + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    let over: Vec<_> = figures.iter().filter(|f| f.verdict == Verdict::Over).collect();
    if !over.is_empty() {
        eprintln!("\nover the limit:");
    }
    for f in &over {
        let known = f.known.map(|why| format!(" (known: {why})")).unwrap_or_default();
        eprintln!("  {}: {}{known}", f.group, f.name);
    }
    Ok(if over.iter().any(|f| f.is_news()) { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
