//! The figures, tables and plots of the checks.

use std::fmt::Write as _;
use std::path::Path;
use std::thread;

use anyhow::Result;

use super::{Check, LARGE, Pattern, SETS, Time, instrumented, needed, ratio, rings, times};
use crate::figure::Figure;
use crate::plot::{self, Axis, Line};
use crate::results;

/// A set that fits the smallest cache.
const CACHED: u64 = SETS[0];
/// Most time of a check in untyped memory, relative to a full shadow's, over [`LARGE`] at random.
const FAR: f64 = 1.0 / 3.0;
/// The same over a cached set, in untyped memory.
const NEAR: f64 = 1.05;
/// The same over a cached set, in byte-checked memory.
const NEAR_BYTES: f64 = 1.2;

/// Measures, within `available` bytes of host memory. Returns the figures and the text for the
/// page.
///
/// # Errors
/// As [`times`], or a plot cannot be written.
pub fn measure(available: u64, folder: &Path, write: bool) -> Result<(Vec<Figure>, String)> {
    let times = times(available, folder)?;
    let mut text = String::from(
        "Nanoseconds of a CPU for a call that checks 8 valid bytes, the median (criterion). The \
         first column is a call that only returns, with the same loop around it; other work on \
         the host shows as columns that are slower as a whole. *KASAN's check* is generic KASAN's \
         in outline mode, written from its description (`benches/src/native/kasan.rs`); *full* is \
         the same layout by Umbra's crate.\n",
    );
    for set in SETS.iter().filter(|set| needed(**set) >= available) {
        // Writing to a string does not fail.
        let skip = umbra_skip::line(
            format_args!("a working set of {}", size(*set)),
            format_args!(
                "its shadow needs {} MiB of host memory, and {} MiB are available.",
                needed(*set) >> 20,
                available >> 20
            ),
        );
        let _ = writeln!(text, "\n{skip}");
    }
    for pattern in [Pattern::Random, Pattern::Sequential] {
        text.push_str(&table(&times, pattern));
        if write {
            text.push_str(&plot(&times, pattern)?);
        }
    }
    let mut figures = figures(available)?;
    if thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) {
        figures.extend(rings::measure());
    } else {
        let skip = umbra_skip::line(
            format_args!("records of two CPUs at once"),
            format_args!("there is one CPU."),
        );
        let _ = writeln!(text, "\n{skip}");
    }
    match umbra::kernel::test_kernel() {
        Some(kernel) => {
            let (more, about) = instrumented::measure(kernel)?;
            figures.extend(more);
            text.push_str(&about);
        }
        None => {
            let skip = umbra_skip::line(
                format_args!("instrumented programs"),
                format_args!("the test kernel, which has Umbra's checks, is not built in."),
            );
            let _ = writeln!(text, "\n{skip}");
        }
    }
    Ok((figures, text))
}

fn find(times: &[Time], key: (Check, Pattern, u64, bool)) -> Option<f64> {
    times.iter().find(|t| (t.check, t.pattern, t.set, t.huge) == key).map(|t| t.ns)
}

/// Formats the size of a working set.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

fn table(times: &[Time], pattern: Pattern) -> String {
    let order = match pattern {
        Pattern::Random => "at random",
        Pattern::Sequential => "one after the other",
    };
    let mut text = format!("\n### Checks {order}\n\n| working set |");
    let mut rule = String::from("| --- |");
    for check in Check::ALL {
        let _ = write!(text, " {} |", check.name());
        rule.push_str(" ---: |");
    }
    let _ = write!(text, " full to untyped |\n{rule} ---: |\n");
    for (set, huge) in SETS.iter().map(|set| (*set, false)).chain([(LARGE, true)]) {
        let of = |check| find(times, (check, pattern, set, huge));
        let (Some(untyped), Some(full)) = (of(Check::Untyped), of(Check::Full)) else { continue };
        let _ = write!(
            text,
            "| {}{} |",
            size(set),
            if huge { ", shadow in pages of 2 MiB" } else { "" }
        );
        for check in Check::ALL {
            let _ =
                write!(text, " {} |", of(check).map(|ns| format!("{ns:.2}")).unwrap_or_default());
        }
        let _ = writeln!(text, " {:.2} |", full / untyped);
    }
    text
}

fn plot(times: &[Time], pattern: Pattern) -> Result<String> {
    let name = format!("checks-{}.svg", format!("{pattern:?}").to_lowercase());
    let (path, shown) = results::plot(&name);
    let lines: Vec<_> = Check::ALL
        .iter()
        .map(|check| Line {
            name: check.name().to_owned(),
            points: SETS
                .iter()
                .filter_map(|set| Some((*set as f64, find(times, (*check, pattern, *set, false))?)))
                .collect(),
        })
        .collect();
    let order = match pattern {
        Pattern::Random => "any address of a working set",
        Pattern::Sequential => "one address after the other",
    };
    plot::lines(
        &path,
        &format!("A check of 8 bytes, {order}"),
        &Axis { name: "working set", logarithmic: true, label: &|v| size(v as u64) },
        &Axis { name: "ns", logarithmic: false, label: &|v| format!("{v:.0}") },
        &lines,
    )?;
    Ok(format!("\n![Checks]({shown})\n"))
}

fn figures(available: u64) -> Result<Vec<Figure>> {
    const CHECKS: &str = "checks without a guest, at random, time to that of full";
    let mut all = Vec::new();
    for (name, check, set, limit) in [
        ("untyped, 4 GiB", Check::Untyped, LARGE, FAR),
        ("untyped, 32 KiB", Check::Untyped, CACHED, NEAR),
        ("byte-checked, 32 KiB", Check::Bytes, CACHED, NEAR_BYTES),
        ("KASAN's check, 32 KiB", Check::Kasan, CACHED, f64::INFINITY),
    ] {
        if needed(set) < available {
            let ratio = ratio(check, set)?;
            let figure =
                Figure::new(CHECKS, name, ratio, "ratio").note("median of pairs measured in turns");
            all.push(if limit.is_finite() { figure.limit(limit) } else { figure });
        }
    }
    Ok(all)
}
