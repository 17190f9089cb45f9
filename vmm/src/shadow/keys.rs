//! Keys for virtual memory.
//!
//! A *key* is the number by which shadow and provenance know a byte of guest memory. For RAM it is
//! the guest-physical address, so that aliases of a page share one shadow and one history. Memory
//! that a guest maps page by page (vmalloc) has no such address that lasts. Its keys are addresses
//! above RAM, behind which there is no memory. `Regions::key_of` finds the key of an address.
//!
//! Keys of virtual memory are handed out in units of [`VIRTUAL_UNIT`], so that no page of page
//! shadow serves two ranges, and only once: a range keeps its shadow as long as the guest runs.

use umbra_shadow::{
    Shadow,
    abi::VIRTUAL_UNIT,
    codes::{PAGE_SHIFT, VMALLOC_INVALID},
};

use super::error::ShadowError;
use super::memslots::Memslots;
use super::windows::{Notify, Windows};

impl Windows {
    /// The key that `len` bytes (not 0) of virtual memory at `va` would get; none if there are not
    /// enough left.
    pub fn next_key(&self, va: u64, len: u64) -> Option<u64> {
        let key = self.next_key.checked_add(va % VIRTUAL_UNIT)?;
        (key.checked_add(len)? <= self.model.memory().layout().keys_end).then_some(key)
    }

    /// Hands out the key of `len` bytes (not 0), which [`Self::next_key`] returned. All of the
    /// memory is poisoned, and the guest sees its shadow from now on. Its page shadow is resident
    /// at once; its byte shadow comes on demand, in a full shadow too.
    ///
    /// # Errors
    /// A memslot could not be added.
    pub fn add_virtual(
        &mut self,
        key: u64,
        len: u64,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        let (start, end) = (self.next_key, key.saturating_add(len).next_multiple_of(VIRTUAL_UNIT));
        let window = self.model.memory().layout().page;
        let (at, bytes) = (start >> PAGE_SHIFT, end.saturating_sub(start) >> PAGE_SHIFT);
        let gpa = window.gpa.saturating_add(at);
        if let Some(page) = &mut self.model.memory_mut().page {
            let outside = || ShadowError::OutsideWindow { gpa, len: bytes };
            // The guest cannot reach the shadow yet.
            page.fill(at, bytes, VMALLOC_INVALID).ok_or_else(outside)?;
            let host = page.pointer(at, bytes).ok_or_else(outside)?;
            memslots
                .map(gpa, host, bytes, self.notify == Notify::Sync)
                .map_err(|source| ShadowError::Memslot { gpa, source })?;
            self.accounting.count_page_bytes(bytes);
        }
        self.model.memory_mut().extend(end);
        self.next_key = end;
        Ok(())
    }
}
