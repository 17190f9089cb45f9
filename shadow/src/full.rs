//! Full shadow, KASAN's layout: a byte of shadow for each granule of memory, all of it present from
//! the start. It is the baseline for tests and measurements of the two-level model.

use crate::byte;
use crate::codes::{GRANULE, POISON_MIN, UNKNOWN};
use crate::memory::ShadowMemory;
use crate::model::Shadow;
use crate::span::{Span, contains};
use crate::violation::{RangeError, Violation};

/// Full shadow over a memory, of which it uses only the byte shadow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Full<M> {
    memory: M,
}

impl<M: ShadowMemory> Full<M> {
    /// A model over the shadow in `memory`.
    pub const fn new(memory: M) -> Self {
        Self { memory }
    }

    /// The memory.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// The memory, to change it.
    pub const fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// The memory, without the model.
    pub fn into_inner(self) -> M {
        self.memory
    }

    /// The whole check.
    #[inline(never)]
    fn check_granules(&self, addr: u64, len: u64) -> Result<(), Violation> {
        match Span::new(&self.memory, addr, len) {
            Ok(Some(span)) => byte::check(&self.memory, span),
            Ok(None) => Ok(()),
            Err(refused) => Err(refused.violation(addr)),
        }
    }

    fn set(&mut self, addr: u64, len: u64, value: u8) -> Result<(), RangeError> {
        if let Some(span) =
            Span::new(&self.memory, addr, len).map_err(|refused| refused.error(addr, len))?
        {
            byte::set(&mut self.memory, span, value);
        }
        Ok(())
    }
}

impl<M: ShadowMemory> Shadow for Full<M> {
    type Memory = M;

    fn memory(&self) -> &M {
        &self.memory
    }

    fn poison(&mut self, addr: u64, len: u64, code: u8) -> Result<(), RangeError> {
        if code < POISON_MIN {
            return Err(RangeError::NotPoison { code });
        }
        self.set(addr, len, code)
    }

    fn unpoison(&mut self, addr: u64, len: u64) -> Result<(), RangeError> {
        self.set(addr, len, 0)
    }

    fn promote(&mut self, addr: u64, len: u64) -> Result<(), RangeError> {
        // All memory is byte-checked already.
        Span::new(&self.memory, addr, len).map(drop).map_err(|refused| refused.error(addr, len))
    }

    #[inline]
    fn check(&self, addr: u64, len: u64) -> Result<(), Violation> {
        if self.passes_at_once(addr, len) { Ok(()) } else { self.check_granules(addr, len) }
    }

    // True inside one granule.
    #[inline]
    fn passes_at_once(&self, addr: u64, len: u64) -> bool {
        let more = len.wrapping_sub(1);
        more < GRANULE
            && byte::stays(addr, more)
            && contains(&self.memory, addr)
            && byte::passes(self.memory.byte(addr), addr.wrapping_add(more))
    }

    fn state(&self, addr: u64) -> u8 {
        if contains(&self.memory, addr) { self.memory.byte(addr) } else { UNKNOWN }
    }
}
