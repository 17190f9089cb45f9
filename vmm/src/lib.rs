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

/// To be called first in a program's `main`, before it opens files or starts threads.
///
/// In the process that this program was executed as to read symbols, it does that, confined
/// ([`jail::leave_only_reading`]), and does not return. Otherwise it forks a process that starts
/// such ones, and returns at once: from then on, symbols and sources are read in them, if that
/// process could be made.
pub fn symbol_worker() {
    report::symbol_worker(jail::leave_only_reading);
}
