//! Provenance: who allocated and freed what.
//!
//! A record goes one way: from its CPU's ring ([`rings`]), where it is decoded once
//! (`umbra_shadow::abi::Record`), through [`Provenance::drain`] into the table of objects with
//! their call stacks ([`objects`]) and, if it is a free, into the quarantine ([`quarantine`]).
//!
//! The crate knows neither KVM nor the shadow's windows. The caller passes in guest memory
//! ([`rings::RingMemory`]), and chooses the keys by which memory is known. Umbra's are explained in
//! `vmm/src/shadow/keys.rs`. Only rings have guest-physical addresses (`gpa`) here.
//!
//! # What is stored
//!
//! - Of each object, live or freed: its start and size, its cache, who allocated it (a task and a
//!   call stack), on which CPU and when, and its redzone or the same of its free. Of what was freed
//!   in its place before: the same, in short.
//! - Each call stack once, and each pair of task and stack once. Objects refer to a pair by number.
//! - The freed memory that waits, oldest first, and the last free of each CPU.
//!
//! All of it is bounded. The table of objects and the stacks have a budget in bytes of host memory,
//! including the allocator's overhead. What no longer fits is dropped, freed objects first, and
//! counted.
//!
//! # How it is found
//!
//! By page: a hash table leads from a page's number to its cells, a power of two of them, and a
//! cell to the record of the object that starts in it, of 44 bytes (`objects/record.rs`). Cells are
//! so small that no two objects share one; in a slab nearly all are in use. Objects that reach
//! beyond the next page are in a tree as well, so that they explain addresses far from their start.
//! The pages with freed objects are a list in the order of their last frees, whose oldest is
//! forgotten first. So an event costs a few hundred instructions, however much is remembered, and
//! no pass over the table stops a guest. `cargo xtask bench nested` measures an event, and `cargo
//! xtask bench costs` the memory for each object (BENCHMARKS.md).

#![warn(clippy::missing_errors_doc)]

mod heap;
mod history;
mod names;
pub mod objects;
mod pool;
pub mod quarantine;
pub mod rings;
mod stacks;

pub use history::{
    Allocation, Drained, Event, EventCounts, INVALID_FREES, InvalidFree, KeyOf, Moment, Provenance,
    RefusedRecords,
};
pub use objects::{
    Cache, FoundObject, ObjectCounts, ObjectEvent, ObjectLimits, Objects, Previous,
    ProvenanceFigures, ShadowHint,
};
pub use quarantine::{Quarantine, QuarantineFigures, QuarantineSize};
pub use stacks::Frames;
