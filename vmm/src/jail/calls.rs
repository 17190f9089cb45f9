//! The system calls that each kind of thread makes once guest code runs.
//!
//! Calls are allowed for a purpose, and with the arguments that the purpose needs. Each feature of
//! the program runs in the jail in the tests, so that a call that is missing here shows there.

use std::collections::BTreeMap;
use std::io;
use std::sync::LazyLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use umbra_machine::ioctls;

use super::{JailError, ThreadKind};

/// Memory, locks, time, signals, the end of a thread or of the process, and what is open already.
const ALWAYS: &[i64] = &[
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_brk,
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
/// Looking for and at files, which Landlock limits to those of the profile. So is `openat` for
/// reading: libraries ask for files that they can do without.
const READING: &[i64] = &[
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_getdents64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
];
/// Questions to the processes that read symbols and sources, whose sockets come from the process
/// that started them.
const WORKERS: &[i64] = &[
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_setsockopt,
    // A kernel that is in memory gets a file.
    libc::SYS_memfd_create,
];
/// What the process that reads symbols and sources does besides: it answers on its socket, within a
/// time, and opens files below a folder only.
const READER: &[i64] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_alarm,
    libc::SYS_openat2,
];
/// Putting a report that is complete in its place, and taking away one that is not.
const REPORTS: &[i64] = &[
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];
/// A further guest: KVM's device, memory, also for code, threads, the doorbell, and the progress
/// that is shown.
const AGAIN: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_mmap,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_eventfd2,
];
/// A `fallocate` that gives memory of the shadow back.
const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// The terminal's settings and size.
const TERMINAL: [u64; 6] =
    [libc::TCGETS, libc::TCSETS, libc::TCGETS2, libc::TCSETS2, libc::TIOCGPGRP, libc::TIOCGWINSZ];
/// Copies of descriptors, and their flags.
const FCNTL: [i32; 4] = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_SETFL];
/// What an `openat` for reading does not say.
const WRITES: i32 =
    libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | libc::O_TMPFILE & !libc::O_DIRECTORY;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Whether the kernel knows seccomp filters.
pub(super) fn host_has_seccomp() -> bool {
    static HAS: LazyLock<bool> = LazyLock::new(|| {
        // SAFETY: without a filter the call fails, with EFAULT where filters are known.
        let result = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::null::<u8>())
        };
        result == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
    });
    *HAS
}

/// The filter of a kind of thread. With `again`, that of the main thread has the calls that set up
/// a further guest.
pub(super) fn program(kind: ThreadKind, again: bool) -> Result<BpfProgram, JailError> {
    compile(rules(kind, again && kind == ThreadKind::Main))
}

/// The filter of the process that reads symbols and sources.
pub(super) fn reader() -> Result<BpfProgram, JailError> {
    let rules = || {
        let mut rules = common()?;
        rules.extend([READING, READER].concat().into_iter().map(|call| (call, Vec::new())));
        rules.insert(libc::SYS_open, read_only(1)?);
        rules.insert(libc::SYS_openat, read_only(2)?);
        rules.insert(libc::SYS_mmap, no_code()?);
        Ok(rules)
    };
    compile(rules())
}

fn compile(rules: Result<Rules, BackendError>) -> Result<BpfProgram, JailError> {
    let filter = |rules| {
        SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)
    };
    rules.and_then(filter).and_then(BpfProgram::try_from).map_err(|error| JailError::Host {
        what: "make a filter of system calls",
        source: io::Error::other(error),
    })
}

/// What every thread may do.
fn common() -> Result<Rules, BackendError> {
    let mut rules: Rules = ALWAYS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_mprotect, no_code()?);
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![one(0, Op::Eq, own)?]);
    rules.insert(libc::SYS_fcntl, any(1, FCNTL.map(|flag| flag as u64))?);
    Ok(rules)
}

/// No code is made any more.
fn no_code() -> Result<Vec<SeccompRule>, BackendError> {
    Ok(vec![masked(2, libc::PROT_EXEC as u64, 0)?])
}

/// Files are opened for reading: argument `at` has the flags.
fn read_only(at: u8) -> Result<Vec<SeccompRule>, BackendError> {
    Ok(vec![masked(at, WRITES as u64, libc::O_RDONLY as u64)?])
}

fn rules(kind: ThreadKind, again: bool) -> Result<Rules, BackendError> {
    let mut rules = common()?;
    let mut all = |calls: &[i64]| rules.extend(calls.iter().map(|call| (*call, Vec::new())));
    match kind {
        // What they find they report at once.
        ThreadKind::Vcpu | ThreadKind::Collector => {
            all(READING);
            all(WORKERS);
        }
        ThreadKind::Main => {
            all(READING);
            all(WORKERS);
            all(REPORTS);
        }
        ThreadKind::Console => {}
    }
    if again {
        all(AGAIN);
        // Limits are read: what would be the new one is no address.
        let none = SeccompCondition::new(2, Len::Qword, Op::Eq, 0)?;
        rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![none])?]);
    } else if kind != ThreadKind::Console {
        rules.insert(libc::SYS_openat, read_only(2)?);
    }
    if kind == ThreadKind::Vcpu {
        rules.insert(libc::SYS_fallocate, any(1, [HOLE as u64])?);
    }
    if !again {
        rules.insert(libc::SYS_mmap, no_code()?);
    }
    rules.insert(libc::SYS_ioctl, ioctl_rules(kind, again)?);
    Ok(rules)
}

fn ioctl_rules(kind: ThreadKind, again: bool) -> Result<Vec<SeccompRule>, BackendError> {
    let mut numbers: Vec<u64> = Vec::new();
    if kind == ThreadKind::Vcpu {
        numbers.extend(ioctls::VCPU.map(u64::from));
    }
    numbers.extend(ioctls::VM.map(u64::from));
    numbers.extend(TERMINAL);
    let mut rules = any(1, numbers)?;
    if again {
        let (mask, value) = ioctls::KVM;
        rules.push(masked(1, mask.into(), value.into())?);
    }
    Ok(rules)
}

/// Argument `at` has one of these values.
fn any(at: u8, values: impl IntoIterator<Item = u64>) -> Result<Vec<SeccompRule>, BackendError> {
    values.into_iter().map(|value| one(at, Op::Eq, value)).collect()
}

/// The bits `mask` of argument `at` are `value`.
fn masked(at: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    one(at, Op::MaskedEq(mask), value)
}

/// One condition on the lower 32 bits of argument `at`: the kernel looks at no others of these.
fn one(at: u8, op: Op, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(at, Len::Dword, op, value)?])
}
