//! Reports about memory errors: one model of a [`Finding`], printed as a KASAN report ([`text`]) or
//! as a line of JSON ([`json`]); and a whole run as a page for a browser ([`html`]) or as SARIF
//! ([`sarif`]).
//!
//! The guest's registers and memory give a stack ([`stack`]), the kernel's ELF and DWARF give its
//! names and lines ([`symbols`]), and [`Findings`] counts repeats. Nothing here knows KVM, the
//! shadow's layout or the sandbox. A caller passes in plain values, and a [`RunSummary`] for
//! reports on a run.

#![warn(clippy::missing_errors_doc)]

mod bounds;
mod collect;
mod cpu;
mod file;
mod finding;
pub mod frame;
mod function;
mod headline;
pub mod html;
mod identity;
pub mod json;
mod printable;
mod run;
pub mod sarif;
mod source;
pub mod stack;
pub mod symbols;
pub mod text;
mod worker;

pub use collect::{Added, DEFAULT_LIMIT, Distinct, Findings};
pub use cpu::{CpuState, Registers};
pub use file::{Target, create};
pub use finding::{
    AccessKind, Finding, Frame, Names, Object, Previous, ROW_MEMORY, ROW_SHADOW, Row, ShadowDump,
    Task, Track, Variable,
};
pub use identity::{FUNCTIONS, Fingerprint, Identity};
pub use printable::{printable, printable_keeping};
pub use run::{PageCounts, PageMap, Picture, RunSummary, Sample, ShadowSummary};
pub use source::{ROOTS_MAX, SourceRoots};
pub use worker::{Confine, symbol_worker};
