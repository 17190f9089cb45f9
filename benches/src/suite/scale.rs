//! Guests of all sizes, and many at once: what shadow costs a host.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{SLICE, SPARE, available_memory};
use crate::figure::{Figure, number};
use crate::plot::{self, Axis, Line};
use crate::program::{Program, Running, until};
use crate::replay::guest;
use crate::results;
use crate::trace::Trace;

/// Guests from 64 MiB to 64 GiB.
const SIZES: [u64; 6] = [64 << 20, 256 << 20, 1 << 30, 4 << 30, 16 << 30, 64 << 30];
const SHADOWS: [&str; 3] = ["off", "per-page", "full"];
/// Each of many guests.
const GUEST: u64 = 256 << 20;
/// Events of the trace that each of them replays.
const EVENTS: usize = 4000;
/// How long one of them may take to get there.
const LIMIT: Duration = Duration::from_secs(300);
const MIB: f64 = 1_048_576.0;

/// Measures. `guests` is how many are tried at once; `write` has a plot written; `tick` hears what is being done. Returns a table, too.
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
        "A guest that ends with its first instruction: what is there before any guest runs. Memory in MiB:\n\n\
         | guest memory | shadow | page shadow | byte shadow, resident | memory of `umbra`, peak | start to the guest's first instruction, ms |\n\
         | ---: | --- | ---: | ---: | ---: | ---: |\n",
    );
    let mut skipped = String::new();
    let mut lines = SHADOWS.map(|shadow| Line { name: format!("shadow {shadow}"), points: Vec::new() });
    for memory in SIZES {
        for (shadow, line) in SHADOWS.into_iter().zip(&mut lines) {
            tick(&format!("a guest of {} MiB, shadow {shadow}", memory >> 20));
            let needed = if shadow == "full" { memory / 8 } else { 0 } + SPARE;
            if needed > available_memory() {
                // Writing to a string does not fail.
                let _ = writeln!(
                    skipped,
                    "\nSKIPPED: a guest of {} MiB with a full shadow: it needs {} MiB of host memory, and {} MiB are available.",
                    number((memory >> 20) as f64),
                    number((needed >> 20) as f64),
                    number((available_memory() >> 20) as f64),
                );
                continue;
            }
            let stats = program.bare(memory, shadow)?;
            let number_of = |path: &str| stats.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN);
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
    if write {
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

/// What a process holds for itself, in bytes: all that goes when it ends.
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
        "\n### Many guests at once\n\nThe test kernel in 256 MiB, held after the first {} events of the trace's slice. *One more guest* is what each held\n\
         process has for itself (`smaps_rollup`), on average; *fit* is the {} MiB of host memory that were available before, divided by that,\n\
         and the last columns are the same for guests that have touched all of their memory: 256 MiB, what the guest's memory had not yet,\n\
         and a full shadow's 32 MiB or the shadow as measured.\n\n\
         | shadow | guests at once | one more guest, MiB | fit | all touched, MiB | fit |\n\
         | --- | ---: | ---: | ---: | ---: | ---: |\n",
        number(EVENTS as f64),
        number(total / MIB),
    );
    let mut all = Vec::new();
    let mut bare = None;
    for shadow in SHADOWS {
        let mut running = Vec::new();
        while running.len() < guests && available_memory() > SPARE + GUEST {
            tick(&format!("guest {} of {guests} at once, shadow {shadow}", running.len() + 1));
            let mut command = Command::new(program.path());
            command
                .arg("run")
                .arg(&file)
                .args(["--timeout=none", "--shadow", shadow])
                .arg("--initrd")
                .arg(&initrd);
            command.args(["--cmdline", "scenarios=- bench=replay:1 bench=check:1000000000000:none:page:0:0"]);
            let (guest, _) = until(&mut command, "bench begin", 2, LIMIT)?;
            guest.stop();
            running.push(guest);
        }
        let each = running.iter().map(private).sum::<Result<f64>>()? / running.len().max(1) as f64;
        // What it has beside an unchecked one of the same age: the shadow, and what the VMM knows of objects.
        let more = each - *bare.get_or_insert(each);
        let touched = GUEST as f64 + more;
        let _ = writeln!(
            text,
            "| {shadow} | {} | {:.1} | {} | {:.1} | {} |",
            running.len(),
            each / MIB,
            number((total / each).floor()),
            touched / MIB,
            number((total / touched).floor()),
        );
        all.push(Figure::new(GROUP, format!("{shadow}: one more guest"), each / MIB, "MiB"));
    }
    Ok((all, text))
}
