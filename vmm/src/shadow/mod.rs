//! The host side of shadow memory: the windows a guest sees it through, what they cost, giving host
//! memory back, and who allocated and freed the memory that the shadow describes.
//!
//! Everything is keyed by guest-physical address, so that aliases of a page share one shadow and
//! one history.

pub mod accounting;
mod heap;
mod keys;
pub mod layout;
mod mapping;
pub mod memory;
pub mod model;
mod names;
pub mod objects;
pub mod pages;
pub mod quarantine;
pub mod release;
mod stack_pages;
mod stacks;
pub mod windows;

#[cfg(test)]
mod tests;

pub use accounting::{Figures, ProcessMemory};
pub use layout::{CHUNK_BYTES, Layout, LayoutError, Window};
pub use memory::HostShadow;
pub use model::Model;
pub use objects::{
    At, Cache, Event, Found, ObjectCounts, ObjectLimits, Objects, Previous, ProvenanceFigures,
};
pub use pages::{PageCounts, PageMap};
pub use quarantine::{Quarantine, QuarantineFigures, QuarantineSize};
pub use release::release_unused;
pub use windows::{Config, FaultOutcome, Mode, Notify, ShadowError, SlotError, Slots, Windows};
