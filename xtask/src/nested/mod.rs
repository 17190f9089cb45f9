//! `cargo xtask nested`: a KVM host like hardware's, on any machine.
//!
//! QEMU's software CPU has AMD's SVM with nested paging. A Debian Linux booted on it loads
//! `kvm_amd`, and its `/dev/kvm` behaves as on hardware: second-stage faults, exceptions, programs
//! in guests. A command runs there with this machine's files at their usual paths. What it writes is
//! forgotten, but in the workspace's `target` folder.

mod host;
mod packages;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::Context;

pub use host::{Ended, Host, Job, Output, in_this_place, quoted, with_this_environment};

/// `cargo xtask nested`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Make one instruction, of guest, program or kernel alike, one nanosecond of the host's clock
    #[arg(long)]
    icount: bool,
    /// Memory of the nested host, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..))]
    memory: u32,
    /// End the command after this many seconds, those of the start included
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// The command to run, and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// Runs a command in a nested host. Passes on its output and its exit status.
pub fn run(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let host = Host::prepare(context)?;
    let job = Job {
        script: host::in_this_place(&arguments.command)?,
        icount: arguments.icount,
        memory_mib: arguments.memory,
        timeout: Duration::from_secs(arguments.timeout),
    };
    context.progress.step("booting the nested host");
    let ended = host.run(&job, &context.progress, Output::PassedOn)?;
    match ended {
        Ended::Exit(status) => Ok(ExitCode::from(status)),
        Ended::Trouble(reason) => bail!("{reason}"),
    }
}
