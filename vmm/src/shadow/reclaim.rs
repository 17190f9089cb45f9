//! Reclaims the host memory of byte shadow that no page uses.
//!
//! One 4 KiB page of byte shadow serves eight guest pages, whose eight page-shadow values are one
//! aligned `u64`. When none of them is `PAGE_BYTES` or `PAGE_BUSY`, and no entry of a check shadow
//! points to it, the byte shadow is dead.
//!
//! It is looked for in small steps while the guest runs ([`Windows::find_unused`]). Only for the
//! rest, [`Windows::reclaim`], must every vCPU be stopped, and that is bounded, too.
//!
//! **Why nothing live is lost.** While every vCPU is stopped, the page shadow does not change, and
//! what was found before is looked at again. A vCPU may have been stopped anywhere:
//! - *inside a promotion*: it set `PAGE_BUSY` before its first store to the byte shadow and sets
//!   `PAGE_BYTES` after the last one, so the page counts as used;
//! - *before a promotion's first store*: the page is not used yet, and a promotion writes all 512
//!   bytes;
//! - *after a demotion*: the guest changed the page shadow and will not read the byte shadow again,
//!   but for inline checks. Their entry is exchanged after the page shadow. As long as it points to
//!   the page, that counts as used. A CPU with an older translation reads zeroes until its next
//!   tick, as it might have read what was there before;
//! - *in a check, between its two loads*, while another vCPU demoted the page: it then reads
//!   zeroes, "accessible", where it would have read garbage. The page has just been freed or handed
//!   out as a whole; which of the two the check sees was a race in the guest already.

use std::ops::Range;

use umbra_shadow::{Shadow as _, codes::PAGE_SHIFT};

use super::{
    error::ShadowError,
    layout::{CHUNK_BYTES, CHUNK_COVERS},
    mapping::HOST_PAGE,
    windows::{Mode, Windows},
};

// The module's description and `ShadowBacking::shadow_page_in_use` rely on this.
const _: () = assert!(CHUNK_COVERS >> PAGE_SHIFT == CHUNK_BYTES / HOST_PAGE * 8);

/// Chunks that a step looks at.
const CHUNKS: u32 = 64;
/// Unused shadow, in bytes, and runs of it, after which a step ends with the chunk that it is in:
/// some 300 pages at most are reclaimed while every vCPU is stopped.
const BYTES: u64 = 1 << 20;
const RUNS: usize = 16;

/// Where the next step begins.
#[derive(Debug, Default)]
pub(super) struct ByteReclaim {
    next: usize,
    /// Whether this pass over all chunks has found unused shadow.
    found: bool,
}

/// What a step has found.
#[derive(Debug, Default)]
pub struct Unused {
    /// Resident and unused, as offsets in the byte window, and in order.
    runs: Vec<Range<u64>>,
    /// A pass over all chunks has ended with this step, and has found something or not.
    pub end_of_pass: Option<bool>,
}

impl Unused {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    fn add(&mut self, run: Range<u64>) {
        match self.runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.runs.push(run),
        }
    }

    fn is_enough(&self) -> bool {
        let bytes: u64 = self.runs.iter().map(|run| run.end - run.start).sum();
        bytes >= BYTES || self.runs.len() >= RUNS
    }
}

impl Windows {
    /// Looks for resident byte shadow that no page uses, in the next few chunks. Takes a sample of
    /// what these chunks use. The vCPUs may run.
    ///
    /// # Errors
    /// The host does not tell what is resident.
    pub fn find_unused(&mut self) -> Result<Unused, ShadowError> {
        let mut unused = Unused::default();
        for _ in 0..CHUNKS {
            let Some(chunk) = self.next_mapped(self.reclaim.next) else {
                self.reclaim.next = 0;
                let before = std::mem::take(&mut self.reclaim.found);
                unused.end_of_pass = Some(before || !unused.is_empty());
                return Ok(unused);
            };
            self.reclaim.next = chunk + 1;
            self.accounting.sample_used(self.model.memory(), chunk);
            self.find_in(chunk, &mut unused)?;
            if unused.is_enough() {
                break;
            }
        }
        self.reclaim.found |= !unused.is_empty();
        Ok(unused)
    }

    /// A chunk that may have unused shadow; in a full shadow there is none.
    fn next_mapped(&self, from: usize) -> Option<usize> {
        (self.mode() == Mode::PerPage).then(|| self.model.memory().next_mapped(from)).flatten()
    }

    fn find_in(&self, chunk: usize, unused: &mut Unused) -> Result<(), ShadowError> {
        let at = chunk as u64 * CHUNK_BYTES;
        for run in self.unused_runs(at..at + CHUNK_BYTES) {
            let resident = self.model.memory().byte.is_resident(&run);
            if resident.map_err(ShadowError::host("look at shadow"))? {
                unused.add(run);
            }
        }
        Ok(())
    }

    /// The runs of unused pages in a part of the byte window.
    fn unused_runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for at in range.step_by(HOST_PAGE as usize) {
            if !self.shadow_page_in_use(at / HOST_PAGE) {
                match runs.last_mut() {
                    Some(last) if last.end == at => last.end += HOST_PAGE,
                    _ => runs.push(at..at + HOST_PAGE),
                }
            }
        }
        runs
    }

    /// Reclaims the host memory of what a step has found, but for what is in use by now. Returns
    /// the bytes. Call it only while no vCPU runs guest code, or where guests do not write the
    /// shadow. The chunks stay mapped.
    ///
    /// # Errors
    /// The host refuses.
    pub fn reclaim(&mut self, unused: Unused) -> Result<u64, ShadowError> {
        let runs: Vec<_> = unused.runs.into_iter().flat_map(|run| self.unused_runs(run)).collect();
        if runs.is_empty() { Ok(0) } else { self.discard(&runs) }
    }

    /// Gives back the host memory of parts of the byte window. Returns the bytes.
    pub(super) fn discard(&mut self, runs: &[Range<u64>]) -> Result<u64, ShadowError> {
        // The most that is resident until then is resident right now.
        let before = self.sample()?;
        let byte = &mut self.model.memory_mut().byte;
        for run in runs {
            let len = run.end - run.start;
            byte.discard(run.start, len).map_err(ShadowError::host("reclaim shadow"))?;
        }
        let bytes = before.saturating_sub(self.sample()?);
        self.accounting.count_reclaimed(bytes);
        Ok(bytes)
    }
}
