//! Why shadow could not be provided or accessed.

use std::io;

use umbra_shadow::RangeError;

use super::check_tables::TableError;
use super::layout::LayoutError;
use super::memslots::MemslotError;

/// Why shadow could not be provided or accessed.
#[derive(Debug, thiserror::Error)]
pub enum ShadowError {
    /// No windows for such memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The ranges of RAM are not in order, or not page-aligned.
    #[error("guest memory range {start:#x}..{end:#x} is empty, misaligned or out of order")]
    Ram {
        /// Guest-physical start.
        start: u64,
        /// Guest-physical end.
        end: u64,
    },
    /// The host did not give the address space or the memory.
    #[error("cannot reserve {bytes} bytes for shadow memory")]
    Reserve {
        /// Requested bytes.
        bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// More byte shadow is needed than is allowed.
    #[error("byte shadow needs {needed} bytes, over the limit of {limit}")]
    Limit {
        /// The limit, in bytes.
        limit: u64,
        /// What would be mapped, in bytes.
        needed: u64,
    },
    /// The access does not lie inside one window.
    #[error("access of {len} bytes at guest-physical {gpa:#x} is not inside a shadow window")]
    OutsideWindow {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// The access lies in a chunk that is not mapped.
    #[error("shadow at guest-physical {gpa:#x} is not mapped")]
    Unmapped {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The windows are read-only for the guest.
    #[error("store to shadow at guest-physical {gpa:#x}, which is read-only")]
    ReadOnly {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The model refuses the change.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A memslot could not be changed.
    #[error("cannot change the memslot of the shadow at guest-physical {gpa:#x}")]
    Memslot {
        /// Guest-physical address.
        gpa: u64,
        /// Why not.
        #[source]
        source: MemslotError,
    },
    /// A region cannot be in the tables of the check shadow.
    #[error(transparent)]
    Tables(#[from] TableError),
    /// The kernel refused something else.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl ShadowError {
    pub(super) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
