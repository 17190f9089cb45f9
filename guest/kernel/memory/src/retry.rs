//! A second try after the quarantine was drained.

/// Runs `take`, and runs it again if it fails and draining the quarantine releases memory.
#[inline(always)]
pub fn or_after_quarantine<T>(mut take: impl FnMut() -> Option<T>) -> Option<T> {
    take().or_else(|| if umbra_guest::quarantine_drain() > 0 { take() } else { None })
}
