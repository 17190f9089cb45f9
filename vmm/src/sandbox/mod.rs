//! The sandbox: runs one kernel on a machine, with its shadow, and collects its findings.
//!
//! | file | what it does |
//! | --- | --- |
//! | `builder.rs`, `config.rs`, `file.rs` | what to run and how; kernels and initrds |
//! | `instrumentation.rs` | warns of a kernel that was not compiled as it must be |
//! | `run.rs`, `shared.rs` | sets a run up, watches it, tears it down; what its threads share |
//! | `gate.rs` | closes the jail before guest code runs |
//! | `vcpu_thread.rs`, `vcpus.rs` | the thread of a vCPU; how vCPUs are paused and ended |
//! | `collector.rs` | a thread that reads rings while the guest runs |
//! | `discovery.rs` | the CPUID leaves by which a guest finds Umbra |
//! | `dispatch.rs` | handles an exit, of which it sees `context.rs`; `calls.rs` a hypercall |
//! | `detached.rs` | the same without a machine: a caller makes the exits |
//! | `investigate.rs` | makes a finding of a bad access; `known.rs` the parts that need no vCPU |
//! | `location.rs` | names a place in the code |
//! | `run_shadow.rs`, `guest_pages.rs` | the shadow of a run; reclaim of dead guest pages |
//! | `guest_info.rs`, `globals.rs` | what a guest has said about itself; its global variables |
//! | `modules.rs` | reads the symbols of a guest's modules from its memory |
//! | `ring_memory.rs` | guest RAM, as the rings read it |
//! | `session.rs`, `observer.rs` | the findings; how a caller observes a run |
//! | `watch.rs`, `console.rs`, `marks.rs`, `picture.rs` | what is watched beside the exits |
//! | `input.rs` | input for the guest's console, and Ctrl-A |
//! | `counts.rs`, `stats.rs` | exits and events; the figures that `--stats` writes |
//! | `outcome.rs`, `end_state.rs`, `report.rs` | how a run ended; the CPUs then; its result |

mod builder;
mod calls;
mod collector;
mod config;
mod console;
mod context;
mod counts;
mod detached;
mod discovery;
mod dispatch;
mod end_state;
mod file;
mod gate;
mod globals;
mod guest_info;
mod guest_pages;
pub mod input;
pub mod instrumentation;
mod investigate;
mod known;
mod location;
mod marks;
mod modules;
mod observer;
mod outcome;
mod picture;
mod report;
mod ring_memory;
mod run;
mod run_shadow;
mod session;
mod shared;
pub mod stats;
#[cfg(test)]
mod tests;
mod vcpu_thread;
mod vcpus;
mod watch;

pub use umbra_report::{Distinct, Picture, Sample};

pub use builder::Sandbox;
pub use config::{Config, Console, DebugExit, Irqchip, ShadowMode};
pub use context::{ExitContext, GuestCpu, OtherVcpus};
pub use detached::Detached;
pub use dispatch::Dispatcher;
pub use file::GuestFile;
pub use marks::Mark;
pub use observer::Observer;
pub use outcome::Outcome;
pub use report::{RunError, RunReport};
pub use run::run;
pub use umbra_shadow::abi::Redzone;
