//! The cost of shadow for a host: guests of all sizes, and many at once.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::figure::{Figure, number};
use crate::host::{SPARE, available_memory};
use crate::plot::{self, Axis, Line};
use crate::program::{Program, Running, until};
use crate::replay::guest;
use crate::results;
use crate::trace::{SLICE, Trace};

/// Guests from 64 MiB to 64 GiB.
const SIZES: [u64; 6] = [64 << 20, 256 << 20, 1 << 30, 4 << 30, 16 << 30, 64 << 30];
const SHADOWS: [&str; 3] = ["off", "per-page", "full"];
/// Memory of each of many guests, and the most host memory of one, with a full shadow.
const GUEST: u64 = 256 << 20;
const GUEST_MAX: u64 = GUEST + GUEST / 8 + (32 << 20);
/// Host memory that is left free while there are many guests: more than for one, which ends soon.
const LEFT: u64 = 4 << 30;
/// Events of the trace that each of them replays.
const EVENTS: usize = 4000;
/// Guests to hold that have not touched all of their memory; they are all alike.
const FEW: usize = 4;
/// Memory of the hosts in the projection, in GiB.
const HOSTS: [u64; 4] = [32, 64, 256, 1024];
/// Work of the guests.
const DONE: [(&str, &str); 2] = [
    ("as the replay left it", "bench=replay:1"),
    ("all of it touched", "bench=replay:1 bench=touch:1"),
];
/// Time limit for that work.
const LIMIT: Duration = Duration::from_secs(300);
const MIB: f64 = 1_048_576.0;

/// Measures with up to `guests` guests at once. `write`: also write a plot. `tick` gets each step.
/// Also returns a table.
///
/// # Errors
/// A guest does not start.
pub fn figures(
    program: &Program,
    kernel: &[u8],
    guests: usize,
    write: bool,
    tick: impl Fn(&str),
) -> Result<(Vec<Figure>, String)> {
    let mut text = sizes(program, write, &tick)?;
    let (figures, many) = many(program, kernel, guests, &tick)?;
    text.push_str(&many);
    Ok((figures, text))
}

fn sizes(program: &Program, write: bool, tick: &impl Fn(&str)) -> Result<String> {
    let mut text = String::from(
        "A guest that ends with its first instruction: what is there before any guest runs. \
         Memory in MiB:\n\n\
         | guest memory | shadow | page shadow | byte shadow, resident | memory of `umbra`, peak \
         | start to the guest's first instruction, ms |\n\
         | ---: | --- | ---: | ---: | ---: | ---: |\n",
    );
    let mut skipped = String::new();
    let mut lines =
        SHADOWS.map(|shadow| Line { name: format!("shadow {shadow}"), points: Vec::new() });
    for memory in SIZES {
        for (shadow, line) in SHADOWS.into_iter().zip(&mut lines) {
            tick(&format!("a guest of {} MiB, shadow {shadow}", memory >> 20));
            let needed = if shadow == "full" { memory / 8 } else { 0 } + SPARE;
            if needed > available_memory() {
                // Writing to a string does not fail.
                let mib = |bytes: u64| number((bytes >> 20) as f64);
                let skip = umbra_skip::line(
                    format_args!("a guest of {} MiB, shadow {shadow}", mib(memory)),
                    format_args!(
                        "it needs {} MiB of host memory, and {} MiB are available.",
                        mib(needed),
                        mib(available_memory())
                    ),
                );
                let _ = writeln!(skipped, "\n{skip}");
                continue;
            }
            let stats = program.bare(memory, shadow)?;
            let number_of =
                |path: &str| stats.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN);
            let _ = writeln!(
                text,
                "| {} | {shadow} | {:.2} | {:.2} | {:.1} | {:.1} |",
                number((memory >> 20) as f64),
                number_of("/shadow/page_bytes") / MIB,
                number_of("/shadow/byte_resident_bytes") / MIB,
                number_of("/host/rss_peak_bytes") / MIB,
                number_of("/host/start_seconds") * 1e3,
            );
            line.points.push(((memory >> 20) as f64, number_of("/host/start_seconds") * 1e3));
        }
    }
    if write && lines.iter().any(|line| !line.points.is_empty()) {
        let (path, shown) = results::plot("start-by-size.svg");
        plot::lines(
            &path,
            "From the start of a run to the guest's first instruction",
            &Axis { name: "guest memory, MiB", logarithmic: true, label: &|v| number(v.round()) },
            &Axis { name: "ms (logarithmic)", logarithmic: true, label: &|v| number(v) },
            &lines,
        )?;
        let _ = write!(text, "\n![Start by guest memory]({shown})\n");
    }
    Ok(text + &skipped)
}

/// Private memory of a process, in bytes: what is freed when it ends.
fn private(process: &Running) -> Result<f64> {
    let path = format!("/proc/{}/smaps_rollup", process.id());
    let rollup = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kib = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()
    };
    let sum = kib("Private_Clean:").zip(kib("Private_Dirty:")).map(|(clean, dirty)| clean + dirty);
    Ok(sum.with_context(|| format!("{path} is not as expected"))? * 1024.0)
}

fn many(
    program: &Program,
    kernel: &[u8],
    guests: usize,
    tick: &impl Fn(&str),
) -> Result<(Vec<Figure>, String)> {
    const GROUP: &str = "many guests of 256 MiB";
    let trace = guest::make(Trace::open(SLICE.as_ref())?.take(EVENTS))?;
    let (file, initrd) = (program.folder().join("kernel"), program.folder().join("replay"));
    fs::write(&file, kernel).with_context(|| format!("cannot write {}", file.display()))?;
    fs::write(&initrd, trace.file).with_context(|| format!("cannot write {}", initrd.display()))?;
    let total = available_memory() as f64;
    let mut text = format!(
        "\n\
         ### Many guests at once\n\n\
         The test kernel in {} MiB, held after the first {} events of the trace's slice, and, in \
         other guests, after it has touched all of its memory. *One more guest* is what each held \
         process has for itself (`smaps_rollup`), on average over those that were held at once; \
         the last columns are the host's memory divided by that, without the fraction: the {} MiB \
         that were available here before, and what hosts of other sizes would have if all of it \
         were available. (What KVM itself takes of the host's memory is not in it; guests are \
         started until there are as many as `--guests` says, or {} MiB are left.)\n\n\
         | guest memory | shadow | guests at once | one more guest, MiB | fit here |",
        GUEST >> 20,
        number(EVENTS as f64),
        number(total / MIB),
        number((LEFT >> 20) as f64),
    );
    for host in HOSTS {
        // Writing to a string does not fail.
        let _ = write!(text, " {} GiB |", number(host as f64));
    }
    let _ = writeln!(text, "\n| --- | --- | ---: | ---: | ---: |{}", " ---: |".repeat(HOSTS.len()));
    let mut all = Vec::new();
    let mut arithmetic = String::new();
    for (memory, words) in DONE {
        for shadow in SHADOWS {
            let wanted = if words.contains("touch") { guests } else { guests.min(FEW) };
            let mut running = Vec::new();
            while running.len() < wanted && available_memory() > LEFT + GUEST_MAX {
                tick(&format!(
                    "guest {} of {wanted} at once, shadow {shadow}, {memory}",
                    running.len() + 1
                ));
                let mut command = Command::new(program.path());
                let cmdline =
                    format!("scenarios=- {words} bench=check:1000000000000:none:page:0:0");
                command.arg("run").arg(&file).arg("--initrd").arg(&initrd);
                command.args(["--timeout=none", "--shadow", shadow, "--cmdline", &cmdline]);
                let (guest, _) = until(&mut command, "bench begin", 2, LIMIT)?;
                guest.stop();
                running.push(guest);
            }
            if running.is_empty() {
                let skip = umbra_skip::line("these guests", "too little host memory");
                let _ = writeln!(text, "| {memory} | {shadow} | {skip} |");
                continue;
            }
            let each = running.iter().map(private).sum::<Result<f64>>()? / running.len() as f64;
            let fit = |bytes: f64| number((bytes / each).floor());
            let _ = write!(
                text,
                "| {memory} | {shadow} | {} | {:.1} | {} |",
                running.len(),
                each / MIB,
                fit(total),
            );
            for host in HOSTS {
                let _ = write!(text, " {} |", fit(host as f64 * 1024.0 * MIB));
            }
            text.push('\n');
            if memory == DONE[1].0 {
                let _ = writeln!(
                    arithmetic,
                    "- shadow {shadow}: {} / {:.1} = {}",
                    number(total / MIB),
                    each / MIB,
                    number(total / each)
                );
            }
            all.push(Figure::new(
                GROUP,
                format!("{shadow}, {memory}: one more guest"),
                each / MIB,
                "MiB",
            ));
        }
    }
    let _ = write!(text, "\nThat is, here and with all memory touched, in MiB:\n\n{arithmetic}");
    Ok((all, text))
}
