//! The result of a run.

use thiserror::Error;
use umbra_machine::MachineError;
use umbra_machine::loader::LoadError;
use umbra_provenance::Objects;
use umbra_report::{CpuState, Findings, Picture, RunSummary, ShadowSummary};

use super::stats::Stats;
use super::{Config, Outcome};
use crate::shadow::ShadowError;

/// Why a run did not begin.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum RunError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Shadow(#[from] ShadowError),
    #[error("Linux needs interrupt controllers and a timer, and they are off")]
    LinuxWithoutIrqchip,
    #[error("{0}: the guest had not begun")]
    NotBegun(Outcome),
    #[error("cannot start a thread of the run, or close the jail for it: {0}")]
    Thread(std::io::Error),
    #[error("cannot make an event by which a guest has its rings read: {0}")]
    Doorbell(std::io::Error),
    #[error("cannot make memory to execute instructions in: {0}; --jail off makes it on demand")]
    Code(std::io::Error),
    #[error("a thread of the run panicked: this is a bug in Umbra")]
    Panicked,
    #[error(
        "{0}, but the run cannot be ended in good order: one of its threads is still busy. Is its \
         output being read?"
    )]
    Abandoned(Outcome),
}

/// The result of a run.
pub struct RunReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Findings.
    pub findings: Findings,
    /// Figures.
    pub stats: Stats,
    /// Data for the page about it, if requested.
    pub picture: Option<Picture>,
    /// The CPUs at the end, if they explain a run that did not end well.
    pub cpus: Vec<CpuState>,
    /// The table of objects at the end: live and freed ones, with their history.
    pub objects: Objects,
    /// [`Config::require_checks`].
    pub(super) require_checks: bool,
}

/// Exit status of a run that was to be checked, and was not.
const UNCHECKED: u8 = 5;

impl RunReport {
    /// Its exit status: that of its [outcome](Outcome::status), or 5 for a run that would be clean
    /// but ran unchecked, if [`Config::require_checks`] is set.
    pub fn status(&self) -> u8 {
        match self.outcome.status(!self.findings.is_empty()) {
            0 if self.require_checks && self.stats.unchecked.is_some() => UNCHECKED,
            status => status,
        }
    }

    /// Summary of this run of `config`, for the page about it.
    pub fn summary<'a>(&'a self, config: &'a Config) -> RunSummary<'a> {
        let stats = &self.stats;
        let shadow = (stats.shadow.mode != "off").then(|| ShadowSummary {
            mode: stats.shadow.mode,
            notify: stats.shadow.notify,
            limit_bytes: config.shadow_limit,
            peak_bytes: stats.shadow.peak_bytes(),
        });
        RunSummary {
            kernel_bytes: config.kernel.bytes(),
            cmdline: &config.cmdline,
            memory_bytes: config.memory,
            shadow,
            timeout: config.timeout,
            stop_at: config.stop_at,
            outcome: self.outcome.to_string(),
            status: self.status(),
            findings: &self.findings,
            allocations: stats.events.allocations,
            frees: stats.events.frees,
            exits: stats.exits.total,
            seconds: stats.host.seconds,
            // Plain numbers and names cannot fail to serialize.
            figures: serde_json::to_value(stats).unwrap_or_default(),
            picture: self.picture.as_ref(),
        }
    }
}
