//! Code that Umbra's VMM and its guests share: the two-level shadow model, its codes, and the
//! hypercall ABI.
//!
//! The crate has no state and no dependencies: kernels compile it in. The model runs over a
//! [`memory::ShadowMemory`]. That is the guest windows in the guest runtime, host memory in the
//! VMM, and plain vectors in tests.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod abi;
mod byte;
pub mod classify;
pub mod codes;
pub mod full;
pub mod group;
pub mod memory;
pub mod model;
pub mod runtime;
mod span;
pub mod two_level;
pub mod violation;

pub use classify::{BugKind, classify};
pub use full::Full;
pub use memory::ShadowMemory;
pub use model::Shadow;
pub use two_level::TwoLevel;
pub use violation::{Cause, RangeError, Violation};
