//! The figures of the core, and the command that measures them.

mod checks;
mod costs;
pub mod exact;
mod process;
mod replay;
mod ring3;
mod scale;
mod start;
mod workload;

use std::fmt::Write as _;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::figure::{Figure, Verdict, markdown, table};
use crate::gate::{self, Gate};
use crate::host::{Host, SPARE, available_memory};
use crate::meter::Meter;
use crate::native;
use crate::program::{FOLDER, Program};
use crate::results::Section;
use crate::trace::{SLICE, Trace};

/// Measures what Umbra promises and prints it beside the promise; BENCHMARKS.md gets it too. Exit
/// status: 0, 1 when a figure is over its limit and that is not known already, 2 when something
/// cannot be measured, or the gate compares nothing.
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// Only these parts; all if none is named.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// The trace to replay natively: an allocator trace (.kmt.zst). Without it, a slice of one that
    /// is in the repository.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The memory of the machine that the trace was recorded on.
    #[arg(long, value_name = "SIZE", default_value = "24G", value_parser = size)]
    memory: u64,
    /// Write the first events of --trace into a file, and measure nothing.
    #[arg(long, value_name = "FILE", requires = "trace")]
    slice: Option<PathBuf>,
    /// Number of events for --slice.
    #[arg(long, value_name = "N", default_value_t = 40_000)]
    events: u64,
    /// With `scale`: number of guests to hold at once, as far as memory allows.
    #[arg(long, value_name = "N", default_value_t = GUESTS,
          value_parser = clap::value_parser!(u16).range(1..))]
    guests: u16,
    /// With `gate`: replace the held figures by those of now.
    #[arg(long)]
    update: bool,
    /// Do not change BENCHMARKS.md and the files that it is made of.
    #[arg(long)]
    keep: bool,
    /// Measure wall-clock time in this many rounds, as on a host that does not count guest
    /// instructions.
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, default_missing_value = "2000000",
          value_parser = clap::value_parser!(u64).range(1..))]
    clock: Option<u64>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Guests that `scale` holds at once.
const GUESTS: u16 = 24;

fn size(text: &str) -> Result<u64, String> {
    let bytes = parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| error.to_string())?;
    if bytes == 0 || !bytes.is_multiple_of(4096) || bytes > 4 << 40 {
        return Err("not a multiple of 4 KiB, up to 4 TiB".into());
    }
    Ok(bytes)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A recorded trace of allocator events, natively: the memory of each kind of shadow.
    Replay,
    /// The cost of each check, natively, by working set: two-level, full, and KASAN's own.
    Native,
    /// A slice of the trace through the test kernel's allocators.
    GuestReplay,
    /// The cost of each check, in a guest.
    Checks,
    /// The cost of each check in a guest's ring 3, in nanoseconds.
    Ring3,
    /// The cost of allocations, events and calls, in a guest.
    Costs,
    /// Compare the figures that repeat exactly with benches/gate.json. Only if named.
    Gate,
    /// Boot and churn, and their shadow compared with a full one.
    Workload,
    /// Memory and start of the program.
    Process,
    /// Guests from 64 MiB to 64 GiB, and many at once.
    Scale,
    /// Time to a guest's first line, compared with QEMU.
    Start,
}

impl Part {
    /// The parts that need a guest.
    const GUESTS: [Self; 8] = [
        Self::GuestReplay,
        Self::Checks,
        Self::Ring3,
        Self::Costs,
        Self::Workload,
        Self::Process,
        Self::Scale,
        Self::Start,
    ];

    /// Its name on the command line.
    fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// The name of its file, and its heading.
    fn section(self) -> (&'static str, &'static str) {
        match self {
            Self::Replay => ("10-replay", "Memory: a recorded trace, natively"),
            Self::Native => ("20-native", "Checks without a guest"),
            Self::GuestReplay => ("25-guest-replay", "The trace in a guest"),
            Self::Gate => ("90-gate", "The gate"),
            Self::Checks => ("30-checks", "Checks in a guest"),
            Self::Ring3 => ("31-ring3", "Checks in a guest, in nanoseconds"),
            Self::Costs => ("32-costs", "Allocations, events and calls in a guest"),
            Self::Workload => ("34-workload", "Boot and churn in a guest"),
            Self::Process => ("36-process", "The program: memory and start"),
            Self::Scale => ("60-scale", "Scale"),
            Self::Start => ("70-start", "Start"),
        }
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

/// The figures of all parts.
#[derive(Default)]
struct Measured {
    figures: Vec<Figure>,
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let (Some(to), Some(trace)) = (&arguments.slice, &arguments.trace) {
        let events = Trace::open(&from(trace))?.write_slice(arguments.events, &from(to))?;
        println!("{} has {events} events", to.display());
        return Ok(ExitCode::SUCCESS);
    }
    let folder = Path::new(FOLDER);
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::hidden()
    };
    bar.set_style(ProgressStyle::with_template("{spinner} [{elapsed}] {wide_msg}")?);
    bar.enable_steady_tick(Duration::from_millis(100));
    if arguments.parts.contains(&Part::Gate) {
        let ticking = bar.clone();
        let measured = exact::measure(move |what| ticking.set_message(what.to_owned()));
        bar.finish_and_clear();
        return compare(&measured?, arguments.update);
    }
    let mut measured = Measured::default();
    let outcome = natively(arguments, &bar, &mut measured)
        .and_then(|()| guests(arguments, folder, &bar, &mut measured));
    bar.finish_and_clear();
    outcome?;
    let file = folder.join("core.json");
    let host = Host::new(None);
    let json = serde_json::to_string_pretty(&Results { host: &host, figures: &measured.figures })?;
    fs::write(&file, json + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    let over: Vec<_> = measured.figures.iter().filter(|f| f.verdict == Verdict::Over).collect();
    if !over.is_empty() {
        eprintln!("\nover the limit:");
    }
    for f in &over {
        let known = f.known.map(|why| format!(" (known: {why})")).unwrap_or_default();
        eprintln!("  {}: {}{known}", f.group, f.name);
    }
    Ok(if over.iter().any(|f| f.is_news()) { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// Compares the figures that repeat exactly with those held, or replaces these.
fn compare(measured: &gate::Measured, update: bool) -> Result<ExitCode> {
    if update {
        if let Err(why) = &measured.guests {
            println!("{}", umbra_skip::line(gate::GUESTS, why));
        }
        Gate::read().unwrap_or_default().update(measured)?;
        println!("{} figures are held in benches/gate.json", measured.count());
        return Ok(ExitCode::SUCCESS);
    }
    let compared = Gate::read()?.compare(measured);
    compared.print();
    Ok(match (compared.worse.len(), compared.compared) {
        (0, 0) => {
            println!("{}", umbra_skip::line(Part::Gate.word(), "no figure was compared"));
            ExitCode::from(2)
        }
        (0, _) => ExitCode::SUCCESS,
        _ => ExitCode::from(1),
    })
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Prints the result of a part, and writes its file.
    fn publish(
        &self,
        part: Part,
        host: &Host,
        body: Option<String>,
        figures: Vec<Figure>,
        bar: &ProgressBar,
        to: &mut Measured,
    ) -> Result<()> {
        let skipped = || {
            let lines = body.iter().flat_map(|body| body.lines());
            lines.filter(|line| umbra_skip::said(line).is_some())
        };
        bar.suspend(|| {
            println!("{part:?}: {host}\n{}", table(&figures));
            skipped().for_each(|line| println!("{line}"));
        });
        if !self.keep {
            let mut command = format!("cargo xtask bench {}", part.word());
            if part == Part::Replay && self.trace.is_some() {
                command.push_str(" --trace FILE");
            }
            if part == Part::Scale && self.guests != GUESTS {
                let _ = write!(command, " --guests {}", self.guests);
            }
            let body = body.unwrap_or_default() + "\n" + &markdown(&figures);
            let (name, title) = part.section();
            Section { name, title, command: &command, host: host.to_string(), body }.write()?;
        }
        to.figures.extend(figures);
        Ok(())
    }
}

/// A path relative to the user's folder: cargo starts this program in another one.
fn from(path: &Path) -> PathBuf {
    match std::env::var_os("UMBRA_BENCH_FROM") {
        Some(folder) => Path::new(&folder).join(path),
        None => path.to_owned(),
    }
}

/// The parts that need no guest.
fn natively(arguments: &Arguments, bar: &ProgressBar, measured: &mut Measured) -> Result<()> {
    if arguments.wants(Part::Replay) {
        let trace = arguments.trace.as_deref().map_or_else(|| SLICE.into(), from);
        let (needed, available) = (arguments.memory / 8 + SPARE, available_memory());
        let no_full = (needed > available).then(|| {
            format!(
                "it needs {} MiB of host memory, and {} MiB are available",
                needed >> 20,
                available >> 20
            )
        });
        let host = Host::new(None);
        let replayed = crate::replay::report::measure(
            &trace,
            arguments.memory,
            no_full,
            !arguments.keep,
            |shadow, at, of| {
                bar.set_message(format!(
                    "replaying the trace, {shadow}: {} %",
                    at * 100 / of.max(1)
                ));
            },
        )?;
        arguments.publish(
            Part::Replay,
            &host,
            Some(replayed.text),
            replayed.figures,
            bar,
            measured,
        )?;
    }
    if arguments.wants(Part::Native) {
        let host = Host::new(None);
        let available = available_memory().saturating_sub(SPARE);
        // Criterion prints its own progress.
        bar.disable_steady_tick();
        bar.finish_and_clear();
        let (figures, text) = native::measure(available, Path::new(FOLDER), !arguments.keep)?;
        bar.reset();
        bar.enable_steady_tick(Duration::from_millis(100));
        arguments.publish(Part::Native, &host, Some(text), figures, bar, measured)?;
    }
    Ok(())
}

/// The parts that need a guest.
fn guests(
    arguments: &Arguments,
    folder: &Path,
    bar: &ProgressBar,
    measured: &mut Measured,
) -> Result<()> {
    let wanted: Vec<_> = Part::GUESTS.into_iter().filter(|part| arguments.wants(*part)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let ticking = bar.clone();
    let tick = move |what: &str| ticking.set_message(what.to_owned());
    let kernel: Option<Arc<[u8]>> = umbra::kernel::test_kernel().map(Into::into);
    let meter = kernel
        .context("there is no test kernel in this build: `cargo xtask bench` builds both")
        .and_then(|kernel| {
            Ok((Meter::new(kernel.clone(), arguments.clock, Box::new(tick))?, kernel))
        });
    let (meter, kernel) = match meter {
        Ok(both) => both,
        Err(error) => {
            for part in wanted {
                let skip = umbra_skip::line(part.word(), format_args!("{error:#}"));
                bar.suspend(|| println!("{skip}"));
            }
            return Ok(());
        }
    };
    for part in wanted {
        let host = Host::new(Some(meter.counts()));
        let mut text = None;
        let figures = match part {
            Part::GuestReplay => {
                let (figures, table) = replay::figures(&meter, Path::new(SLICE))?;
                text = Some(table);
                figures
            }
            Part::Process => {
                bar.set_message("building umbra, and starting it");
                process::figures(&Program::build(folder)?, &kernel)?
            }
            Part::Scale => {
                bar.set_message("building umbra");
                let tick = |what: &str| bar.set_message(what.to_owned());
                let (figures, table) = scale::figures(
                    &Program::build(folder)?,
                    &kernel,
                    arguments.guests.into(),
                    !arguments.keep,
                    tick,
                )?;
                text = Some(table);
                figures
            }
            Part::Start => {
                bar.set_message("building umbra");
                let tick = |what: &str| bar.set_message(what.to_owned());
                start::figures(&Program::build(folder)?, &kernel, tick)?
            }
            Part::Workload => workload::figures(&meter)?,
            Part::Checks => checks::figures(&meter)?,
            Part::Ring3 => {
                let (figures, table) =
                    ring3::figures(&kernel, |what| bar.set_message(what.to_owned()))?;
                text = Some(table);
                figures
            }
            Part::Costs => costs::figures(&meter)?,
            Part::Replay | Part::Native | Part::Gate => continue,
        };
        arguments.publish(part, &host, text, figures, bar, measured)?;
    }
    Ok(())
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
