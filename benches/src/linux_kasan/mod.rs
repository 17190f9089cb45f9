//! The same Linux four times: without KASAN, with its own (generic, outline and inline), and with
//! Umbra's shadow.
//!
//! All four are optimized for speed, as the kernels of distributions are. They have the patches of
//! `guest/linux/patches` in their sources, for the workload; without `CONFIG_KASAN_UMBRA` these
//! change nothing else. Each boots once for each size of guest and replays the workload. A kernel
//! with KASAN also runs Linux's own tests of KASAN, in the smaller guest. Marks on the console
//! (`--mark`) take the figures.

mod recording;
mod report;

pub(crate) use recording::record;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use umbra_tests::ktap::{self, Verdict};
use umbra_tests::linux::kernel;

use crate::host::Host;
use crate::program::{FOLDER, Program};
use crate::results::Section;
use crate::trace::Trace;

/// The recorded events that are replayed.
pub(crate) const TRACE: &str = crate::trace::SLICE;

/// Boots Linux without KASAN, with its own (outline and inline), and with Umbra's, and compares
/// them. Exit status: 0, 1 when a figure is over its limit and that is not known already, 2 when
/// something cannot be measured.
#[derive(Parser)]
#[command(name = "linux-kasan")]
struct Arguments {
    /// Only these kernels (none, outline, inline, umbra). The figures of the others are those of
    /// the last time.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only guests of this size (1G, 4G).
    #[arg(long, value_delimiter = ',')]
    memory: Vec<String>,
    /// Measure nothing, only write the tables anew.
    #[arg(long)]
    table: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The kernels: name, file, and `--shadow`.
const KERNELS: [(&str, &str, &str); 4] = [
    ("none", "compare-none/vmlinux", "off"),
    ("outline", "compare-outline/vmlinux", "off"),
    ("inline", "compare-inline/vmlinux", "off"),
    ("umbra", "compare-umbra/vmlinux", "per-page"),
];
/// Memory of the guests.
const MEMORY: [(&str, u64); 2] = [("1G", 1 << 30), ("4G", 4 << 30)];
/// The guest in which the suite runs.
const WITH_SUITE: &str = "1G";
/// Lines of the console at the end of the boot, of the workload, and of the suite after it.
pub(crate) const POINTS: [&str; 3] =
    ["umbra replay: memory after boot", "umbra replay: memory at the end", "# kasan: pass:"];
/// Command lines. The machine restarts after the replay, or after the suite.
pub(crate) const REPLAY: &str = "umbra_replay=restart";
const REPLAY_AND_SUITE: &str = "umbra_replay=1 kunit_shutdown=reboot";

/// The exit status of a run that the user ended.
const INTERRUPTED: i32 = 130;

/// A mark in `--stats`. Sizes are bytes.
#[derive(Clone, Debug, Default, Deserialize)]
struct Mark {
    text: String,
    line: String,
    seconds: f64,
    instructions: Option<u64>,
    exits: u64,
    hypercalls: u64,
    shadow_faults: u64,
    rss_bytes: u64,
    shadow_peak_bytes: u64,
}

impl Mark {
    /// A figure that the guest prints in KiB; returns bytes.
    fn said(&self, name: &str) -> Option<u64> {
        let mut words = self.line.split_ascii_whitespace();
        words.find(|word| *word == name)?;
        Some(words.next()?.parse::<u64>().ok()? * 1024)
    }
}

/// The part of `--stats` that is read.
#[derive(Deserialize)]
struct Stats {
    outcome: String,
    findings: u64,
    #[serde(default)]
    marks: Vec<Mark>,
}

/// The marks of one run.
#[derive(Clone, Debug, Default)]
struct Measured {
    boot: Option<Mark>,
    workload: Option<Mark>,
    suite: Option<Mark>,
}

/// All runs, by kernel and memory.
type All = BTreeMap<(&'static str, &'static str), Measured>;

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
    let folder = Path::new(FOLDER).join("linux-compare");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let recording = recording::record(Trace::open(Path::new(TRACE))?)?;
    let initrd = folder.join("recording");
    fs::write(&initrd, &recording.bytes).context("cannot write the recording")?;
    if !arguments.table {
        let bar = ProgressBar::new_spinner();
        bar.set_style(ProgressStyle::with_template("{spinner} [{elapsed}] {wide_msg}")?);
        bar.enable_steady_tick(Duration::from_millis(100));
        bar.set_message("building umbra");
        let program = Program::build(&folder)?;
        let wanted =
            |list: &[String], name: &str| list.is_empty() || list.iter().any(|one| one == name);
        for (memory, bytes) in MEMORY.iter().filter(|(name, _)| wanted(&arguments.memory, name)) {
            for (name, image, shadow) in
                KERNELS.iter().filter(|(name, ..)| wanted(&arguments.only, name))
            {
                bar.set_message(format!("{name}, {memory}"));
                let image = kernel(image);
                ensure!(
                    image.exists(),
                    "there is no {}: `cargo xtask linux compare`",
                    image.display()
                );
                let files = Files::new(&folder, name, memory);
                files.run(&program, &image, *bytes, shadow, cmdline(name, memory), &initrd)?;
            }
        }
        bar.finish_and_clear();
    }
    let mut all = All::new();
    for (memory, _) in MEMORY {
        for (name, ..) in KERNELS {
            let files = Files::new(&folder, name, memory);
            // A run in progress has written nothing yet.
            if files.stats.metadata().is_ok_and(|file| file.len() > 0) {
                let measured = files.read(cmdline(name, memory) == REPLAY_AND_SUITE);
                all.insert((name, memory), measured.with_context(|| format!("{name}, {memory}"))?);
            }
        }
    }
    let figures = report::figures(&all, recording.allocations);
    let body = report::body(&all, &figures, recording.allocations)?;
    print!("{body}");
    let counted =
        all.values().filter_map(|run| run.boot.as_ref()).any(|boot| boot.instructions.is_some());
    Section {
        name: "50-linux",
        title: "Linux: without KASAN, with its own, with Umbra's",
        command: "cargo xtask linux compare",
        host: Host::new(Some(counted)).to_string(),
        body,
    }
    .write()?;
    Ok(ExitCode::from(u8::from(figures.iter().any(crate::figure::Figure::is_news))))
}

/// The command line of a kernel.
fn cmdline(name: &str, memory: &str) -> &'static str {
    if name == "none" || memory != WITH_SUITE { REPLAY } else { REPLAY_AND_SUITE }
}

/// The files of a run: its figures and its console. They are kept, so that kernels can be measured
/// one by one.
struct Files {
    stats: PathBuf,
    console: PathBuf,
}

impl Files {
    fn new(folder: &Path, name: &str, memory: &str) -> Self {
        let file = |end: &str| folder.join(format!("{name}-{memory}.{end}"));
        Self { stats: file("json"), console: file("console") }
    }

    /// Runs a kernel to its end.
    fn run(
        &self,
        program: &Program,
        image: &Path,
        memory: u64,
        shadow: &str,
        cmdline: &str,
        initrd: &Path,
    ) -> Result<()> {
        let mut command = Command::new(program.path());
        command
            .arg("run")
            .arg(image)
            .arg(format!("--memory={memory}"))
            .arg(format!("--shadow={shadow}"));
        command.args(["--keep-going", "--timeout=none", "--cmdline", cmdline]);
        for point in POINTS {
            command.arg("--mark").arg(point);
        }
        command.arg("--stats").arg(&self.stats).arg("--initrd").arg(initrd);
        let console = File::create(&self.console).context("cannot write the console's file")?;
        let output =
            command.stdin(Stdio::null()).stdout(console).output().context("cannot start umbra")?;
        ensure!(
            // If the user ended it, the marks until then count.
            matches!(output.status.code(), Some(0 | 1 | INTERRUPTED)),
            "umbra ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Reads the result of a run.
    fn read(&self, with_suite: bool) -> Result<Measured> {
        let stats: Stats =
            serde_json::from_slice(&fs::read(&self.stats)?).context("bad --stats")?;
        let whole = stats.outcome == "reset";
        ensure!(
            whole || stats.outcome == "interrupted",
            "the guest did not restart, but: {}",
            stats.outcome
        );
        let mark = |point: &str| stats.marks.iter().find(|mark| mark.text == point).cloned();
        let [boot, workload, suite] = POINTS.map(mark);
        if whole {
            let all = boot.is_some() && workload.is_some() && suite.is_some() == with_suite;
            ensure!(all, "the console lacks the line at the end of a part");
        }
        ensure!(
            suite.is_some() || stats.findings == 0,
            "{} findings in a kernel without a bug",
            stats.findings
        );
        if suite.is_some() {
            let console = String::from_utf8_lossy(&fs::read(&self.console)?).into_owned();
            let cases = ktap::cases(&console);
            let failed = cases.iter().filter(|case| case.verdict == Verdict::Fail).count();
            ensure!(cases.len() > 50 && failed == 0, "{failed} of {} cases failed", cases.len());
        }
        Ok(Measured { boot, workload, suite })
    }
}
