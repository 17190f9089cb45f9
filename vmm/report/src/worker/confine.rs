//! What the worker takes from itself before it reads anything.

use std::io;
use std::os::fd::AsRawFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most address space, in bytes: it bounds what parsed debug information takes.
pub(super) const MEMORY: u64 = 1 << 30;
/// Most CPU time, in seconds. Each answer has a shorter limit; this is for all of them.
const CPU_SECONDS: u64 = 300;
/// Most descriptors: three, and what a search of a folder opens.
const DESCRIPTORS: u64 = 64;

/// What each resource is limited to. The process writes no file, and leaves none when it crashes.
const LIMITS: [(Resource, u64); 5] = [
    (Resource::As, MEMORY),
    (Resource::Cpu, CPU_SECONDS),
    (Resource::Nofile, DESCRIPTORS),
    (Resource::Fsize, 0),
    (Resource::Core, 0),
];

/// Closes all descriptors but the first three, and limits what this process may use.
///
/// # Errors
/// A limit cannot be set.
pub(super) fn limit_resources() -> io::Result<()> {
    close_descriptors();
    for (resource, wanted) in LIMITS {
        // A limit that is lower already stays.
        let lower = getrlimit(resource).maximum.map_or(wanted, |maximum| maximum.min(wanted));
        setrlimit(resource, Rlimit { current: Some(lower), maximum: Some(lower) })?;
    }
    Ok(())
}

/// Closes what a parent may have left open. Those of Umbra itself are closed when it executes.
fn close_descriptors() {
    close_range(3, libc::c_uint::MAX);
}

/// Closes all descriptors but the standard streams and `kept`.
pub(super) fn close_descriptors_but(kept: &impl AsRawFd) {
    let kept = kept.as_raw_fd().cast_unsigned();
    if kept > 3 {
        close_range(3, kept - 1);
    }
    close_range(kept.max(2) + 1, libc::c_uint::MAX);
}

fn close_range(first: libc::c_uint, last: libc::c_uint) {
    // SAFETY: nothing of this process uses any of them: it has only begun.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if closed == 0 {
        return;
    }
    // Linux before 5.9.
    let most = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20).min(1 << 20);
    for descriptor in first..=last.min(u32::try_from(most).unwrap_or(first)) {
        // SAFETY: as above.
        unsafe { libc::close(descriptor.cast_signed()) };
    }
}
