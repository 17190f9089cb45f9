//! The command line of `umbra`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use umbra_machine::layout;
use umbra_machine::loader::Protocol;
use umbra_provenance::QuarantineSize;
use umbra_report::text::{self, TextStyle};
use umbra_report::{CpuState, Names, RunSummary, SourceRoots, Target, html, sarif};

use crate::confine::{self, Places};
use crate::demo;
use crate::jail;
use crate::outputs::{one_file_each, output, source_roots, target};
use crate::print::{FindingPrinter, in_full, say, say_if_read, size, stderr_color};
use crate::sandbox::{
    self, Config, Console, DebugExit, GuestFile, Irqchip, Outcome, Redzone, RunError, RunReport,
    ShadowMode,
};
use crate::shadow::Notify;
use crate::terminal;
use crate::values::{
    Limit, parse_debug_exit, parse_quarantine, parse_redzone, parse_size, parse_time,
};
use crate::watchdog;

/// Most CPUs, as clap wants it.
const MAX_CPUS: i64 = layout::MAX_CPUS as i64;
/// Exit status for a bad command line or an unsuitable host.
const USAGE: u8 = 2;

#[derive(Parser)]
#[command(
    version,
    about = "Boots an x86_64 kernel under KVM and finds its memory errors as they happen",
    after_help = "Exit status: 0 clean, 1 findings, 2 usage or host problem, 3 the guest crashed \
                  or failed, 4 time limit, 5 unchecked (--require-checks), 6 an oops, 130 \
                  interrupted. RUST_LOG=info (or debug) tells more."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a kernel. Its console goes to standard output, findings go to standard error. A Linux
    /// kernel's console reads standard input; Ctrl-A x ends the run, Ctrl-A b sends a break, Ctrl-A
    /// Ctrl-A sends Ctrl-A.
    Run(Run),
    /// Run the built-in test kernel, whose scenarios misbehave on purpose, and compare the findings
    /// with what is expected. Exit status 0 if every scenario got its verdict.
    Demo(Demo),
}

#[derive(Args)]
struct Run {
    /// The kernel: an x86_64 ELF file with symbols, instrumented to be checked; or a Linux bzImage.
    kernel: PathBuf,
    /// How to boot it.
    #[arg(long, value_enum, default_value_t = Boot::Auto)]
    boot: Boot,
    /// A file that the kernel gets in memory.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line. Linux gets console=ttyS0, reboot=k and panic=-1 in front of it,
    /// unless it has them.
    #[arg(long, default_value = "", value_name = "STRING", allow_hyphen_values = true)]
    cmdline: String,
    #[command(flatten)]
    guest: Guest,
    /// Interrupt controllers and timers. With them `hlt` ends the run only if interrupts are off on
    /// all CPUs; without them it does at once. Linux and several CPUs need them.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    irqchip: Switch,
    /// QEMU's isa-debug-exit, port 0xf4: a write ends the run, with exit status 0 (or 1, with
    /// findings) for this VALUE and 3 for any other. Or `off`, or `auto` (0x10; off for Linux).
    #[arg(long, default_value = "auto", value_name = "VALUE", value_parser = parse_debug_exit)]
    debug_exit: DebugExit,
    /// End the run after this time (such as 90s, 5m), or `none`.
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = parse_time)]
    timeout: Limit,
    /// Write each finding as a line of JSON to a file, or to standard output (-).
    #[arg(long, value_name = "FILE")]
    findings: Option<PathBuf>,
    /// Write the run's figures as a JSON object to a file, or to standard output (-).
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// When this text first appears on the console, add the costs until then to `marks` in --stats.
    /// Can be given more than once.
    #[arg(long, value_name = "TEXT", requires = "stats", allow_hyphen_values = true)]
    mark: Vec<String>,
    /// Write an HTML page about the run, when it has ended.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Show source lines on the HTML page from this folder, and from no other. Links in it are not
    /// followed. Can be given more than once. Default: the top of the current directory's Git tree,
    /// or else the current directory.
    #[arg(long, value_name = "DIR", requires = "html")]
    source_root: Vec<PathBuf>,
    /// Write the findings as a SARIF 2.1.0 log, when the run has ended. Paths of sources in it are
    /// relative to the current directory.
    #[arg(long, value_name = "FILE")]
    sarif: Option<PathBuf>,
    /// Look in this folder, and below it, for the `.ko` files of the kernel's modules: their source
    /// lines are in reports.
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Continue after findings.
    #[arg(long, conflicts_with = "stop_at")]
    keep_going: bool,
    /// Stop after this many different findings. Those of one bug, wherever it shows, count once.
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..))]
    stop_at: u32,
    /// Exit with status 5 if the run would be clean but the guest ran unchecked.
    #[arg(long)]
    require_checks: bool,
    /// Do not count an oops as a crash if Linux goes on after it.
    #[arg(long)]
    ignore_oops: bool,
    /// How to print function names: as in the source, or as in the ELF (what
    /// scripts/decode_stacktrace.sh and syzkaller look for).
    #[arg(long, value_enum, default_value_t = Symbols::Demangled)]
    symbols: Symbols,
}

#[derive(Args)]
struct Demo {
    /// Scenarios to run; all if none is named.
    scenarios: Vec<String>,
    /// List the scenarios and their expected findings.
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    guest: Guest,
    /// Print no findings. Without this option the first one is printed, or all of the named
    /// scenarios.
    #[arg(long, short, conflicts_with = "verbose")]
    quiet: bool,
    /// Print all findings, and the guest's console.
    #[arg(long, short)]
    verbose: bool,
    /// Write all findings to a folder: as text, as JSON, and an HTML page about the run.
    #[arg(long, value_name = "DIR", conflicts_with = "list")]
    out: Option<PathBuf>,
    /// Write an HTML page about the run.
    #[arg(long, value_name = "FILE", conflicts_with = "list")]
    html: Option<PathBuf>,
    /// Show source lines on the HTML page from this folder, as for `run`.
    #[arg(long, value_name = "DIR")]
    source_root: Vec<PathBuf>,
}

/// What `run` and `demo` have in common.
#[derive(Args)]
struct Guest {
    /// Guest memory.
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = parse_size)]
    memory: u64,
    /// CPUs of the guest.
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS))]
    cpus: u8,
    /// Which shadow to keep.
    #[arg(long, value_enum, default_value_t = Shadow::PerPage)]
    shadow: Shadow,
    /// Who writes the shadow: the guest, which records its allocations in a ring; or the VMM, with
    /// one call per event and the shadow read-only for the guest.
    #[arg(long, value_enum, default_value_t = HowToNotify::Ring)]
    notify: HowToNotify,
    /// Stop the guest rather than map more byte shadow than this.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    shadow_limit: Option<u64>,
    /// Quarantine: the amount of freed memory that waits before it is allocated again, so that uses
    /// after free are found. A SIZE, `off`, or `auto` (1/32 of guest memory).
    #[arg(long, default_value = "auto", value_name = "SIZE", value_parser = parse_quarantine)]
    quarantine: QuarantineSize,
    /// Redzones between objects, where overruns are found. A SIZE (a multiple of 8), `off` (objects
    /// lie as in an unchecked kernel), or `auto` (more behind larger objects).
    #[arg(long, default_value = "auto", value_name = "SIZE", value_parser = parse_redzone)]
    redzone: Redzone,
    /// Host memory for the history of allocations and frees. When it is full, the oldest freed
    /// objects are dropped first.
    #[arg(long, default_value = "64M", value_name = "SIZE", value_parser = parse_size)]
    provenance: u64,
    /// Confine this program before it looks at the kernel: only the files that it needs, no
    /// privileges, no network, and few system calls once the guest runs (docs/security.md).
    #[arg(long, value_enum, default_value_t = JailMode::On)]
    jail: JailMode,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum JailMode {
    /// As far as the host can.
    On,
    /// Not at all.
    Off,
    /// Completely, or there is no run.
    Required,
}

impl From<JailMode> for jail::Mode {
    fn from(mode: JailMode) -> Self {
        match mode {
            JailMode::On => Self::On,
            JailMode::Off => Self::Off,
            JailMode::Required => Self::Required,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Boot {
    /// As the file requires.
    Auto,
    /// ELF, by the Linux 64-bit boot protocol.
    Elf,
    /// ELF, by its PVH note.
    Pvh,
    /// Linux bzImage, which unpacks itself in the guest.
    Bzimage,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shadow {
    /// One byte for each page, byte shadow on demand.
    PerPage,
    /// KASAN's layout, 1/8 of all memory, for comparison.
    Full,
    /// None.
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
enum HowToNotify {
    /// No exit for an allocation.
    Ring,
    /// Slower, but a wild write to the shadow has no effect, and is found.
    Sync,
}

#[derive(Clone, Copy, ValueEnum)]
enum Switch {
    /// As a PC has them.
    On,
    /// None.
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
enum Symbols {
    /// As in the source.
    Demangled,
    /// As in the ELF.
    Linkage,
}

impl Guest {
    fn config(&self, kernel: GuestFile, cmdline: String) -> Config {
        Config {
            kernel,
            cmdline,
            memory: self.memory,
            cpus: self.cpus,
            shadow: match self.shadow {
                Shadow::PerPage => ShadowMode::PerPage,
                Shadow::Full => ShadowMode::Full,
                Shadow::Off => ShadowMode::Off,
            },
            notify: match self.notify {
                HowToNotify::Ring => Notify::Ring,
                HowToNotify::Sync => Notify::Sync,
            },
            shadow_limit: self.shadow_limit,
            quarantine: self.quarantine,
            redzone: self.redzone,
            provenance: self.provenance,
            count_instructions: true,
            ..Config::default()
        }
    }
}

impl Run {
    /// The configuration, without what depends on the other files that are named.
    fn config(&self, kernel: GuestFile) -> Config {
        Config {
            irqchip: match self.irqchip {
                Switch::On => Irqchip::On,
                Switch::Off => Irqchip::Off,
            },
            debug_exit: self.debug_exit,
            timeout: self.timeout.0,
            stop_at: (!self.keep_going).then_some(self.stop_at as usize),
            require_checks: self.require_checks,
            ignore_oops: self.ignore_oops,
            marks: self.mark.clone(),
            modules: self.modules.clone(),
            boot: match self.boot {
                Boot::Auto => Protocol::Auto,
                Boot::Elf => Protocol::Elf,
                Boot::Pvh => Protocol::Pvh,
                Boot::Bzimage => Protocol::BzImage,
            },
            ..self.guest.config(kernel, self.cmdline.clone())
        }
    }
}

fn run(args: &Run, stop: &Arc<AtomicBool>) -> Result<u8> {
    let kernel = GuestFile::open("kernel", &args.kernel)?;
    let initrd = args.initrd.as_deref().map(|path| GuestFile::open("initrd", path)).transpose()?;
    if let Some(folder) = args.modules.as_deref() {
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    }
    let files = [
        ("--findings", args.findings.as_deref()),
        ("--stats", args.stats.as_deref()),
        ("--html", args.html.as_deref()),
        ("--sarif", args.sarif.as_deref()),
    ];
    one_file_each(&files)?;
    let roots = source_roots(&args.source_root)?;
    let page = target(args.html.as_deref())?;
    let log = target(args.sarif.as_deref())?;
    let json = args.findings.as_deref().map(output).transpose()?;
    let stats = args.stats.as_deref().map(output).transpose()?;
    // Standard output has either the guest's console or the JSON.
    let is_dash = |(_, path): &(&str, Option<&Path>)| path.is_some_and(|p| p.as_os_str() == "-");
    let output: Box<dyn Write + Send> =
        if files.iter().any(is_dash) { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
    let names = match args.symbols {
        Symbols::Demangled => Names::Demangled,
        Symbols::Linkage => Names::Linkage,
    };
    let style = TextStyle { color: stderr_color(), names };
    let mut config = Config {
        initrd,
        count_instructions: stats.is_some() || page.is_some(),
        picture: page.is_some(),
        ..args.config(kernel)
    };
    let lost = Arc::new(AtomicBool::new(false));
    let printer = FindingPrinter { style, quiet: false, json, lost: lost.clone() };
    let restore = terminal::Restore;
    let console = Console { output, input: terminal::input() };
    let places = Places {
        write: [&page, &log].into_iter().flatten().filter_map(Target::folder).collect(),
        again: false,
    };
    config.jail = confine::enter(args.guest.jail.into(), &config, &places)?;
    watchdog::start(config.timeout, stop.clone(), config.jail.clone());
    let report = sandbox::run(&config, console, Box::new(printer), stop);
    drop(restore);
    let report = report?;
    // If standard error is closed, the output is lost.
    let _ = text::write_repeats(&mut io::stderr().lock(), &report.findings, style);
    print_cpus(&report.cpus, style);
    say(format_args!("{}{}", summary(&report), unjailed(&config)));
    if let Some(mut stats) = stats {
        serde_json::to_writer_pretty(&mut stats, &report.stats)?;
        stats.write_all(b"\n").and_then(|()| stats.flush()).context("cannot write --stats")?;
    }
    write_reports(args, &report.summary(&config), names, page.map(|page| (page, roots)), log)?;
    if lost.load(Relaxed) {
        bail!("cannot write --findings");
    }
    Ok(report.status())
}

/// Writes the page and the log about a run that has ended.
fn write_reports(
    args: &Run,
    run: &RunSummary,
    names: Names,
    page: Option<(Target, SourceRoots)>,
    log: Option<Target>,
) -> Result<()> {
    let kernel = args.kernel.to_string_lossy();
    if let Some((target, roots)) = page {
        let file = Some(args.kernel.as_path());
        let roots = &roots;
        let page = html::Page { kernel: &kernel, file, roots, run, names, verdicts: Vec::new() };
        target.write(|out| html::write(out, &page)).context("cannot write --html")?;
    }
    if let Some(target) = log {
        let root = std::env::current_dir().ok();
        let log = sarif::Log { kernel: &kernel, root: root.as_deref(), run };
        target.write(|out| sarif::write(out, &log)).context("cannot write --sarif")?;
    }
    Ok(())
}

/// Most CPUs whose state is printed.
const CPUS_SHOWN: usize = 8;

/// Prints the state of the CPUs to standard error. If that is closed, it is lost.
fn print_cpus(cpus: &[CpuState], style: TextStyle) {
    let mut out = io::stderr().lock();
    for cpu in cpus.iter().take(CPUS_SHOWN) {
        let _ = cpu.write(&mut out, style);
    }
    if cpus.len() > CPUS_SHOWN {
        let _ = writeln!(out, "The other {} CPUs are not shown", cpus.len() - CPUS_SHOWN);
    }
}

/// The option that would let a run continue, for a message.
fn hint(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::TimeLimit(_) => ": --timeout gives it more",
        Outcome::ShadowLimit(_) => ": --shadow-limit gives it more",
        Outcome::DebugExit { success: false, .. } => ": --debug-exit sets the value of success",
        _ => "",
    }
}

/// The end of the summary of a run without a jail.
fn unjailed(config: &Config) -> &'static str {
    if config.jail.is_some() { "" } else { "; without a jail (--jail off)" }
}

/// Summary of a run, in one line.
fn summary(report: &RunReport) -> String {
    let outcome = format!("{}{}", report.outcome, hint(&report.outcome));
    let stats = &report.stats;
    let findings = match stats.findings {
        0 => "no findings".to_owned(),
        1 => "1 finding".to_owned(),
        n => format!("{n} findings"),
    };
    if let Some(why) = stats.unchecked.filter(|_| stats.findings == 0) {
        return format!("{outcome}; the guest ran unchecked: {why}");
    }
    let shadow = &stats.shadow;
    format!(
        "{outcome}; {findings}; shadow {} at its peak (1/8 of the guest's memory is {})",
        size(shadow.peak_bytes()),
        size(stats.guest.memory_bytes / 8),
    )
}

fn demo(args: &Demo, stop: &AtomicBool) -> Result<u8> {
    let kernel = crate::kernel::test_kernel().context(
        "built without the test kernel: in a checkout of Umbra, `cargo xtask demo` builds both",
    )?;
    let scenarios = crate::kernel::scenarios(kernel)?;
    if args.list {
        demo::list(&scenarios, &mut io::stdout().lock())?;
        return Ok(0);
    }
    let mut chosen = demo::choose(&scenarios, &args.scenarios)?;
    if matches!(args.guest.shadow, Shadow::Off) && args.scenarios.is_empty() {
        // Unchecked, the others would really corrupt memory.
        chosen.retain(|scenario| scenario.expected.is_empty());
    }
    let roots = source_roots(&args.source_root)?;
    let page = target(args.html.as_deref())?;
    let folder = args.out.as_deref().map(demo::Folder::new).transpose()?;
    let shown = match (args.quiet, args.verbose || !args.scenarios.is_empty()) {
        (true, _) => demo::Shown::None,
        (false, true) => demo::Shown::All,
        (false, false) => demo::Shown::First,
    };
    let mut config = Config {
        picture: page.is_some() || folder.is_some(),
        ..args.guest.config(kernel.into(), String::new())
    };
    let folders = page.as_ref().and_then(Target::folder).into_iter();
    let places = Places {
        write: folders.chain(folder.as_ref().and_then(demo::Folder::folder)).collect(),
        again: true,
    };
    config.jail = confine::enter(args.guest.jail.into(), &config, &places)?;
    demo::run(&config, &chosen, demo::Outputs { shown, page, folder, roots }, stop)
}

/// Restores the terminal when a signal ends the process, or ends the run.
fn restore_terminal_at_signals() {
    use signal_hook::consts::{SIGABRT, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGABRT] {
        let handler = move || {
            terminal::restore();
            if ![SIGINT, SIGTERM, SIGHUP].contains(&signal) {
                // A signal handler cannot report its error.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        };
        // SAFETY: the handler only makes system calls and reads statics that were set before.
        if let Err(error) = unsafe { signal_hook::low_level::register(signal, handler) } {
            log::warn!("signals are not handled: {error}");
        }
    }
}

/// Has all threads take memory from one arena of glibc's. By default each thread has its own, which
/// grows by a system call for a page or two; and what one thread takes, another gives back here:
/// they share one state and its lock.
fn use_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a parameter of the allocator, before there is a second thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Parses the command line and executes it. To be called first in a program's `main`, since it
/// calls [`symbol_worker`](crate::symbol_worker).
pub fn main() -> ExitCode {
    crate::symbol_worker();
    use_one_arena();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_target(false)
        .init();
    // clap itself exits with 2 on a bad command line and 0 for help.
    let cli = Cli::parse();
    let stop = Arc::new(AtomicBool::new(false));
    // The first Ctrl-C ends the run cleanly; a second one ends the process.
    restore_terminal_at_signals();
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let registered =
            signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())
                .and_then(|_| signal_hook::flag::register(signal, stop.clone()));
        if let Err(error) = registered {
            log::warn!("signals are not handled: {error}");
        }
    }
    let result = match &cli.command {
        Command::Run(args) => run(args, &stop),
        Command::Demo(args) => demo(args, &stop),
    };
    match result {
        Ok(status) => status.into(),
        Err(error) => match error.downcast_ref() {
            Some(RunError::Abandoned(outcome)) => {
                // Nobody may be reading standard error.
                say_if_read(format_args!("{}", in_full(&error)));
                outcome.status(false).into()
            }
            Some(RunError::NotBegun(outcome)) => {
                say(format_args!("{error}"));
                outcome.status(false).into()
            }
            _ => {
                say(format_args!("{}", in_full(&error)));
                USAGE.into()
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn keep_going_and_stop_at_exclude_each_other() {
        assert!(
            Cli::try_parse_from(["umbra", "run", "k", "--keep-going", "--stop-at", "3"]).is_err()
        );
        assert!(Cli::try_parse_from(["umbra", "run", "k", "--stop-at", "0"]).is_err());
        assert!(Cli::try_parse_from(["umbra", "run", "k", "--keep-going"]).is_ok());
    }
}
