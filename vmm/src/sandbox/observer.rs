//! How a caller observes a run.

use std::sync::Arc;

use umbra_machine::stats::Counters;
use umbra_report::Finding;

/// Gets each new finding while the guest runs.
pub trait Observer: Send {
    /// A finding that is the first of its kind.
    fn finding(&mut self, finding: &Finding);

    /// Called right before the guest runs. `counters` are its vCPUs', if requested and if KVM has
    /// them.
    fn starts(&mut self, counters: Option<Arc<Counters>>) {
        let _ = counters;
    }
}

/// Ignores everything.
impl Observer for () {
    fn finding(&mut self, _: &Finding) {}
}
