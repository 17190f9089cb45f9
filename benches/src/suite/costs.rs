//! The cost of allocations, events and calls, in guest instructions and exits, or in time.

use anyhow::{Context as _, Result};
use umbra::provenance::{Objects, QuarantineSize};

use crate::figure::Figure;
use crate::heap;
use crate::meter::{Meter, Mode, Word};

/// Rounds of the timings.
const TIMED: u64 = 2000;
/// Limit for the additional instructions of an allocation and its free, over the same kernel
/// without checks.
const MORE: f64 = 400.0;
/// Limit for the VMM's memory per object, in bytes.
const PROVENANCE: f64 = 64.0;
/// Blocks of 2 MiB whose shadow is touched.
const CHUNKS: u64 = 60;

/// Measures all of these.
pub fn figures(meter: &Meter) -> Result<Vec<Figure>> {
    let mut all = exact(meter)?;
    all.extend(provenance(meter)?);
    all.extend(times(meter)?);
    Ok(all)
}

/// Measures those that repeat exactly.
pub fn exact(meter: &Meter) -> Result<Vec<Figure>> {
    let mut all = instructions(meter)?;
    all.extend(exits(meter)?);
    Ok(all)
}

fn instructions(meter: &Meter) -> Result<Vec<Figure>> {
    const GROUP: &str = "costs (the loop excluded)";
    let none = Word::new("check", "none:page:0:0");
    let kmalloc = |bytes: u64| {
        (format!("kmalloc({bytes}) and kfree"), Word::new("kmalloc", bytes.to_string()))
    };
    let call = |name: &str, what: &str| (name.to_owned(), Word::new("call", what));
    let mut all = Vec::new();
    let mut unchecked = None;
    for (mode, mode_name, words) in [
        (Mode::OFF, "off", vec![kmalloc(64), kmalloc(1024), kmalloc(8192)]),
        (
            Mode::RING,
            "ring",
            vec![
                kmalloc(64),
                kmalloc(1024),
                kmalloc(8192),
                ("record of an event, 3 frames".to_owned(), Word::new("record", "0")),
                ("record of an event, 10 frames".to_owned(), Word::new("record", "7")),
                call("umbra_alloc, 64 bytes in a slot of 96", "alloc"),
                call("umbra_alloc and umbra_free of it", "alloc-free"),
                call("umbra_poison, 8 bytes", "poison"),
                call("umbra_unpoison, 8 bytes", "unpoison"),
                call("umbra_unpoison, a page", "unpoison-page"),
                call("end of a scope with 32 bytes", "scope"),
                call("a page demoted and promoted by these", "promote"),
                call("a hypercall", "drain"),
            ],
        ),
        (
            Mode::SYNC,
            "sync",
            vec![
                kmalloc(64),
                kmalloc(1024),
                kmalloc(8192),
                call("umbra_alloc, 64 bytes in a slot of 96", "alloc"),
                call("umbra_alloc and umbra_free of it", "alloc-free"),
                call("umbra_poison, 8 bytes", "poison"),
            ],
        ),
        (
            Mode::FULL,
            "full",
            vec![
                kmalloc(64),
                kmalloc(1024),
                kmalloc(8192),
                call("umbra_alloc, 64 bytes in a slot of 96", "alloc"),
                call("umbra_unpoison, a page", "unpoison-page"),
            ],
        ),
    ] {
        let measured: Vec<_> = std::iter::once(none.clone())
            .chain(words.iter().map(|(_, word)| word.clone()))
            .collect();
        let costs = meter.cost(mode, &measured)?;
        for ((name, _), cost) in words.iter().zip(&costs[1..]) {
            all.push(Figure::new(
                GROUP,
                format!("{mode_name}: {name}"),
                cost - costs[0],
                meter.unit(),
            ));
        }
        // The first word: `kmalloc(64)`.
        let cost = costs[1] - costs[0];
        let more = cost - *unchecked.get_or_insert(cost);
        if mode == Mode::RING {
            let full = quarantined(meter, costs[0])? - unchecked.unwrap_or(cost);
            for (name, more) in [
                ("ring: kmalloc(64) and kfree, more than off, before the quarantine is full", more),
                (
                    "ring: kmalloc(64) and kfree, more than off, one object out for each that \
                     goes in",
                    full,
                ),
            ] {
                let figure = Figure::new(GROUP, name, more, meter.unit()).limit(MORE);
                all.push(if meter.counts() { figure } else { figure.not_applicable() });
            }
        }
    }
    Ok(all)
}

/// Heap memory of provenance in the middle of a churn, names included.
fn provenance(meter: &Meter) -> Result<Vec<Figure>> {
    const GROUP: &str =
        "provenance: memory of the VMM in a churn of 20,000 operations, stacks and caches included";
    let mut all = Vec::new();
    // However many objects there are.
    let fixed = heap::bytes_of(Objects::default());
    for (quarantine, with) in [
        (QuarantineSize::Auto, "with a quarantine"),
        // Of so few objects that the fixed part is much of it.
        (QuarantineSize::Bytes(0), "without a quarantine"),
    ] {
        let run = meter
            .run(Mode { quarantine, ..Mode::RING }, "scenarios=huge_churn churn=20000 keep")?;
        let stats = &run.stats.provenance;
        let (live, freed, waiting) = (stats.live, stats.freed, run.stats.quarantine.objects);
        let bytes = heap::bytes_of(run.objects);
        // A freed object is remembered until its memory is handed out again, with or without a
        // quarantine.
        let each = Figure::new(
            GROUP,
            format!("{with}, for each object that is remembered, live or freed"),
            bytes as f64 / (live + freed).max(1) as f64,
            "bytes",
        );
        all.push(each.limit(PROVENANCE).note(format!(
            "{bytes} bytes, {fixed} of them fixed: {live} live, {freed} freed, of which {waiting} \
             are in the quarantine, {} stacks",
            stats.stacks
        )));
        let live = bytes as f64 / live.max(1) as f64;
        let live =
            Figure::new(GROUP, format!("{with}, all of it for each live object"), live, "bytes");
        all.push(live);
    }
    Ok(all)
}

/// `kmalloc(64)` and `kfree` with a full quarantine: each free leads to an eviction at some time.
/// The quarantine is small, so that it fills soon and evicts in small batches.
fn quarantined(meter: &Meter, empty: f64) -> Result<f64> {
    const BYTES: u64 = 512 << 10;
    // An object of 64 bytes has a slot of 96. The first number of rounds fills the quarantine; the
    // difference is ten batches of a sixteenth each.
    const FULL: u64 = BYTES / 96 + 1000;
    const BATCHES: u64 = 10 * (BYTES / 16 / 96 + 1);
    let mode = Mode { quarantine: QuarantineSize::Bytes(BYTES), ..Mode::RING };
    Ok(meter.later_cost(mode, &Word::new("kmalloc", "64"), [FULL, FULL + BATCHES])? - empty)
}

fn exits(meter: &Meter) -> Result<Vec<Figure>> {
    const GROUP: &str = "exits of calls in sync mode";
    let mut all = Vec::new();
    for (name, what, calls) in [
        ("umbra_poison", "poison", 1.0),
        ("umbra_unpoison", "unpoison", 1.0),
        ("umbra_alloc", "alloc", 1.0),
        ("umbra_alloc and umbra_free", "alloc-free", 2.0),
    ] {
        let exits = meter.exits(Mode::SYNC, &Word::new("call", what))?;
        all.push(Figure::new(GROUP, name, exits / calls, "exits/call").limit(1.0));
    }
    Ok(all)
}

fn times(meter: &Meter) -> Result<Vec<Figure>> {
    const GROUP: &str = "times (they vary from run to run)";
    let empty = meter.clock(Mode::RING, &Word::new("check", "none:page:0:0"), TIMED)?;
    let hypercall = meter.clock(Mode::RING, &Word::new("call", "drain"), TIMED)?;
    let change = meter.clock(Mode::SYNC, &Word::new("call", "poison"), TIMED)?;
    let touch = |state| meter.clock(Mode::RING, &Word::new("chunks", state), CHUNKS);
    let (new, used) = (touch("new").context("256 MiB hold no 64 blocks")?, touch("used")?);
    let microseconds = |name, ns: f64| Figure::new(GROUP, name, ns / 1000.0, "µs");
    Ok(vec![
        microseconds("hypercall (an empty ring's drain) and back", hypercall - empty),
        microseconds("umbra_poison of 8 bytes, in sync mode", change - empty),
        microseconds("a promotion", used),
        microseconds("shadow fault: a chunk mapped at its first touch", new - used),
    ])
}
