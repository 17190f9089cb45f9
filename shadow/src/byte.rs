//! The byte shadow: one value per granule. The full model uses it for all pages, the two-level
//! model for byte-checked ones.

use crate::codes::{GRANULE, GRANULE_SHIFT};
use crate::memory::ShadowMemory;
use crate::span::Span;
use crate::violation::{Cause, Violation};

const MASK: u64 = GRANULE - 1;

/// The number of valid bytes in a granule. Values without a meaning count as poisoned.
#[inline]
fn valid_bytes(value: u8) -> u64 {
    match value {
        0 => GRANULE,
        1..=7 => u64::from(value),
        _ => 0,
    }
}

/// Whether `more` bytes behind `addr`, less than a page, are in the same granule. (With a constant
/// `more` the compiler makes a test of alignment of it.)
#[inline]
pub(crate) fn stays(addr: u64, more: u64) -> bool {
    (addr & MASK) + more < GRANULE
}

/// Whether an access to a single granule is good. `last` is its last byte, and `value` the byte
/// shadow of the granule.
#[inline]
pub(crate) fn passes(value: u8, last: u64) -> bool {
    value == 0 || (last & MASK) < valid_bytes(value)
}

/// Checks all granules of the span.
pub(crate) fn check<M: ShadowMemory>(memory: &M, span: Span) -> Result<(), Violation> {
    let mut at = span.first;
    loop {
        let value = memory.byte(at);
        let end = (at | MASK).min(span.last);
        if value != 0 {
            let invalid = (at & !MASK) | valid_bytes(value);
            if invalid <= end {
                return Err(Violation {
                    address: invalid.max(at),
                    code: value,
                    cause: Cause::Poisoned,
                });
            }
        }
        if end == span.last {
            return Ok(());
        }
        at = end + 1;
    }
}

/// Poisons the span with `value`, or makes it valid if that is 0.
pub(crate) fn set<M: ShadowMemory>(memory: &mut M, span: Span, value: u8) {
    let parts = span.cut(GRANULE_SHIFT);
    if let Some(head) = parts.head {
        set_part(memory, head, value);
    }
    let (addr, granules) = parts.whole;
    if granules != 0 {
        memory.set_bytes(addr, granules, value);
    }
    if let Some(tail) = parts.tail {
        set_part(memory, tail, value);
    }
}

/// [`set`] for a part of one granule.
fn set_part<M: ShadowMemory>(memory: &mut M, part: Span, value: u8) {
    let old = memory.byte(part.first);
    let new = after(old, part.first & MASK, (part.last & MASK) + 1, value);
    if new != old {
        memory.set_bytes(part.first, 1, new);
    }
}

/// The byte shadow of a granule after its bytes `start..end` were set to `value`.
fn after(old: u8, start: u64, end: u64, value: u8) -> u8 {
    let valid = valid_bytes(old);
    if value == 0 {
        // The mask turns eight valid bytes into their value, 0.
        return if end > valid { (end & MASK) as u8 } else { old };
    }
    if end < valid {
        // No value can express valid bytes behind the part. Memory in use must not be reported.
        old
    } else if start == 0 {
        value
    } else if start < valid {
        start as u8
    } else {
        old
    }
}
