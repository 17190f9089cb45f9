//! Watches a running nested host: passes on its output, and waits for its end.

use std::fs;
use std::io::{self, BufRead as _, BufReader, PipeReader, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::process::Running;
use crate::progress::Progress;

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// The command ended, with this status.
    Exit(u8),
    /// There is no status, for this reason.
    Trouble(String),
}

/// Destination of the command's output.
pub enum Output<'a> {
    /// Standard output and standard error of this program.
    PassedOn,
    /// Each line of both, as it comes.
    Lines(&'a mut (dyn FnMut(&str) + Send)),
}

/// Message from a thread that reads from the host.
enum Said {
    Control(String),
    Line(String),
    /// The reader of our own output is gone.
    Unwanted,
    /// A stream ended.
    End,
}

/// Our ends of the pipes from a host.
pub struct Streams {
    out: PipeReader,
    err: PipeReader,
    control: PipeReader,
}

/// The host's ends: the command's standard output and error, and control.
pub type Ports = [OwnedFd; 3];

/// The pipes between a host and this program.
pub fn pipes(output: &Output<'_>) -> io::Result<(Streams, Ports)> {
    let (control, to_control) = io::pipe()?;
    let (out, to_out) = io::pipe()?;
    let (err, to_err) = match output {
        Output::PassedOn => io::pipe()?,
        Output::Lines(_) => (out.try_clone()?, to_out.try_clone()?),
    };
    let ports = [to_out, to_err, to_control].map(OwnedFd::from);
    Ok((Streams { out, err, control }, ports))
}

/// A host that runs.
pub struct Watch<'a> {
    pub running: Running,
    pub begin: Instant,
    /// Time limit until the host says "ready".
    pub boot: Duration,
    /// Time limit of the run.
    pub timeout: Duration,
    /// Files whose last lines may say why the host ended, the best one first.
    pub logs: &'a [PathBuf],
    pub progress: &'a Progress,
}

impl Watch<'_> {
    /// Passes on the output until the host ends.
    pub fn follow(mut self, streams: Streams, output: Output<'_>) -> Result<Ended> {
        let Streams { out, err, control } = streams;
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
            let limit = if ready { self.timeout } else { self.timeout.min(self.boot) };
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
                    end = Some(Ended::Trouble(late(ready, limit, self.timeout)));
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if matches!(end, Some(Ended::Trouble(_))) {
                break;
            }
        }
        self.progress.finish();
        // It ended by itself, or is killed here. Then the threads reach the end of their streams.
        if end.as_ref().is_none_or(|end| matches!(end, Ended::Trouble(_))) {
            self.running.kill();
        }
        drop(received);
        self.running.wait()?;
        for thread in threads {
            // The thread does not panic; if it did, only its output would be lost.
            let _ = thread.join();
        }
        Ok(end.unwrap_or_else(|| Ended::Trouble(crashed(self.logs))))
    }
}

/// Why a host ended without an exit status: the last lines of the first of these files that has
/// any.
fn crashed(logs: &[PathBuf]) -> String {
    let last = logs.iter().map(|log| last_lines(log)).find(|last| !last.is_empty());
    match last {
        None => "the nested host ended before the command did".into(),
        Some(last) => {
            format!("the nested host ended before the command did; its last words: {last}")
        }
    }
}

/// The last lines of a log, as one.
fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(5)..].join(" | ");
    last.chars().filter(|c| !c.is_control()).take(600).collect()
}

fn late(ready: bool, limit: Duration, timeout: Duration) -> String {
    let what = if ready { "the command did not end" } else { "the nested host did not boot" };
    let advice = if limit == timeout { ": --timeout sets the limit" } else { "" };
    format!("{what} within {} s{advice}", limit.as_secs())
}

/// Decodes a control word of the host that ends the run.
fn ended(word: &str) -> Option<Ended> {
    let (what, rest) = word.split_once(' ').unwrap_or((word, ""));
    let rest: String = rest.chars().filter(|c| !c.is_control()).take(200).collect();
    match what {
        "exit" => rest.parse().ok().map(Ended::Exit),
        "no-kvm" => Some(Ended::Trouble(format!(
            "there is no KVM in the nested host, perhaps since its CPU has neither SVM (QEMU's \
             `-cpu max,+svm`) nor VMX (Bochs'): {rest}"
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
    // A line that is too long comes in pieces.
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

/// Flushes after each write, so that incomplete lines appear at once.
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
    fn a_limit_that_can_be_set_is_told_as_such() {
        let (short, long) = (Duration::from_secs(300), Duration::from_secs(3600));
        assert_eq!(late(false, short, long), "the nested host did not boot within 300 s");
        assert!(late(false, short, short).ends_with("300 s: --timeout sets the limit"));
        assert!(late(true, long, long).starts_with("the command did not end within 3600 s: "));
    }

    #[test]
    fn a_host_that_crashed_is_told_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let logs = ["console", "log"].map(|name| folder.path().join(name));
        assert!(crashed(&logs).ends_with("before the command did"));
        fs::write(&logs[1], "no firmware\n").unwrap();
        assert!(crashed(&logs).ends_with("last words: no firmware"));
        fs::write(&logs[0], "1\r\n2\n\n3\n4\n5\n\x1b6\n").unwrap();
        assert!(crashed(&logs).ends_with("last words: 2 | 3 | 4 | 5 | 6"));
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
            reason.contains("neither SVM") && reason.ends_with("kvm_amd: not supported"),
            "{reason}"
        );
    }
}
