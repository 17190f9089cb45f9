//! Watches the guest's console: keeps its last lines and, if the guest is Linux, recognises a panic
//! and a regular stop.
//!
//! The console itself is a terminal, and what a guest writes goes there as it is. What is kept here
//! is for messages and figures, and is printable.

use std::collections::VecDeque;

use umbra_report::printable_keeping;

/// Lines that are kept.
const LINES: usize = 64;
/// Bytes of each that are kept.
pub(super) const LINE_BYTES: usize = 400;
/// Linux's messages (kernel/panic.c, kernel/reboot.c). Linux halts if it cannot switch the machine
/// off.
const PANIC: &str = "Kernel panic - not syncing: ";
const PANIC_END: &str = "---[ end Kernel panic - not syncing: ";
const STOPS: [&str; 2] = ["reboot: Power down", "reboot: System halted"];

/// What a line means for the end of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    /// Nothing.
    None,
    /// The guest has panicked and stopped.
    PanicEnd,
    /// The guest has stopped on purpose.
    Stopped,
}

/// Watches the console.
#[derive(Debug, Default)]
pub(super) struct ConsoleWatch {
    linux: bool,
    lines: VecDeque<String>,
    panic: Option<String>,
    /// Whether to look for an oops.
    oopses: bool,
    oops: Option<String>,
}

impl ConsoleWatch {
    /// For a guest that is Linux, or not.
    pub(super) fn new(linux: bool) -> Self {
        Self { linux, oopses: true, ..Self::default() }
    }

    /// With or without the recognition of oopses.
    pub(super) fn with_oopses(self, oopses: bool) -> Self {
        Self { oopses, ..self }
    }

    /// Handles a line, without its end.
    pub(super) fn line(&mut self, line: &[u8]) -> Sign {
        let line = String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES)]);
        let line = printable_keeping(line.trim_end(), &['\t']);
        let sign = if self.linux { self.sign(&line) } else { Sign::None };
        if self.lines.len() >= LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line.into_owned());
        sign
    }

    fn sign(&mut self, line: &str) -> Sign {
        let said = without_stamps(line);
        if let Some(message) = said.strip_prefix(PANIC) {
            // The first panic has the reason.
            self.panic.get_or_insert_with(|| message.to_owned());
        } else if said.starts_with(PANIC_END) {
            return Sign::PanicEnd;
        } else if STOPS.contains(&said) {
            return Sign::Stopped;
        } else if self.oopses && self.oops.is_none() && is_oops(said) {
            self.oops = Some(said.to_owned());
        }
        Sign::None
    }

    /// The message of a Linux panic, if there was one.
    pub(super) fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// The first line of Linux's first oops, if there was one.
    pub(super) fn oops(&self) -> Option<&str> {
        self.oops.as_deref()
    }

    /// Whether the guest is Linux.
    pub(super) fn is_linux(&self) -> bool {
        self.linux
    }

    /// The last lines.
    pub(super) fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}

/// Whether this is the first line of an oops: what happened, the error code, and a count, as in
/// `Oops: 0002 [#1] PREEMPT SMP` (`__die_header` in `arch/x86/kernel/dumpstack.c`).
fn is_oops(line: &str) -> bool {
    let Some((_, rest)) = line.rsplit_once(": ") else { return false };
    let Some((code, rest)) = rest.split_once(" [#") else { return false };
    let count = rest.split_once(']').map_or("", |(count, _)| count);
    code.len() == 4
        && code.bytes().all(|digit| digit.is_ascii_hexdigit())
        && !count.is_empty()
        && count.bytes().all(|digit| digit.is_ascii_digit())
}

/// A line without the time stamp and the caller that Linux may print in front: `[    1.234567][
/// T1] `.
fn without_stamps(mut line: &str) -> &str {
    while let Some((_, rest)) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        line = rest.trim_start();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_says_how_it_ends() {
        let mut watch = ConsoleWatch::new(true);
        assert_eq!(watch.line(b"[    1.234567] Run /init as init process\r"), Sign::None);
        assert_eq!(
            watch.line(b"[    1.5][    T1] Kernel panic - not syncing: no init\r"),
            Sign::None
        );
        assert_eq!(watch.panic(), Some("no init"));
        assert_eq!(watch.line(b"Kernel panic - not syncing: another"), Sign::None);
        assert_eq!(watch.panic(), Some("no init"));
        assert_eq!(
            watch.line(b"---[ end Kernel panic - not syncing: no init ]---"),
            Sign::PanicEnd
        );
        assert_eq!(watch.line(b"[  2.0] reboot: Power down"), Sign::Stopped);
        assert_eq!(watch.line(b"reboot: System halted\r"), Sign::Stopped);
        assert_eq!(watch.line(b"echo reboot: Power down"), Sign::None);
        assert_eq!(watch.line(b"reboot: Restarting system"), Sign::None);
    }

    #[test]
    fn other_guests_say_what_they_like() {
        let mut watch = ConsoleWatch::new(false);
        assert_eq!(watch.line(b"reboot: Power down"), Sign::None);
        watch.line(b"Kernel panic - not syncing: joke");
        watch.line(b"Oops: 0002 [#1]");
        assert_eq!((watch.panic(), watch.oops()), (None, None));
    }

    #[test]
    fn what_is_kept_is_bounded_and_printable() {
        let mut watch = ConsoleWatch::new(true);
        for _ in 0..100 {
            watch.line(&[b'['; 5000]);
            watch.line(b"\x1b[31mred\xff\x00");
        }
        assert_eq!(watch.lines().count(), LINES);
        assert!(watch.lines().all(|line| line.len() <= 3 * LINE_BYTES && !line.contains('\x1b')));
        assert!(watch.lines().any(|line| line == "\\u{1b}[31mred\u{fffd}\\u{0}"));
        let panic = "Kernel panic - not syncing: x\x1b[2J\u{202e}y\u{200b}z";
        watch.line(panic.as_bytes());
        assert_eq!(watch.panic(), Some(r"x\u{1b}[2J\u{202e}y\u{200b}z"));
    }

    #[test]
    fn an_oops_is_recognised_once() {
        let mut watch = ConsoleWatch::new(true);
        for line in
            ["Oops: what", "a: 0002 [#]", "BUG: 0002", "x: 00020 [#1]", ": [#1]", "0002 [#1]"]
        {
            watch.line(line.as_bytes());
            assert_eq!(watch.oops(), None, "{line}");
        }
        let first = "general protection fault, probably for address 0x5: 0000 [#1] PREEMPT SMP";
        watch.line(format!("[    1.5] {first}").as_bytes());
        watch.line(b"Oops: 0002 [#2] SMP");
        assert_eq!(watch.oops(), Some(first));
        let mut deaf = ConsoleWatch::new(true).with_oopses(false);
        deaf.line(first.as_bytes());
        assert_eq!(deaf.oops(), None);
    }
}
