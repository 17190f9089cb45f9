//! What Umbra's VMM and its guests agree on: the two-level shadow model, its codes, and the hypercall ABI.
//!
//! The crate holds no state of its own. The model runs over a [`memory::ShadowMemory`], which is guest
//! windows in the guest runtime, host memory in the VMM, and plain vectors in tests.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
pub mod codes;
pub mod memory;
