//! The sandbox: runs one kernel on a machine, with its shadow, and collects its findings.
//!
//! | file | what it does |
//! | --- | --- |
//! | `run.rs` | sets a run up, watches it, tears it down; `vcpus.rs` has the threads |
//! | `dispatch.rs` | handles an exit; `calls.rs` a hypercall |
//! | `investigate.rs` | makes a finding of a bad access |
//! | `shadow_host.rs`, `guest_info.rs`, `session.rs`, `watch.rs` | the parts of a run's state |

mod builder;
mod calls;
mod config;
mod console;
mod discovery;
mod dispatch;
mod file;
mod globals;
mod guest_info;
mod guest_pages;
pub mod input;
mod investigate;
mod marks;
mod outcome;
mod picture;
mod report;
mod ring_memory;
mod run;
mod session;
mod shadow_host;
pub mod stats;
#[cfg(test)]
mod tests;
mod vcpus;
mod watch;

use std::sync::Arc;

use umbra_machine::stats::Counters;
use umbra_report::Finding;
pub use umbra_report::{Picture, Sample};

pub use builder::Sandbox;
pub use config::{Config, Console, ShadowMode};
pub use file::GuestFile;
use investigate::CodeLocation;
pub use marks::Mark;
pub use outcome::Outcome;
pub use report::{Report, RunError};
pub use run::run;
pub use umbra_shadow::abi::Redzone;

/// Gets each new finding while the guest runs.
pub trait Observer: Send {
    /// A finding that is the first of its kind.
    fn finding(&mut self, finding: &Finding);

    /// Called right before the guest runs. `counters` are its vCPUs', if they were asked for and
    /// KVM has them.
    fn starts(&mut self, counters: Option<Arc<Counters>>) {
        let _ = counters;
    }
}

/// Ignores everything.
impl Observer for () {
    fn finding(&mut self, _: &Finding) {}
}
