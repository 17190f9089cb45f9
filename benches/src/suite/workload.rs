//! The cost of boot, churn, and all scenarios, with two-level and with full shadow.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use umbra::report::{Finding, Names};

use crate::figure::Figure;
use crate::meter::{Meter, Mode, Run};

/// Operations of the churn whose shadow and instructions are compared.
const OPERATIONS: u64 = 4000;
/// Operations of the two runs whose exits are compared: enough for the ring to fill more than once.
const MANY: [u64; 2] = [1000, 21_000];

fn churn(meter: &Meter, mode: Mode, operations: u64) -> Result<Run> {
    meter.run(mode, &format!("scenarios=huge_churn churn={operations}"))
}

/// The findings, without what differs between two runs of one kernel: addresses do, since page
/// tables for more shadow take more memory.
fn found(run: &Run) -> BTreeSet<String> {
    let line = |f: &Finding| {
        let offset = f.object.as_ref().map(|object| object.offset);
        format!(
            "{}, {} bytes at {offset:?} at {:#x} by {}",
            f.headline(Names::Linkage),
            f.size,
            f.ip,
            f.task.name
        )
    };
    run.findings
        .iter()
        .map(|(finding, times)| format!("{}, {times} times", line(finding)))
        .collect()
}

fn shadow_bytes(run: &Run) -> f64 {
    run.stats.shadow.peak_bytes() as f64
}

/// Measures all of these.
pub fn figures(meter: &Meter) -> Result<Vec<Figure>> {
    let mut all = Vec::new();
    if meter.counts() {
        let boot = meter.run(Mode::RING, "scenarios=-")?;
        let instructions =
            boot.stats.guest.instructions.context("KVM has stopped counting instructions")?;
        all.push(
            Figure::new(
                "boot",
                "entry of the test kernel to its first scenario",
                instructions as f64,
                "instructions",
            )
            .limit(3e6),
        );
    }

    const GROUP: &str = "churn in 256 MiB";
    let modes = [
        (Mode::RING, "per-page"),
        (Mode::FULL, "full"),
        (Mode::SYNC, "per-page, sync"),
        (Mode::OFF, "off"),
    ];
    let mut runs = Vec::new();
    for (mode, name) in modes {
        let run = churn(meter, mode, OPERATIONS)?;
        if mode != Mode::OFF {
            all.push(Figure::new(
                GROUP,
                format!("{name}: shadow"),
                shadow_bytes(&run) / 1024.0,
                "KiB",
            ));
        }
        if let Some(instructions) = run.stats.guest.instructions {
            all.push(Figure::new(
                GROUP,
                format!("{name}: instructions"),
                instructions as f64,
                "instructions",
            ));
        }
        all.push(Figure::new(GROUP, format!("{name}: time"), run.stats.host.seconds, "s"));
        runs.push(run);
    }
    let ratio = shadow_bytes(&runs[0]) / shadow_bytes(&runs[1]);
    all.push(
        Figure::new(GROUP, "shadow of per-page, to full's", ratio, "ratio")
            .limit(0.1)
            .note(format!("1/{:.0}", 1.0 / ratio)),
    );
    let differ = |a: &Run, b: &Run| found(a).symmetric_difference(&found(b)).count() as f64;
    all.push(
        Figure::new(
            GROUP,
            "findings that per-page and full do not share",
            differ(&runs[0], &runs[1]),
            "findings",
        )
        .limit(0.0),
    );

    const SCENARIOS: &str = "all scenarios in 256 MiB";
    let [per_page, full] =
        [Mode::RING, Mode::FULL].map(|mode| meter.run(mode, &format!("churn={OPERATIONS}")));
    let (per_page, full) = (per_page?, full?);
    all.push(Figure::new(
        SCENARIOS,
        "findings of per-page",
        per_page.stats.findings as f64,
        "findings",
    ));
    all.push(
        Figure::new(
            SCENARIOS,
            "findings that per-page and full do not share",
            differ(&per_page, &full),
            "findings",
        )
        .limit(0.0),
    );
    let ratio = shadow_bytes(&per_page) / shadow_bytes(&full);
    all.push(
        Figure::new(SCENARIOS, "shadow of per-page, to full's", ratio, "ratio")
            .limit(0.1)
            .note(format!("1/{:.0}", 1.0 / ratio)),
    );

    const EXITS: &str = "exits of churn in ring mode";
    let [few, many] = MANY.map(|operations| churn(meter, Mode::RING, operations));
    let (few, many) = (few?, many?);
    let events = |run: &Run| (run.stats.events.allocations + run.stats.events.frees) as f64;
    let thousands = (events(&many) - events(&few)) / 1000.0;
    let more = |of: fn(&Run) -> u64| (of(&many) as f64 - of(&few) as f64) / thousands;
    all.push(
        Figure::new(
            EXITS,
            "all exits, to 1,000 allocations or frees",
            more(|r| r.stats.exits.total),
            "exits",
        )
        .limit(1.0),
    );
    all.push(Figure::new(
        EXITS,
        "of these, drains of the ring",
        more(|r| r.stats.exits.hypercall),
        "exits",
    ));
    all.push(Figure::new(
        EXITS,
        "of these, first touches of shadow",
        more(|r| r.stats.exits.shadow_fault),
        "exits",
    ));
    Ok(all)
}
