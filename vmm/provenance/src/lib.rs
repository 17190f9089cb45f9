//! Who allocated and freed what.
//!
//! A record goes one way: from its CPU's ring ([`rings`]), decoded once (`records.rs`), through
//! [`Provenance::drain`] into the table of objects with their call stacks ([`objects`]) and, if it
//! is a free, into the quarantine ([`quarantine`]).
//!
//! The crate knows neither KVM nor the shadow's windows. Guest memory is what a caller passes in
//! ([`rings::RingMemory`]), and an address is whatever the caller keys memory by: Umbra passes
//! guest-physical addresses, so that aliases of a page share one history.

mod heap;
mod history;
mod names;
pub mod objects;
pub mod quarantine;
mod records;
pub mod rings;
mod stacks;

pub use history::{Allocation, EventCounts, KeyOf, Provenance};
pub use objects::{
    Cache, FoundObject, ObjectCounts, ObjectEvent, ObjectLimits, Objects, Previous,
    ProvenanceFigures, ShadowHint,
};
pub use quarantine::{Quarantine, QuarantineFigures, QuarantineSize};
