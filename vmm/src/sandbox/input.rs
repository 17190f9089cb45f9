//! Input for the guest's console: a thread reads it and passes it to the serial port. Ctrl-A begins
//! a command to Umbra itself.

use std::io::Read;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use super::gate::Gate;
use super::shared::Shared;
use crate::jail::ThreadKind;

/// Ctrl-A.
const ESCAPE: u8 = 1;
/// Bytes per read.
const CHUNK: usize = 256;
/// Pause before a retry when the serial port has no room for input, and between two flushes.
const FULL: Duration = Duration::from_millis(10);

/// The keys after Ctrl-A, for the user.
pub const KEYS: &str = "Ctrl-A x ends the run, Ctrl-A b sends a break, Ctrl-A Ctrl-A sends Ctrl-A";

/// A key, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    /// For the guest.
    Byte(u8),
    /// A break on the line.
    Break,
    /// End the run.
    Quit,
    /// Print the keys.
    Help,
}

/// Finds commands in typed bytes.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn key(&mut self, byte: u8) -> Option<Key> {
        if !std::mem::take(&mut self.escaped) {
            self.escaped = byte == ESCAPE;
            return (!self.escaped).then_some(Key::Byte(byte));
        }
        match byte {
            ESCAPE | b'a' => Some(Key::Byte(ESCAPE)),
            b'b' => Some(Key::Break),
            b'x' => Some(Key::Quit),
            b'h' | b'?' => Some(Key::Help),
            _ => None,
        }
    }
}

/// The threads that [`spawn`] starts.
pub(super) const THREADS: usize = 2;

/// Starts the threads, which wait at the `gate`. The reading thread ends at the end of the input,
/// or at the first key after the run.
pub(super) fn spawn(
    mut input: Box<dyn Read + Send>,
    shared: Weak<Shared>,
    gate: &Arc<Gate>,
) -> std::io::Result<()> {
    let flushed = shared.clone();
    let [input_gate, console_gate] = [gate.clone(), gate.clone()];
    let run = move || {
        if !input_gate.arrive(ThreadKind::Console) {
            return;
        }
        let (mut keys, mut chunk) = (Keys::default(), [0; CHUNK]);
        loop {
            let count = match input.read(&mut chunk) {
                Ok(0) => return,
                Ok(count) => count,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    log::info!("console input ends: {e}");
                    return;
                }
            };
            for key in chunk[..count].iter().filter_map(|byte| keys.key(*byte)) {
                if !execute(key, &shared) {
                    return;
                }
            }
        }
    };
    thread::Builder::new().name("input".into()).spawn(run)?;
    let flush = move || {
        if console_gate.arrive(ThreadKind::Console) {
            keep_flushing(&flushed);
        }
    };
    thread::Builder::new().name("console".into()).spawn(flush).map(drop)
}

/// Writes out console lines without an end, such as a prompt. This has a thread of its own, since
/// output may block.
fn keep_flushing(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade().filter(|shared| !shared.stop.load(SeqCst)) {
        if let Some(mut dispatcher) = shared.dispatcher_within(FULL) {
            dispatcher.flush();
        }
        drop(shared);
        thread::sleep(FULL);
    }
}

/// Executes a key. Returns false if the run has ended.
fn execute(key: Key, shared: &Weak<Shared>) -> bool {
    loop {
        let Some(shared) = shared.upgrade() else { return false };
        if shared.stop.load(SeqCst) {
            return false;
        }
        let done = match key {
            Key::Byte(byte) => shared.dispatcher().input(byte),
            Key::Break => shared.dispatcher().input_break(),
            Key::Quit => {
                shared.quit.store(true, SeqCst);
                true
            }
            Key::Help => {
                log::warn!("{KEYS}");
                true
            }
        };
        if done {
            return true;
        }
        drop(shared);
        thread::sleep(FULL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_begins_a_command() {
        let mut keys = Keys::default();
        let typed: Vec<_> =
            b"a\x01xb\x01\x01\x01b\x01?\x01zc\x01a".iter().filter_map(|b| keys.key(*b)).collect();
        let byte = Key::Byte;
        assert_eq!(
            typed,
            [
                byte(b'a'),
                Key::Quit,
                byte(b'b'),
                byte(1),
                Key::Break,
                Key::Help,
                byte(b'c'),
                byte(1)
            ]
        );
    }
}
