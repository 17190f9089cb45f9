//! Umbra's chores: `cargo xtask demo` and `cargo xtask test` set up what a machine lacks, build the
//! guest and run.

mod apt;
mod bench;
mod c_kernel;
mod context;
mod demo;
mod guest;
mod hosts;
mod linux;
mod nested;
mod picture;
mod process;
mod programs;
mod progress;
mod setup;
mod summary;
mod tests;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use context::Context;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Umbra's chores")]
struct Arguments {
    /// Show what every command prints
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot the test kernel under KVM and show what Umbra finds in it
    ///
    /// Installs what is missing, builds the test kernel and Umbra, and runs `umbra demo`, whose
    /// exit status it passes on.
    Demo {
        /// Arguments for `umbra demo`: names of scenarios, or options (see `cargo xtask demo --
        /// --help`)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Run everything that is checked before a change lands: format, lints, documentation, tests
    ///
    /// Installs what is missing first. Tests run on this machine and, side by side with it, in the
    /// nested host (see `cargo xtask nested`), where their names begin with `svm::`. Without KVM
    /// here, what needs it runs there only. The last lines count what passed, failed, and was
    /// skipped on each host, and together.
    Test {
        /// Only the tests whose names contain this, and none of the other checks; only in the
        /// nested host if it begins with `svm::`
        name: Option<String>,
        /// Those too that take very long, and on both hosts what belongs to one of them
        #[arg(long)]
        all: bool,
    },
    /// Run a command on a KVM host like hardware's, which QEMU's software CPU gives on any machine
    ///
    /// AMD's SVM with nested paging. The command sees this machine's files, at the same paths, and
    /// a /tmp of its own. What it writes is forgotten, but in `target` of this workspace. It reads
    /// nothing from standard input. Its exit status is passed on; 2 is a host that does not start,
    /// and a command that does not end in time. The host has one CPU; guests may have more.
    Nested(nested::Arguments),
    /// Measure what Umbra costs, and write BENCHMARKS.md
    ///
    /// `cargo xtask bench -- --help` lists the parts and their options. Without arguments it
    /// measures all parts but `linux`, which takes some minutes.
    Bench {
        /// `linux` for what booting Linux costs; otherwise parts and options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Run every scenario of the test kernels and write what was found to docs/scenarios.md
    ///
    /// `cargo xtask test` fails where the file says something else than what was found.
    Scenarios,
    /// Make the README's picture of the page that `--html` writes
    ///
    /// Needs KVM and chromium, which is installed where it is missing.
    Picture,
    /// Build the Linux kernels that the tests boot and fetch Debian's, into target/linux
    ///
    /// They are Debian's linux-source-6.1 with configurations from guest/linux/config: a small one,
    /// and one with the patches in guest/linux/patches, which Umbra checks. What a build needs is
    /// installed; the kernels are not. Where the newest version does not work with the patches, one
    /// that is known to is built, and the last line says so.
    Linux {
        #[command(subcommand)]
        task: Option<LinuxTask>,
    },
    /// Build the guest runtime and the test kernel from source, into target/guest
    Guest {
        /// Only the runtime: libumbra_rt.a, to link into a kernel of your own, with umbra.h and
        /// umbra.mk for one in C
        #[arg(long)]
        lib: bool,
        /// Only the runtime and the C test kernel, by gcc and by clang
        #[arg(long, conflicts_with = "lib")]
        c: bool,
    },
}

#[derive(Subcommand)]
enum LinuxTask {
    /// List the versions of Linux's sources that apt offers, and which of them the patches apply to
    ///
    /// Downloads each version once, to look; installs nothing.
    Status,
    /// Run Linux's own tests of KASAN in the kernel that Umbra checks
    Test,
    /// Write down anew what these tests come to with Linux's own KASAN, under QEMU
    Expected,
    /// Boot the same Linux without KASAN, with its own, and with Umbra's, and compare what that
    /// costs
    ///
    /// Takes most of an hour where KVM emulates ring 0: Linux's own KASAN is slow there.
    Compare {
        /// Arguments for the benchmark (see `cargo xtask linux compare -- --help`)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = process::forward_signals()
        .and_then(|()| Context::new(arguments.verbose))
        .and_then(|context| {
            let outcome = match arguments.task {
                Task::Demo { arguments } => demo::run(&context, &arguments),
                Task::Test { name, all } => {
                    Ok(tests::run(&context, &hosts::Selection { name, all }))
                }
                Task::Nested(arguments) => nested::run(&context, &arguments),
                Task::Bench { arguments } => bench::run(&context, &arguments),
                Task::Scenarios => tests::write_tables(&context),
                Task::Picture => picture::run(&context),
                Task::Linux { task: None } => linux::run(&context),
                Task::Linux { task: Some(LinuxTask::Status) } => linux::status::run(&context),
                Task::Linux { task: Some(LinuxTask::Test) } => linux::suite::test(&context),
                Task::Linux { task: Some(LinuxTask::Expected) } => linux::suite::expected(&context),
                Task::Linux { task: Some(LinuxTask::Compare { arguments }) } => {
                    linux::suite::compare(&context, &arguments)
                }
                Task::Guest { lib: true, .. } => {
                    guest::library(&context).map(|()| ExitCode::SUCCESS)
                }
                Task::Guest { c: true, .. } => c_kernel::run(&context).map(|()| ExitCode::SUCCESS),
                Task::Guest { .. } => guest::run(&context).map(|()| ExitCode::SUCCESS),
            };
            context.progress.finish();
            outcome
        });
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}
