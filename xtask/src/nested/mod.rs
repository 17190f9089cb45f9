//! `cargo xtask nested`: a KVM host as on hardware, on any machine.
//!
//! QEMU's software CPU has AMD's SVM with nested paging. A Debian Linux booted on it loads
//! `kvm_amd`, and its `/dev/kvm` behaves as on hardware: second-stage faults, exceptions, programs
//! in guests. A command runs there with this machine's files at their usual paths. What it writes
//! is lost, except in the workspace's `target` folder.
//!
//! Bochs' CPU has Intel's VMX with EPT, for `kvm_intel`. It is far slower, and has only those of
//! this machine's files that the command names.

mod host;
mod initrd;
mod packages;
mod vmx;
mod watch;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::context::Context;
use crate::programs;

pub use host::{Host, Job, in_this_place, quoted, with_this_environment};
pub use watch::{Ended, Output};

use vmx::{VmxHost, VmxJob};

/// Memory of the nested host, in MiB, and seconds for a command, unless others are given.
const MEMORY_MIB: u32 = 4096;
const TIMEOUT_SECONDS: u64 = 3600;

/// `cargo xtask nested`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Let each instruction, in guest, program or kernel, take one nanosecond of the host's clock
    #[arg(long)]
    icount: bool,
    /// Intel's VMX instead of SVM, with Bochs: takes minutes to boot, and has only the files that
    /// are words of the command, and their libraries
    ///
    /// Without a command it builds Umbra and runs `umbra demo`.
    #[arg(long, conflicts_with = "icount")]
    vmx: bool,
    /// Memory of the nested host, in MiB; with --vmx 2048 by default
    #[arg(
        long,
        value_name = "MIB",
        default_value_t = MEMORY_MIB,
        default_value_if("vmx", "true", "2048"),
        value_parser = clap::value_parser!(u32).range(512..)
    )]
    memory: u32,
    /// End the command after this many seconds, including the boot; with --vmx 7200 by default
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = TIMEOUT_SECONDS,
        default_value_if("vmx", "true", "7200"),
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    timeout: u64,
    /// The command to run, and its arguments
    #[arg(
        required_unless_present = "vmx",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// Runs a command in a nested host. Passes on its output and its exit status.
pub fn run(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let ended = if arguments.vmx {
        on_vmx(context, arguments)
    } else {
        let (memory, timeout) = (arguments.memory, arguments.timeout);
        on_svm(context, &arguments.command, arguments.icount, memory, timeout)
    };
    passed_on(ended?)
}

/// Runs a command in a nested host with SVM, as `run` does without options.
pub fn run_command(context: &Context, command: &[OsString]) -> Result<ExitCode> {
    passed_on(on_svm(context, command, false, MEMORY_MIB, TIMEOUT_SECONDS)?)
}

fn passed_on(ended: Ended) -> Result<ExitCode> {
    match ended {
        Ended::Exit(status) => Ok(ExitCode::from(status)),
        Ended::Trouble(reason) => bail!("{reason}"),
    }
}

fn on_svm(
    context: &Context,
    command: &[OsString],
    icount: bool,
    memory_mib: u32,
    seconds: u64,
) -> Result<Ended> {
    let host = Host::prepare(context)?;
    let script = in_this_place(command)?;
    let job = Job { script, icount, memory_mib, timeout: Duration::from_secs(seconds) };
    context.progress.step("booting the nested host");
    host.run(&job, &context.progress, Output::PassedOn)
}

fn on_vmx(context: &Context, arguments: &Arguments) -> Result<Ended> {
    let host = VmxHost::prepare(context)?;
    let mut command = arguments.command.clone();
    if command.is_empty() {
        command = vec![programs::umbra(context)?.into(), "demo".into()];
    }
    let job = VmxJob {
        script: in_this_place(&command)?,
        command,
        memory_mib: arguments.memory,
        timeout: Duration::from_secs(arguments.timeout),
    };
    host.run(context, &job)
}
