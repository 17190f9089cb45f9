//! Who allocated and freed what: a guest's rings of records ([`rings`]), its objects with their
//! call stacks ([`objects`]), and its quarantine ([`quarantine`]).
//!
//! The crate knows neither KVM nor the shadow's windows. Guest memory is what a caller passes in
//! ([`rings::RingMemory`]), and an address is whatever the caller keys memory by: Umbra passes
//! guest-physical addresses, so that aliases of a page share one history.

mod heap;
mod names;
pub mod objects;
pub mod quarantine;
pub mod rings;
mod stacks;

pub use objects::{
    At, Cache, Event, Found, ObjectCounts, ObjectLimits, Objects, Previous, ProvenanceFigures,
};
pub use quarantine::{Quarantine, QuarantineFigures, QuarantineSize};
