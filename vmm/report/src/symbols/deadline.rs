//! When lookups have to end, whatever the file does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// A moment at which no lookup goes on. Whoever watches a run sets it, in any thread, also while a
/// lookup is under way. At first there is none.
#[derive(Clone, Debug)]
pub struct Deadline(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    /// Nanoseconds after `epoch`.
    at: AtomicU64,
}

impl Default for Deadline {
    fn default() -> Self {
        Self(Arc::new(Inner { epoch: Instant::now(), at: AtomicU64::new(u64::MAX) }))
    }
}

impl Deadline {
    /// Sets it to so much time from now.
    pub fn set(&self, time: Duration) {
        let at = self.0.epoch.elapsed().saturating_add(time);
        self.0.at.store(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX), SeqCst);
    }

    /// The time that is left until it, at most `longest`; none if it is over.
    pub(super) fn left(&self, longest: Duration) -> Option<Duration> {
        let at = Duration::from_nanos(self.0.at.load(SeqCst));
        let left = at.checked_sub(self.0.epoch.elapsed())?.min(longest);
        (!left.is_zero()).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_set_anew() {
        let (deadline, long) = (Deadline::default(), Duration::from_secs(100));
        assert_eq!(deadline.left(long), Some(long));
        deadline.clone().set(Duration::ZERO);
        assert_eq!(deadline.left(long), None);
        deadline.set(Duration::from_secs(50));
        assert!(deadline.left(long).is_some_and(|left| left <= Duration::from_secs(50)));
        deadline.set(Duration::MAX);
        assert_eq!((deadline.left(long), deadline.left(Duration::ZERO)), (Some(long), None));
    }
}
