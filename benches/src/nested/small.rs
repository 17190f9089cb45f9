//! What the test kernel's events cost a whole host, and starts, exits and shadow faults.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::cost::{Cost, cheapest, slope};
use crate::figure::Measured;
use crate::program::{exits_after, exits_at_once};

/// The configurations of the churn.
const CONFIGURATIONS: [(&str, &[&str]); 4] = [
    ("off", &["--shadow=off"]),
    ("per-page, ring", &["--shadow=per-page", "--notify=ring"]),
    ("per-page, sync", &["--shadow=per-page", "--notify=sync"]),
    ("full, ring", &["--shadow=full", "--notify=ring"]),
];
/// Operations of the two runs whose costs are compared: half of them allocations, half frees.
const OPERATIONS: [u64; 2] = [20_000, 60_000];
/// The same where each is an exit or two.
const OPERATIONS_SYNC: [u64; 2] = [2_000, 12_000];
/// Rounds of `kmalloc` and `kfree` of the two runs: the first fill the quarantine, which has room
/// for 10,922 objects of 64 bytes in slots of 96.
const ROUNDS: [u64; 2] = [12_000, 52_000];
const QUARANTINE: &str = "--quarantine=1M";
/// Exits of the two runs.
const EXITS: [u64; 2] = [100, 10_100];
/// First touches of byte shadow of the two runs; there are 64 at most.
const FAULTS: [u64; 2] = [4, 60];

const CHURN: &str = "churn of the test kernel, an operation";
const KMALLOC: &str = "kmalloc(64) and kfree, with a full quarantine";
const ONCE: &str = "a run, an exit, a shadow fault";

/// Measures them.
pub(super) fn figures(program: &Path, tick: impl Fn(&str)) -> Result<Vec<Measured>> {
    let folder = TempDir::new().context("no temporary folder")?;
    let file = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
        let path = folder.path().join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    let kernel = umbra::kernel::test_kernel().context("this was built without the test kernel")?;
    let kernel = file("kernel", kernel)?;
    // The first run reads the program from the disk, which none of those that count shall do.
    churn(program, &kernel, CONFIGURATIONS[0].1, 1)?;
    let mut all = Vec::new();
    for (name, options) in CONFIGURATIONS {
        tick(&format!("the churn, {name}"));
        let operations = if name.ends_with("sync") { OPERATIONS_SYNC } else { OPERATIONS };
        let run = |count| churn(program, &kernel, options, count);
        let [few, many] = [run(operations[0])?, run(operations[1])?];
        let of = |part: fn(&Cost) -> f64| slope(part(&few), part(&many), operations);
        all.push(Measured::new(CHURN, format!("{name}: whole host"), of(|cost| cost.running)));
        all.push(Measured::new(
            CHURN,
            format!("{name}: outside the guest"),
            of(|cost| cost.outside),
        ));
        if name.ends_with("ring") {
            let collector = of(|cost| cost.collector);
            all.push(Measured::new(CHURN, format!("{name}: in the collector"), collector));
        }
    }
    for (name, options) in &CONFIGURATIONS[..2] {
        tick(&format!("kmalloc and kfree, {name}"));
        let run = |rounds| {
            let words = format!("--cmdline=scenarios=- bench=kmalloc:{rounds}:64");
            without_interrupts(program, &kernel, &[*options, &[QUARANTINE, &words]].concat())
        };
        let [few, many] = [run(ROUNDS[0])?, run(ROUNDS[1])?];
        let each = slope(few.running, many.running, ROUNDS);
        all.push(Measured::new(KMALLOC, format!("{name}: whole host"), each));
    }
    let at_once = file("exits-at-once", &exits_at_once())?;
    for (name, options) in CONFIGURATIONS.iter().filter(|(name, _)| !name.ends_with("sync")) {
        tick(&format!("a start, {name}"));
        let cost = without_interrupts(program, &at_once, options)?;
        all.push(Measured::new(ONCE, format!("start to end in 256 MiB, {name}"), cost.whole));
    }
    tick("an exit");
    let exit = |count| {
        without_interrupts(program, &file("exits", &exits_after(count))?, &["--shadow=off"])
    };
    let [few, many] = [exit(EXITS[0])?, exit(EXITS[1])?];
    let each = slope(few.running, many.running, EXITS);
    all.push(Measured::new(ONCE, "an exit to Umbra and back".into(), each));
    tick("a shadow fault");
    let fault = |count| {
        let words = format!("--cmdline=scenarios=- bench=chunks:{count}:new");
        without_interrupts(program, &kernel, &[&words])
    };
    let [few, many] = [fault(FAULTS[0])?, fault(FAULTS[1])?];
    let each = slope(few.running, many.running, FAULTS);
    all.push(Measured::new(ONCE, "a first touch of 2 MiB, its promotion included".into(), each));
    Ok(all)
}

/// As [`cheapest`], for a guest that needs no interrupts.
fn without_interrupts(program: &Path, kernel: &Path, arguments: &[&str]) -> Result<Cost> {
    cheapest(program, kernel, &[arguments, &["--irqchip=off"]].concat())
}

fn churn(program: &Path, kernel: &Path, options: &[&str], operations: u64) -> Result<Cost> {
    let words = format!("--cmdline=scenarios=huge_churn churn={operations}");
    let mut arguments = options.to_vec();
    arguments.push(&words);
    without_interrupts(program, kernel, &arguments)
}
