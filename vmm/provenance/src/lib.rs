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
//!   call stack), and its redzone or who freed it and how long ago. Of what was freed in its place
//!   before: the same, in short.
//! - Each call stack once, and each pair of task and stack once. Objects refer to a pair by number.
//! - The freed memory that waits, oldest first, and the last free of each CPU.
//!
//! All of it is bounded. The table of objects and the stacks have a budget in bytes of host memory,
//! including the allocator's overhead. What no longer fits is dropped, oldest freed objects first,
//! and counted.
//!
//! # Why no `BTreeMap`
//!
//! With a quarantine, most remembered objects are freed ones that wait, so there are many, and each
//! byte of an object counts. An object takes 48 bytes as a plain struct, before what a tree adds:
//! its key, the free part of its nodes, and the allocator's own bytes. Neighbours are alike,
//! though: most lie in one slab, have its size and cache, and come from few call sites. So up to 32
//! neighbours share a leaf, in which each stores only how it differs from the one before
//! (`objects/coding.rs`), and up to 64 leaves share a chunk.
//!
//! `cargo xtask bench costs` measures host memory in a churn of 4,000 operations, all objects,
//! stacks and indices included (BENCHMARKS.md, "provenance"): 7.37 bytes for each object with a
//! quarantine, 10.89 without one, where few objects share the same stacks.
//!
//! The price is time. An event finds its leaf by two binary searches and writes the rest of it
//! anew. The property tests of `objects/table.rs` compare every operation with a `BTreeMap`.

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
