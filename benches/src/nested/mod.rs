//! What a whole host spends on a guest: guest, VMM and host kernel together.
//!
//! It is measured in the nested host of `cargo xtask nested --icount`, where each instruction, of
//! whatever, takes one nanosecond of the clock. So the CPU time of the process `umbra`, which its
//! kernel keeps to the nanosecond, is the number of instructions that the host spent on it: the
//! guest's, the program's, and the kernel's on their behalf.
//!
//! `--measure` runs there and leaves the figures in a file; `--report` runs on the machine, writes
//! the page, and compares with what `gate.json` holds.

mod cost;
mod linux;
mod programs;
mod report;
mod small;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use crate::figure::{Figure, Measured};
use crate::gate::Gate;
use crate::linux_kasan::TRACE;

/// What `cargo xtask bench nested` starts, once in the nested host and once on the machine.
#[derive(Parser)]
#[command(name = "cargo xtask bench nested --")]
struct Arguments {
    /// Only these parts (small, linux, programs). What the others came to the last time stays
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Hold what was measured in benches/gate.json from now on
    #[arg(long)]
    update: bool,
    /// Have Linux replay this trace (.kmt.zst) instead of the repository's slice of one, and only
    /// print what it comes to
    #[arg(long, value_name = "FILE", conflicts_with_all = ["update", "parts"])]
    trace: Option<PathBuf>,
    /// How many events of --trace
    #[arg(long, value_name = "NUMBER", default_value_t = 120_000, requires = "trace")]
    events: usize,
    /// Measure, with this `umbra`
    #[arg(long, hide = true, value_name = "PROGRAM")]
    measure: Option<PathBuf>,
    /// Where the figures are left
    #[arg(long, hide = true, value_name = "FOLDER", default_value = crate::program::FOLDER)]
    folder: PathBuf,
    /// What the figures depend on besides this repository
    #[arg(long, hide = true, default_value = "unknown")]
    versions: String,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The test kernel's churn, a start, an exit, a shadow fault
    Small,
    /// Linux without KASAN, with its own, and with Umbra's
    Linux,
    /// Programs on these kernels: compilations, checksums of files
    Programs,
}

impl Part {
    const ALL: [Self; 3] = [Self::Small, Self::Linux, Self::Programs];

    /// The file that keeps its figures.
    fn file(self, folder: &Path) -> PathBuf {
        folder.join(match self {
            Self::Small => "nested-small.json",
            Self::Linux => "nested-linux.json",
            Self::Programs => "nested-programs.json",
        })
    }
}

/// The program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !arguments.bench {
        // `cargo test --all-targets` starts it too.
        println!("nothing is measured without --bench: use `cargo xtask bench nested`");
        return ExitCode::SUCCESS;
    }
    let outcome = match &arguments.measure {
        Some(program) => measure(&arguments, program).map(|()| ExitCode::SUCCESS),
        None => report(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

/// In the nested host.
fn measure(arguments: &Arguments, program: &Path) -> Result<()> {
    let tick = |what: &str| println!("measuring {what}");
    if let Some(trace) = &arguments.trace {
        let figures = linux::figures(program, trace, arguments.events, tick)?;
        println!("{}", report::body(&figures));
        return Ok(());
    }
    for part in Part::ALL {
        if !arguments.parts.is_empty() && !arguments.parts.contains(&part) {
            continue;
        }
        let figures = match part {
            Part::Small => small::figures(program, tick)?,
            Part::Linux => linux::figures(program, Path::new(TRACE), usize::MAX, tick)?,
            Part::Programs => programs::figures(program, tick)?,
        };
        let file = part.file(&arguments.folder);
        std::fs::write(&file, serde_json::to_string_pretty(&figures)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// On the machine.
fn report(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.trace.is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut measured = Vec::new();
    for part in Part::ALL {
        let file = part.file(&arguments.folder);
        let Ok(text) = std::fs::read(&file) else { continue };
        let figures: Vec<Measured> = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", file.display()))?;
        measured.extend(figures);
    }
    if measured.is_empty() {
        bail!("nothing was measured: there is nothing in {}", arguments.folder.display());
    }
    let body = report::body(&measured);
    print!("{body}");
    report::section(body, &arguments.versions).write()?;
    let figures: Vec<_> = measured.into_iter().map(Figure::from).collect();
    let gate = Gate::read()?;
    if arguments.update {
        gate.update_nested(&arguments.versions, &figures)?;
        println!("{} figures are held in benches/gate.json", figures.len());
        return Ok(ExitCode::SUCCESS);
    }
    let compared = gate.compare_nested(&arguments.versions, &figures);
    compared.print();
    // Figures of another QEMU or kernel are compared with nothing, which is no failure.
    Ok(if compared.worse.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
