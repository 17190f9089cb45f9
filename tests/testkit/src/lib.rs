//! Helpers for the tests of several crates. It uses no other crate of the workspace, so that each
//! of them can use it in its own tests.

mod code;
pub mod cpio;
pub mod elf;
pub mod ktap;
