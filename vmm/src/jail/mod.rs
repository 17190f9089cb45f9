//! The jail of the process that runs a guest.
//!
//! A guest that finds a defect of KVM or of Umbra, and a kernel file that finds one of the loader
//! or of the readers of symbols, shall gain nothing by it. So the program gives up what it does not
//! need, in two steps:
//!
//! - [`Jail::enter`], before anything of the kernel is parsed and before there is a second thread:
//!   no new privileges, no capabilities, resource limits, and a Landlock domain that leaves it the
//!   files of its [`Profile`] and no TCP.
//! - [`Jail::close`], by each thread right before guest code runs: a seccomp filter with the system
//!   calls that this [kind](ThreadKind) of thread makes. A call that is not in it ends the process
//!   with a sentence that names it (`trap.rs`).
//!
//! | file | what it does |
//! | --- | --- |
//! | `files.rs` | Landlock |
//! | `calls.rs` | the system calls of each kind of thread |
//! | `trap.rs` | reports a call that was stopped |
//! | `limits.rs` | privileges and resource limits |
//!
//! The process that reads symbols and sources runs no guest. It has a jail of its own,
//! [`leave_only_reading`].
//!
//! A library does not put its program into a jail unless it is asked:
//! [`Config::jail`](crate::sandbox::Config::jail).

mod calls;
mod files;
mod limits;
mod trap;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use seccompiler::BpfProgram;
use thiserror::Error;

/// KVM's device. The machine opens it inside of the jail.
const KVM: &str = "/dev/kvm";

/// Whether there is a jail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// As strict as the host can.
    #[default]
    On,
    /// None.
    Off,
    /// As strict as it is meant to be, or no run.
    Required,
}

/// Why there is no jail.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum JailError {
    #[error("cannot {what}: {source}; --jail off runs without a jail")]
    Host { what: &'static str, source: io::Error },
    #[error("the jail is not complete here: {0}; --jail on runs all the same")]
    Incomplete(String),
    #[error(
        "files in {0} can only be written with privileges that the jail drops: choose another \
         folder, or run with --jail off"
    )]
    Privileged(PathBuf),
    #[error("cannot allow {path} in the jail: {reason}")]
    Path { path: PathBuf, reason: String },
}

/// What a run may use.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Files to read, and folders to read in, at any depth. What is open already needs no entry.
    pub read: Vec<PathBuf>,
    /// Folders in which files may be made and renamed.
    pub write: Vec<PathBuf>,
    /// Most bytes of address space that guest memory, shadow and history take.
    pub memory: u64,
    /// CPUs of the guest.
    pub cpus: u8,
    /// Several guests run one after the other, so that the main thread sets up machines again.
    pub again: bool,
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, and handles its exits.
    Vcpu,
    /// Reads rings while the guest runs.
    Collector,
    /// Waits for the others, and writes the reports when the run has ended.
    Main,
    /// Reads the console's input, or writes its output.
    Console,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Vcpu, Self::Collector, Self::Main, Self::Console];

    /// Its name in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vcpu => "a vCPU",
            Self::Collector => "the collector",
            Self::Main => "the main thread",
            Self::Console => "the console",
        }
    }
}

/// Leaves the calling process nothing but to read in `folders` and what is open already, and to
/// answer on a socket: it is to parse files that nobody trusts. A system call that this does not
/// take ends it by `SIGSYS`, without a word. To be called by the only thread of the process.
///
/// What the host lacks stays open, as in a jail that is not required: [`Jail::enter`] says so.
pub fn leave_only_reading(folders: &[&Path]) {
    let _ = limits::no_new_privileges();
    let _ = limits::drop_capabilities();
    let _ = files::restrict(folders.iter().copied().filter(|folder| folder.is_dir()), [], []);
    if calls::host_has_seccomp()
        && let Ok(program) = calls::reader()
    {
        let _ = seccompiler::apply_filter(&program);
    }
}

/// A jail that this process is in. Its threads [close](Jail::close) it one by one.
#[derive(Debug)]
pub struct Jail {
    programs: [Arc<BpfProgram>; ThreadKind::ALL.len()],
    missing: Vec<String>,
}

impl Jail {
    /// Enters the first part of the jail: files, privileges and limits. To be called by the only
    /// thread of the process; those that it starts are in the jail as well.
    ///
    /// # Errors
    /// The host refuses what it should be able to do, a path of the profile is not there, or
    /// `required` is set and the host lacks Landlock or seccomp.
    pub fn enter(profile: &Profile, required: bool) -> Result<Self, JailError> {
        // These cannot be opened later. Where they are missing, the run says so.
        let _ = crate::shadow::proc::files();
        let _ = umbra_machine::stats::time_stamps_are_in_step();
        // The first call looks for the kernel's clock in this process, which takes other calls.
        let _ = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        limits::no_new_privileges()?;
        limits::drop_capabilities()?;
        files::check_writable(&profile.write)?;
        limits::set(profile)?;
        let mut missing = Vec::new();
        let [read, write] =
            [&profile.read, &profile.write].map(|all| all.iter().map(PathBuf::as_path));
        missing.extend(files::restrict(read, write, [Path::new(KVM)])?);
        trap::install().map_err(|source| JailError::Host { what: "catch SIGSYS", source })?;
        let compile = |kind| calls::program(kind, profile.again).map(Arc::new);
        let [vcpu, collector, main, console] = ThreadKind::ALL.map(compile);
        let programs = [vcpu?, collector?, main?, console?];
        if !calls::host_has_seccomp() {
            missing.push("this kernel has no seccomp filters".into());
        }
        if required && !missing.is_empty() {
            return Err(JailError::Incomplete(missing.join(", and ")));
        }
        Ok(Self { programs, missing })
    }

    /// What the host lacks, a sentence each.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Closes the jail for the calling thread, which is of this kind: from here on it makes only
    /// the system calls of its kind. A thread that it starts later is closed in as well.
    ///
    /// # Errors
    /// The host refuses.
    pub fn close(&self, kind: ThreadKind) -> io::Result<()> {
        trap::note_kind(kind);
        if !calls::host_has_seccomp() {
            return Ok(());
        }
        let at = ThreadKind::ALL.iter().position(|known| *known == kind).unwrap_or_default();
        seccompiler::apply_filter(&self.programs[at]).map_err(io::Error::other)
    }
}
