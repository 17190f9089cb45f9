//! What to run and how, and where its console goes.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use umbra_machine::cpuid::CpuidLeaf;
use umbra_machine::loader::Protocol;
use umbra_provenance::{QuarantineSize, objects};
use umbra_report::Distinct;
use umbra_shadow::abi::Redzone;

use super::GuestFile;
use crate::jail::Jail;
use crate::shadow::{Mode, Notify};

/// Which shadow to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShadowMode {
    /// One byte for each page, byte shadow on demand.
    #[default]
    PerPage,
    /// KASAN's own layout, for comparison.
    Full,
    /// None: the guest runs unchecked.
    Off,
}

impl ShadowMode {
    /// The mode of the windows; none without a shadow.
    pub(super) fn mode(self) -> Option<Mode> {
        match self {
            Self::PerPage => Some(Mode::PerPage),
            Self::Full => Some(Mode::Full),
            Self::Off => None,
        }
    }

    /// Its name in figures.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PerPage => "per-page",
            Self::Full => "full",
            Self::Off => "off",
        }
    }
}

/// Interrupt controllers and timers of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Irqchip {
    /// Those of a PC: the old interrupt controllers and the APICs, an interval timer and the local
    /// APICs' timers, and tables that name them. `hlt` with interrupts on waits for one; with
    /// interrupts off on all CPUs, it ends the run.
    #[default]
    On,
    /// None: `hlt` ends the run. For one CPU, and not for Linux.
    Off,
}

/// The debug port that ends a run: QEMU's `isa-debug-exit` at
/// [`DEBUG_EXIT`](umbra_machine::devices::DEBUG_EXIT).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DebugExit {
    /// As with [`DebugExit::SUCCESS`], but none for Linux.
    #[default]
    Auto,
    /// There is no such port.
    Off,
    /// The value that means success. Every other means failure.
    Success(u32),
}

impl DebugExit {
    /// The value by which small kernels in Rust say that all is well. QEMU's exit status is 33
    /// then, which no problem of QEMU's own gives.
    pub const SUCCESS: u32 = 0x10;

    /// The value that means success, if there is such a port.
    pub(super) fn success(self, linux: bool) -> Option<u32> {
        match self {
            Self::Auto => (!linux).then_some(Self::SUCCESS),
            Self::Off => None,
            Self::Success(value) => Some(value),
        }
    }
}

/// What to run, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// The kernel's file.
    pub kernel: GuestFile,
    /// How to boot it.
    pub boot: Protocol,
    /// A file that the kernel gets in memory.
    pub initrd: Option<GuestFile>,
    /// Its command line. Linux gets some defaults, see
    /// [`with_defaults`](umbra_machine::loader::with_defaults).
    pub cmdline: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// CPUs, 1 to [`MAX_CPUS`](umbra_machine::layout::MAX_CPUS).
    pub cpus: u8,
    /// Its interrupt controllers and timers.
    pub irqchip: Irqchip,
    /// Its debug port that ends the run.
    pub debug_exit: DebugExit,
    /// Which shadow.
    pub shadow: ShadowMode,
    /// Who writes it.
    pub notify: Notify,
    /// Most byte shadow that may be mapped, in bytes.
    pub shadow_limit: Option<u64>,
    /// Size of the quarantine: freed memory that waits before it is allocated again.
    pub quarantine: QuarantineSize,
    /// Size of the redzone behind each object.
    pub redzone: Redzone,
    /// Host memory for the history of allocations and frees, in bytes.
    pub provenance: u64,
    /// Time limit.
    pub timeout: Option<Duration>,
    /// Stop after this many different findings; never if none.
    pub stop_at: Option<usize>,
    /// Which findings count as different.
    pub distinct: Distinct,
    /// A run that was not checked is not clean: its status is 5
    /// ([`RunReport::status`](super::RunReport::status)).
    pub require_checks: bool,
    /// An oops of Linux that it survives does not count as a crash.
    pub ignore_oops: bool,
    /// Find out whether the host counts guest instructions, and read the count. Costs a probe
    /// guest.
    pub count_instructions: bool,
    /// Watch the run for [`RunReport::picture`](super::RunReport::picture). Without it nothing is
    /// sampled.
    pub picture: bool,
    /// Texts to look for on the console. When one first appears, the costs until then go to
    /// [`Stats::marks`](super::stats::Stats::marks).
    pub marks: Vec<String>,
    /// The folder with the files of the kernel's modules (`.ko`), for the source lines in reports.
    pub modules: Option<PathBuf>,
    /// Additional CPUID leaves. One with the number of Umbra's own leaf replaces it. That changes
    /// only what the guest reads, for example another version of Umbra, or smaller windows.
    pub cpuid: Vec<CpuidLeaf>,
    /// The jail that this process is in. The threads of the run close it before guest code runs,
    /// and the thread that called [`run`](super::run) with them, for good. None: no jail.
    pub jail: Option<Arc<Jail>>,
}

/// An empty kernel with 256 MiB, one CPU and no limits.
impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: GuestFile::default(),
            boot: Protocol::Auto,
            initrd: None,
            cmdline: String::new(),
            memory: 256 << 20,
            cpus: 1,
            irqchip: Irqchip::default(),
            debug_exit: DebugExit::default(),
            shadow: ShadowMode::default(),
            notify: Notify::Ring,
            shadow_limit: None,
            quarantine: QuarantineSize::Auto,
            redzone: Redzone::Adaptive,
            provenance: objects::DEFAULT_BUDGET,
            timeout: None,
            stop_at: None,
            distinct: Distinct::Bugs,
            require_checks: false,
            ignore_oops: false,
            count_instructions: false,
            picture: false,
            marks: Vec::new(),
            modules: None,
            cpuid: Vec::new(),
            jail: None,
        }
    }
}

/// The guest's console.
pub struct Console {
    /// Gets what the guest writes.
    pub output: Box<dyn Write + Send>,
    /// What is typed, if the guest is Linux. Ctrl-A begins a command, see [`input`](super::input).
    pub input: Option<Box<dyn Read + Send>>,
}

impl<W: Write + Send + 'static> From<Box<W>> for Console {
    fn from(output: Box<W>) -> Self {
        Self { output, input: None }
    }
}
