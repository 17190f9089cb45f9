//! Reclaims host memory behind guest pages whose contents are dead: free pages, freed objects in
//! the quarantine, and the empty part of rings.
//!
//! The shadow says which pages these are. The guest says once, in its first call ([`GuestFlags`]),
//! that their contents may be discarded. For free pages this does what the free page reporting of a
//! balloon does, without a driver.
//!
//! They are looked for in small steps while the guest runs ([`GuestPageReclaim::find`]). What was
//! found is looked at again, and discarded, while every vCPU stands still
//! ([`GuestPageReclaim::discard`]).
//!
//! **Why nothing live is lost.** An allocator unpoisons a page before the first store that matters,
//! and poisons it after the last one. So the contents of a page that is poisoned as free are dead,
//! wherever its vCPU was stopped. A discarded page reads as zero. The same holds for an object that
//! is poisoned as one in the quarantine.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use umbra_machine::memory::Ram;
use umbra_provenance::rings::Rings;
use umbra_shadow::Shadow as _;
use umbra_shadow::abi::GuestFlags;
use umbra_shadow::codes::PAGE_SIZE;

use super::ring_memory::RingRam;
use crate::shadow::Windows;

/// Pause between two passes over guest memory.
const PAUSE: Duration = Duration::from_secs(1);
/// Guest memory that a step looks at.
const PART: u64 = 32 << 20;

/// What a step finds at most, whatever the guest has written to its page shadow.
#[derive(Clone, Copy, Debug)]
struct Most {
    /// Runs of dead pages.
    runs: usize,
    /// Pages in them.
    pages: u64,
}

/// A step at an exit: it may stop the vCPUs.
const AT_EXIT: Most = Most { runs: 32, pages: 256 };

/// Decides when to look for dead pages and where, and discards them.
#[derive(Debug)]
pub(super) struct GuestPageReclaim {
    /// The flags of the guest's `Hello`; `None` before. A second `Hello` means that another kernel
    /// was started (kexec), which may use pages that are free for the first: nothing is discarded
    /// from then on.
    allowed: Option<GuestFlags>,
    /// Where the next step begins. `None` between two passes; a pass begins with the rings.
    next: Option<u64>,
    last_pass: Instant,
    reclaimed_bytes: u64,
}

impl Default for GuestPageReclaim {
    fn default() -> Self {
        Self { allowed: None, next: None, last_pass: Instant::now(), reclaimed_bytes: 0 }
    }
}

impl GuestPageReclaim {
    /// Handles a `Hello` of the guest: `flags` allow to discard memory.
    pub(super) fn allow(&mut self, flags: GuestFlags) {
        self.allowed = Some(if self.allowed.is_none() { flags } else { GuestFlags::default() });
    }

    /// Whether free pages may be discarded.
    fn is_allowed(&self) -> bool {
        self.allows(GuestFlags::FREE_PAGES_UNUSED)
    }

    fn allows(&self, what: GuestFlags) -> bool {
        self.allowed.is_some_and(|allowed| allowed.has(what))
    }

    /// Whether it is time for a step.
    pub(super) fn is_due(&self) -> bool {
        self.is_allowed() && (self.next.is_some() || self.last_pass.elapsed() >= PAUSE)
    }

    /// The pause is over.
    #[cfg(test)]
    pub(super) fn skip_pause(&mut self) {
        self.last_pass -= PAUSE;
    }

    /// Looks for dead pages that are resident, in the next part of guest memory. The vCPUs may run.
    /// If the host refuses, there are no more steps.
    pub(super) fn find(&mut self, windows: &Windows, rings: &Rings, ram: &Ram) -> Vec<Range<u64>> {
        let (end, found) = match self.next {
            None => (0, resident(rings.unused_pages(&RingRam(ram)), AT_EXIT, ram)),
            Some(start) => {
                let end = ram.end().min(start.saturating_add(PART));
                let objects = self.allows(GuestFlags::QUARANTINE_UNUSED);
                let runs = windows.model().memory().unused_pages(start..end, objects);
                (end, resident(runs, AT_EXIT, ram))
            }
        };
        let (runs, cut_off) = found.unwrap_or_else(|error| {
            self.give_up(&error);
            Default::default()
        });
        // What is too much in rings waits for the next pass.
        let next = cut_off.filter(|_| self.next.is_some()).unwrap_or(end);
        self.next = Some(next).filter(|next| *next < ram.end() && self.is_allowed());
        if self.next.is_none() {
            self.last_pass = Instant::now();
        }
        runs
    }

    /// Discards what was found, but for what is in use by now. Every vCPU stands still. If the host
    /// refuses, there are no more steps.
    pub(super) fn discard(
        &mut self,
        found: &[Range<u64>],
        windows: &Windows,
        rings: &Rings,
        ram: &Ram,
    ) {
        let objects = self.allows(GuestFlags::QUARANTINE_UNUSED);
        let in_rings: Vec<_> = rings.unused_pages(&RingRam(ram)).collect();
        for run in found {
            let in_rings =
                in_rings.iter().map(|unused| unused.start.max(run.start)..unused.end.min(run.end));
            let dead = windows.model().memory().unused_pages(run.clone(), objects);
            for run in dead.chain(in_rings).filter(|run| !run.is_empty()) {
                match ram.discard(&run) {
                    Ok(bytes) => self.reclaimed_bytes += bytes,
                    Err(error) => return self.give_up(&error),
                }
            }
        }
    }

    fn give_up(&mut self, error: &io::Error) {
        log::warn!("free memory of the guest is no longer reclaimed: {error}");
        self.allowed = Some(GuestFlags::default());
    }

    /// Bytes that were reclaimed.
    pub(super) fn reclaimed_bytes(&self) -> u64 {
        self.reclaimed_bytes
    }
}

/// The resident parts of some runs, and where there is more, if that is too much.
fn resident(
    runs: impl Iterator<Item = Range<u64>>,
    most: Most,
    ram: &Ram,
) -> io::Result<(Vec<Range<u64>>, Option<u64>)> {
    let (mut found, mut pages) = (Vec::new(), most.pages);
    for run in runs {
        for part in ram.resident(&run)? {
            if found.len() == most.runs || pages == 0 {
                return Ok((found, Some(part.start)));
            }
            let some = ((part.end - part.start) / PAGE_SIZE).min(pages);
            pages -= some;
            let end = part.start + some * PAGE_SIZE;
            found.push(part.start..end);
            if end < part.end {
                return Ok((found, Some(end)));
            }
        }
    }
    Ok((found, None))
}
