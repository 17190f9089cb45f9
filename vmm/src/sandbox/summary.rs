//! A run in the plain figures that its page is made of.

use umbra_report::{RunSummary, ShadowSummary};

use super::{Config, Report};

impl Report {
    /// The run of `config` that this is the report of, for a page about it.
    pub fn summary<'a>(&'a self, config: &'a Config) -> RunSummary<'a> {
        let stats = &self.stats;
        let shadow = (stats.shadow.mode != "off").then(|| ShadowSummary {
            mode: stats.shadow.mode,
            notify: stats.shadow.notify,
            limit_bytes: config.shadow_limit,
            peak_bytes: stats.shadow.page_bytes + stats.shadow.byte_peak_resident_bytes,
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
            // Plain numbers and names: there is nothing in it that could fail.
            figures: serde_json::to_value(stats).unwrap_or_default(),
            picture: self.picture.as_ref(),
        }
    }
}
