//! Per-CPU buffers for the list of memory that leaves the quarantine.

use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use umbra_shadow::abi::{Owner, Released};

use crate::state;

/// Entries of the buffer of a CPU that has no ring.
const FEW: usize = 8;

struct Small(UnsafeCell<[Released; FEW]>);

// SAFETY: only the holder of a CPU's buffer uses it.
unsafe impl Sync for Small {}

static SMALL: [Small; state::CPUS] =
    [const { Small(UnsafeCell::new([Released::new(0, 0, Owner { allocator: 0, note: 0 }); FEW])) };
        state::CPUS];

/// A CPU's buffer. It belongs to one user at a time, who has [claimed](Self::claim) it.
pub struct ReleaseBuffer {
    entries: AtomicPtr<Released>,
    len: AtomicU64,
    /// Entries that the VMM wrote and that their allocators have not got yet.
    pending: AtomicU64,
    claimed: AtomicBool,
}

impl ReleaseBuffer {
    /// The buffer of a CPU that has no ring yet.
    pub(crate) const fn new() -> Self {
        Self {
            entries: AtomicPtr::new(null_mut()),
            len: AtomicU64::new(0),
            pending: AtomicU64::new(0),
            claimed: AtomicBool::new(false),
        }
    }

    /// Moves the buffer to `len` entries at `entries`.
    pub fn place(&self, entries: *mut Released, len: u64) {
        self.entries.store(entries, Relaxed);
        self.len.store(len, Relaxed);
    }

    /// The address and the number of the entries, for CPU `cpu`.
    pub fn entries(&self, cpu: usize) -> (*mut Released, u64) {
        match self.entries.load(Relaxed) {
            entries if entries.is_null() => (SMALL[cpu].0.get().cast(), FEW as u64),
            entries => (entries, self.len.load(Relaxed)),
        }
    }

    /// Takes the buffer, unless somebody else has it.
    pub fn claim(&self) -> bool {
        !self.claimed.swap(true, Acquire)
    }

    /// The counterpart of [`claim`](Self::claim).
    pub fn unclaim(&self) {
        self.claimed.store(false, Release);
    }

    /// Entries that are pending for their allocators.
    #[inline(always)]
    pub fn pending(&self) -> u64 {
        self.pending.load(Relaxed)
    }

    /// Notes that the VMM wrote `entries` entries.
    pub fn set_pending(&self, entries: u64) {
        self.pending.store(entries, Relaxed);
    }

    /// Takes the pending entries; the caller returns them to their allocators.
    pub fn take_pending(&self) -> u64 {
        self.pending.swap(0, Relaxed)
    }
}
