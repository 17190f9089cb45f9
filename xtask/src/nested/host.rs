//! One run of the nested host: its start, the command's output, and its end.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, PipeReader, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use umbra_testkit::cpio::Archive;

use super::packages::{self, Kernel, Program};
use crate::Context;
use crate::process::{Command, Running};
use crate::progress::Progress;

/// The first program of the host.
const INIT: &str = include_str!("init.sh");
/// What it loads, with parameters: nobody needs a third level of virtual machines.
const MODULES: [(&str, &str); 6] = [
    ("kvm_amd", "nested=0"),
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("9pnet_virtio", ""),
    ("9p", ""),
    ("overlay", ""),
];
/// A host that does not say "ready" within this time never will.
const BOOT: Duration = Duration::from_secs(300);

/// All that a nested host is made of.
pub struct Host {
    workspace: PathBuf,
    qemu: Program,
    kernel: Kernel,
    busybox: PathBuf,
}

/// What to run in a nested host, and how.
pub struct Job {
    /// A script for `/bin/sh`.
    pub script: Vec<u8>,
    /// One instruction is one nanosecond.
    pub icount: bool,
    /// Memory of the host.
    pub memory_mib: u32,
    /// For all of it.
    pub timeout: Duration,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// The command ended, with this status.
    Exit(u8),
    /// It did not, for this reason.
    Trouble(String),
}

/// Where the command's output goes.
pub enum Output<'a> {
    /// Standard output and standard error of this program.
    PassedOn,
    /// Each line of both, as it comes.
    Lines(&'a mut (dyn FnMut(&str) + Send)),
}

/// A word between the quotes of a shell. A name that is not UTF-8 is not kept.
pub fn quoted(word: &OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"))
}

/// A script that runs a command in the current folder, with the current environment.
pub fn in_this_place(command: &[OsString]) -> Result<Vec<u8>> {
    let folder = std::env::current_dir().context("the current folder is gone")?;
    let words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
    let script = format!("cd {} || exit 2\nexec {}\n", quoted(folder.as_os_str()), words.join(" "));
    Ok(with_this_environment(script.as_bytes()))
}

/// A script that runs in the current environment.
pub fn with_this_environment(script: &[u8]) -> Vec<u8> {
    let mut whole = String::new();
    for (name, value) in std::env::vars_os() {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let name = name.to_string_lossy();
        // There is another /tmp.
        if name != "TMPDIR" && name.chars().all(is_name) && !name.starts_with(char::is_numeric) {
            let _ = writeln!(whole, "export {name}={}", quoted(&value));
        }
    }
    let mut whole = whole.into_bytes();
    whole.extend(script);
    whole
}

impl Host {
    /// Fetches what is missing.
    ///
    /// # Errors
    ///
    /// QEMU or Debian's kernel are neither there nor to be had; the message says what to do.
    pub fn prepare(context: &Context) -> Result<Self> {
        let advice = "the nested host is made of Debian's packages qemu-system-x86, \
                      linux-image-amd64 and busybox-static";
        let parts = || -> Result<_> {
            Ok((packages::qemu(context)?, packages::kernel(context)?, packages::busybox(context)?))
        };
        let (qemu, kernel, busybox) = parts().context(advice)?;
        Ok(Self { workspace: context.root.clone(), qemu, kernel, busybox })
    }

    /// What figures of this host depend on: the versions of QEMU and of the kernel.
    pub fn versions(&self) -> String {
        format!("{}; Linux {}", self.qemu.version, self.kernel.release)
    }

    /// Boots it, runs a job, and waits for the end.
    ///
    /// # Errors
    ///
    /// The host cannot be started at all.
    pub fn run(&self, job: &Job, progress: &Progress, output: Output<'_>) -> Result<Ended> {
        let folder = tempfile::tempdir().context("no temporary folder can be made")?;
        let initrd = folder.path().join("initrd");
        self.write_initrd(&initrd, job).context("cannot write the nested host's first files")?;
        let console = folder.path().join("console");
        let (control, to_control) = io::pipe()?;
        let (out, to_out) = io::pipe()?;
        let (err, to_err) = match output {
            Output::PassedOn => io::pipe()?,
            Output::Lines(_) => (out.try_clone()?, to_out.try_clone()?),
        };
        let ports = [to_out, to_err, to_control].map(OwnedFd::from);
        let mut qemu = self.qemu(job, &initrd, &console, &ports);
        let running = qemu.start(&ports)?;
        drop(ports);
        let begin = Instant::now();
        let end = Watch { running, begin, timeout: job.timeout, progress }
            .follow(control, out, err, output)?;
        Ok(end.unwrap_or_else(|| Ended::Trouble(crashed(&console))))
    }

    /// QEMU's command line. `ports` are the command's standard output and error, and control.
    fn qemu(&self, job: &Job, initrd: &Path, console: &Path, ports: &[OwnedFd; 3]) -> Command {
        let mut command = Command::new(&self.qemu.path, &self.workspace);
        for (name, value) in &self.qemu.variables {
            command.env(name, value);
        }
        for folder in &self.qemu.data {
            command.args([OsStr::new("-L"), folder.as_os_str()]);
        }
        if job.icount {
            command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        } else {
            command.args(["-accel", "tcg,thread=multi"]);
        }
        // More than one CPU, and QEMU 7.2 corrupts the host's kernel when guests give memory back.
        command.args(["-machine", "pc", "-cpu", "max,+svm", "-smp", "1"]);
        command.args(["-m", &job.memory_mib.to_string()]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-vga",
            "none",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
        command.args([OsStr::new("-kernel"), self.kernel.image.as_os_str()]);
        command.args([OsStr::new("-initrd"), initrd.as_os_str()]);
        command.args(["-serial".into(), option("file:", console, "")]);
        command.args(["-device", "virtio-serial-pci"]);
        for (port, fd) in ports.iter().enumerate() {
            let (set, fd) = (port + 1, fd.as_raw_fd());
            command.args(["-add-fd", &format!("fd={fd},set={set}")]);
            // To append: QEMU cuts a file off otherwise, which a pipe cannot be.
            let to = format!("file,id=port{set},path=/dev/fdset/{set},append=on");
            command.args(["-chardev", &to]);
            command.args(["-device", &format!("virtserialport,nr={set},chardev=port{set}")]);
        }
        let target = self.workspace.join("target");
        for (tag, folder, access) in [
            ("machine", Path::new("/"), "readonly=on,"),
            ("workspace", &self.workspace, "readonly=on,"),
            ("target", &target, ""),
        ] {
            let settings = format!(",mount_tag={tag},security_model=none,{access}multidevs=remap");
            command.args(["-virtfs".into(), option("local,path=", folder, &settings)]);
        }
        command
    }

    fn write_initrd(&self, file: &Path, job: &Job) -> Result<()> {
        let mut archive = Archive::new(BufWriter::new(File::create(file)?));
        for folder in ["bin", "dev", "proc", "sys", "machine", "modules", "job"] {
            archive.folder(folder)?;
        }
        archive.file("bin/busybox", true, &fs::read(&self.busybox)?)?;
        archive.file("init", true, INIT.as_bytes())?;
        let mut order = String::new();
        for (name, bytes) in self.kernel.modules(&MODULES.map(|(name, _)| name))? {
            let parameters = MODULES.iter().find(|(module, _)| *module == name);
            let _ =
                writeln!(order, "{name} {}", parameters.map_or("", |(_, parameters)| parameters));
            archive.file(&format!("modules/{name}.ko"), false, &bytes)?;
        }
        archive.file("modules/order", false, order.as_bytes())?;
        archive.file("job/workspace", false, self.workspace.as_os_str().as_encoded_bytes())?;
        archive.file("job/command", false, &job.script)?;
        archive.finish()?;
        Ok(())
    }
}

/// An option of QEMU's with a path in it, in which a comma is doubled.
fn option(before: &str, path: &Path, after: &str) -> OsString {
    let mut option = OsString::from(before);
    for (number, part) in path.to_string_lossy().split(',').enumerate() {
        if number > 0 {
            option.push(",,");
        }
        option.push(part);
    }
    option.push(after);
    option
}

/// Why a host ended without a word: the last lines of its console, if there are any.
fn crashed(console: &Path) -> String {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(5)..].join(" | ");
    let last: String = last.chars().filter(|c| !c.is_control()).take(600).collect();
    if last.is_empty() {
        "the nested host ended before the command did".into()
    } else {
        format!("the nested host ended before the command did; its last words: {last}")
    }
}

/// What a thread that reads from the host has to say.
enum Said {
    Control(String),
    Line(String),
    /// The reader of our own output is gone.
    Unwanted,
    /// A stream ended.
    End,
}

/// A host that runs.
struct Watch<'a> {
    running: Running,
    begin: Instant,
    timeout: Duration,
    progress: &'a Progress,
}

impl Watch<'_> {
    /// Hands on what comes until the host ends. `None` if it ended without a status.
    fn follow(
        mut self,
        control: PipeReader,
        out: PipeReader,
        err: PipeReader,
        output: Output<'_>,
    ) -> Result<Option<Ended>> {
        let (send, received) = mpsc::sync_channel(64);
        let mut threads = vec![{
            let send = send.clone();
            thread::spawn(move || lines(control, &send, Said::Control))
        }];
        let mut nothing = |_: &str| ();
        let on_line: &mut (dyn FnMut(&str) + Send) = match output {
            Output::PassedOn => {
                for (stream, to) in [(out, Stream::Out), (err, Stream::Err)] {
                    let send = send.clone();
                    threads.push(thread::spawn(move || pass_on(stream, to, &send)));
                }
                &mut nothing
            }
            Output::Lines(on_line) => {
                drop(err);
                let send = send.clone();
                threads.push(thread::spawn(move || lines(out, &send, Said::Line)));
                on_line
            }
        };
        drop(send);
        let mut open = threads.len();
        let mut end = None;
        let mut ready = false;
        while open > 0 {
            let limit = if ready { self.timeout } else { self.timeout.min(BOOT) };
            match received.recv_timeout(limit.saturating_sub(self.begin.elapsed())) {
                Ok(Said::Line(line)) => on_line(&line),
                Ok(Said::End) => open -= 1,
                Ok(Said::Unwanted) => {
                    end = end.or(Some(Ended::Trouble("nobody reads the output".into())))
                }
                Ok(Said::Control(word)) if word == "ready" => {
                    ready = true;
                    self.progress.finish();
                }
                Ok(Said::Control(word)) => end = end.or_else(|| ended(&word)),
                Err(RecvTimeoutError::Timeout) => {
                    end = Some(Ended::Trouble(late(ready, limit)));
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if matches!(end, Some(Ended::Trouble(_))) {
                break;
            }
        }
        self.progress.finish();
        // Ended by itself, or has to be: then the threads come to the end of their streams.
        if end.as_ref().is_none_or(|end| matches!(end, Ended::Trouble(_))) {
            self.running.kill();
        }
        drop(received);
        self.running.wait()?;
        for thread in threads {
            // Nothing in there panics; and its output would be all that is lost.
            let _ = thread.join();
        }
        Ok(end)
    }
}

fn late(ready: bool, limit: Duration) -> String {
    let seconds = limit.as_secs();
    if ready {
        format!("the command did not end within {seconds} s: --timeout sets the limit")
    } else {
        format!("the nested host did not boot within {seconds} s")
    }
}

/// What a word of the host's means for the end of the run.
fn ended(word: &str) -> Option<Ended> {
    let (what, rest) = word.split_once(' ').unwrap_or((word, ""));
    let rest: String = rest.chars().filter(|c| !c.is_control()).take(200).collect();
    match what {
        "exit" => rest.parse().ok().map(Ended::Exit),
        "no-kvm" => Some(Ended::Trouble(format!(
            "there is no KVM in the nested host, perhaps since this QEMU's CPU has no SVM \
             (`-cpu max,+svm`): {rest}"
        ))),
        "no-files" => Some(Ended::Trouble(format!(
            "the nested host cannot use this machine's files ({rest}): is this a QEMU with virtfs?"
        ))),
        _ => None,
    }
}

/// Sends each line of a stream.
fn lines(stream: PipeReader, to: &mpsc::SyncSender<Said>, what: impl Fn(String) -> Said) {
    let mut stream = BufReader::new(stream);
    let mut bytes = Vec::new();
    // A line without an end comes in pieces.
    while stream.by_ref().take(1 << 16).read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
        let line = String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned();
        if to.send(what(line)).is_err() {
            return;
        }
        bytes.clear();
    }
    let _ = to.send(Said::End);
}

#[derive(Clone, Copy)]
enum Stream {
    Out,
    Err,
}

/// Copies a stream to one of ours.
fn pass_on(mut stream: PipeReader, to: Stream, said: &mpsc::SyncSender<Said>) {
    let copied = match to {
        Stream::Out => io::copy(&mut stream, &mut Flushed(io::stdout())),
        Stream::Err => io::copy(&mut stream, &mut io::stderr()),
    };
    let _ = said.send(if copied.is_ok() { Said::End } else { Said::Unwanted });
}

/// Writes at once what is written, so that nobody waits for the end of a line.
struct Flushed(io::Stdout);

impl io::Write for Flushed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.0.write(bytes)?;
        self.0.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let words: Vec<OsString> =
            ["printf", "%s|", "a b", "it's", "$HOME", "\\", ""].map(Into::into).into();
        let script = in_this_place(&words).unwrap();
        let script = std::str::from_utf8(&script).unwrap();
        let mut shell = std::process::Command::new("/bin/sh");
        let output = shell.arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|it's|$HOME|\\||");
    }

    #[test]
    fn the_hosts_words_are_understood() {
        assert_eq!(ended("exit 3"), Some(Ended::Exit(3)));
        assert_eq!(ended("exit 300"), None);
        assert_eq!(ended("hello"), None);
        let Some(Ended::Trouble(reason)) = ended("no-kvm kvm_amd: not\x1b supported") else {
            panic!()
        };
        assert!(
            reason.contains("no SVM") && reason.ends_with("kvm_amd: not supported"),
            "{reason}"
        );
    }

    #[test]
    fn paths_in_options_may_have_commas() {
        assert_eq!(option("file:", Path::new("/a,b"), ",x"), "file:/a,,b,x");
    }
}
