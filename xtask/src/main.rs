//! Umbra's chores: `cargo xtask demo` and `cargo xtask test` install what is missing, build the
//! guest and run.

mod apt;
mod bench;
mod c_kernel;
mod context;
mod demo;
mod fuzz;
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
    /// Show the output of every command
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
    /// Run everything that is checked before a change lands: format, lints, documentation, tests,
    /// a minute of each fuzzer
    ///
    /// Installs what is missing first. Tests run on this machine and, side by side with it, in the
    /// nested host (see `cargo xtask nested`), where their names begin with `svm::`. Without KVM
    /// here, tests that need it run there only. The last lines count the passed, failed and skipped
    /// tests of each host, and of both.
    Test {
        /// Only the tests whose names contain this, without the other checks. Only in the nested
        /// host if it begins with `svm::`
        name: Option<String>,
        /// Also run tests that take very long, and all tests on both hosts
        #[arg(long)]
        all: bool,
    },
    /// Run a command on a KVM host as on hardware, made by QEMU's software CPU on any machine
    ///
    /// The CPU has AMD's SVM with nested paging. The command sees this machine's files, at the same
    /// paths, and a /tmp of its own. What it writes is lost, except in `target` of this workspace.
    /// Its standard input is empty. Its exit status is passed on; 2 means that the host did not
    /// start, or the command did not end in time. The host has one CPU; guests may have more.
    Nested(nested::Arguments),
    /// Measure what Umbra costs, and write BENCHMARKS.md
    ///
    /// `cargo xtask bench -- --help` lists the parts and their options. Without arguments it
    /// measures all parts except `linux`, which takes some minutes.
    Bench {
        /// `linux` to measure booting Linux; otherwise parts and options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Fuzz what a hostile guest or file can reach
    ///
    /// Builds the fuzzers in `fuzz/` with overflow checks and debug assertions, and runs one on
    /// each processor. They begin with the seeds in fuzz/seeds and with what earlier runs left in
    /// target/fuzz/TARGET/corpus. An input that fails is kept in target/fuzz/TARGET/found; the exit
    /// status is 1 then.
    Fuzz(fuzz::Arguments),
    /// Run every scenario of the test kernels and write the findings to docs/scenarios.md
    ///
    /// `cargo xtask test` fails if the file differs from the findings.
    Scenarios,
    /// Make the README's picture of the `--html` page
    ///
    /// Needs KVM and chromium, which is installed if it is missing.
    Picture,
    /// Build the Linux kernels that the tests boot and fetch Debian's, into target/linux
    ///
    /// They are Debian's linux-source-6.1 with configurations from guest/linux/config: a small one,
    /// and one with the patches in guest/linux/patches, which Umbra checks. Build tools are
    /// installed; the kernels are not. If the newest version does not work with the patches, an
    /// older one that is known to work is built, and the last line says so.
    Linux {
        #[command(subcommand)]
        task: Option<LinuxTask>,
    },
    /// Build the guest runtime and the test kernel from source, into target/guest
    Guest {
        /// Only the runtime: libumbra_rt.a to link into your own kernel, with umbra.h and umbra.mk
        /// for C
        #[arg(long)]
        lib: bool,
        /// Only the runtime and the C test kernel, by gcc and by clang
        #[arg(long, conflicts_with = "lib")]
        c: bool,
    },
}

#[derive(Subcommand)]
enum LinuxTask {
    /// List the versions of Linux's sources that apt offers, and whether the patches apply
    ///
    /// Downloads each version once; installs nothing.
    Status,
    /// Run Linux's own tests of KASAN in the kernel that Umbra checks
    Test,
    /// Record the results of these tests with Linux's own KASAN, under QEMU
    Expected,
    /// Boot the same Linux without KASAN, with its own, and with Umbra's, and compare the costs
    ///
    /// Takes most of an hour if KVM emulates ring 0: Linux's own KASAN is slow there.
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
                Task::Fuzz(arguments) => fuzz::main(&context, &arguments),
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
