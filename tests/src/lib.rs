//! Helpers of the integration tests: lists of tests that print what they skip, Linux guests, tables
//! of findings, JSON schemas, and runs of the program.

pub mod linux;
pub mod program;
pub mod schema;
pub mod suite;
pub mod table;

pub use umbra_testkit::{elf, ktap};
