//! Runs other programs so that none outlives this one.
//!
//! Each has a process group of its own, which a signal that ends this program ends first; and the
//! kernel ends it should this program be killed.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

use anyhow::{Context as _, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::progress::Progress;

/// The process group of the program that runs now; 0 if none.
static RUNNING: AtomicI32 = AtomicI32::new(0);

/// Makes Ctrl-C, and the other ways to ask a program to end, end the running child first.
pub fn forward_signals() -> Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let forward = move || {
            let group = RUNNING.load(SeqCst);
            if group > 0 {
                // SAFETY: `kill` may be called in a signal handler, and takes no memory of ours.
                unsafe { libc::kill(-group, SIGTERM) };
            }
            // Its error could not be told from here; the default action for these signals is to
            // end.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        };
        // SAFETY: the handler calls only what may be called in one.
        unsafe { signal_hook::low_level::register(signal, forward) }
            .context("cannot handle signals")?;
    }
    Ok(())
}

/// What a finished program left.
pub struct Finished {
    /// It ended with status 0.
    pub success: bool,
    /// What it printed, both streams as they came.
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

    /// Takes an environment variable away.
    pub fn without(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.inner.env_remove(name);
        self
    }

    /// Runs it to its end and hands each line it prints to `line`, as it comes.
    pub fn stream(&mut self, mut line: impl FnMut(&str)) -> Result<Finished> {
        // One pipe for both streams keeps their lines in order.
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        let copy = writer.try_clone().context("cannot make a pipe")?;
        self.inner.stdin(Stdio::null()).stdout(writer).stderr(copy);
        let child = self.spawn();
        // The command's own ends of the pipe would keep it open.
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
        RUNNING.store(0, SeqCst);
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

    /// Runs it and shows what it printed if it fails, which is then an error.
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

    /// Becomes the program. Returns only if that fails.
    pub fn replace(&mut self) -> Result<ExitCode> {
        Err(self.inner.exec()).with_context(|| format!("cannot run {}", self.program.display()))
    }

    fn spawn(&mut self) -> Result<Child> {
        self.inner.process_group(0);
        // SAFETY: getpid has no preconditions.
        let parent = unsafe { libc::getpid() };
        let end_with_parent = move || {
            // SAFETY: both only concern the calling process, and may be called between fork and
            // exec.
            let orphaned = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 || libc::getppid() != parent
            };
            if orphaned { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure allocates nothing and takes no lock.
        unsafe { self.inner.pre_exec(end_with_parent) };
        let child =
            self.inner.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        RUNNING.store(i32::try_from(child.id()).unwrap_or(0), SeqCst);
        Ok(child)
    }
}

/// What a program prints to its standard output, if it can be run and succeeds.
pub fn ask(program: &Path, arguments: &[&str]) -> Option<String> {
    let output =
        std::process::Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Where a program lies, if the search path has it.
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
