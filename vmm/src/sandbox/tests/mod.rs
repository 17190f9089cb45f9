//! The dispatcher, fed with exits that no guest made, over a vCPU and memslots that do not
//! exist.

mod bench;
mod calls;
mod exits;
mod findings;
mod guest_pages;
mod keys;
mod quarantine;
mod random;
mod windows;

const RAM: u64 = 16 << 20;
/// The vCPU that makes all exits.
const CPU: u8 = 2;
