//! Runs the program `umbra` as a user does: exit status, output, memory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Time limit of a run, unless the test sets another.
const HUNG: Duration = Duration::from_secs(100);

/// The result of a run.
#[derive(Debug)]
pub struct Run {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
    /// `--stats`, if requested.
    pub stats: Value,
    /// `--findings`, one value for each line, if requested.
    pub findings: Vec<Value>,
    /// Its duration.
    pub time: Duration,
}

impl Run {
    /// The exit status; none after a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Panics unless the program ended with `code`, and without a panic of its own.
    #[track_caller]
    pub fn expect(&self, code: i32) -> &Self {
        assert_eq!(self.code(), Some(code), "signal {:?}\n{}", self.status.signal(), self.tail());
        self.assert_no_panic();
        self
    }

    /// Panics if the program did.
    #[track_caller]
    pub fn assert_no_panic(&self) {
        for word in ["panicked at", "RUST_BACKTRACE", "stack backtrace", "this is a bug"] {
            assert!(!self.stderr.contains(word), "{word}:\n{}", self.tail());
        }
    }

    /// Panics unless it ended with status 2 and one sentence, which holds all of `words`.
    #[track_caller]
    pub fn expect_refusal(&self, words: &[&str]) {
        self.expect(2);
        let lines: Vec<_> = self.stderr.lines().collect();
        assert!(
            lines.len() == 1 && lines[0].starts_with("umbra: ") && lines[0].len() < 400,
            "not one sentence:\n{}",
            self.tail()
        );
        for word in words {
            assert!(lines[0].contains(word), "no {word:?} in: {}", lines[0]);
        }
        assert!(self.stdout.is_empty());
    }

    /// Panics unless it ended with status 2 and a message of the command-line parser, which holds
    /// all of `words`.
    #[track_caller]
    pub fn expect_usage(&self, words: &[&str]) {
        self.expect(2);
        let first = self.stderr.lines().next().unwrap_or_default();
        assert!(first.starts_with("error: "), "{}", self.tail());
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in:\n{}", self.tail());
        }
        assert!(self.stdout.is_empty());
    }

    /// The outcome in `--stats`.
    #[track_caller]
    pub fn outcome(&self) -> &str {
        self.stats["outcome"]
            .as_str()
            .unwrap_or_else(|| panic!("no outcome in --stats:\n{}", self.tail()))
    }

    /// A number in `--stats`, by its path (`/exits/total`).
    #[track_caller]
    pub fn figure(&self, path: &str) -> u64 {
        let value = self.stats.pointer(path).and_then(Value::as_u64);
        value.unwrap_or_else(|| panic!("no number {path} in {}", self.stats))
    }

    /// The end of standard error, for a message.
    pub fn tail(&self) -> String {
        let skip = self.stderr.chars().count().saturating_sub(3000);
        self.stderr.chars().skip(skip).collect()
    }
}

/// A run that was not started yet.
pub struct Umbra {
    command: Command,
    dir: TempDir,
    files: u32,
    collect: bool,
    patience: Duration,
}

impl Umbra {
    /// `program` with a command.
    pub fn new(program: &str, command: &str) -> Self {
        let mut process = Command::new(program);
        process
            .arg(command)
            .env_remove("RUST_LOG")
            .env_remove("RUST_BACKTRACE")
            .env_remove("NO_COLOR");
        process.stdin(Stdio::null());
        let dir = TempDir::new().expect("a temporary directory");
        Self { command: process, dir, files: 0, collect: false, patience: HUNG }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments from one string, separated by blanks.
    #[must_use]
    pub fn args(mut self, args: &str) -> Self {
        self.command.args(args.split_ascii_whitespace());
        self
    }

    /// Adds the path of a file with these contents as an argument.
    #[must_use]
    pub fn file(mut self, contents: &[u8]) -> Self {
        self.files += 1;
        let path = self.dir.path().join(format!("file{}", self.files));
        fs::write(&path, contents).expect("a temporary file");
        self.arg(path)
    }

    /// Asks for `--stats` and `--findings`, in files.
    #[must_use]
    pub fn collect(mut self) -> Self {
        self.collect = true;
        let (stats, findings) = (self.path("stats"), self.path("findings"));
        self.arg("--stats").arg(stats).arg("--findings").arg(findings)
    }

    /// Sets its time limit.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// A path in the run's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command itself.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it. Its output goes to files, so that it never blocks on a pipe.
    pub fn start(mut self) -> Started {
        let [stdout, stderr] = ["stdout", "stderr"]
            .map(|name| File::create(self.path(name)).expect("a temporary file"));
        self.command.stdout(stdout).stderr(stderr);
        let begin = Instant::now();
        let child = self.command.spawn().expect("the program starts");
        Started { umbra: self, child, begin }
    }

    /// Runs it to its end.
    pub fn run(self) -> Run {
        self.start().wait()
    }
}

/// A run that is under way.
pub struct Started {
    umbra: Umbra,
    child: Child,
    begin: Instant,
}

impl Started {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Types something, if its standard input is a pipe.
    #[track_caller]
    pub fn types(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("it reads");
    }

    /// Its standard input, if that is a pipe.
    #[track_caller]
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("a pipe")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: our child, which has not been waited for: nobody else can have its id.
        unsafe { libc::kill(self.pid(), signal) };
    }

    /// Its output so far on standard output or standard error (`stdout`, `stderr`).
    pub fn so_far(&self, which: &str) -> Vec<u8> {
        fs::read(self.umbra.path(which)).unwrap_or_default()
    }

    /// Waits until standard output or standard error holds `text`.
    #[track_caller]
    pub fn wait_for(&mut self, which: &str, text: &str) {
        let begin = Instant::now();
        while !String::from_utf8_lossy(&self.so_far(which)).contains(text) {
            if let Ok(Some(status)) = self.child.try_wait() {
                let [out, err] = ["stdout", "stderr"].map(|name| tail(&self.so_far(name)));
                panic!("{status}, and no {text:?} on {which}:\n{out}\n{err}");
            }
            assert!(
                begin.elapsed() < self.umbra.patience,
                "no {text:?} on {which}: {}",
                tail(&self.so_far(which))
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end. Panics after the time limit.
    pub fn wait(mut self) -> Run {
        let status = self.reap();
        let read = |name| fs::read(self.umbra.path(name)).unwrap_or_default();
        let json = |bytes: &[u8]| serde_json::from_slice(bytes).expect("JSON");
        let (stats, findings) = (read("stats"), read("findings"));
        Run {
            status,
            stdout: read("stdout"),
            stderr: String::from_utf8_lossy(&read("stderr")).into_owned(),
            stats: if stats.is_empty() { Value::Null } else { json(&stats) },
            findings: findings
                .split(|b| *b == b'\n')
                .filter(|line| !line.is_empty())
                .map(json)
                .collect(),
            time: self.begin.elapsed(),
        }
    }

    fn reap(&mut self) -> ExitStatus {
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status;
            }
            if self.begin.elapsed() > self.umbra.patience {
                // It may end just now.
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("the program does not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The processes that a process has started, and that have not ended.
pub fn children(parent: i32) -> Vec<i32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which is in parentheses: the state and the parent.
        let mut rest = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        rest.next().is_some_and(|state| state != "Z")
            && rest.next().is_some_and(|of| of == parent.to_string())
    });
    ours.collect()
}

/// The end of some output, for a message.
fn tail(output: &[u8]) -> String {
    String::from_utf8_lossy(&output[output.len().saturating_sub(3000)..]).into_owned()
}
