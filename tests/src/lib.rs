//! Helpers shared by the integration tests: lists of tests that say aloud what they skip, small ELF
//! kernels, and the program run as a user runs it.

pub mod elf;
pub mod ktap;
pub mod linux;
pub mod program;
pub mod suite;
pub mod table;
