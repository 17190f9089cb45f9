//! What the tests of several crates share. It uses no other crate of the workspace, so that each
//! of them can use it in its own tests.

pub mod cpio;
pub mod elf;
pub mod ktap;
