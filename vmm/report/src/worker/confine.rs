//! What the worker takes from itself before it reads anything.

use std::io;

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
pub(super) fn confine() -> io::Result<()> {
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
    const FIRST: libc::c_uint = 3;
    // SAFETY: nothing of this process uses any of them: it has only begun.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
    if closed == 0 {
        return;
    }
    // Linux before 5.9.
    let last = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20).min(1 << 20);
    for descriptor in FIRST..u32::try_from(last).unwrap_or(FIRST) {
        // SAFETY: as above.
        unsafe { libc::close(descriptor.cast_signed()) };
    }
}
