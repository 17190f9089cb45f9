//! Which guest memory is stack, in `sync` mode: there the compiler's own stores to a stack's shadow
//! come to the VMM, and are carried out instead of being taken for tampering.
//!
//! This weakens `sync` for stacks: a wild store to their shadow goes unseen if each of its bytes is
//! one that a stack's shadow may hold. All other shadow stays out of the guest's reach.

use umbra_shadow::{
    Shadow, ShadowMemory,
    codes::{self, GRANULE, GRANULE_SHIFT, PAGE_SHIFT, PAGE_SIZE},
};

use super::{
    layout::CHUNK_COVERS,
    windows::{ShadowError, Slots, WindowOffset, Windows},
};

/// A set of pages, one bit each; it grows to the highest page that was ever in it.
#[derive(Debug, Default)]
pub(super) struct StackPages {
    bits: Vec<u64>,
}

impl StackPages {
    /// Puts the whole pages of `len` bytes at `gpa` in, or takes them out. The range lies in guest
    /// memory.
    pub fn set(&mut self, gpa: u64, len: u64, stack: bool) {
        for page in gpa.div_ceil(PAGE_SIZE)..gpa.saturating_add(len) >> PAGE_SHIFT {
            let at = (page / 64) as usize;
            if at >= self.bits.len() {
                if !stack {
                    return;
                }
                self.bits.resize(at + 1, 0);
            }
            if let Some(word) = self.bits.get_mut(at) {
                let bit = 1 << (page % 64);
                *word = if stack { *word | bit } else { *word & !bit };
            }
        }
    }

    /// Whether all pages that `len` bytes (not 0) at `gpa` touch are in the set.
    pub fn hold(&self, gpa: u64, len: u64) -> bool {
        let mut pages = gpa >> PAGE_SHIFT..=(gpa + (len - 1)) >> PAGE_SHIFT;
        pages.all(|page| {
            self.bits.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
        })
    }
}

impl Windows {
    /// The whole pages of `len` bytes at `gpa` become a stack of the guest, or cease to be one. The
    /// range lies in guest memory. Means something in `sync` mode only.
    pub fn mark_stack(&mut self, gpa: u64, len: u64, stack: bool) {
        self.stack_pages.set(gpa, len, stack);
    }

    /// A guest stored `data` to a read-only window at `gpa`: carries that out if it is what a
    /// compiler stores to the shadow of a stack. Tells whether it did.
    ///
    /// # Errors
    /// The limit is reached: the shadow is unchanged then.
    pub fn stack_store(
        &mut self,
        gpa: u64,
        data: &[u8],
        slots: &mut dyn Slots,
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
            self.make_room(chunk, &chunks, slots)?;
            self.model.memory_mut().set_mapped(chunk, true);
        }
        self.model.promote(start, covered)?;
        for (granule, value) in (0..).zip(data) {
            self.model.memory_mut().set_bytes(start + granule * GRANULE, 1, *value);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_are_stack() {
        let mut pages = StackPages::default();
        pages.set(0x1800, 0x4000, true);
        assert!(pages.hold(0x2000, 0x3000) && !pages.hold(0x1fff, 2) && !pages.hold(0x4fff, 2));
        pages.set(0x3001, 0x1fff, false);
        assert!(pages.hold(0x3fff, 1) && !pages.hold(0x4000, 1));
        pages.set(1 << 40, 0x1000, false);
        assert_eq!(pages.bits.len(), 1, "taking out what is not there costs nothing");
        assert!(!pages.hold(1 << 40, 1));
    }
}
