//! Ranges of checked memory by first and last address, so that the end of the address space is no
//! special case.

use crate::codes::UNKNOWN;
use crate::memory::ShadowMemory;
use crate::violation::{Cause, RangeError, Violation};

/// A range of at least one byte, wholly inside the checked addresses.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub first: u64,
    pub last: u64,
}

/// Why a range is no [`Span`].
#[derive(Clone, Copy)]
pub(crate) enum Refused {
    Wrapped,
    Outside(u64),
}

/// A span cut at multiples of a power of two.
pub(crate) struct Parts {
    /// The start of the span, if it covers its first unit in part.
    pub head: Option<Span>,
    /// Address of the first unit that is covered wholly, and how many there are (may be 0).
    pub whole: (u64, u64),
    /// The end of the span, if it covers a last unit, other than the one of `head`, in part.
    pub tail: Option<Span>,
}

impl Span {
    /// The span of `len` bytes from `addr` on; none for no bytes.
    #[inline]
    pub fn new<M: ShadowMemory>(memory: &M, addr: u64, len: u64) -> Result<Option<Self>, Refused> {
        if len == 0 {
            return Ok(None);
        }
        let Some(last) = addr.checked_add(len - 1) else { return Err(Refused::Wrapped) };
        if contains(memory, addr) && contains(memory, last) {
            return Ok(Some(Self { first: addr, last }));
        }
        Err(Refused::Outside(if contains(memory, addr) { memory.limit() } else { addr }))
    }

    /// Cuts the span at multiples of `1 << shift`.
    #[inline]
    pub fn cut(self, shift: u32) -> Parts {
        let mask = (1u64 << shift) - 1;
        let Self { first, last } = self;
        if first & mask == 0 && last & mask == mask {
            return Parts { head: None, whole: (first, ((last - first) >> shift) + 1), tail: None };
        }
        let unit_last = first | mask;
        if last <= unit_last {
            return Parts { head: Some(self), whole: (first, 0), tail: None };
        }
        let (head, start) = match first & mask {
            0 => (None, first),
            _ => (Some(Self { first, last: unit_last }), unit_last + 1),
        };
        let (tail, ends_whole) = match last & mask == mask {
            true => (None, 1),
            false => (Some(Self { first: last & !mask, last }), 0),
        };
        // Between two neighbouring units that are both covered in part there is no whole unit.
        Parts { head, whole: (start, ((last - start) >> shift) + ends_whole), tail }
    }
}

/// Whether `addr` has shadow.
#[inline]
pub(crate) fn contains<M: ShadowMemory>(memory: &M, addr: u64) -> bool {
    addr >= memory.base() && (addr < memory.limit() || is_last(memory))
}

/// Whether memory reaches to the end of the address space, so that every address is below its end.
/// In other memory only bad accesses call this.
#[inline]
fn is_last<M: ShadowMemory>(memory: &M) -> bool {
    core::hint::cold_path();
    memory.limit() == u64::MAX
}

impl Refused {
    /// The violation of an access that starts at `addr`.
    #[inline]
    pub fn violation(self, addr: u64) -> Violation {
        match self {
            Self::Wrapped => Violation { address: addr, code: UNKNOWN, cause: Cause::Wrapped },
            Self::Outside(address) => Violation { address, code: UNKNOWN, cause: Cause::Outside },
        }
    }

    /// The error of a change of `len` bytes from `addr` on.
    #[inline]
    pub fn error(self, addr: u64, len: u64) -> RangeError {
        match self {
            Self::Wrapped => RangeError::Wrapped { addr, len },
            Self::Outside(addr) => RangeError::Outside { addr },
        }
    }
}
