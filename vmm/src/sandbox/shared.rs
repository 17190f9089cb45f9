//! What all threads of a run share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use umbra_machine::stats::Counters;
use umbra_machine::{Machine, MemslotId};
use umbra_report::symbols::Deadline;
use vm_memory::GuestAddress;

use super::collector::Doorbell;
use super::dispatch::Dispatcher;
use super::vcpus::Vcpus;
use crate::shadow::{MemslotError, Memslots};

/// Time limit for getting at the state when the run ends.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// The machine's memslots, for the shadow.
pub(super) struct MachineMemslots<'a>(pub &'a Machine);

impl Memslots for MachineMemslots<'_> {
    fn map(
        &mut self,
        gpa: u64,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<u32, MemslotError> {
        // SAFETY: `Shared` drops the machine before the windows, and the vCPUs' threads hold both;
        // shadow is memory that is meant for the guest to write. If the windows fail while they are
        // made, they are dropped first, but then no vCPU ever runs.
        let memslot = unsafe { self.0.map(GuestAddress(gpa), host, len, readonly) };
        memslot.map(MemslotId::into_raw).map_err(|e| MemslotError::Kernel(std::io::Error::other(e)))
    }

    fn unmap(&mut self, memslot: u32) -> Result<(), MemslotError> {
        self.0
            .unmap(MemslotId::from_raw(memslot))
            .map_err(|e| MemslotError::Kernel(std::io::Error::other(e)))
    }
}

/// What all threads of a run share. Fields are dropped in this order: the machine, whose
/// memslots lie in the windows, before them.
pub(super) struct Shared {
    pub(super) machine: Machine,
    pub(super) vcpus: Vcpus,
    /// Wakes the collector, if there are rings.
    pub(super) doorbell: Option<Doorbell>,
    pub(super) counters: Option<Arc<Counters>>,
    /// All threads are to end.
    pub(super) stop: AtomicBool,
    /// The user typed the key that ends the run.
    pub(super) quit: AtomicBool,
    /// When lookups of symbols have to end.
    pub(super) lookups: Deadline,
    /// The state. The lock is fair: a vCPU that makes one exit after the other does not keep the
    /// others waiting. A panic does not poison it. The panic shows when its thread is joined, and
    /// the findings are still good.
    pub(super) dispatcher: Mutex<Dispatcher>,
}

impl Shared {
    /// All threads are to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, SeqCst);
        if let Some(doorbell) = &self.doorbell {
            doorbell.ring();
        }
    }

    /// The state.
    pub(super) fn dispatcher(&self) -> MutexGuard<'_, Dispatcher> {
        self.dispatcher.lock()
    }

    /// The state, if no other thread has it.
    pub(super) fn try_dispatcher(&self) -> Option<MutexGuard<'_, Dispatcher>> {
        self.dispatcher.try_lock()
    }

    /// The state, unless another thread keeps it for so long.
    pub(super) fn dispatcher_within(&self, limit: Duration) -> Option<MutexGuard<'_, Dispatcher>> {
        self.dispatcher.try_lock_for(limit)
    }

    /// The state, unless another thread keeps it: it may be writing to a pipe that nobody reads.
    pub(super) fn dispatcher_in_time(&self) -> Option<MutexGuard<'_, Dispatcher>> {
        self.dispatcher_within(LOCK_LIMIT)
    }
}
