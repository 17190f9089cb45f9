//! The replay's figures, table and plots.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use umbra::shadow::Mode;

use super::{Replay, Sample, replay};
use crate::clock::Spent;
use crate::figure::{Figure, number};
use crate::plot::{self, Axis, Line};
use crate::results;

const MIB: f64 = 1_048_576.0;
/// Limit for page shadow and peak byte shadow of the whole trace together, in MiB, on 24 GiB.
const SHADOW_MAX: f64 = 25.0;
/// Limit relative to a full shadow, in percent.
const SHARE: f64 = 1.0;
/// Limit for 5 million events, in seconds.
const SECONDS: f64 = 5.0;
/// Events of the whole trace.
const WHOLE: u64 = 5_000_000;
/// Memory of the machine that it was recorded on.
const RECORDED: u64 = 24 << 30;

/// A layout of shadow, and its cost in bytes.
struct Way {
    name: &'static str,
    how: &'static str,
    fixed: f64,
    now: f64,
    peak: f64,
    used: Option<f64>,
    time: Option<[Spent; 2]>,
}

/// The result of a replay of both models: figures with limits, and text for the page.
pub struct Measured {
    /// The figures.
    pub figures: Vec<Figure>,
    /// The text.
    pub text: String,
}

/// Replays the trace at `path` with both models. `no_full` is the reason why there is no full
/// shadow, if so. `write`: also write the plots.
///
/// # Errors
/// As [`replay`], or a plot cannot be written.
pub fn measure(
    path: &Path,
    memory: u64,
    no_full: Option<String>,
    write: bool,
    mut tick: impl FnMut(&str, u64, u64),
) -> Result<Measured> {
    let two = replay(path, memory, Mode::PerPage, |at, of| tick("two-level", at, of))?;
    let full = match no_full {
        Some(why) => Err(why),
        None => Ok(replay(path, memory, Mode::Full, |at, of| tick("full", at, of))?),
    };
    let ways = ways(&two, full.as_ref().ok(), memory);
    let figures = figures(&two, memory);
    let mut text = table(&two, &ways, memory, path);
    if let Err(why) = &full {
        let why = format_args!("{why}; its size is computed.");
        let _ = writeln!(text, "\n{}", umbra_skip::line("the replay with a full shadow", why));
    }
    if write {
        text.push_str(&plots(&two, memory)?);
    }
    Ok(Measured { figures, text })
}

fn most(samples: &[Sample], of: impl Fn(&Sample) -> u64) -> f64 {
    samples.iter().map(of).max().unwrap_or(0) as f64
}

fn last(samples: &[Sample], of: impl Fn(&Sample) -> u64) -> f64 {
    samples.last().map_or(0, of) as f64
}

fn ways(two: &Replay, full: Option<&Replay>, memory: u64) -> Vec<Way> {
    let (figures, samples) = (&two.figures, &two.samples[..]);
    let (page, eighth) = (figures.page_bytes as f64, memory as f64 / 8.0);
    let used = figures.byte_used_peak_bytes as f64;
    vec![
        Way {
            name: "**two-level**, host pages of 4 KiB (Umbra)",
            how: "resident",
            fixed: page,
            now: figures.byte_resident_bytes as f64,
            peak: figures.byte_peak_resident_bytes as f64,
            used: Some(used),
            time: Some([two.start, two.time]),
        },
        Way {
            name: "two-level, blocks of 512 bytes, one for each byte-checked page",
            how: "counted",
            fixed: page,
            now: figures.byte_used_bytes as f64,
            peak: used,
            used: Some(used),
            time: None,
        },
        Way {
            name: "two-level, chunks of 256 KiB resident as a whole",
            how: "counted",
            fixed: page,
            now: figures.byte_mapped_bytes as f64,
            peak: figures.byte_mapped_peak_bytes as f64,
            used: Some(used),
            time: None,
        },
        Way {
            name: "two-level, a byte for 32 bytes, host pages of 4 KiB",
            how: "counted",
            fixed: page,
            now: last(samples, |s| s.resident_at_32),
            peak: most(samples, |s| s.resident_at_32),
            used: Some(used / 4.0),
            time: None,
        },
        Way {
            name: "full, a byte for 32 bytes, objects moved to multiples of 32 bytes",
            how: "counted",
            fixed: eighth / 4.0,
            now: last(samples, |s| s.aligned_to_32),
            peak: most(samples, |s| s.aligned_to_32),
            used: None,
            time: None,
        },
        Way {
            name: "**full**, a byte for 8 bytes (KASAN's layout)",
            how: if full.is_some() { "resident" } else { "computed" },
            fixed: full.map_or(eighth, |full| full.figures.byte_peak_resident_bytes as f64),
            now: 0.0,
            peak: 0.0,
            used: None,
            time: full.map(|full| [full.start, full.time]),
        },
    ]
}

fn figures(two: &Replay, memory: u64) -> Vec<Figure> {
    const GROUP: &str = "replay of a trace, two-level";
    let bytes = two.figures.peak_bytes() as f64;
    let whole = two.events >= WHOLE && memory == RECORDED;
    let limit = |figure: Figure, most| if whole { figure.limit(most) } else { figure };
    let share = bytes / (memory as f64 / 8.0) * 100.0;
    let seconds = two.time.cpu.as_secs_f64();
    vec![
        limit(
            Figure::new(GROUP, "page shadow and peak resident byte shadow", bytes / MIB, "MiB"),
            SHADOW_MAX,
        ),
        limit(Figure::new(GROUP, "the same, of a full shadow", share, "percent"), SHARE),
        limit(Figure::new(GROUP, "time of a CPU", seconds, "s"), SECONDS).note(format!(
            "reading the trace and giving back included; {:.1} s by the clock",
            two.time.clock.as_secs_f64()
        )),
    ]
}

fn table(two: &Replay, ways: &[Way], memory: u64, path: &Path) -> String {
    let full = memory as f64 / 8.0;
    let trace = path.file_name().unwrap_or(path.as_os_str()).display();
    let mut text = format!(
        "{} allocator events of a real kernel that builds Linux (`{trace}`), at their physical \
         addresses in {} MiB, by KASAN's rules (`benches/src/replay/kasan.rs`). Shadow in \
         MiB:\n\n\
         | shadow | | static | now | peak | used at most | unused at the end | static and peak | \
         of full | CPU seconds, start and replay |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        number(two.events as f64),
        number(memory as f64 / MIB),
    );
    for way in ways {
        let mib = |bytes: f64| format!("{:.2}", bytes / MIB);
        let unused = match way.used {
            Some(_) if way.now > 0.0 => {
                let used = two.figures.byte_used_bytes as f64
                    * if way.name.contains("32") { 0.25 } else { 1.0 };
                format!("{:.0} %", (1.0 - used / way.now) * 100.0)
            }
            _ => String::new(),
        };
        let total = way.fixed + way.peak;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {unused} | {} | {:.2} % | {} |",
            way.name,
            way.how,
            mib(way.fixed),
            mib(way.now),
            mib(way.peak),
            way.used.map(mib).unwrap_or_default(),
            mib(total),
            total / full * 100.0,
            way.time
                .map(|t| t.map(|t| format!("{:.2}", t.cpu.as_secs_f64())).join(", "))
                .unwrap_or_default(),
        );
    }
    let figures = &two.figures;
    let peak = two.samples.iter().max_by_key(|s| s.resident).copied().unwrap_or_default();
    let _ = write!(
        text,
        "\n\
         Of the two-level byte shadow, {:.0} % is unused by any byte-checked page at its peak: \
         one page of shadow serves eight pages. {} MiB were given back on the way. Live objects \
         have {} MiB at most, and KASAN's redzones would add {} MiB to these, which the recorded \
         kernel did not have: with them the byte shadow grows about as much as the slabs do. \
         Slabs of before the recording that nothing happens in are not known, and there is no \
         quarantine. The start is what it takes to make the shadow, which for a full one means \
         all of it; the replay has the reading of the trace in it.\n",
        (1.0 - peak.used as f64 / (peak.resident as f64).max(1.0)) * 100.0,
        number((figures.released_bytes as f64 / MIB).round()),
        number((most(&two.samples, |s| s.slots) / MIB).round()),
        number((most(&two.samples, |s| s.redzones) / MIB).round()),
    );
    text
}

fn plots(two: &Replay, memory: u64) -> Result<String> {
    let events = Axis { name: "million events", logarithmic: false, label: &|v| format!("{v:.1}") };
    let line = |name: &str, of: &dyn Fn(&Sample) -> f64| Line {
        name: name.to_owned(),
        points: two.samples.iter().map(|s| (s.event as f64 / 1e6, of(s) / MIB)).collect(),
    };
    let full = memory as f64 / 8.0;
    let (all, all_path) = results::plot("replay.svg");
    plot::lines(
        &all,
        "Shadow of a kernel that builds Linux",
        &events,
        &Axis { name: "MiB (logarithmic)", logarithmic: true, label: &|v| format!("{v:.0}") },
        &[
            line("two-level (Umbra)", &|s| (s.page + s.resident) as f64),
            line("full (KASAN)", &|_| full),
            line("full, 1/32", &|s| full / 4.0 + s.aligned_to_32 as f64),
            line("two-level, chunks of 256 KiB", &|s| (s.page + s.mapped) as f64),
        ],
    )?;
    let (bytes, bytes_path) = results::plot("replay-bytes.svg");
    plot::lines(
        &bytes,
        "Two-level: byte shadow",
        &events,
        &Axis { name: "MiB", logarithmic: false, label: &|v| format!("{v:.0}") },
        &[
            line("resident", &|s| s.resident as f64),
            line("used by byte-checked pages", &|s| s.used as f64),
            line("resident, a byte for 32 bytes", &|s| s.resident_at_32 as f64),
        ],
    )?;
    Ok(format!("\n![Shadow over time]({all_path})\n\n![Byte shadow over time]({bytes_path})\n"))
}
