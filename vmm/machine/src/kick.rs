//! Gets a vCPU out of guest mode from another thread.
//!
//! A kick sets a flag and sends the vCPU's thread a signal. [`super::vcpu::Vcpu::run`] checks the
//! flag before it enters the guest, and the signal handler sets `immediate_exit`, so a signal that
//! arrives between the check and the entry is not lost either.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs now, or null.
    static RUNNING: AtomicPtr<u8> = const { AtomicPtr::new(std::ptr::null_mut()) };
    static THREAD: Cell<i32> = const { Cell::new(0) };
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Only thread-local and atomic accesses: safe in a signal handler.
    let _ = RUNNING.try_with(|byte| {
        let byte = byte.load(Ordering::Relaxed);
        if !byte.is_null() {
            // SAFETY: `Running` set the address, and clears it before the vCPU's mapping can go, on
            // the thread that this handler interrupts.
            unsafe { byte.write_volatile(1) };
        }
    });
}

/// Installs the handler of the kick signal, once for the process.
pub(super) fn install_handler() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| register_signal_handler(SIGRTMIN(), on_signal).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// State that a vCPU and its kickers share.
#[derive(Debug, Default)]
pub(super) struct KickState {
    pending: AtomicBool,
    /// Thread that runs the vCPU, 0 before the first run.
    thread: AtomicI32,
}

impl KickState {
    /// Takes a pending kick, if there is one.
    pub(super) fn take(&self) -> bool {
        self.pending.swap(false, Ordering::SeqCst)
    }
}

/// Exists while this thread is in, or about to enter, `KVM_RUN`.
pub(super) struct Running;

impl Running {
    /// Announces it. `immediate_exit` stays valid until the value is dropped.
    pub(super) fn start(state: &KickState, immediate_exit: *mut u8) -> Self {
        let thread = THREAD.with(|cached| {
            if cached.get() == 0 {
                // SAFETY: gettid has no preconditions.
                cached.set(unsafe { libc::gettid() });
            }
            cached.get()
        });
        if state.thread.load(Ordering::Relaxed) != thread {
            state.thread.store(thread, Ordering::SeqCst);
        }
        RUNNING.with(|byte| byte.store(immediate_exit, Ordering::SeqCst));
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.with(|byte| byte.store(std::ptr::null_mut(), Ordering::SeqCst));
    }
}

/// Makes the current or next [`super::vcpu::Vcpu::run`] of one vCPU return
/// [`super::vcpu::VmExit::Interrupted`]. Clones kick the same vCPU; any thread may.
#[derive(Clone, Debug)]
pub struct Kicker(pub(super) Arc<KickState>);

impl Kicker {
    /// Kicks and does not wait. A caller that wants the vCPU to stop sets a flag of its own first.
    pub fn kick(&self) {
        self.0.pending.store(true, Ordering::SeqCst);
        self.signal();
    }

    fn signal(&self) {
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // A failure means that the thread is gone, and there is nothing to stop. SAFETY: tgkill
            // takes plain numbers; the handler was installed before the vCPU existed.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

#[cfg(test)]
impl Kicker {
    /// Kicks and waits until the vCPU's loop has seen it, at most `limit`. `false`: it has not.
    pub(crate) fn kick_and_wait(&self, limit: std::time::Duration) -> bool {
        use std::time::{Duration, Instant};
        /// Time between two signals.
        const RETRY: Duration = Duration::from_millis(5);
        let start = Instant::now();
        self.0.pending.store(true, Ordering::SeqCst);
        loop {
            if !self.0.pending.load(Ordering::SeqCst) {
                return true;
            }
            if start.elapsed() >= limit {
                return false;
            }
            self.signal();
            let wait = Instant::now();
            while self.0.pending.load(Ordering::SeqCst) && wait.elapsed() < RETRY {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
}
