//! A slice of a recorded trace through the test kernel's allocators, with each shadow.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};

use crate::figure::{Figure, number};
use crate::meter::{Meter, Mode, Run};
use crate::replay::guest::{self, GuestTrace};
use crate::trace::Trace;

/// Events of the slice that are replayed.
const EVENTS: usize = 20_000;
/// Limit for instructions with two-level shadow, relative to a full one.
const MORE: f64 = 1.05;
const KIB: f64 = 1024.0;
const GROUP: &str = "replay of a trace in 256 MiB";

const MODES: [(Mode, &str); 5] = [
    (Mode::OFF, "off"),
    (Mode::RING, "per-page, ring"),
    (Mode::FULL, "full, ring"),
    (Mode::SYNC, "per-page, sync"),
    (Mode::FULL_SYNC, "full, sync"),
];

/// Measures. Also returns a table.
///
/// # Errors
/// The slice in the repository is bad, or as [`Meter::run`].
pub fn figures(meter: &Meter, slice: &Path) -> Result<(Vec<Figure>, String)> {
    let trace = guest::make(Trace::open(slice)?.take(EVENTS))?;
    let file: Arc<[u8]> = trace.file.clone().into();
    let mut all = Vec::new();
    let mut text = head(&trace);
    let mut runs = Vec::new();
    for (mode, name) in MODES {
        let run = meter.run_with(mode, "scenarios=- bench=replay:1", Some(file.clone()))?;
        let between = run.between.first().context("the kernel replayed nothing")?;
        let (instructions, time) = (between.instructions as f64, between.time.as_secs_f64());
        row(&mut text, name, &run, instructions / trace.events() as f64, meter.counts(), time);
        if meter.counts() {
            all.push(Figure::new(
                GROUP,
                format!("{name}: instructions for each event"),
                instructions / trace.events() as f64,
                "instructions",
            ));
        }
        all.push(Figure::new(
            GROUP,
            format!("{name}: exits"),
            run.stats.exits.total as f64,
            "exits",
        ));
        if mode != Mode::OFF {
            let shadow = &run.stats.shadow;
            let bytes = shadow.peak_bytes() as f64 / KIB;
            all.push(Figure::new(GROUP, format!("{name}: shadow, at the peak"), bytes, "KiB"));
        }
        runs.push((mode, instructions));
    }
    let of = |mode| runs.iter().find(|(of, _)| *of == mode).map(|(_, count)| *count);
    if meter.counts() {
        for (name, two, full) in [
            ("ring: instructions of per-page, to full's", Mode::RING, Mode::FULL),
            ("sync: instructions of per-page, to full's", Mode::SYNC, Mode::FULL_SYNC),
        ] {
            let ratio = of(two).context("no run")? / of(full).context("no run")?;
            all.push(Figure::new(GROUP, name, ratio, "ratio").limit(MORE));
        }
    }
    Ok((all, text))
}

fn head(trace: &GuestTrace) -> String {
    format!(
        "The first {} events of the trace's slice in the repository, through the test kernel's \
         own slab and page allocators: {} objects and {} blocks of pages allocated, {} frees, {} \
         events in all. (Frees of what was allocated before the recording, and pages that became \
         slabs, are left out: the kernel makes slabs by itself.) Instructions are those of the \
         replay alone, its loop included; exits, shadow and memory are those of the whole run. \
         Memory in KiB:\n\n\
         | shadow | instructions for each event | seconds | exits | hypercalls | shadow faults | \
         page shadow | byte shadow, peak | used, peak | memory of `umbra`, peak |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        number(EVENTS as f64),
        number(trace.objects as f64),
        number(trace.blocks as f64),
        number(trace.frees as f64),
        number(trace.events() as f64),
    )
}

fn row(text: &mut String, name: &str, run: &Run, instructions: f64, counts: bool, time: f64) {
    let kib = |bytes: u64| number(bytes as f64 / KIB);
    let (shadow, exits) = (&run.stats.shadow, &run.stats.exits);
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "| {name} | {} | {time:.1} | {} | {} | {} | {} | {} | {} | {} |",
        if counts { format!("{instructions:.1}") } else { String::new() },
        number(exits.total as f64),
        number(exits.hypercall as f64),
        number(exits.shadow_fault as f64),
        kib(shadow.page_bytes),
        kib(shadow.byte_peak_resident_bytes),
        kib(shadow.byte_used_peak_bytes),
        kib(run.stats.host.rss_peak_bytes),
    );
}
