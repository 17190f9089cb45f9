//! Gives host memory back that lies behind byte shadow nobody looks at any more.
//!
//! One 4 KiB page of byte shadow serves eight guest pages, whose eight page-shadow values are one aligned
//! `u64`. When none of them is `PAGE_BYTES` or `PAGE_BUSY`, the byte shadow is garbage and can go.
//!
//! **Why nothing live is lost.** It runs while every vCPU is stopped, so the page shadow does not change
//! under it. A vCPU may have been stopped anywhere:
//! - *inside a promotion*: it set `PAGE_BUSY` before its first store to the byte shadow and sets `PAGE_BYTES`
//!   after the last one, so the page counts as used;
//! - *before a promotion's first store*: the page is not used yet, and a promotion writes all 512 bytes;
//! - *after a demotion*: the guest changed the page shadow and will not read the byte shadow again;
//! - *in a check, between its two loads*, while another vCPU demoted the page: it then reads zeroes, "accessible",
//!   where it would have read garbage. The page has just been freed or handed out as a whole; which of the two the
//!   check sees was a race in the guest already.

use umbra_shadow::{Shadow, codes::PAGE_SHIFT};

use super::{
    layout::{CHUNK_BYTES, CHUNK_COVERS},
    mapping::HOST_PAGE,
    memory::HostShadow,
    windows::{ShadowError, Windows},
};

/// Pages of byte shadow in a chunk.
const CHUNK_SHADOW_PAGES: u64 = CHUNK_BYTES / HOST_PAGE;

// The module's description, and `HostShadow::shadow_page_in_use`, rest on this.
const _: () = assert!(CHUNK_COVERS >> PAGE_SHIFT == CHUNK_SHADOW_PAGES * 8);

/// Gives back the host memory of all byte shadow that no page uses. Returns the bytes that went, by the
/// kernel's count.
///
/// Call it only while no vCPU runs guest code. The chunks stay mapped. It reads the page shadow of mapped
/// chunks and, when there is something to give back, the kernel's memory figures twice
/// (see [`super::accounting::resident_bytes`]): a thing for every now and then, not for every exit.
pub fn release_unused(windows: &mut Windows) -> Result<u64, ShadowError> {
    let runs = unused_runs(windows.model.memory())?;
    if runs.is_empty() {
        return Ok(0);
    }
    let before = windows.sample()?;
    for run in &runs {
        windows
            .model
            .memory_mut()
            .byte
            .discard(run.at, run.len)
            .map_err(ShadowError::host("give back shadow"))?;
    }
    windows.accounting.released(before).map_err(ShadowError::host("read /proc/self/smaps"))
}

/// A part of the byte window, in bytes.
struct Run {
    at: u64,
    len: u64,
}

/// Unused shadow pages that are in memory, adjacent ones together.
fn unused_runs(shadow: &HostShadow) -> Result<Vec<Run>, ShadowError> {
    let mut runs: Vec<Run> = Vec::new();
    if shadow.page.is_none() {
        return Ok(runs); // A full shadow is in use everywhere.
    }
    for chunk in shadow.mapped_chunks() {
        let mut unused = [false; CHUNK_SHADOW_PAGES as usize];
        for (page, unused) in unused.iter_mut().enumerate() {
            *unused = !shadow.shadow_page_in_use(chunk, page as u64);
        }
        if !unused.contains(&true) {
            continue;
        }
        let start = chunk as u64 * CHUNK_BYTES;
        let populated = shadow
            .byte
            .populated(start, CHUNK_BYTES)
            .map_err(ShadowError::host("ask which shadow is resident"))?;
        for (page, _) in
            unused.iter().zip(populated).enumerate().filter(|(_, (unused, there))| **unused && *there)
        {
            let at = start + page as u64 * HOST_PAGE;
            match runs.last_mut() {
                Some(run) if run.at + run.len == at => run.len += HOST_PAGE,
                _ => runs.push(Run { at, len: HOST_PAGE }),
            }
        }
    }
    Ok(runs)
}
