//! The cost of the program `umbra` as a process.

use anyhow::{Context as _, Result};

use crate::figure::Figure;
use crate::program::Program;

/// Starts for the median.
const STARTS: usize = 20;
const MIB: f64 = 1_048_576.0;

/// Measures all of these.
pub fn figures(program: &Program, kernel: &[u8]) -> Result<Vec<Figure>> {
    const MEMORY: &str = "memory of umbra, beside 256 MiB of guest and its shadow";
    let mut all = Vec::new();
    for (name, cmdline, status) in [
        ("a guest that only boots", "scenarios=-", 0),
        ("churn, without findings", "scenarios=huge_churn churn=2000", 0),
        ("one scenario, with findings and symbols", "scenarios=kmalloc_oob_right", 1),
        ("all scenarios, with findings and symbols", "churn=2000", 1),
    ] {
        let stats = program.stats(kernel, cmdline, status)?;
        let bytes = stats["host"]["vmm_overhead_bytes"]
            .as_f64()
            .context("--stats has no vmm_overhead_bytes")?;
        all.push(Figure::new(MEMORY, name, bytes / MIB, "MiB").limit(8.0));
    }
    let start = program.start_to_end(STARTS)?;
    all.push(
        Figure::new(
            "start",
            "process start to its end, of a guest that ends at once",
            start.as_secs_f64() * 1e3,
            "ms",
        )
        .limit(20.0)
        .note(format!(
            "median of {STARTS}; an upper bound for the time to the first guest instruction"
        )),
    );
    Ok(all)
}
