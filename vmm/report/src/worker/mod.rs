//! A process of its own for what parses untrusted files: symbols, debug information, and the source
//! files that it names.
//!
//! Whatever such a file does to its parser happens there: the process has none of the virtual
//! machine's descriptors, little memory and time ([`confine`]), and no rights but to read
//! ([`Confine`]). Whoever waits for it ends it after a while ([`Client`]). Its death costs names
//! and lines, and no findings.
//!
//! It is the same program, executed again with an argument of its own. A program offers that by
//! calling [`symbol_worker`] first in its `main`. In one that does not, parsing happens in the
//! process itself.

mod client;
mod confine;
mod serve;
mod starter;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use self::client::{Client, Failure};
use crate::source::{Place, Shown};
use crate::symbols::answers::{Question, Reply};

/// The first argument of the process.
const ARGUMENT: &str = "--umbra-symbol-worker";

/// The program can be executed as a worker.
static OFFERED: AtomicBool = AtomicBool::new(false);

/// What the process works on. The kernel's file is its standard output.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// It has the kernel's file.
    pub kernel: bool,
    /// The folder with the files of modules.
    pub modules: Option<PathBuf>,
    /// The folders with sources.
    pub roots: Vec<PathBuf>,
    /// When the kernel was built, since 1970.
    pub built: Option<Duration>,
}

/// A request, with a time limit for an answer that nobody waits for any more.
#[derive(Debug, Serialize, Deserialize)]
struct Message {
    seconds: u32,
    request: Request,
}

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Symbols(Question),
    Source(Place),
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Response {
    Symbols(Reply),
    Source(Shown),
}

/// Takes rights from the process that reads symbols and sources, before it reads anything. It still
/// has to read in these folders, what is open, and its socket.
pub type Confine = fn(folders: &[&Path]);

/// To be called first in a program's `main`, before it opens files or starts threads.
///
/// In the process that this program was executed as to read symbols, it does that, and does not
/// return. Otherwise it forks a process that starts such ones, and returns at once: from then on,
/// symbols and sources are read in them, if that process could be made.
pub fn symbol_worker(confine: Confine) {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == ARGUMENT) {
        std::process::exit(serve::serve(confine));
    }
    OFFERED.store(starter::fork().is_ok(), SeqCst);
}

/// Whether files can be parsed in a process of its own.
pub(crate) fn is_offered() -> bool {
    OFFERED.load(SeqCst)
}
