//! What the program prints: findings as they come, and lines for people.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use umbra_report::text::{self, TextStyle};
use umbra_report::{Finding, Names, json, printable};

use crate::sandbox::Observer;

/// Prints findings as they come: text to standard error, JSON if requested.
pub(crate) struct FindingPrinter {
    pub(crate) style: TextStyle,
    pub(crate) quiet: bool,
    pub(crate) json: Option<Box<dyn Write + Send>>,
    /// The JSON could not be written.
    pub(crate) lost: Arc<AtomicBool>,
}

impl FindingPrinter {
    /// Text only.
    pub(crate) fn text(quiet: bool) -> Self {
        Self {
            style: TextStyle { color: stderr_color(), names: Names::Demangled },
            quiet,
            json: None,
            lost: Arc::default(),
        }
    }
}

impl Observer for FindingPrinter {
    fn finding(&mut self, finding: &Finding) {
        // If standard error is closed, the guest continues, and the exit status reports the
        // finding.
        if !self.quiet {
            let _ = text::write(&mut io::stderr().lock(), finding, self.style);
        }
        if let Some(out) = &mut self.json
            && let Err(error) = json::write(out, finding).and_then(|()| out.flush())
        {
            log::error!("--findings cannot be written any more: {error}");
            self.json = None;
            self.lost.store(true, Relaxed);
        }
    }
}

/// Whether standard error gets colours: on a terminal, unless NO_COLOR is set.
pub(crate) fn stderr_color() -> bool {
    anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never
        && io::stderr().is_terminal()
}

/// Prints a line to standard error. If that is closed, only the exit status is left.
pub(crate) fn say(what: std::fmt::Arguments) {
    let _ = writeln!(io::stderr().lock(), "umbra: {}", printable(&what.to_string()));
}

/// Prints a line to standard error, if it is read within 200 ms. Another thread may be writing
/// there, and wait for its reader, so that this takes no lock.
pub(crate) fn say_if_read(what: std::fmt::Arguments) {
    const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    let out = io::stderr();
    if let Ok(1..) = poll(&mut [PollFd::new(&out, PollFlags::OUT)], Some(&PATIENCE)) {
        let _ = rustix::io::write(&out, format!("umbra: {what}\n").as_bytes());
    }
}

/// An error with its causes. Some errors name their cause already; it is not repeated.
pub(crate) fn in_full(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text += ": ";
        }
        text += &cause;
    }
    text
}

/// Formats a size in a suitable unit.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cause_is_told_twice() {
        let cause = || io::Error::from(io::ErrorKind::NotFound);
        let error = anyhow::Error::new(cause()).context(format!("cannot read x: {}", cause()));
        assert_eq!(
            in_full(&error.context("no kernel")),
            "no kernel: cannot read x: entity not found"
        );
    }
}
