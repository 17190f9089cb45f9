//! The same Linux three times: without KASAN, with its own (generic, outline), and with Umbra's shadow under it.
//!
//! All three have the patches of `guest/linux/patches` in their sources, for the workload; without `CONFIG_KASAN_UMBRA` these
//! change nothing else. Each run ends when the guest restarts the machine, so `--stats` counts to that moment.

mod recording;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use umbra_tests::linux::kernel;

use crate::figure::number;
use crate::program::Program;
use crate::results::Section;
use crate::suite::{FOLDER, Host};
use crate::trace::Trace;

/// The recorded events that are replayed.
const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/traces/kernel-build-slice.kmt.zst");
const MIB: f64 = 1_048_576.0;

/// Boots Linux without KASAN, with its own, and with Umbra's, and compares them.
#[derive(Parser)]
#[command(name = "linux-kasan")]
struct Arguments {
    /// Only these kernels (none, stock, umbra). The figures of the others are those of the last time.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these points (boot, suite, workload).
    #[arg(long, value_delimiter = ',')]
    points: Vec<String>,
    /// Only guests of this size, such as 1G.
    #[arg(long, value_delimiter = ',')]
    memory: Vec<String>,
    /// Measure nothing, only write the table anew.
    #[arg(long)]
    table: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The kernels: what they are called, and where they lie.
const KERNELS: [(&str, &str); 3] =
    [("none", "compare-none/vmlinux"), ("stock", "compare-kasan/vmlinux"), ("umbra", "umbra/vmlinux")];
/// The guests.
const MEMORY: [(&str, u64); 2] = [("1G", 1 << 30), ("4G", 4 << 30)];
/// Where the guest restarts: the command line for it, and whether a kernel without KASAN gets there.
const POINTS: [(&str, &str, bool); 3] = [
    ("boot", "umbra_replay=restart", true),
    ("suite", "kunit_shutdown=reboot", false),
    ("workload", "umbra_replay=restart", true),
];

/// What one run came to. Bytes, unless named otherwise.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Measured {
    instructions: Option<u64>,
    exits: u64,
    seconds: f64,
    rss: u64,
    /// The most shadow that the VMM had resident.
    shadow: u64,
    allocations: u64,
    ring_drains: u64,
    /// What the guest says, if it gets to say it.
    total: Option<u64>,
    available: Option<u64>,
}

/// All runs so far, by kernel, memory and point.
type All = BTreeMap<String, Measured>;

/// The program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !arguments.bench {
        // `cargo test --all-targets` starts it too.
        println!("nothing is measured without --bench: use `cargo xtask linux compare`");
        return ExitCode::SUCCESS;
    }
    run(&arguments).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let folder = Path::new(FOLDER);
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let file = folder.join("linux-compare.json");
    let mut all: All = match fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("bad {}", file.display()))?,
        Err(_) => All::new(),
    };
    let recording = recording::record(Trace::open(Path::new(TRACE))?)?;
    let initrd = folder.join("recording");
    fs::write(&initrd, &recording.bytes).context("cannot write the recording")?;
    if !arguments.table {
        let bar = ProgressBar::new_spinner();
        bar.set_style(ProgressStyle::with_template("{spinner} [{elapsed}] {wide_msg}")?);
        bar.enable_steady_tick(Duration::from_millis(100));
        bar.set_message("building umbra");
        let program = Program::build(folder)?;
        let wanted = |list: &[String], name: &str| list.is_empty() || list.iter().any(|one| one == name);
        for (memory, bytes) in MEMORY.iter().filter(|(name, _)| wanted(&arguments.memory, name)) {
            for (name, image) in KERNELS.iter().filter(|(name, _)| wanted(&arguments.only, name)) {
                for (point, cmdline, plain) in
                    POINTS.iter().filter(|(name, ..)| wanted(&arguments.points, name))
                {
                    if !plain && (*name == "none" || *memory != "1G") {
                        continue;
                    }
                    bar.set_message(format!("{name}, {memory}, to the end of {point}"));
                    let initrd = (*point == "workload").then_some(initrd.as_path());
                    let image = kernel(image);
                    ensure!(image.exists(), "there is no {}: `cargo xtask linux compare`", image.display());
                    let run = Run { program: &program, image, memory: *bytes, cmdline, initrd, folder };
                    all.insert(format!("{name} {memory} {point}"), run.measure()?);
                    // What is measured is kept, should a later run fail.
                    fs::write(&file, serde_json::to_string_pretty(&all)? + "\n")
                        .context("cannot write the figures")?;
                }
            }
        }
        bar.finish_and_clear();
    }
    let body = body(&all, recording.allocations)?;
    print!("{body}");
    let counted = all.values().any(|run| run.instructions.is_some());
    Section {
        name: "40-linux-kasan",
        title: "Linux: without KASAN, with its own, with Umbra's",
        command: "cargo xtask linux compare",
        host: Host::new(Some(counted)).to_string(),
        body,
    }
    .write()?;
    Ok(ExitCode::SUCCESS)
}

struct Run<'a> {
    program: &'a Program,
    image: PathBuf,
    memory: u64,
    cmdline: &'a str,
    initrd: Option<&'a Path>,
    folder: &'a Path,
}

impl Run<'_> {
    fn measure(&self) -> Result<Measured> {
        let stats_file = self.folder.join("linux-compare-stats.json");
        let mut command = Command::new(self.program.path());
        command.arg("run").arg(&self.image).arg(format!("--memory={}", self.memory));
        command.args(["--keep-going", "--timeout=none", "--cmdline", self.cmdline]);
        command.arg("--stats").arg(&stats_file);
        if let Some(initrd) = self.initrd {
            command.arg("--initrd").arg(initrd);
        }
        let output = command.stdin(Stdio::null()).output().context("cannot start umbra")?;
        let console = String::from_utf8_lossy(&output.stdout);
        let stats: Value = serde_json::from_slice(&fs::read(&stats_file).context("no --stats")?)?;
        let why = || format!("{}\n{}", String::from_utf8_lossy(&output.stderr), self.cmdline);
        ensure!(stats["outcome"] == "reset", "the guest did not restart: {}\n{}", stats["outcome"], why());
        let number = |path: &str| {
            stats.pointer(path).and_then(Value::as_u64).with_context(|| format!("--stats has no {path}"))
        };
        let said = |name: &str| {
            let line = console.lines().rfind(|line| line.contains("memory at the end: "))?;
            let mut words = line.split_ascii_whitespace();
            words.find(|word| *word == name)?;
            Some(words.next()?.parse::<u64>().ok()? * 1024)
        };
        Ok(Measured {
            instructions: number("/guest/instructions").ok(),
            exits: number("/exits/total")?,
            seconds: stats.pointer("/host/seconds").and_then(Value::as_f64).unwrap_or(f64::NAN),
            rss: number("/host/rss_peak_bytes")?,
            shadow: number("/shadow/page_bytes")? + number("/shadow/byte_peak_resident_bytes")?,
            allocations: number("/events/allocations")?,
            ring_drains: number("/events/ring_drains")?,
            total: said("MemTotal:"),
            available: said("MemAvailable:"),
        })
    }
}

/// The table, from what was measured.
fn body(all: &All, allocations: u64) -> Result<String> {
    let mut text = format!(
        "The small Linux of `guest/linux/config`, one CPU. The workload is {} allocations of a kernel that builds Linux, replayed by an \
         initcall through the kernel's own `kmalloc`, caches and page allocator, each object written and read.\n\n",
        number(allocations as f64)
    );
    let run = |kernel: &str, memory: &str, point: &str| all.get(&format!("{kernel} {memory} {point}"));
    let mib = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / MIB));
    let million = |count: Option<u64>| count.map_or("-".into(), |count| number((count as f64 / 1e6).round()));
    writeln!(text, "After the workload, in MiB:\n")?;
    writeln!(
        text,
        "| guest | KASAN | MemTotal | MemAvailable | shadow at its peak | net available | host RSS of the process |"
    )?;
    writeln!(text, "| --- | --- | ---: | ---: | ---: | ---: | ---: |")?;
    for (memory, bytes) in MEMORY {
        for (name, _) in KERNELS {
            let Some(run) = run(name, memory, "workload") else { continue };
            // The guest's own shadow is 1/8 of its memory, and is not in its MemTotal.
            let (shadow, outside) = match name {
                "stock" => (bytes / 8, 0),
                "none" => (0, 0),
                _ => (run.shadow, run.shadow),
            };
            let net = run.available.map(|available| available.saturating_sub(outside));
            writeln!(
                text,
                "| {memory} | {name} | {} | {} | {} | {} | {} |",
                mib(run.total),
                mib(run.available),
                mib(Some(shadow)),
                mib(net),
                mib(Some(run.rss))
            )?;
        }
    }
    writeln!(
        text,
        "\nFor comparison, the patch set of 2017 on a 1 GB guest: MemTotal 858 MB with KASAN, 987 MB with page shadow, and 30 MB of \
                    shadow at run time; on 4 GB 3477, 4000 and 50 MB.\n"
    )?;
    writeln!(text, "Million guest instructions, exits to the VMM in thousands, and seconds:\n")?;
    writeln!(
        text,
        "| guest | to the end of | none | stock | umbra | umbra of stock | umbra of none | exits: none | stock | umbra | s: none | stock | umbra |"
    )?;
    writeln!(
        text,
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )?;
    for (memory, _) in MEMORY {
        for (point, ..) in POINTS {
            let runs = KERNELS.map(|(name, _)| run(name, memory, point));
            if runs.iter().all(Option::is_none) {
                continue;
            }
            let count = |at: usize| runs[at].and_then(|run| run.instructions);
            let ratio = |of: usize| match (count(2), count(of)) {
                (Some(umbra), Some(other)) if other > 0 => format!("{:.2}", umbra as f64 / other as f64),
                _ => "-".into(),
            };
            write!(
                text,
                "| {memory} | {point} | {} | {} | {} | {} | {} |",
                million(count(0)),
                million(count(1)),
                million(count(2)),
                ratio(1),
                ratio(0)
            )?;
            for run in runs {
                write!(
                    text,
                    " {} |",
                    run.map_or("-".into(), |run| number((run.exits as f64 / 1e3).round()))
                )?;
            }
            for run in runs {
                write!(text, " {} |", run.map_or("-".into(), |run| format!("{:.0}", run.seconds)))?;
            }
            writeln!(text)?;
        }
    }
    if let Some(run) = run("umbra", "1G", "workload") {
        writeln!(
            text,
            "\nOf the exits of umbra's workload {} are drains of the ring, for {} allocations; console output is most of \
             the others. Where ring 0 is emulated, Umbra gives Linux a \
             slower clock, so that few ticks of its timer are in the counts.",
            number(run.ring_drains as f64),
            number(run.allocations as f64)
        )?;
    }
    Ok(text)
}
