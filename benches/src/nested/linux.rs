//! What Linux costs a whole host: without KASAN, with its own, and with Umbra's, all at -O2.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use umbra_tests::linux::kernel;

use super::cost::{Cost, of_host, run};
use crate::figure::Measured;
use crate::linux_kasan::{POINTS, REPLAY, record};
use crate::trace::Trace;

/// The kernels, their files, and what they get as `--shadow`.
pub(super) const KERNELS: [(&str, &str, &str); 4] = [
    ("none", "compare-none/vmlinux", "off"),
    ("stock outline", "compare-outline/vmlinux", "off"),
    ("stock inline", "compare-inline/vmlinux", "off"),
    ("umbra", "compare-umbra/vmlinux", "per-page"),
];
/// The parts of a run.
pub(super) const BOOT: &str = "Linux: boot to the workload";
pub(super) const REPLAYED: &str = "Linux: the workload";
pub(super) const MEMORY: &str = "Linux: memory of the process, peak, KiB";
pub(super) const WHOLE: &str = "Linux: Umbra's whole run, who pays";
/// Who pays for a run.
pub(super) const PARTS: [&str; 5] = [
    "the guest, and KVM inside of KVM_RUN",
    "the vCPU's thread, while the guest stands still",
    "the collector, while the guest runs",
    "start, end and all other threads",
    "whole host",
];

/// Measures them with the first `events` events of a trace.
pub(super) fn figures(
    program: &Path,
    trace: &Path,
    events: usize,
    tick: impl Fn(&str),
) -> Result<Vec<Measured>> {
    let folder = TempDir::new().context("no temporary folder")?;
    let initrd = folder.path().join("recording");
    let recording = record(Trace::open(trace)?.take(events))?;
    fs::write(&initrd, &recording.bytes).context("cannot write the recording")?;
    tick(&format!("{} allocations", recording.allocations));
    let mut all = Vec::new();
    for (name, file, shadow) in KERNELS {
        tick(&format!("Linux, {name}"));
        let mut arguments = vec![
            "--memory=1G".to_owned(),
            format!("--shadow={shadow}"),
            format!("--cmdline={REPLAY}"),
        ];
        arguments.extend(POINTS[..2].iter().map(|point| format!("--mark={point}")));
        arguments.push(format!("--initrd={}", initrd.display()));
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let cost = run(program, &kernel(file), &arguments)?;
        let [boot, end] = POINTS[..2] else { bail!("a run has other parts") };
        let boot_cpu = at_mark(&cost, boot, "cpu_seconds")? * 1e9;
        let end_cpu = at_mark(&cost, end, "cpu_seconds")? * 1e9;
        all.push(Measured::new(BOOT, name.into(), boot_cpu));
        all.push(Measured::new(REPLAYED, name.into(), end_cpu - boot_cpu));
        let peak = at_mark(&cost, end, "rss_peak_bytes")?;
        all.push(Measured::new(MEMORY, name.into(), peak / 1024.0));
        if shadow != "off" {
            let vcpu = of_host(&cost.stats, "vcpus_cpu_seconds")?;
            let rest = cost.whole - vcpu - cost.collector;
            for (part, cost) in PARTS.iter().zip([
                vcpu - cost.outside,
                cost.outside,
                cost.collector,
                rest,
                cost.whole,
            ]) {
                all.push(Measured::new(WHOLE, (*part).into(), cost));
            }
        }
    }
    Ok(all)
}

/// A figure of one of a run's marks.
pub(super) fn at_mark(cost: &Cost, text: &str, what: &str) -> Result<f64> {
    let marks = cost.stats["marks"].as_array();
    let mut marks = marks.into_iter().flatten();
    let found = marks.find(|mark| mark["text"].as_str() == Some(text));
    let mark = found.with_context(|| format!("the console never said \"{text}\""))?;
    mark[what].as_f64().with_context(|| format!("a mark has no {what}"))
}
