//! Time of a start, compared with QEMU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::figure::Figure;
use crate::program::{Program, until};
use crate::pvh;

/// Starts for the median.
const STARTS: usize = 11;
const LIMIT: Duration = Duration::from_secs(60);
/// Memory of the guests, also with QEMU: Umbra's default.
const MEMORY: u64 = 256 << 20;
/// Makes the test kernel print a line as soon as it has started.
const COMMAND_LINE: &str = "scenarios=- bench=check:1:none:page:0:0";
const FIRST_LINE: &str = "bench begin";

/// Measures. `tick` gets each step.
///
/// # Errors
/// Umbra does not start.
pub fn figures(program: &Program, kernel: &[u8], tick: impl Fn(&str)) -> Result<Vec<Figure>> {
    const LINE: &str = "process start to the first instructions of a guest: a kernel of 14 bytes, \
                        which says a line";
    const KERNEL: &str = "process start to the test kernel's first line";
    let (small, large) = (program.folder().join("says-a-line"), program.folder().join("kernel"));
    std::fs::write(&small, pvh::says_a_line())
        .with_context(|| format!("cannot write {}", small.display()))?;
    std::fs::write(&large, kernel).with_context(|| format!("cannot write {}", large.display()))?;
    let mut all = Vec::new();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    tick("starting umbra");
    let umbra = median(
        || {
            let mut command = Command::new(program.path());
            command.arg("run").arg(&small).arg("--shadow=off");
            command
        },
        "!",
    )?;
    all.push(Figure::new(LINE, "umbra", milliseconds(umbra), "ms"));
    all.extend(qemu(LINE, &small, "!", &tick));
    for shadow in ["off", "per-page", "full"] {
        tick(&format!("starting the test kernel, shadow {shadow}"));
        let time = median(
            || {
                let mut command = Command::new(program.path());
                command.arg("run").arg(&large).args(["--shadow", shadow]);
                command.args(["--cmdline", COMMAND_LINE]);
                command
            },
            FIRST_LINE,
        )?;
        all.push(Figure::new(KERNEL, format!("umbra, shadow {shadow}"), milliseconds(time), "ms"));
    }
    let same = program.folder().join("kernel-pvh");
    std::fs::write(&same, pvh::test_kernel(kernel, MEMORY, COMMAND_LINE)?)
        .with_context(|| format!("cannot write {}", same.display()))?;
    all.extend(qemu(KERNEL, &same, FIRST_LINE, &tick).map(|figure| {
        let note =
            "without shadow; with a few instructions before it, because QEMU starts ELF files by \
             PVH only";
        if figure.note.is_empty() { figure.note(note) } else { figure }
    }));
    for shadow in ["off", "per-page", "full"] {
        let stats = program.bare(MEMORY, shadow)?;
        let seconds =
            stats["host"]["start_seconds"].as_f64().context("--stats has no start_seconds")?;
        let overhead = stats["host"]["vmm_overhead_bytes"]
            .as_f64()
            .context("--stats has no vmm_overhead_bytes")?;
        const RUN: &str = "a guest of 256 MiB that ends with its first instruction";
        all.push(Figure::new(
            RUN,
            format!("shadow {shadow}: start of the run to that instruction"),
            seconds * 1e3,
            "ms",
        ));
        let name = format!("shadow {shadow}: umbra's memory beside the guest's and its shadow");
        all.push(Figure::new(RUN, name, overhead / 1_048_576.0, "MiB"));
    }
    Ok(all)
}

/// The same with QEMU, with KVM and with its software CPU.
fn qemu(group: &'static str, kernel: &Path, line: &str, tick: &impl Fn(&str)) -> [Figure; 2] {
    ["kvm", "tcg"].map(|accel| {
        tick(&format!("starting QEMU, {accel}"));
        let name = format!("QEMU ({})", accel.to_uppercase());
        let time = median(
            || {
                let mut command = Command::new("qemu-system-x86_64");
                // Not all hosts let QEMU set this MSR.
                let cpu = if accel == "kvm" { "host,-arch-capabilities" } else { "max" };
                command.args(["-accel", accel, "-cpu", cpu, "-nodefaults", "-display", "none"]);
                command.arg("-m").arg(format!("{}M", (MEMORY + pvh::MORE) >> 20));
                command.args(["-serial", "stdio", "-no-reboot", "-kernel"]).arg(kernel);
                command
            },
            line,
        );
        match time {
            Ok(time) => Figure::new(group, name, time.as_secs_f64() * 1e3, "ms"),
            Err(error) => {
                let note = umbra_skip::line(&name, format_args!("{error:#}"));
                Figure::new(group, name, f64::NAN, "ms").note(note)
            }
        }
    })
}

fn median(command: impl Fn() -> Command, text: &str) -> Result<Duration> {
    let mut all = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        all.push(until(&mut command(), text, 1, LIMIT)?.1);
    }
    all.sort();
    all.get(STARTS / 2).copied().context("no starts")
}
