//! Runs other programs so that none outlives this one.
//!
//! Each has its own process group. A signal that ends this program ends the group first. If this
//! program is killed, the kernel ends the child.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

use crate::progress::Progress;

/// The process groups of the programs that run now; 0 where a place is free.
static RUNNING: [AtomicI32; 8] = [const { AtomicI32::new(0) }; 8];

/// Takes a place for a process group. If all are taken, only the kernel ends the program.
fn remember(group: i32) {
    let _ = RUNNING.iter().any(|place| place.compare_exchange(0, group, SeqCst, SeqCst).is_ok());
}

/// Frees the place of a process group.
fn forget(group: i32) {
    let _ = RUNNING.iter().any(|place| place.compare_exchange(group, 0, SeqCst, SeqCst).is_ok());
}

/// Makes Ctrl-C and similar signals end the running children first, and remove temporary folders.
pub fn forward_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            for group in RUNNING.iter().map(|place| place.load(SeqCst)).filter(|group| *group > 0) {
                // SAFETY: `kill` takes no memory of ours.
                unsafe { libc::kill(-group, SIGTERM) };
            }
            for folder in folders().iter() {
                // There is nobody to report an error to.
                let _ = std::fs::remove_dir_all(folder);
            }
            // Its error cannot be reported here; the default action for these signals ends the
            // process.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// The temporary folders that exist now.
fn folders() -> MutexGuard<'static, Vec<PathBuf>> {
    static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder that is removed when it is dropped, and when a signal ends this program.
pub struct TemporaryFolder(TempDir);

impl TemporaryFolder {
    /// A new empty folder.
    pub fn new() -> Result<Self> {
        let mut folders = folders();
        let folder = tempfile::tempdir().context("no temporary folder can be made")?;
        folders.push(folder.path().to_owned());
        Ok(Self(folder))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        folders().retain(|folder| folder != self.0.path());
    }
}

/// The result of a program.
pub struct Finished {
    /// It ended with status 0.
    pub success: bool,
    /// Its output, both streams in order.
    pub output: String,
}

/// A program to run.
pub struct Command {
    inner: std::process::Command,
    program: PathBuf,
}

impl Command {
    /// `program`, to run in `directory`.
    pub fn new(program: impl Into<PathBuf>, directory: &Path) -> Self {
        let program = program.into();
        let mut inner = std::process::Command::new(&program);
        inner.current_dir(directory);
        Self { inner, program }
    }

    /// Adds arguments.
    pub fn args(&mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.inner.args(arguments);
        self
    }

    /// Sets an environment variable.
    pub fn env(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.inner.env(name, value);
        self
    }

    /// Removes an environment variable.
    pub fn without(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.inner.env_remove(name);
        self
    }

    /// Runs it to its end and passes each line of its output to `line` at once.
    pub fn stream(&mut self, mut line: impl FnMut(&str)) -> Result<Finished> {
        // One pipe for both streams keeps their lines in order.
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        let copy = writer.try_clone().context("cannot make a pipe")?;
        self.inner.stdin(Stdio::null()).stdout(writer).stderr(copy);
        let child = self.spawn(&[]);
        // The command's copies of the pipe would keep it open.
        self.inner.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = child?;
        let mut output = String::new();
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_end_matches(['\r', '\n']);
            line(text);
            output.push_str(text);
            output.push('\n');
            bytes.clear();
        }
        let status = child.wait();
        forget(child.id().cast_signed());
        let status =
            status.with_context(|| format!("cannot wait for {}", self.program.display()))?;
        Ok(Finished { success: status.success(), output })
    }

    /// Runs it to its end, as part of the current step.
    pub fn run(&mut self, progress: &Progress) -> Result<Finished> {
        let verbose = progress.verbose();
        if verbose {
            eprintln!("+ {:?}", self.inner);
        }
        self.stream(|text| if verbose { eprintln!("{text}") } else { progress.detail(text) })
    }

    /// Runs it. If it fails, shows its output and returns an error.
    pub fn run_or_fail(&mut self, progress: &Progress) -> Result<String> {
        let finished = self.run(progress)?;
        if !finished.success {
            progress.finish();
            if !progress.verbose() {
                eprint!("{}", finished.output);
            }
            bail!("{} failed while {}", self.program.display(), progress.current());
        }
        Ok(finished.output)
    }

    /// Replaces this process by the program. Returns only on failure.
    pub fn replace(&mut self) -> Result<ExitCode> {
        Err(self.inner.exec()).with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Starts it without standard input and output. It inherits standard error and the descriptors
    /// `inherited`, under the same numbers.
    pub fn start(&mut self, inherited: &[OwnedFd]) -> Result<Running> {
        self.start_with(Stdio::null(), Stdio::inherit(), inherited)
    }

    /// The same, with this standard input and standard error.
    pub fn start_with(
        &mut self,
        input: Stdio,
        error: Stdio,
        inherited: &[OwnedFd],
    ) -> Result<Running> {
        self.inner.stdin(input).stdout(Stdio::null()).stderr(error);
        let inherited: Vec<RawFd> = inherited.iter().map(|fd| fd.as_raw_fd()).collect();
        let child = self.spawn(&inherited);
        // The command's copies would keep a pipe open.
        self.inner.stdin(Stdio::null()).stderr(Stdio::null());
        Ok(Running { child: child? })
    }

    fn spawn(&mut self, inherited: &[RawFd]) -> Result<Child> {
        self.inner.process_group(0);
        let inherited = inherited.to_owned();
        // SAFETY: getpid has no preconditions.
        let parent = unsafe { libc::getpid() };
        let end_with_parent = move || {
            // SAFETY: both only concern the calling process, and may be called between fork and
            // exec.
            let orphaned = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 || libc::getppid() != parent
            };
            // SAFETY: takes a flag from a file descriptor of this process, and touches no memory.
            let kept = |fd: &RawFd| unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } == 0;
            if orphaned || !inherited.iter().all(kept) {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: the closure allocates nothing and takes no lock.
        unsafe { self.inner.pre_exec(end_with_parent) };
        let child =
            self.inner.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        remember(child.id().cast_signed());
        Ok(child)
    }
}

/// A program that runs in the background. Killed when dropped.
pub struct Running {
    child: Child,
}

impl Running {
    /// Kills it.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<()> {
        self.child.wait().context("cannot wait for a program")?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        // An error cannot be handled here.
        let _ = self.child.wait();
        forget(self.child.id().cast_signed());
    }
}

/// The standard output of a program, if it succeeds.
pub fn ask(program: &Path, arguments: &[&str]) -> Option<String> {
    let output =
        std::process::Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The path of a program in the search path.
pub fn which(name: &str) -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_come_in_order_and_the_status_is_told() {
        let mut lines = Vec::new();
        let script = "echo one; echo two >&2; printf 'thr\\377ee'; exit 3";
        let finished = Command::new("/bin/sh", Path::new("/"))
            .args(["-c", script])
            .stream(|line| lines.push(line.to_owned()))
            .unwrap();
        assert_eq!(lines, ["one", "two", "thr\u{fffd}ee"]);
        assert!(!finished.success);
        assert_eq!(finished.output, "one\ntwo\nthr\u{fffd}ee\n");
        assert!(Command::new("/nowhere/program", Path::new("/")).stream(|_| {}).is_err());
    }
}
