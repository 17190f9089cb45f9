//! The other process: answers requests until nobody is there to ask.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use super::confine::limit_resources;
use super::wire::{Left, receive, send};
use super::{Confine, Message, Request, Response, Setup};
use crate::source::SourceFiles;
use crate::symbols::Contents;
use crate::symbols::answers::Answers;

/// Without end: whoever asks has a time limit, and ends this process.
const FOREVER: Left = &|| Some(Duration::MAX);

/// Serves the socket that is standard input. Returns the exit status of the process.
pub(super) fn serve(confine: Confine) -> i32 {
    if limit_resources().is_err() {
        return 1;
    }
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else { return 1 };
    let socket = UnixStream::from(socket);
    let setup = receive(&socket, FOREVER).ok();
    let Some(setup) = setup.and_then(|setup| serde_json::from_slice(&setup).ok()) else {
        return 1;
    };
    let Setup { modules, roots, .. } = &setup;
    confine(&modules.iter().chain(roots).map(PathBuf::as_path).collect::<Vec<_>>());
    let mut worker = Worker { setup, answers: None, sources: None };
    while let Ok(message) = receive(&socket, FOREVER) {
        let Ok(Message { seconds, request }) = serde_json::from_slice(&message) else { return 1 };
        // SAFETY: no memory is passed. The signal ends the process, if the answer takes too long
        // and nobody is left to end it.
        unsafe { libc::alarm(seconds) };
        let response = worker.respond(request);
        // SAFETY: as above.
        unsafe { libc::alarm(0) };
        let Ok(response) = serde_json::to_vec(&response) else { return 1 };
        if send(&socket, &response, FOREVER).is_err() {
            return 1;
        }
    }
    0
}

struct Worker {
    setup: Setup,
    /// Made when they were needed, under the time limit of a request.
    answers: Option<Answers>,
    sources: Option<SourceFiles>,
}

impl Worker {
    fn respond(&mut self, request: Request) -> Response {
        let Self { setup, answers, sources } = self;
        match request {
            Request::Symbols(question) => {
                let answers = answers
                    .get_or_insert_with(|| Answers::new(kernel(setup), setup.modules.take()));
                Response::Symbols(answers.reply(question))
            }
            Request::Source(place) => {
                let built = setup.built.and_then(|since| UNIX_EPOCH.checked_add(since));
                let sources = sources.get_or_insert_with(|| SourceFiles::new(&setup.roots, built));
                Response::Source(sources.show(&place))
            }
        }
    }
}

/// The kernel's file, which is standard output.
fn kernel(setup: &Setup) -> io::Result<Contents> {
    if !setup.kernel {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file: OwnedFd = io::stdout().as_fd().try_clone_to_owned()?;
    Contents::disk(File::from(file))
}
