//! Ends the process where it cannot end itself: a read of a file may wait for a server that is
//! gone, a write for a reader that is not there, and a report may take long.
//!
//! The time limit and the signals end a run in good order, with its findings. This is for when that
//! takes far too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::jail::{Jail, ThreadKind};
use crate::print::say_if_read;
use crate::terminal;

/// Time for an end in good order.
const PATIENCE: Duration = Duration::from_secs(60);
/// Poll interval.
const TICK: Duration = Duration::from_millis(250);

/// Ends the process [`PATIENCE`] after the time limit with status 4, and so long after `stop` was
/// set with status 130. Its thread is in the jail, if there is one, as those of the console are.
pub(crate) fn start(limit: Option<Duration>, stop: Arc<AtomicBool>, jail: Option<Arc<Jail>>) {
    // A limit that overflows the clock is none.
    let end = limit.and_then(|limit| Instant::now().checked_add(limit.checked_add(PATIENCE)?));
    let watch = move || {
        if let Some(Err(error)) = jail.map(|jail| jail.close(ThreadKind::Console)) {
            log::warn!("nothing ends a run that hangs: {error}");
            return;
        }
        let mut stopped: Option<Instant> = None;
        loop {
            thread::sleep(TICK);
            if stop.load(Relaxed) && stopped.get_or_insert_with(Instant::now).elapsed() >= PATIENCE
            {
                give_up("an end was asked for", 130);
            }
            if end.is_some_and(|end| end <= Instant::now()) {
                give_up("the time limit is over", 4);
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("watchdog".into()).spawn(watch) {
        log::warn!("nothing ends a run that hangs: {error}");
    }
}

fn give_up(why: &str, status: i32) -> ! {
    terminal::restore();
    say_if_read(format_args!("{why}, and this program does not come to its end: it is ended now"));
    // SAFETY: ends the process at once. Other threads may hold any lock.
    unsafe { libc::_exit(status) }
}
