//! The gate in front of the guest: its vCPUs' threads wait there until all threads have closed the
//! jail.

use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::jail::{Jail, ThreadKind};

/// See the module.
pub(super) struct Gate {
    jail: Option<Arc<Jail>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Threads that have come to the gate.
    arrived: usize,
    /// Why one of them could not close the jail.
    failed: Option<io::Error>,
    /// Whether they may go on, once that is known.
    open: Option<bool>,
}

impl Gate {
    /// A closed gate. Without a jail it only waits.
    pub(super) fn new(jail: Option<Arc<Jail>>) -> Self {
        Self { jail, state: Mutex::default(), changed: Condvar::new() }
    }

    fn close_jail(&self, kind: ThreadKind) -> io::Result<()> {
        self.jail.as_ref().map_or(Ok(()), |jail| jail.close(kind))
    }

    /// Closes the jail for a thread, and waits. Returns whether it may go on.
    pub(super) fn arrive(&self, kind: ThreadKind) -> bool {
        let closed = self.close_jail(kind);
        let mut state = self.state.lock();
        state.arrived += 1;
        if let Err(error) = closed {
            state.failed = Some(error);
        }
        self.changed.notify_all();
        while state.open.is_none() {
            self.changed.wait(&mut state);
        }
        state.open == Some(true)
    }

    /// Waits until `threads` have come, closes the jail for this thread, which is the main one, and
    /// lets them go on.
    ///
    /// # Errors
    /// A thread could not close the jail. The others are to end.
    pub(super) fn open(&self, threads: usize) -> io::Result<()> {
        let mut state = self.state.lock();
        while state.arrived < threads {
            self.changed.wait(&mut state);
        }
        let failed = state.failed.take();
        drop(state);
        let closed = failed.map_or_else(|| self.close_jail(ThreadKind::Main), Err);
        self.decide(closed.is_ok());
        closed
    }

    /// Lets all threads go on, or end.
    pub(super) fn decide(&self, open: bool) {
        self.state.lock().open.get_or_insert(open);
        self.changed.notify_all();
    }
}
