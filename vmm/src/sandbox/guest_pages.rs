//! Reclaims host memory behind guest pages whose contents are dead: free pages, freed objects in
//! the quarantine, and the empty part of rings.
//!
//! The shadow says which pages these are. The guest says once, in its first call ([`GuestFlags`]),
//! that their contents may be discarded. For free pages this does what the free page reporting of a
//! balloon does, without a driver.
//!
//! **Why nothing live is lost.** It runs while every vCPU stands still. An allocator unpoisons a
//! page before the first store that matters, and poisons it after the last one. So the contents of
//! a page that is poisoned as free are dead, wherever its vCPU was stopped. A discarded page reads
//! as zero. The same holds for an object that is poisoned as one in the quarantine.

use std::time::{Duration, Instant};

use umbra_machine::memory::Ram;
use umbra_provenance::rings::Rings;
use umbra_shadow::Shadow as _;
use umbra_shadow::abi::GuestFlags;

use super::ring_memory::RingRam;
use crate::shadow::Windows;

/// Pause between two scans.
const PAUSE: Duration = Duration::from_secs(1);
/// Guest memory per scan.
const PART: u64 = 4 << 30;
/// Most runs of dead pages per scan, whatever the guest has written to its page shadow.
const RUNS: usize = 1024;
/// Most scans that [`GuestPageReclaim::scan_all`] makes for runs that are left over.
const SCANS: u64 = if cfg!(test) { 1 } else { 64 };

/// Decides when to scan, and discards what a scan finds.
#[derive(Debug)]
pub(super) struct GuestPageReclaim {
    /// The flags of the guest's `Hello`; `None` before. A second `Hello` means that another kernel
    /// was started (kexec), which may use pages that are free for the first: nothing is discarded
    /// from then on.
    allowed: Option<GuestFlags>,
    /// Where the next scan begins.
    next: u64,
    last_scan: Instant,
    reclaimed_bytes: u64,
}

impl Default for GuestPageReclaim {
    fn default() -> Self {
        Self { allowed: None, next: 0, last_scan: Instant::now(), reclaimed_bytes: 0 }
    }
}

impl GuestPageReclaim {
    /// Handles a `Hello` of the guest: `flags` allow to discard memory.
    pub(super) fn allow(&mut self, flags: GuestFlags) {
        self.allowed = Some(if self.allowed.is_none() { flags } else { GuestFlags::default() });
    }

    /// Whether free pages may be discarded.
    pub(super) fn is_allowed(&self) -> bool {
        self.allows(GuestFlags::FREE_PAGES_UNUSED)
    }

    fn allows(&self, what: GuestFlags) -> bool {
        self.allowed.is_some_and(|allowed| allowed.has(what))
    }

    /// Whether it is time for a scan.
    pub(super) fn wants_scan(&self) -> bool {
        self.is_allowed() && self.last_scan.elapsed() >= PAUSE
    }

    /// The pause is over.
    #[cfg(test)]
    pub(super) fn skip_pause(&mut self) {
        self.last_scan -= PAUSE;
    }

    /// Scans all guest memory, unless the guest has cut it into too many runs. Every vCPU stands
    /// still.
    pub(super) fn scan_all(&mut self, windows: &Windows, rings: &Rings, ram: &Ram) {
        self.next = 0;
        for _ in 0..SCANS + ram.end() / PART {
            self.scan(windows, rings, ram);
            if self.next >= ram.end() || !self.is_allowed() {
                break;
            }
        }
    }

    /// Scans a part of guest memory and discards its dead pages. Every vCPU stands still. If the
    /// host refuses, there are no more scans.
    pub(super) fn scan(&mut self, windows: &Windows, rings: &Rings, ram: &Ram) {
        let start = if self.next < ram.end() { self.next } else { 0 };
        let end = ram.end().min(start + PART);
        self.next = end;
        let objects = self.allows(GuestFlags::QUARANTINE_UNUSED);
        let mut runs = windows.model().memory().unused_pages(start..end, objects);
        let some = runs.by_ref().take(RUNS);
        for run in rings.unused_pages(&RingRam(ram)).chain(some) {
            match ram.discard(&run) {
                Ok(bytes) => self.reclaimed_bytes += bytes,
                Err(error) => {
                    log::warn!("free memory of the guest is no longer reclaimed: {error}");
                    self.allowed = Some(GuestFlags::default());
                    break;
                }
            }
        }
        if let Some(run) = runs.next() {
            self.next = run.start;
        }
        self.last_scan = Instant::now();
    }

    /// Bytes that were reclaimed.
    pub(super) fn reclaimed_bytes(&self) -> u64 {
        self.reclaimed_bytes
    }
}
