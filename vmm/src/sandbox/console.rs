//! Watches the guest's console: keeps its last lines and, if the guest is Linux, recognises a panic
//! and a regular stop.

use std::collections::VecDeque;

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
}

impl ConsoleWatch {
    /// For a guest that is Linux, or not.
    pub(super) fn new(linux: bool) -> Self {
        Self { linux, ..Self::default() }
    }

    /// Handles a line, without its end.
    pub(super) fn line(&mut self, line: &[u8]) -> Sign {
        let line = String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES)]);
        let line: String =
            line.trim_end().chars().filter(|c| !c.is_control() || *c == '\t').collect();
        let sign = if self.linux { self.sign(&line) } else { Sign::None };
        if self.lines.len() >= LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
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
        }
        Sign::None
    }

    /// The message of a Linux panic, if there was one.
    pub(super) fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
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
        assert_eq!(watch.panic(), None);
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
    }
}
