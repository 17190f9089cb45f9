//! Stores of a guest to the shadow of its stacks, in `sync` mode: those that compilers make are
//! carried out instead of being taken for tampering.
//!
//! This weakens `sync` for stacks: a wild store to their shadow goes unseen if each of its bytes is
//! one that a stack's shadow may hold. All other shadow stays out of the guest's reach.

use umbra_shadow::{
    Shadow, ShadowMemory,
    codes::{self, GRANULE, GRANULE_SHIFT},
};

use super::{
    error::ShadowError,
    layout::CHUNK_COVERS,
    memslots::Memslots,
    windows::{WindowOffset, Windows},
};

impl Windows {
    /// The whole pages of `len` bytes at `gpa` become a stack of the guest, or cease to be one. The
    /// range lies in guest memory. Only `sync` mode uses it.
    pub fn mark_stack(&mut self, gpa: u64, len: u64, stack: bool) {
        self.stack_pages.set(gpa, len, stack);
    }

    /// A guest stored `data` to a read-only window at `gpa`: carries it out if a compiler may store
    /// it to the shadow of a stack. Returns whether it did.
    ///
    /// # Errors
    /// The limit is reached: the shadow is unchanged then.
    pub fn stack_store(
        &mut self,
        gpa: u64,
        data: &[u8],
        memslots: &mut dyn Memslots,
    ) -> Result<bool, ShadowError> {
        let bytes = data.len() as u64;
        let Ok(WindowOffset::Byte(at)) = self.place(gpa, bytes) else { return Ok(false) };
        let (start, covered) = (at << GRANULE_SHIFT, bytes << GRANULE_SHIFT);
        if !data.iter().all(|value| codes::on_stack(*value))
            || !self.stack_pages.hold(start, covered)
        {
            return Ok(false);
        }
        let chunk = |address: u64| (address / CHUNK_COVERS) as usize;
        let chunks = chunk(start)..chunk(start + covered - 1) + 1;
        for chunk in chunks.clone() {
            self.make_room(chunk, &chunks, memslots)?;
            self.model.memory_mut().set_mapped(chunk, true);
        }
        self.model.promote(start, covered)?;
        for (granule, value) in (0..).zip(data) {
            self.model.memory_mut().set_bytes(start + granule * GRANULE, 1, *value);
        }
        Ok(true)
    }
}
