//! The terminal as a guest's console: each key goes to the guest at once, and only the guest
//! echoes. Its settings are restored on every exit that a program can catch.

use std::io::{self, IsTerminal, Read, stdin, stdout};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp,
    tcsetattr,
};

use crate::sandbox::input::KEYS;

/// The terminal's original settings.
static BEFORE: OnceLock<Termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);
/// Set when the terminal must not be changed any more.
static OVER: Mutex<bool> = Mutex::new(false);

/// Input for a guest's console: the terminal, if the console is shown there and this process is in
/// the foreground; or else a file or pipe.
pub fn input() -> Option<Box<dyn Read + Send>> {
    if !stdin().is_terminal() {
        return Some(Box::new(stdin()));
    }
    let ours = tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp());
    (ours && stdout().is_terminal()).then(|| Box::new(Keyboard) as _)
}

/// The terminal's keys. The first read makes it raw.
struct Keyboard;

impl Read for Keyboard {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        make_raw()?;
        // Bypass the standard library's buffer, which may wait for more.
        Ok(rustix::io::read(stdin(), to)?)
    }
}

fn make_raw() -> io::Result<()> {
    let over = OVER.lock().unwrap_or_else(PoisonError::into_inner);
    if *over || RAW.load(SeqCst) {
        return Ok(());
    }
    let before = tcgetattr(stdin())?;
    let mut raw = before.clone();
    raw.local_modes -=
        LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
    raw.input_modes -=
        InputModes::ICRNL | InputModes::IXON | InputModes::ISTRIP | InputModes::BRKINT;
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    // Set before it can be needed.
    let _ = BEFORE.set(before);
    RAW.store(true, SeqCst);
    tcsetattr(stdin(), OptionalActions::Now, &raw)?;
    crate::print::say(format_args!("{KEYS}"));
    Ok(())
}

/// Restores the terminal. May be called in a signal handler.
pub fn restore() {
    if RAW.swap(false, SeqCst)
        && let Some(before) = BEFORE.get()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

/// Restores the terminal for good when dropped.
pub struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        let mut over = OVER.lock().unwrap_or_else(PoisonError::into_inner);
        *over = true;
        restore();
    }
}
