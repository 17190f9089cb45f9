//! Measures what Umbra promises, and prints it beside the promise.
//!
//! A [`figure::Figure`] is one measured value with its limit. [`meter::Meter`] boots the test
//! kernel with the library and counts what its `bench=` words do, exactly where KVM counts guest
//! instructions; [`program::Program`] runs the program `umbra` as a process of its own, for what a
//! process costs. [`suite`] holds the figures of the core, [`linux`] those of booting Linux,
//! [`linux_kasan`] those of Linux with different checks, [`nested`] those of a whole host. [`gate`]
//! compares the figures that repeat exactly with those of before. [`heap`] measures memory.
//! [`native`] times checks and instrumented programs without a guest, [`replay`] replays a recorded
//! [`trace`]. [`pvh`] makes kernels that QEMU can also start. [`results`] keeps the results in the
//! repository, with [`plot`]s.

pub mod clock;
pub mod figure;
pub mod gate;
pub mod heap;
mod host;
pub mod linux;
pub mod linux_kasan;
pub mod meter;
pub mod native;
pub mod nested;
pub mod plot;
pub mod program;
pub mod pvh;
pub mod replay;
pub mod results;
mod runtime;
pub mod suite;
pub mod trace;
