//! How long a start takes, beside QEMU's.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::figure::Figure;
use crate::program::{Program, says_a_line, until};

/// Starts of which the median is taken.
const STARTS: usize = 11;
const LIMIT: Duration = Duration::from_secs(60);

/// Measures it. `tick` hears what is being done.
///
/// # Errors
/// Umbra does not start.
pub fn figures(program: &Program, kernel: &[u8], tick: impl Fn(&str)) -> Result<Vec<Figure>> {
    const LINE: &str = "process start to the first line of a kernel of 14 bytes";
    const KERNEL: &str = "process start to the test kernel's first line";
    let (small, large) = (program.folder().join("says-a-line"), program.folder().join("kernel"));
    std::fs::write(&small, says_a_line()).with_context(|| format!("cannot write {}", small.display()))?;
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
    for accel in ["kvm", "tcg"] {
        tick(&format!("starting QEMU, {accel}"));
        let name = format!("QEMU ({})", accel.to_uppercase());
        let qemu = median(
            || {
                let mut command = Command::new("qemu-system-x86_64");
                let cpu = if accel == "kvm" { "host" } else { "max" };
                command.args(["-accel", accel, "-cpu", cpu, "-m", "256", "-nodefaults", "-display", "none"]);
                command.args(["-serial", "stdio", "-no-reboot", "-kernel"]).arg(&small);
                command
            },
            "!",
        );
        all.push(match qemu {
            Ok(time) => Figure::new(LINE, name, milliseconds(time), "ms"),
            Err(error) => Figure::new(LINE, name, f64::NAN, "ms").note(format!("SKIPPED: {error:#}")),
        });
    }
    for shadow in ["off", "per-page", "full"] {
        tick(&format!("starting the test kernel, shadow {shadow}"));
        let time = median(
            || {
                let mut command = Command::new(program.path());
                command.arg("run").arg(&large).args(["--shadow", shadow]);
                command.args(["--cmdline", "scenarios=- bench=check:1:none:page:0:0"]);
                command
            },
            "bench begin",
        )?;
        all.push(Figure::new(KERNEL, format!("umbra, shadow {shadow}"), milliseconds(time), "ms"));
    }
    for shadow in ["off", "per-page", "full"] {
        let stats = program.bare(256 << 20, shadow)?;
        let seconds = stats["host"]["start_seconds"].as_f64().context("--stats has no start_seconds")?;
        let overhead =
            stats["host"]["vmm_overhead_bytes"].as_f64().context("--stats has no vmm_overhead_bytes")?;
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

fn median(command: impl Fn() -> Command, text: &str) -> Result<Duration> {
    let mut all = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        all.push(until(&mut command(), text, 1, LIMIT)?.1);
    }
    all.sort();
    all.get(STARTS / 2).copied().context("no starts")
}
