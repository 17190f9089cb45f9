//! What a shadow model does, whatever its layout.
//!
//! A granule (8 bytes) can only say "the first N bytes are valid", which decides how changes round:
//!
//! - **poison**: in each granule the covered bytes become invalid, unless a valid byte lies behind
//!   them in the same granule; then the granule stays as it is. A bug may go unseen there, but
//!   memory that is in use is never reported. A granule that is left with no valid byte, and is
//!   covered from its first byte on, carries the code.
//! - **unpoison**: in each granule every byte up to the end of the covered part becomes valid.
//!
//! [`TwoLevel`](crate::two_level::TwoLevel) and [`Full`](crate::full::Full) answer every question
//! alike.

use crate::memory::ShadowMemory;
use crate::violation::{RangeError, Violation};

/// A shadow over some memory.
pub trait Shadow {
    /// Where the shadow bytes live.
    type Memory: ShadowMemory;

    /// Where the shadow bytes live.
    fn memory(&self) -> &Self::Memory;

    /// Makes `len` bytes from `addr` on invalid; `code` says why.
    ///
    /// # Errors
    /// `code` is no poison code, or the range wraps or has addresses without shadow. No bytes are
    /// always in range.
    fn poison(&mut self, addr: u64, len: u64, code: u8) -> Result<(), RangeError>;

    /// Makes `len` bytes from `addr` on valid.
    ///
    /// # Errors
    /// The range wraps or has addresses without shadow. No bytes are always in range.
    fn unpoison(&mut self, addr: u64, len: u64) -> Result<(), RangeError>;

    /// Makes the pages that hold `len` bytes from `addr` on byte-checked, where the layout knows a
    /// difference. What is valid does not change. For memory whose byte shadow others write
    /// directly, such as stacks under instrumented code.
    ///
    /// # Errors
    /// The range wraps or has addresses without shadow. No bytes are always in range.
    fn promote(&mut self, addr: u64, len: u64) -> Result<(), RangeError>;

    /// Checks an access to `len` bytes from `addr` on. An access to no bytes passes.
    ///
    /// # Errors
    /// The access touches a byte that is not valid or has no shadow, or it wraps.
    fn check(&self, addr: u64, len: u64) -> Result<(), Violation>;

    /// The quick half of [`check`](Self::check), without loop or call: whether an access obviously
    /// passes. It is true for most accesses that pass; if it is not, only `check` knows. For a
    /// guest that wants to have nothing else on its hot path.
    fn passes_at_once(&self, addr: u64, len: u64) -> bool;

    /// The first bad address of an access, if it has one.
    fn first_bad(&self, addr: u64, len: u64) -> Option<u64> {
        self.check(addr, len).err().map(|violation| violation.address)
    }

    /// What a full byte shadow would hold for the granule of `addr`: 0 for eight valid bytes, 1 to
    /// 7 for that many, else poisoned. [`codes::UNKNOWN`](crate::codes::UNKNOWN) for an address
    /// without shadow.
    fn state(&self, addr: u64) -> u8;
}
