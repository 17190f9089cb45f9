//! The findings of a run, the observer that gets them, and the limit that ends the run.

use umbra_report::{Added, DEFAULT_LIMIT, Distinct, Finding, Findings};

use super::{Observer, Outcome};

/// The findings of a run.
pub(super) struct Session {
    findings: Findings,
    observer: Box<dyn Observer>,
    stop_at: Option<usize>,
}

impl Session {
    /// No findings yet. `observer` gets each new one; the run ends after `stop_at` of them.
    pub(super) fn new(
        observer: Box<dyn Observer>,
        distinct: Distinct,
        stop_at: Option<usize>,
    ) -> Self {
        Self { findings: Findings::new(distinct, DEFAULT_LIMIT), observer, stop_at }
    }

    /// The findings so far.
    pub(super) fn findings(&self) -> &Findings {
        &self.findings
    }

    /// Takes all findings out.
    pub(super) fn take_findings(&mut self) -> Findings {
        std::mem::take(&mut self.findings)
    }

    /// Adds a finding. If it is new, calls `flush` and then the observer. Ends the run if that was
    /// the last one wanted.
    pub(super) fn add(&mut self, finding: Finding, flush: impl FnOnce()) -> Result<(), Outcome> {
        let Added::New(at) = self.findings.add(finding) else { return Ok(()) };
        flush();
        if let Some((finding, _)) = self.findings.get(at) {
            self.observer.finding(finding);
        }
        let distinct = self.findings.distinct();
        match self.stop_at {
            Some(limit) if distinct >= limit => Err(Outcome::FindingLimit(distinct)),
            _ => Ok(()),
        }
    }
}
