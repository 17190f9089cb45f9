//! The sandbox: runs one kernel on a machine, with its shadow, and collects its findings.
//!
//! | file | what it does |
//! | --- | --- |
//! | `run.rs` | sets a run up, watches it, tears it down |
//! | `vcpu_thread.rs`, `vcpus.rs` | the thread of a vCPU; how vCPUs are paused and ended |
//! | `dispatch.rs` | handles an exit, of which it sees `context.rs`; `calls.rs` a hypercall |
//! | `investigate.rs` | makes a finding of a bad access |
//! | `run_shadow.rs`, `guest_info.rs`, `session.rs`, `watch.rs` | the parts of a run's state |

mod builder;
mod calls;
mod config;
mod console;
mod context;
mod counts;
mod discovery;
mod dispatch;
mod file;
mod globals;
mod guest_info;
mod guest_pages;
pub mod input;
mod investigate;
mod location;
mod marks;
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

pub use umbra_report::{Picture, Sample};

pub use builder::Sandbox;
pub use config::{Config, Console, ShadowMode};
pub use file::GuestFile;
pub use marks::Mark;
pub use observer::Observer;
pub use outcome::Outcome;
pub use report::{RunError, RunReport};
pub use run::run;
pub use umbra_shadow::abi::Redzone;
