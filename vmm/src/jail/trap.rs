//! Reports a system call that the jail stopped, and ends the process.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use syscalls::Sysno;

use super::ThreadKind;

/// Exit status of a problem of the host.
const STATUS: i32 = 2;
/// Wait for a reader of standard error. It may be a pipe that is full.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

thread_local! {
    /// What this thread is called in the message.
    static KIND: Cell<&'static str> = const { Cell::new("a thread outside of the jail") };
}

/// Remembers what the calling thread is.
pub(super) fn note_kind(kind: ThreadKind) {
    KIND.with(|cell| cell.set(kind.as_str()));
}

/// Installs the handler of `SIGSYS`, the signal of a call that a filter stops.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: all bit patterns are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_stopped;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler makes only system calls that each filter allows, and touches only this
    // thread's stack and a constant-initialised thread-local.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The start of `siginfo_t` for `SIGSYS` (Linux, include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct SysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    address: u64,
    call: i32,
}

/// Text of bounded length, without an allocator.
struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

/// The message about a call. Its first three arguments tell what was to be done.
fn message(call: i32, arguments: [u64; 3], thread: &str) -> Text {
    let mut text = Text { bytes: [0; 512], len: 0 };
    let number = usize::try_from(call).ok().and_then(Sysno::new);
    let name = number.map_or("unknown", |number| number.name());
    // It always fits, and if not, is cut off.
    let [a, b, c] = arguments;
    let _ = writeln!(
        text,
        "umbra: the jail stopped system call {call} ({name}, {a:#x} {b:#x} {c:#x}) of {thread}: \
         this is a defect of Umbra, or an attack by the guest; --jail off runs without the jail"
    );
    text
}

extern "C" fn on_stopped(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a `siginfo_t` of this signal.
    let call = unsafe { (*info.cast::<SysInfo>()).call };
    // SAFETY: and the registers of the thread.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX]
        .map(|at| registers[at as usize].cast_unsigned());
    crate::terminal::restore();
    let text = message(call, arguments, KIND.get());
    // SAFETY: descriptor 2 is open, or each use of it fails.
    let stderr = unsafe { std::os::fd::BorrowedFd::borrow_raw(2) };
    if let Ok(1..) = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&PATIENCE)) {
        let _ = rustix::io::write(stderr, &text.bytes[..text.len]);
    }
    // SAFETY: ends the process at once, without handlers of its own.
    unsafe { libc::_exit(STATUS) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_the_call_and_the_thread() {
        let text = message(41, [1, 2, 3], ThreadKind::Vcpu.as_str());
        let text = std::str::from_utf8(&text.bytes[..text.len]).unwrap();
        assert!(text.contains("system call 41 (socket, 0x1 0x2 0x3) of a vCPU:"), "{text}");
        assert!(text.ends_with("without the jail\n"), "{text}");
        let text = message(-1, [0; 3], "x");
        assert!(std::str::from_utf8(&text.bytes[..text.len]).unwrap().contains("-1 (unknown,"));
    }
}
