//! The shadow of a run, if it has one, and the host memory that is reclaimed with its help.

use umbra_provenance::rings::Rings;
use umbra_shadow::Shadow as _;
use umbra_shadow::abi::{Features, GuestFlags};
use umbra_shadow::codes::{GRANULE, PAGE_SIZE, VMALLOC_INVALID};

use super::context::ExitContext;
use super::discovery::features;
use super::guest_pages::GuestPageReclaim;
use super::{Outcome, ShadowMode};
use crate::shadow::{FaultOutcome, Mode, Model, Notify, ShadowError, Windows};

/// The shadow of a run. With `ShadowMode::Off` there are no windows, and nothing to reclaim.
pub(super) struct RunShadow {
    windows: Option<Windows>,
    guest_pages: GuestPageReclaim,
    byte_looks: Backoff,
}

/// Drains between two steps of the search for byte shadow to reclaim: one, or before a new pass
/// over all of it twice as many as before if the last pass found nothing.
#[derive(Default)]
struct Backoff {
    drains: u32,
    left: u32,
}

impl Backoff {
    /// The most.
    const MAX: u32 = 32;

    /// Whether it is time for a step.
    fn is_due(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    /// A step has been made. If it was the last one of a pass, that has found something or nothing.
    fn stepped(&mut self, end_of_pass: Option<bool>) {
        match end_of_pass {
            None => self.left = 1,
            Some(found) => {
                self.drains = if found { 1 } else { (2 * self.drains).clamp(1, Self::MAX) };
                self.left = self.drains;
            }
        }
    }
}

impl RunShadow {
    /// The shadow behind `windows`.
    pub(super) fn new(windows: Option<Windows>) -> Self {
        Self { windows, guest_pages: GuestPageReclaim::default(), byte_looks: Backoff::default() }
    }

    /// The windows.
    pub(super) fn windows(&self) -> Option<&Windows> {
        self.windows.as_ref()
    }

    /// The windows, to change the shadow.
    pub(super) fn windows_mut(&mut self) -> Option<&mut Windows> {
        self.windows.as_mut()
    }

    /// The shadow itself.
    pub(super) fn model(&self) -> Option<&Model> {
        self.windows.as_ref().map(Windows::model)
    }

    /// Who writes the shadow.
    pub(super) fn notify(&self) -> Option<Notify> {
        self.windows.as_ref().map(Windows::notify)
    }

    /// The feature bits of this run.
    pub(super) fn features(&self) -> Features {
        let Some(windows) = &self.windows else { return Features::default() };
        features(windows.mode().into(), windows.notify())
    }

    /// Whether a key stands for virtual memory.
    pub(super) fn is_virtual(&self, key: u64) -> bool {
        self.model().is_some_and(|model| key >= model.memory().layout().virtual_start)
    }

    /// Whether the whole page of a key belongs to no allocation of virtual memory: a guard page.
    pub(super) fn is_guard(&self, key: u64) -> bool {
        let Some(model) = self.model() else { return false };
        let page = key & !(PAGE_SIZE - 1);
        let mut granules = (page..page + PAGE_SIZE).step_by(GRANULE as usize);
        self.is_virtual(key) && granules.all(|at| model.state(at) == VMALLOC_INVALID)
    }

    /// The windows, if `gpa` lies in one of them.
    pub(super) fn windows_at(&mut self, gpa: u64) -> Option<&mut Windows> {
        self.windows.as_mut().filter(|windows| windows.contains(gpa))
    }

    /// Handles the guest's first call: `flags` allow to discard memory.
    pub(super) fn allow_reclaim(&mut self, flags: GuestFlags) {
        // Only page shadow says which pages are free.
        let has_pages = self.windows.as_ref().is_some_and(|w| w.mode() == Mode::PerPage);
        self.guest_pages.allow(if has_pages { flags } else { GuestFlags::default() });
    }

    /// Reclaims the host memory of some byte shadow that no page uses. In `sync` mode, where only
    /// the VMM changes shadow: the vCPUs may run.
    pub(super) fn reclaim_byte_shadow(&mut self) -> Result<(), Outcome> {
        if let Some(windows) = &mut self.windows {
            let unused = windows.find_unused()?;
            windows.reclaim(unused)?;
        }
        Ok(())
    }

    /// The same after a drain of rings, if it is time for that. If there is any, the other vCPUs
    /// are paused.
    pub(super) fn reclaim_after_drain(&mut self, context: &mut ExitContext) -> Result<(), Outcome> {
        let Some(windows) = self.windows.as_mut().filter(|_| self.byte_looks.is_due()) else {
            return Ok(());
        };
        let unused = windows.find_unused()?;
        self.byte_looks.stepped(unused.end_of_pass);
        if !unused.is_empty() {
            context.others.pause()?;
            windows.reclaim(unused)?;
        }
        Ok(())
    }

    /// Reclaims dead guest pages in a part of guest memory, if it is time for that. If there are
    /// any, the other vCPUs are paused.
    pub(super) fn reclaim_guest_pages(
        &mut self,
        rings: &Rings,
        context: &mut ExitContext,
    ) -> Result<(), Outcome> {
        let Some(windows) = self.windows.as_ref().filter(|_| self.guest_pages.is_due()) else {
            return Ok(());
        };
        let found = self.guest_pages.find(windows, rings, context.ram);
        if !found.is_empty() {
            context.others.pause()?;
            self.guest_pages.discard(&found, windows, rings, context.ram);
        }
        Ok(())
    }

    /// Bytes of guest pages that were reclaimed.
    pub(super) fn reclaimed_guest_bytes(&self) -> u64 {
        self.guest_pages.reclaimed_bytes()
    }

    /// The next exit may scan for dead guest pages at once.
    #[cfg(test)]
    pub(super) fn skip_reclaim_pause(&mut self) {
        self.guest_pages.skip_pause();
    }
}

/// [`Windows::fault`]. At the limit, chunks that no page uses make room. But while other vCPUs go
/// from chunk to chunk, each chunk may look used: the limit counts only once the others are paused.
pub(super) fn fault(
    windows: &mut Windows,
    gpa: u64,
    len: u64,
    write: bool,
    context: &mut ExitContext,
) -> Result<Result<FaultOutcome, ShadowError>, Outcome> {
    match windows.fault(gpa, len, write, context.memslots) {
        Err(ShadowError::Limit { .. }) => {
            context.others.pause()?;
            Ok(windows.fault(gpa, len, write, context.memslots))
        }
        outcome => Ok(outcome),
    }
}

impl From<Mode> for ShadowMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::PerPage => Self::PerPage,
            Mode::Full => Self::Full,
        }
    }
}
