//! Umbra: boots an x86_64 kernel as a KVM guest, keeps its shadow memory outside of it, and reports
//! its memory errors.

#![warn(clippy::missing_errors_doc)]

pub mod cli;
mod confine;
mod demo;
pub mod hypercall;
pub mod jail;
pub mod kernel;
mod outputs;
mod print;
pub mod sandbox;
pub mod shadow;
mod terminal;
mod values;
pub mod verdicts;
mod watchdog;

pub use umbra_machine as machine;
pub use umbra_provenance as provenance;
pub use umbra_report as report;
pub use umbra_report::symbol_worker;
