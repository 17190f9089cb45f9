//! Reclaims the host memory of byte shadow that no page uses.
//!
//! One 4 KiB page of byte shadow serves eight guest pages, whose eight page-shadow values are one
//! aligned `u64`. When none of them is `PAGE_BYTES` or `PAGE_BUSY`, the byte shadow is dead.
//!
//! **Why nothing live is lost.** It runs while every vCPU is stopped, so the page shadow does not
//! change under it. A vCPU may have been stopped anywhere:
//! - *inside a promotion*: it set `PAGE_BUSY` before its first store to the byte shadow and sets
//!   `PAGE_BYTES` after the last one, so the page counts as used;
//! - *before a promotion's first store*: the page is not used yet, and a promotion writes all 512
//!   bytes;
//! - *after a demotion*: the guest changed the page shadow and will not read the byte shadow again;
//! - *in a check, between its two loads*, while another vCPU demoted the page: it then reads
//!   zeroes, "accessible", where it would have read garbage. The page has just been freed or handed
//!   out as a whole; which of the two the check sees was a race in the guest already.

use umbra_shadow::{Shadow, codes::PAGE_SHIFT};

use super::{
    accounting::count,
    error::ShadowError,
    layout::{CHUNK_BYTES, CHUNK_COVERS},
    mapping::HOST_PAGE,
    windows::Windows,
};

// The module's description and `ShadowBacking::shadow_page_in_use` rely on this.
const _: () = assert!(CHUNK_COVERS >> PAGE_SHIFT == CHUNK_BYTES / HOST_PAGE * 8);

/// Reclaims the host memory of all byte shadow that no page uses. Returns the bytes.
///
/// Call it only while no vCPU runs guest code. The chunks stay mapped. It reads the page shadow of
/// mapped chunks and asks the kernel about their pages: a few microseconds for each chunk.
///
/// # Errors
/// The host refuses.
pub fn reclaim_unused(windows: &mut Windows) -> Result<u64, ShadowError> {
    let (resident, runs) = scan(windows)?;
    // The most that is resident until the next reclaim is resident right now.
    windows.accounting.note_resident(resident);
    windows.sample_used();
    let mut reclaimed = 0;
    for run in runs {
        let byte = &mut windows.model.memory_mut().byte;
        byte.discard(run.at, run.len).map_err(ShadowError::host("reclaim shadow"))?;
        reclaimed += run.len;
    }
    windows.accounting.count_reclaimed(reclaimed);
    Ok(reclaimed)
}

/// A part of the byte window, in bytes.
struct Run {
    at: u64,
    len: u64,
}

/// Bytes of all resident shadow, and the resident pages that are unused, adjacent ones together.
fn scan(windows: &Windows) -> Result<(u64, Vec<Run>), ShadowError> {
    let shadow = windows.model.memory();
    let mut resident = 0;
    let mut runs: Vec<Run> = Vec::new();
    for chunk in shadow.mapped_chunks() {
        let held =
            windows.accounting.held(chunk).map_err(ShadowError::host("read /proc/self/pagemap"))?;
        resident += count(&held);
        for (page, _) in (0u64..).zip(held).filter(|(_, held)| *held) {
            if shadow.shadow_page_in_use(chunk, page) {
                continue;
            }
            let at = chunk as u64 * CHUNK_BYTES + page * HOST_PAGE;
            match runs.last_mut() {
                Some(run) if run.at + run.len == at => run.len += HOST_PAGE,
                _ => runs.push(Run { at, len: HOST_PAGE }),
            }
        }
    }
    Ok((resident, runs))
}
