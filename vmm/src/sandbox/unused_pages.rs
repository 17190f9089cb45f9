//! Gives host memory back that lies behind free pages of the guest, behind freed objects that wait
//! in its quarantine, and behind what is empty of its rings.
//!
//! Which pages these are the shadow tells. That it matters to nobody what lies in them, the guest
//! says once, in its first call ([`GuestFlags`]). For free pages this comes to what the free page
//! reporting of a balloon does, without a driver.
//!
//! **Why nothing is lost.** It is done while every vCPU stands still. An allocator unpoisons a page
//! before anybody stores to it for good, and poisons it after the last one did: so of a page that
//! is poisoned as free at that moment nothing is missed, wherever its vCPU was stopped. Then it
//! reads as zero. The same goes for an object that is poisoned as one in quarantine.

use std::time::{Duration, Instant};

use umbra_shadow::Shadow as _;
use umbra_shadow::abi::GuestFlags;

use super::rings::Rings;
use crate::machine::memory::Ram;
use crate::shadow::Windows;

/// How long nothing is looked at after a look.
const PAUSE: Duration = Duration::from_secs(1);
/// Guest memory that is looked at at a time.
const PART: u64 = 4 << 30;
/// Most runs of unused pages that are looked at at a time, whatever the guest has made of its page
/// shadow.
const RUNS: usize = 1024;

/// What is given back when.
#[derive(Debug)]
pub(super) struct UnusedPages {
    /// What the guest said of itself; `None` before its first call. A second first call is that
    /// of another kernel, which may live in pages that are free to the one before it: nothing is
    /// given back from then on.
    allowed: Option<GuestFlags>,
    /// Where the next look begins.
    next: u64,
    last: Instant,
    released: u64,
}

impl Default for UnusedPages {
    fn default() -> Self {
        Self { allowed: None, next: 0, last: Instant::now(), released: 0 }
    }
}

impl UnusedPages {
    /// Takes in what a guest says of itself.
    pub(super) fn hello(&mut self, flags: GuestFlags) {
        self.allowed = Some(if self.allowed.is_none() { flags } else { GuestFlags::default() });
    }

    /// Whether free pages may be given back.
    pub(super) fn is_allowed(&self) -> bool {
        self.allows(GuestFlags::FREE_PAGES_UNUSED)
    }

    fn allows(&self, what: GuestFlags) -> bool {
        self.allowed.is_some_and(|allowed| allowed.has(what))
    }

    /// Whether it is time for a look.
    pub(super) fn is_due(&self) -> bool {
        self.is_allowed() && self.last.elapsed() >= PAUSE
    }

    /// It is time for a look if one is allowed.
    #[cfg(test)]
    pub(super) fn make_due(&mut self) {
        self.last -= PAUSE;
    }

    /// Gives back all that is unused now. Every vCPU stands still.
    pub(super) fn give_all_back(&mut self, windows: &Windows, rings: &Rings, ram: &Ram) {
        self.next = 0;
        self.give_back(windows, rings, ram);
        while self.next < ram.end() && self.is_allowed() {
            self.give_back(windows, rings, ram);
        }
    }

    /// Looks at a part of guest memory and gives back what is unused in it. Every vCPU stands
    /// still. A host that refuses is asked no more.
    pub(super) fn give_back(&mut self, windows: &Windows, rings: &Rings, ram: &Ram) {
        let start = if self.next < ram.end() { self.next } else { 0 };
        let end = ram.end().min(start + PART);
        self.next = end;
        let objects = self.allows(GuestFlags::QUARANTINE_UNUSED);
        let mut runs = windows.model().memory().unused_pages(start..end, objects);
        let some = runs.by_ref().take(RUNS);
        for run in rings.unused_pages(ram).chain(some) {
            match ram.give_back(&run) {
                Ok(bytes) => self.released += bytes,
                Err(error) => {
                    log::warn!("free memory of the guest is not given back any more: {error}");
                    self.allowed = Some(GuestFlags::default());
                    break;
                }
            }
        }
        if let Some(run) = runs.next() {
            self.next = run.start;
        }
        self.last = Instant::now();
    }

    /// Bytes that were given back.
    pub(super) fn released(&self) -> u64 {
        self.released
    }
}
