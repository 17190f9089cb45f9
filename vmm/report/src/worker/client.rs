//! The side that asks.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::starter::{Started, start_worker};
use super::wire::{Left, WireError, receive, send};
use super::{Message, Request, Response, Setup};

/// Seconds after which the process ends itself, beyond the time limit of a request.
const MORE_SECONDS: u32 = 2;

/// Why there is no answer. The process is ended then; the next request starts another one.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The process cannot be started.
    Start(io::Error),
    /// It died.
    Died,
    /// It took too long.
    Late,
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Late => Self::Late,
            WireError::Gone => Self::Died,
        }
    }
}

/// Asks a worker, which it starts when it has to.
pub(crate) struct Client {
    setup: Setup,
    /// The kernel's file.
    file: Option<File>,
    process: Option<Process>,
}

impl Client {
    /// A client of processes that work on this. None is started yet.
    pub(crate) fn new(setup: Setup, file: Option<File>) -> Self {
        Self { setup, file, process: None }
    }

    /// A client of a process that is there already, and gets no setup.
    pub(crate) fn connected(socket: UnixStream) -> Self {
        let process = Some(Process(Started::connected(socket)));
        Self { setup: Setup::default(), file: None, process }
    }

    /// Asks, and waits for the answer while there is time left.
    ///
    /// # Errors
    /// There is no answer in time.
    pub(crate) fn ask(&mut self, request: Request, left: Left) -> Result<Response, Failure> {
        let mut process = match self.process.take() {
            Some(process) => process,
            None => Process::start(&self.setup, self.file.as_ref(), left)?,
        };
        let response = process.ask(request, left)?;
        // Otherwise it was dropped, and with that ended.
        self.process = Some(process);
        Ok(response)
    }
}

/// A worker. It is ended when this is dropped.
struct Process(Started);

impl Process {
    fn start(setup: &Setup, file: Option<&File>, left: Left) -> Result<Self, Failure> {
        let process = Self(start_worker(file, left)?);
        let setup = serde_json::to_vec(setup).map_err(|_| Failure::Died)?;
        send(&process.0.socket, &setup, left)?;
        Ok(process)
    }

    fn ask(&mut self, request: Request, left: Left) -> Result<Response, Failure> {
        let seconds = left().unwrap_or(Duration::ZERO).as_secs();
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_add(MORE_SECONDS);
        let message = Message { seconds, request };
        let message = serde_json::to_vec(&message).map_err(|_| Failure::Died)?;
        send(&self.0.socket, &message, left)?;
        let response = receive(&self.0.socket, left)?;
        serde_json::from_slice(&response).map_err(|_| Failure::Died)
    }
}
