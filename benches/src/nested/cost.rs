//! The cost of a process, as the nested host's kernel counts it.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

/// What a run cost, in instructions: nanoseconds of the nested host.
#[derive(Clone, Debug)]
pub(super) struct Cost {
    /// Of guest, program and kernel together, from the program's start to its end.
    pub(super) whole: f64,
    /// What the host did from the guest's first instruction to its end, whatever the process. The
    /// CPU is the only one and a guest that is measured never waits, so it is the clock's time. It
    /// repeats better than `whole`, which has a process's start and end in it.
    pub(super) running: f64,
    /// Of the program and the kernel while the guest stood still.
    pub(super) outside: f64,
    /// Of the thread that reads rings while the guest runs.
    pub(super) collector: f64,
    /// `--stats`.
    pub(super) stats: Value,
}

/// The cheapest of three runs: interrupts of the kernel's own come in between.
///
/// # Errors
/// As [`run`].
pub(super) fn cheapest(program: &Path, kernel: &Path, arguments: &[&str]) -> Result<Cost> {
    let mut best = run(program, kernel, arguments)?;
    for _ in 1..3 {
        let other = run(program, kernel, arguments)?;
        best.whole = best.whole.min(other.whole);
        best.outside = best.outside.min(other.outside);
        best.collector = best.collector.min(other.collector);
        if other.running < best.running {
            (best.running, best.stats) = (other.running, other.stats);
        }
    }
    Ok(best)
}

/// Runs `umbra run` on a kernel's file.
///
/// # Errors
/// It cannot be started, or ends with another status than 0 or 1.
pub(super) fn run(program: &Path, kernel: &Path, arguments: &[&str]) -> Result<Cost> {
    let folder = TempDir::new().context("no temporary folder")?;
    let stats = folder.path().join("stats");
    let mut command = Command::new(program);
    command.arg("run").arg(kernel).args(["--keep-going", "--timeout=none"]);
    command.args(arguments).arg("--stats").arg(&stats);
    command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: a system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(without_random_layout) };
    let before = of_children()?;
    let output =
        command.output().with_context(|| format!("{} does not start", program.display()))?;
    let whole = of_children()? - before;
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "umbra {arguments:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let text = fs::read(&stats).context("there are no --stats")?;
    let stats: Value = serde_json::from_slice(&text).context("--stats is not JSON")?;
    let of_host = |key| of_host(&stats, key);
    let (running, outside) = (of_host("seconds")?, of_host("outside_seconds")?);
    let collector = of_host("collector_cpu_seconds")?;
    Ok(Cost { whole, running, outside, collector, stats })
}

/// A time of the `host` part of `--stats`, in nanoseconds.
///
/// # Errors
/// There is none of this name.
pub(super) fn of_host(stats: &Value, key: &str) -> Result<f64> {
    let seconds = stats.pointer(&format!("/host/{key}")).and_then(Value::as_f64);
    seconds.map(|seconds| seconds * 1e9).with_context(|| format!("--stats has no {key}"))
}

/// Has this process's next program laid out the same way each time: what is mapped where decides
/// how many page tables it needs, and so what it costs.
fn without_random_layout() -> io::Result<()> {
    // SAFETY: changes nothing but what a later `execve` does.
    match unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// CPU time of all children that ended, in nanoseconds.
fn of_children() -> Result<f64> {
    // SAFETY: all bits zero are a valid value of this plain structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: fills in the structure, which is ours.
    let done = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) };
    ensure!(done == 0, "the kernel does not tell what children cost");
    let nanoseconds = |time: libc::timeval| time.tv_sec as f64 * 1e9 + time.tv_usec as f64 * 1e3;
    Ok(nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime))
}

/// What one of the rounds costs by which two runs differ.
pub(super) fn slope(few: f64, many: f64, rounds: [u64; 2]) -> f64 {
    (many - few) / (rounds[1] - rounds[0]) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_cost_what_they_use() {
        let before = of_children().unwrap();
        let busy = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
        Command::new("/bin/sh").args(["-c", busy]).status().unwrap();
        assert!(of_children().unwrap() > before);
        assert_eq!(slope(100.0, 300.0, [1, 11]), 20.0);
    }
}
