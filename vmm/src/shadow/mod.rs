//! The host side of shadow memory: the windows of a guest, their cost, and reclaim of host memory.
//!
//! Memory is looked up by its key (`keys.rs`): the guest-physical address of RAM, and a number of
//! its own for virtual memory.

pub mod accounting;
mod check_tables;
mod error;
mod keys;
pub mod layout;
mod mapping;
pub mod memory;
mod memslots;
pub mod model;
pub mod pages;
pub(crate) mod proc;
mod reclaim;
mod stack_pages;
mod stack_store;
pub mod windows;

#[cfg(test)]
mod tests;

pub use accounting::{Figures, ProcessMemory};
pub use check_tables::{CheckedRegion, TableError};
pub use error::ShadowError;
pub use layout::{CHUNK_BYTES, Layout, LayoutError, Window};
pub use memory::ShadowBacking;
pub use memslots::{MemslotError, Memslots};
pub use model::Model;
pub use pages::page_map;
pub use reclaim::Unused;
pub use windows::{FaultOutcome, Mode, Notify, Windows, WindowsConfig};
