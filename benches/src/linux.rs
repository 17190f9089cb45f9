//! The cost of booting the small Linux to the start of its first program, with Umbra and with QEMU.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use umbra_tests::linux::{initrd, kernel};

use crate::figure::{Figure, Verdict, markdown, table};
use crate::host::Host;
use crate::program::{FOLDER, Program};
use crate::results::Section;

/// The line that Linux prints before its first program.
const INIT: &[u8] = b"Run /init as init process";
/// The first program: `1: jmp 1b`.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// Time limit of a boot.
const LIMIT: Duration = Duration::from_secs(1800);
/// Poll interval for the console.
const LOOK: Duration = Duration::from_millis(5);
const MIB: f64 = 1_048_576.0;
const BOOT: &str = "the small Linux in 128 MiB, one CPU, unchecked, to the start of /init";
/// Debian's kernel, unchanged.
const STOCK: &str =
    "Debian's own kernel (bzImage) in 256 MiB, one CPU, unchecked, to the start of /init";
/// Text before the figures.
const ABOUT: &str = "\
`vmlinux` of `cargo xtask linux` (`guest/linux/config/small.config` on top of `tinyconfig`), started
without a boot loader, until its console says that it starts `/init`; and Debian's kernel the same
way. Umbra's command line is its own default, which is longer where ring 0 is emulated
(`vmm/machine/src/loader/linux.rs`). QEMU is Debian's, with the same kernel and initrd, and
`console=ttyS0 panic=-1`; what it cannot boot has the reason beside it. All seconds are by the
clock, and begin with the program's start.
";

/// Measures what it costs to boot Linux; BENCHMARKS.md gets it too. Exit status: 0, 1 when a figure
/// is over its limit, 2 when something cannot be measured.
#[derive(Parser)]
#[command(name = "linux")]
struct Arguments {
    /// Only Umbra.
    #[arg(long)]
    no_qemu: bool,
    /// Do not change BENCHMARKS.md and the files that it is made of.
    #[arg(long)]
    keep: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !arguments.bench {
        // `cargo test --all-targets` starts it too.
        println!("nothing is measured without --bench: use `cargo xtask bench linux`");
        return ExitCode::SUCCESS;
    }
    run(&arguments).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let folder = Path::new(FOLDER);
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let (image, initrd_file) = (kernel("small/vmlinux"), folder.join("initrd"));
    ensure!(image.exists(), "there is no {}: `cargo xtask linux` builds it", image.display());
    fs::write(&initrd_file, initrd(&SPIN)).context("cannot write the initrd")?;
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} [{elapsed}] {wide_msg}")?);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar.set_message("building umbra");
    let program = Program::build(folder)?;
    bar.set_message("booting Linux by umbra");
    let small =
        Booted { group: BOOT, kernel: &image, memory: "128M", initrd: &initrd_file, folder };
    let (mut figures, counted) = umbra(&program, &small)?;
    let qemus = |booted: &Booted| -> Vec<Figure> {
        let accels: &[_] = if arguments.no_qemu { &[] } else { &["kvm", "tcg"] };
        let boot = |accel: &&str| {
            bar.set_message(format!("booting Linux by QEMU, {accel}"));
            qemu(accel, booted)
        };
        accels.iter().map(boot).collect()
    };
    figures.extend(qemus(&small));
    let stock = kernel("debian/bzImage");
    if stock.exists() {
        bar.set_message("booting Debian's Linux by umbra");
        let stock = Booted { group: STOCK, kernel: &stock, memory: "256M", ..small };
        figures.extend(debian(&program, &stock)?);
        figures.extend(qemus(&stock));
    }
    bar.finish_and_clear();
    let host = Host::new(Some(counted)).to_string();
    println!("{host}\n{}", table(&figures).trim_end());
    let file = folder.join("linux.json");
    fs::write(&file, serde_json::to_string_pretty(&figures)? + "\n")
        .with_context(|| format!("cannot write {}", file.display()))?;
    // A run without QEMU is incomplete, so it does not go on the page.
    if !arguments.keep && !arguments.no_qemu {
        Section {
            name: "40-linux-boot",
            title: "Booting Linux",
            command: "cargo xtask bench linux",
            host,
            body: ABOUT.to_owned() + &markdown(&figures),
        }
        .write()?;
    }
    Ok(ExitCode::from(u8::from(figures.iter().any(|figure| figure.verdict == Verdict::Over))))
}

/// What is booted.
#[derive(Clone, Copy)]
struct Booted<'a> {
    group: &'static str,
    kernel: &'a Path,
    memory: &'static str,
    initrd: &'a Path,
    /// Gets the logs.
    folder: &'a Path,
}

/// Boots with Umbra. Returns `--stats` and the seconds to the first program.
fn run_umbra(program: &Program, booted: &Booted) -> Result<(Value, f64)> {
    let &Booted { kernel, memory, initrd, folder, .. } = booted;
    let stats_file = folder.join("linux-stats.json");
    let mut command = Command::new(program.path());
    command.arg("run").arg(kernel).args(["--shadow=off", "--timeout=none", "--memory", memory]);
    command.arg("--initrd").arg(initrd).arg("--stats").arg(&stats_file);
    let (mut child, seconds) = boot(&mut command, &folder.join("linux-umbra"))?;
    let typed = child.stdin.as_mut().context("no standard input")?;
    std::io::Write::write_all(typed, b"\x01x").context("umbra does not read")?;
    let status = child.wait().context("cannot wait for umbra")?;
    ensure!(status.code() == Some(130), "umbra ended with {status}");
    let stats = serde_json::from_slice(&fs::read(&stats_file).context("no --stats")?)?;
    Ok((stats, seconds))
}

/// Debian's kernel, with Umbra.
fn debian(program: &Program, booted: &Booted) -> Result<Vec<Figure>> {
    let (stats, seconds) = run_umbra(program, booted)?;
    let counted = stats.pointer("/guest/instructions").and_then(Value::as_f64);
    let counted =
        counted.map(|count| Figure::new(STOCK, "guest instructions", count / 1e6, "million"));
    Ok(counted.into_iter().chain([Figure::new(STOCK, "umbra (KVM)", seconds, "s")]).collect())
}

/// The small kernel, with Umbra. Also returns whether the host counts guest instructions.
fn umbra(program: &Program, booted: &Booted) -> Result<(Vec<Figure>, bool)> {
    let (stats, seconds) = run_umbra(program, booted)?;
    let number = |path: &str| {
        stats
            .pointer(path)
            .and_then(Value::as_f64)
            .with_context(|| format!("--stats has no {path}"))
    };
    let outside = number("/host/outside_seconds")? / number("/host/seconds")? * 100.0;
    let instructions = number("/guest/instructions").ok();
    let mut figures = Vec::new();
    if let Some(count) = instructions {
        let figure = Figure::new(BOOT, "guest instructions", count / 1e6, "million").limit(40.0);
        figures.push(figure.note("a timer's ticks among them, which are more on a slower run"));
    }
    figures
        .push(Figure::new(BOOT, "umbra's time outside of KVM_RUN", outside, "percent").limit(2.0));
    let overhead = number("/host/vmm_overhead_bytes")? / MIB;
    figures
        .push(Figure::new(BOOT, "umbra's memory beside the guest's", overhead, "MiB").limit(8.0));
    figures.push(Figure::new(BOOT, "umbra (KVM)", seconds, "s"));
    Ok((figures, instructions.is_some()))
}

/// Boots with QEMU, which may fail.
fn qemu(accel: &str, booted: &Booted) -> Figure {
    let &Booted { group, kernel, memory, initrd, folder } = booted;
    let mut command = Command::new("qemu-system-x86_64");
    // All features, except those that stop a guest where ring 0 is emulated.
    let cpu = if accel == "kvm" { "host,-arch-capabilities,-cx16" } else { "max" };
    command.args(["-accel", accel, "-cpu", cpu, "-m", memory, "-nodefaults", "-display", "none"]);
    command.args(["-serial", "stdio", "-no-reboot", "-append", "console=ttyS0 panic=-1"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    let name = format!("QEMU ({})", accel.to_uppercase());
    match boot(&mut command, &folder.join(format!("linux-qemu-{accel}"))) {
        Ok((mut child, seconds)) => {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
            Figure::new(group, name, seconds, "s")
        }
        Err(error) => Figure::new(group, name, f64::NAN, "s").note(format!("{error:#}")),
    }
}

/// Starts a command, and waits until its output says that Linux starts its first program. Returns
/// the running process and the seconds until then.
fn boot(command: &mut Command, log: &Path) -> Result<(Child, f64)> {
    let path = |suffix: &str| -> PathBuf {
        let mut name = OsString::from(log);
        name.push(suffix);
        name.into()
    };
    let (out, err) = (path(".out"), path(".err"));
    let create = |path: &Path| {
        File::create(path).with_context(|| format!("cannot write {}", path.display()))
    };
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(create(&out)?)
        .stderr(create(&err)?)
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    loop {
        let said = fs::read(&out).unwrap_or_default();
        if said.windows(INIT.len()).any(|part| part == INIT) {
            return Ok((child, begin.elapsed().as_secs_f64()));
        }
        let ended = child.try_wait().context("cannot wait for it")?;
        let failed = fs::read_to_string(&err).unwrap_or_default();
        // QEMU does not exit when KVM cannot run its guest.
        let stuck = failed.contains("KVM internal error") || failed.contains("emulation failure");
        if ended.is_some() || stuck || begin.elapsed() > LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            let reason = failed.lines().take(2).collect::<Vec<_>>().join(" ");
            bail!("{}", if reason.is_empty() { "it does not get there" } else { &reason });
        }
        std::thread::sleep(LOOK);
    }
}
