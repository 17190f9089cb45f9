//! A run, for the page about it: plain figures, and samples over time.

use std::time::Duration;

use serde_json::Value;

use super::Findings;

/// A run that has ended. Sizes are bytes.
#[derive(Clone)]
pub struct RunSummary<'a> {
    /// Size of the kernel's file.
    pub kernel_bytes: u64,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Guest memory.
    pub memory_bytes: u64,
    /// The shadow; none in a run without checks.
    pub shadow: Option<ShadowSummary>,
    /// The time limit.
    pub timeout: Option<Duration>,
    /// The number of different findings that ends the run.
    pub stop_at: Option<usize>,
    /// The outcome, as a sentence without a full stop.
    pub outcome: String,
    /// The exit status.
    pub status: u8,
    /// The findings.
    pub findings: &'a Findings,
    /// Allocations of the guest.
    pub allocations: u64,
    /// Frees of the guest.
    pub frees: u64,
    /// Exits from the guest.
    pub exits: u64,
    /// Wall-clock time.
    pub seconds: f64,
    /// All figures, as objects of named values. The end of a name is its unit.
    pub figures: Value,
    /// The run over time, if it was watched.
    pub picture: Option<&'a Picture>,
}

/// The shadow of a run. Sizes are bytes.
#[derive(Clone, Copy, Debug)]
pub struct ShadowSummary {
    /// Its layout, by its name on the command line.
    pub mode: &'static str,
    /// The way it is written, by its name on the command line.
    pub notify: &'static str,
    /// The limit of byte shadow.
    pub limit_bytes: Option<u64>,
    /// The peak of resident shadow, both levels together.
    pub peak_bytes: u64,
}

/// A run over time.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// The shadow's memory over time, by rising time. Empty without a shadow.
    pub samples: Vec<Sample>,
    /// The pages of the guest at the end; none without a shadow.
    pub pages: Option<PageMap>,
    /// The end of the console's output: any bytes.
    pub console: Vec<u8>,
}

/// The shadow's host memory at a moment. Sizes are bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Time since the first sample, which is taken at the first exit or the first tick.
    pub at: Duration,
    /// Page shadow.
    pub page: u64,
    /// Byte shadow that is mapped: what could become resident without an exit.
    pub mapped: u64,
    /// Byte shadow that is resident.
    pub resident: u64,
    /// Byte shadow that byte-checked pages use.
    pub used: u64,
}

/// The number of pages in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Accessible as a whole.
    pub valid: u64,
    /// Free.
    pub free: u64,
    /// Byte-checked: some of it may be accessible.
    pub bytes: u64,
    /// Poisoned as a whole for another reason.
    pub poisoned: u64,
}

impl PageCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.valid + self.free + self.bytes + self.poisoned
    }

    /// Adds the pages of another part.
    pub fn add(&mut self, other: &Self) {
        self.valid += other.valid;
        self.free += other.free;
        self.bytes += other.bytes;
        self.poisoned += other.poisoned;
    }
}

/// Guest memory by rising guest-physical address, from 0 on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageMap {
    /// Pages that a cell stands for, a power of two.
    pub pages_per_cell: u64,
    /// The cells. One without any page is a hole in guest memory.
    pub cells: Vec<PageCounts>,
    /// All cells together.
    pub total: PageCounts,
}
