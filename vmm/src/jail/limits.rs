//! Privileges that are given up, and resource limits.

use std::io;

use caps::{CapSet, CapsHashSet};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{JailError, Profile};
use crate::shadow::ProcessMemory;

/// Most bytes of a file that the process writes, the console's included.
pub(super) const FILE_BYTES: u64 = 16 << 30;
/// Open files: one for each vCPU and one for its statistics, and some for all.
const FILES: u64 = 128;
const FILES_PER_CPU: u64 = 2;
/// Address space for what does not depend on the guest: symbols, reports, the program itself.
const OTHER_MEMORY: u64 = 4 << 30;
/// Address space for a thread: its stack, and glibc's arena of memory for it.
const THREAD_MEMORY: u64 = 136 << 20;
/// Threads beside those of vCPUs.
const OTHER_THREADS: u64 = 7;

pub(super) fn no_new_privileges() -> Result<(), JailError> {
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| JailError::Host { what: "give up new privileges", source: error.into() })
}

/// Drops all capabilities from all sets, as far as there are any.
pub(super) fn drop_capabilities() -> Result<(), JailError> {
    let fail = |error: caps::errors::CapsError| JailError::Host {
        what: "drop capabilities",
        source: io::Error::other(error),
    };
    // Without this capability the bounding set stays; it has no effect without new privileges.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).map_err(fail)? {
        for capability in caps::read(None, CapSet::Bounding).map_err(fail)? {
            caps::drop(None, CapSet::Bounding, capability).map_err(fail)?;
        }
    }
    // Kernels before 4.3 have no ambient set.
    let _ = caps::clear(None, CapSet::Ambient);
    let none = CapsHashSet::new();
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &none).map_err(fail)?;
    }
    Ok(())
}

/// Lowers the resource limits. Those that are lower already stay.
pub(super) fn set(profile: &Profile) -> Result<(), JailError> {
    let threads = u64::from(profile.cpus) + OTHER_THREADS;
    // 0 if the host does not tell; what the process has now is little.
    let now = ProcessMemory::read().map_or(0, |memory| memory.address_space);
    let memory = now + OTHER_MEMORY + threads * THREAD_MEMORY;
    for (resource, limit) in [
        (Resource::As, profile.memory.saturating_add(memory)),
        (Resource::Fsize, FILE_BYTES),
        (Resource::Core, 0),
        (Resource::Nofile, FILES + FILES_PER_CPU * u64::from(profile.cpus)),
    ] {
        let lower = |old: Option<u64>| Some(old.map_or(limit, |old| old.min(limit)));
        let Rlimit { current, maximum } = getrlimit(resource);
        let new = Rlimit { current: lower(current), maximum: lower(maximum) };
        setrlimit(resource, new).map_err(|error| JailError::Host {
            what: "set a resource limit",
            source: error.into(),
        })?;
    }
    // A file that is too large is an error of the write, and not the end of the process.
    // SAFETY: no handler runs.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    Ok(())
}
