//! What Umbra tells about a memory error: one model of a [`Finding`], printed as a KASAN report
//! ([`text`]) or as a line of JSON ([`json`]); and of a whole run, as a page for a browser
//! ([`html`]).
//!
//! The way of a finding: the guest's registers and memory give a stack ([`stack`]), the kernel's
//! ELF and DWARF give its names and lines ([`symbols`]), [`Findings`] counts repeats, and the two
//! printings write it out. Nothing of that knows KVM or the shadow's layout; a caller passes in
//! what it has read.

mod collect;
mod finding;
pub mod frame;
pub mod html;
pub mod json;
mod run;
pub mod stack;
pub mod symbols;
pub mod text;

pub use collect::{Added, DEFAULT_LIMIT, Findings};
pub use finding::{
    AccessKind, Finding, Frame, Names, Object, Previous, ROW_MEMORY, ROW_SHADOW, Row, ShadowDump,
    Task, Track, Variable,
};
pub use run::{PageCounts, PageMap, Picture, RunSummary, Sample, ShadowSummary};
