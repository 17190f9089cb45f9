//! Helpers shared by the integration tests: lists of tests that say aloud what they skip, small ELF
//! kernels, and the program run as a user runs it.

pub mod linux;
pub mod program;
pub mod suite;
pub mod table;

pub use umbra_testkit::{elf, ktap};
