//! Two-level shadow: a byte for each page, and a byte for each granule of the pages that need it.
//!
//! A change that covers whole pages writes their page shadow, and *demotes* them if they were
//! byte-checked: the byte shadow behind them is garbage from then on. A change that covers a part
//! of a page *promotes* it, unless the whole page already has the value that the part gets.
//!
//! **The order of stores in a promotion matters**, because other CPUs check accesses to the page
//! meanwhile, and the VMM may look for host memory to reclaim:
//!
//! 1. page shadow to [`PAGE_BUSY`]: the byte shadow is in use, but must not be read yet. If inline
//!    checks read it, its group is opened (`group.rs`);
//! 2. byte shadow of the whole page, from its old page shadow;
//! 3. page shadow to [`PAGE_BYTES`];
//! 4. the part.
//!
//! A [`ShadowMemory`] that others read at the same time must keep this order, with volatile or
//! atomic stores (on x86_64 the processor then keeps it too). Its documentation has all
//! requirements.

use crate::byte;
use crate::codes::{
    PAGE_BUSY, PAGE_BYTES, PAGE_SHIFT, PAGE_SIZE, PAGE_VALID, POISON_MIN, SHADOW_PER_PAGE, UNKNOWN,
};
use crate::memory::ShadowMemory;
use crate::model::Shadow;
use crate::span::{Span, contains};
use crate::violation::{Cause, RangeError, Violation};

const MASK: u64 = PAGE_SIZE - 1;

/// The meaning of a page-shadow value.
enum Class {
    /// The byte shadow decides.
    Bytes,
    /// All granules hold this value: 0, or a poison code.
    Whole(u8),
}

/// Two-level shadow over a memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct TwoLevel<M> {
    memory: M,
}

impl<M: ShadowMemory> TwoLevel<M> {
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

    /// The page shadow of the page of `addr`. Waits for a promotion that is under way.
    #[inline]
    fn page(&self, addr: u64) -> u8 {
        match self.memory.page(addr) {
            PAGE_BUSY => self.memory.wait_page(addr),
            page => page,
        }
    }

    /// The whole check, page by page.
    #[inline(never)]
    fn check_pages(&self, addr: u64, len: u64) -> Result<(), Violation> {
        let span = match Span::new(&self.memory, addr, len) {
            Ok(Some(span)) => span,
            Ok(None) => return Ok(()),
            Err(refused) => return Err(refused.violation(addr)),
        };
        let mut at = span.first;
        loop {
            let last = (at | MASK).min(span.last);
            match classify_page(self.page(at)) {
                Class::Whole(PAGE_VALID) => {}
                Class::Whole(code) => {
                    return Err(Violation { address: at, code, cause: Cause::Poisoned });
                }
                Class::Bytes => byte::check(&self.memory, Span { first: at, last })?,
            }
            if last == span.last {
                return Ok(());
            }
            at = last + 1;
        }
    }

    fn set(&mut self, addr: u64, len: u64, value: u8) -> Result<(), RangeError> {
        let span =
            Span::new(&self.memory, addr, len).map_err(|refused| refused.error(addr, len))?;
        let Some(span) = span else { return Ok(()) };
        let parts = span.cut(PAGE_SHIFT);
        if let Some(head) = parts.head {
            self.set_part(head, value);
        }
        let (addr, pages) = parts.whole;
        if pages != 0 {
            self.memory.set_pages(addr, pages, value);
            self.memory.settle_groups(addr, pages, value);
        }
        if let Some(tail) = parts.tail {
            self.set_part(tail, value);
        }
        Ok(())
    }

    /// Sets a part of one page.
    fn set_part(&mut self, part: Span, value: u8) {
        if self.promote_page(part.first, Some(value)) {
            byte::set(&mut self.memory, part, value);
        }
    }

    /// Makes the page of `addr` byte-checked, unless all of it has the value `unless`. Returns
    /// whether it is byte-checked now.
    fn promote_page(&mut self, addr: u64, unless: Option<u8>) -> bool {
        let start = addr & !MASK;
        loop {
            let page = self.page(start);
            match classify_page(page) {
                Class::Bytes => return true,
                Class::Whole(value) if unless == Some(value) => return false,
                Class::Whole(value) => {
                    // If another CPU has changed the page since, its class is read again.
                    if self.memory.claim_page(start, page) {
                        self.memory.open_group(start);
                        self.memory.set_bytes(start, SHADOW_PER_PAGE, value);
                        self.memory.set_pages(start, 1, PAGE_BYTES);
                        return true;
                    }
                }
            }
        }
    }
}

/// Decodes a page-shadow value. A value that is never written counts as poisoned. It must not get
/// into the byte shadow, where it could mean valid bytes.
#[inline]
fn classify_page(page: u8) -> Class {
    match page {
        // A promotion that will not end now: the guest is stopped, or broken.
        PAGE_BYTES | PAGE_BUSY => Class::Bytes,
        PAGE_VALID | POISON_MIN.. => Class::Whole(page),
        _ => Class::Whole(UNKNOWN),
    }
}

impl<M: ShadowMemory> Shadow for TwoLevel<M> {
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
        self.set(addr, len, PAGE_VALID)
    }

    fn promote(&mut self, addr: u64, len: u64) -> Result<(), RangeError> {
        let span =
            Span::new(&self.memory, addr, len).map_err(|refused| refused.error(addr, len))?;
        let Some(span) = span else { return Ok(()) };
        let mut at = span.first;
        loop {
            self.promote_page(at, None);
            if at | MASK >= span.last {
                return Ok(());
            }
            at = (at | MASK) + 1;
        }
    }

    #[inline]
    fn check(&self, addr: u64, len: u64) -> Result<(), Violation> {
        if self.passes_at_once(addr, len) { Ok(()) } else { self.check_pages(addr, len) }
    }

    // True inside one accessible page, or one granule of a byte-checked one.
    #[inline]
    fn passes_at_once(&self, addr: u64, len: u64) -> bool {
        let more = len.wrapping_sub(1);
        // A page is checked as a whole or not at all, so the last byte needs no comparison with the
        // limits. `check_pages` handles accesses to no bytes.
        if more >= PAGE_SIZE || !contains(&self.memory, addr) {
            return false;
        }
        // An access within a granule is within a page, so each class needs one comparison only.
        let page = self.memory.page(addr);
        if page == PAGE_VALID {
            return (addr & MASK) + more <= MASK;
        }
        if page == PAGE_BYTES {
            return byte::stays(addr, more)
                && byte::passes(self.memory.byte(addr), addr.wrapping_add(more));
        }
        // Poison, or a promotion.
        core::hint::cold_path();
        false
    }

    fn state(&self, addr: u64) -> u8 {
        if !contains(&self.memory, addr) {
            return UNKNOWN;
        }
        match classify_page(self.page(addr)) {
            Class::Bytes => self.memory.byte(addr),
            Class::Whole(value) => value,
        }
    }
}
