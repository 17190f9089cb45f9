//! What an allocator does before it fails.

/// Runs `take`, and once more if it fails and the quarantine then gives memory back.
#[inline(always)]
pub fn or_after_quarantine<T>(mut take: impl FnMut() -> Option<T>) -> Option<T> {
    take().or_else(|| if umbra_guest::quarantine_drain() > 0 { take() } else { None })
}
