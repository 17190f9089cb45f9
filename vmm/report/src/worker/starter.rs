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
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::ARGUMENT;
use super::client::Failure;
use super::wire::{Left, slice};

/// This program, also where its file was replaced meanwhile.
const SELF: &str = "/proc/self/exe";

/// The socket to that process, while it is good.
static STARTER: Mutex<Option<UnixStream>> = Mutex::new(None);

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
            *STARTER.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
            Ok(())
        }
    }
}

/// Asks it for a worker that gets `file`. Returns the socket to the worker.
///
/// # Errors
/// There is none in time. After that there will be none any more.
pub(super) fn worker(file: Option<&File>, left: Left) -> Result<UnixStream, Failure> {
    let mut starter = STARTER.lock().unwrap_or_else(PoisonError::into_inner);
    let gone = || Failure::Start(io::Error::other("the process that starts it is gone"));
    let socket = starter.take().ok_or_else(gone)?;
    let request = [u8::from(file.is_some())];
    match file {
        Some(file) => socket.send_with_fd(&request[..], file.as_raw_fd()),
        None => socket.send_with_fds(&[&request[..]], &[]),
    }
    .map_err(|_| gone())?;
    loop {
        socket.set_read_timeout(slice(left)?).map_err(Failure::Start)?;
        let mut reply = [0; 4];
        match socket.recv_with_fd(&mut reply) {
            Ok((4, worker)) => {
                *starter = Some(socket);
                let error = || io::Error::from_raw_os_error(i32::from_le_bytes(reply));
                return worker
                    .map(|worker| UnixStream::from(OwnedFd::from(worker)))
                    .ok_or_else(|| Failure::Start(error()));
            }
            Ok(_) => return Err(gone()),
            Err(error) if [libc::EAGAIN, libc::EINTR].contains(&error.errno()) => {}
            Err(_) => return Err(gone()),
        }
    }
}

/// Starts workers until nobody asks any more.
fn serve(socket: &UnixStream) {
    leave_the_program(socket);
    let mut request = [0];
    while let Ok((1, file)) = socket.recv_with_fd(&mut request) {
        let sent = match start(file) {
            Ok(worker) => socket.send_with_fd(&[0; 4][..], worker.as_raw_fd()),
            Err(error) => {
                let number = error.raw_os_error().unwrap_or(libc::EAGAIN).to_le_bytes();
                socket.send_with_fds(&[&number[..]], &[])
            }
        };
        if sent.is_err() {
            return;
        }
    }
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
    // SAFETY: no memory is passed. Workers that have ended leave nothing to wait for.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    super::confine::close_descriptors_but(socket);
}

fn start(file: Option<File>) -> io::Result<UnixStream> {
    let (socket, theirs) = UnixStream::pair()?;
    Command::new(SELF)
        .arg(ARGUMENT)
        .stdin(OwnedFd::from(theirs))
        .stdout(file.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok(socket)
}
