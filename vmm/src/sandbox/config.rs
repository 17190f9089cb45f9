//! What to run and how, and where its console goes.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use umbra_machine::cpuid::CpuidLeaf;
use umbra_machine::loader::Protocol;
use umbra_provenance::{QuarantineSize, objects};
use umbra_report::Distinct;
use umbra_shadow::abi::Redzone;

use super::GuestFile;
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
    /// Give the guest interrupt controllers even if it has one CPU; a Linux guest gets them anyway.
    /// With them `hlt` does not end the run: an interrupt may follow.
    pub irqchip: bool,
    /// Give the guest a timer, and the interrupt controllers that it needs. A Linux guest gets it
    /// anyway.
    pub pit: bool,
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
            irqchip: false,
            pit: false,
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
