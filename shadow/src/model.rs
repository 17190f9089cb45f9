//! The interface of a shadow model, for every layout.
//!
//! A granule (8 bytes) can only express "the first N bytes are valid". So changes are rounded:
//!
//! - **poison**: in each granule the covered bytes become invalid. If a valid byte is behind them
//!   in the same granule, the granule does not change. A bug may be missed there, but memory in use
//!   is never reported. A granule that has no valid byte left, and is covered from its first byte
//!   on, gets the code.
//! - **unpoison**: in each granule every byte up to the end of the covered part becomes valid.
//!
//! [`TwoLevel`](crate::two_level::TwoLevel) and [`Full`](crate::full::Full) give the same answers.

use crate::memory::ShadowMemory;
use crate::violation::{RangeError, Violation};

/// A shadow over some memory.
pub trait Shadow {
    /// The storage of the shadow bytes.
    type Memory: ShadowMemory;

    /// The shadow bytes.
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

    /// Makes the pages that hold `len` bytes from `addr` on byte-checked, in a layout that has
    /// other pages. The same bytes stay valid. For memory whose byte shadow others write directly,
    /// such as the stacks of instrumented code.
    ///
    /// # Errors
    /// The range wraps or has addresses without shadow. No bytes are always in range.
    fn promote(&mut self, addr: u64, len: u64) -> Result<(), RangeError>;

    /// Checks an access to `len` bytes from `addr` on. An access to no bytes passes.
    ///
    /// # Errors
    /// The access touches a byte that is not valid or has no shadow, or it wraps.
    fn check(&self, addr: u64, len: u64) -> Result<(), Violation>;

    /// The fast path of [`check`](Self::check), without loop or call. It is true for most good
    /// accesses; if it is false, `check` decides. For a guest's hot path.
    fn passes_at_once(&self, addr: u64, len: u64) -> bool;

    /// The first bad address of an access, if it has one.
    fn first_bad(&self, addr: u64, len: u64) -> Option<u64> {
        self.check(addr, len).err().map(|violation| violation.address)
    }

    /// The value of a full byte shadow for the granule of `addr`: 0 for eight valid bytes, 1 to 7
    /// for that many, else a poison code. [`codes::UNKNOWN`](crate::codes::UNKNOWN) for an address
    /// without shadow.
    fn state(&self, addr: u64) -> u8;
}
