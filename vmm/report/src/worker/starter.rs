//! The process that starts workers.
//!
//! When a finding first needs a name, the program may be in a jail in which nothing is executed and
//! no socket is made. So it is forked while the program has only begun. It waits for requests, and
//! is gone when the program is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::ARGUMENT;
use super::client::Failure;
use super::wire::{Left, slice};

/// This program, also where its file was replaced meanwhile.
const SELF: &str = "/proc/self/exe";

/// That process, as its program knows it.
struct Starter {
    socket: UnixStream,
    /// Workers that were asked for and have not come yet.
    awaited: u32,
}

/// None if there is no such process, or it is gone.
static STARTER: Mutex<Option<Starter>> = Mutex::new(None);

fn starter() -> MutexGuard<'static, Option<Starter>> {
    STARTER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forks the process. Called by the only thread of the program.
///
/// # Errors
/// There is no socket, or no process.
pub(super) fn fork() -> io::Result<()> {
    let (socket, theirs) = UnixStream::pair()?;
    // SAFETY: there is no other thread whose locks the child would inherit.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(socket);
            serve(&theirs);
            // SAFETY: ends the child without what the parent wants to run at its own end.
            unsafe { libc::_exit(0) }
        }
        _ => {
            *starter() = Some(Starter { socket, awaited: 0 });
            Ok(())
        }
    }
}

/// A request: what to do, and the process that it is about.
type Message = [u8; 5];
/// To start a worker: the reply is its number and its socket, or an error's number and no socket.
const START: u8 = 0;
/// The same, and it gets the file that comes with the request.
const START_WITH_FILE: u8 = 1;
/// To end a worker, without a reply.
const END: u8 = 2;

fn message(what: u8, pid: i32) -> Message {
    let [a, b, c, d] = pid.to_le_bytes();
    [what, a, b, c, d]
}

/// A worker that was started.
pub(super) struct Started {
    pub socket: UnixStream,
    /// None if the program's own starter did not start it.
    pid: Option<i32>,
}

impl Started {
    /// One that others started, and that they end.
    pub(super) fn connected(socket: UnixStream) -> Self {
        Self { socket, pid: None }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let Some(pid) = self.pid else { return };
        if let Some(starter) = &*starter() {
            // Without the process that started it, it ends when its time is over.
            let _ = starter.socket.send_with_fds(&[&message(END, pid)[..]], &[]);
        }
    }
}

/// Asks for a worker that gets `file`.
///
/// # Errors
/// There is none in time, or none at all.
pub(super) fn start_worker(file: Option<&File>, left: Left) -> Result<Started, Failure> {
    let mut starter = starter();
    let gone = || Failure::Start(io::Error::other("the process that starts it is gone"));
    let there = starter.as_mut().ok_or_else(gone)?;
    let started = there.ask(file).and_then(|()| there.wait(left));
    // It is good as long as it answers, late or not.
    if let Err(Broken::Gone) = started {
        *starter = None;
    }
    started.map_err(|broken| match broken {
        Broken::Gone => gone(),
        Broken::Late => Failure::Late,
        Broken::Refused(error) => Failure::Start(error),
    })
}

/// Why there is no worker.
enum Broken {
    /// The process that starts it is gone.
    Gone,
    /// It does not come in time.
    Late,
    /// The host refuses.
    Refused(io::Error),
}

impl Starter {
    fn ask(&mut self, file: Option<&File>) -> Result<(), Broken> {
        let sent = match file {
            Some(file) => {
                self.socket.send_with_fd(&message(START_WITH_FILE, 0)[..], file.as_raw_fd())
            }
            None => self.socket.send_with_fds(&[&message(START, 0)[..]], &[]),
        };
        self.awaited += 1;
        sent.map(drop).map_err(|_| Broken::Gone)
    }

    /// Waits for the last one that was asked for. Those before it came too late: without their
    /// sockets they end.
    fn wait(&mut self, left: Left) -> Result<Started, Broken> {
        loop {
            let time = slice(left).map_err(|_| Broken::Late)?;
            self.socket.set_read_timeout(time).map_err(|_| Broken::Gone)?;
            let mut number = [0; 4];
            let worker = match self.socket.recv_with_fd(&mut number) {
                Ok((4, worker)) => worker,
                Err(error) if [libc::EAGAIN, libc::EINTR].contains(&error.errno()) => continue,
                Ok(_) | Err(_) => return Err(Broken::Gone),
            };
            self.awaited -= 1;
            if self.awaited > 0 {
                continue;
            }
            let number = i32::from_le_bytes(number);
            let socket = worker.map(|worker| UnixStream::from(OwnedFd::from(worker)));
            return socket
                .map(|socket| Started { socket, pid: Some(number) })
                .ok_or_else(|| Broken::Refused(io::Error::from_raw_os_error(number)));
        }
    }
}

/// Starts and ends workers until nobody asks any more, and ends the last ones then.
fn serve(socket: &UnixStream) {
    leave_the_program(socket);
    let mut workers: Vec<Child> = Vec::new();
    let mut request: Message = [0; 5];
    while let Ok((5, file)) = socket.recv_with_fd(&mut request) {
        // Those that have died.
        workers.retain_mut(|worker| matches!(worker.try_wait(), Ok(None)));
        let [what, pid @ ..] = request;
        if what == END {
            let pid = i32::from_le_bytes(pid).cast_unsigned();
            workers.iter_mut().filter(|worker| worker.id() == pid).for_each(end);
            continue;
        }
        let sent = match start(file) {
            Ok((theirs, worker)) => {
                let pid = worker.id().to_le_bytes();
                workers.push(worker);
                socket.send_with_fd(&pid[..], theirs.as_raw_fd())
            }
            Err(error) => {
                let number = error.raw_os_error().unwrap_or(libc::EAGAIN).to_le_bytes();
                socket.send_with_fds(&[&number[..]], &[])
            }
        };
        if sent.is_err() {
            break;
        }
    }
    workers.iter_mut().for_each(end);
}

fn end(worker: &mut Child) {
    // It may have ended by itself.
    let _ = worker.kill();
    let _ = worker.wait();
}

/// Takes nothing of the program along: a reader of its output shall not wait for this process, and
/// a Ctrl-C is for the run, which still has findings to tell then.
fn leave_the_program(socket: &UnixStream) {
    if let Ok(nothing) = File::options().read(true).write(true).open("/dev/null") {
        for stream in 0..3 {
            // SAFETY: nothing in this process uses its standard streams.
            unsafe { libc::dup2(nothing.as_raw_fd(), stream) };
        }
    }
    let _ = rustix::process::setpgid(None, None);
    super::confine::close_descriptors_but(socket);
}

fn start(file: Option<File>) -> io::Result<(UnixStream, Child)> {
    let (socket, theirs) = UnixStream::pair()?;
    let child = Command::new(SELF)
        .arg(ARGUMENT)
        .stdin(OwnedFd::from(theirs))
        .stdout(file.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok((socket, child))
}
