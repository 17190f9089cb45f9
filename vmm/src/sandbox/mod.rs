//! The sandbox: a machine, its shadow and its findings, joined for one run of one kernel. The
//! library's entry point is [`run`].
//!
//! Each vCPU runs in a thread of its own. The calling thread waits for them, watches the time limit
//! and the request to stop, and gets the vCPUs out of the guest for either. If the host does not
//! let go of one, the run still ends, with all that was found.

mod calls;
mod console;
mod file;
mod globals;
pub mod input;
mod investigate;
mod marks;
pub mod monitor;
mod outcome;
mod picture;
mod rings;
pub mod stats;
#[cfg(test)]
mod tests;
mod unused_pages;
mod vcpus;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use thiserror::Error;
pub use umbra_shadow::abi::Redzone;
use vm_memory::GuestAddress;

use crate::machine::cpuid::CpuidLeaf;
use crate::machine::devices::{COM1_IRQ, Devices};
use crate::machine::loader::{
    Boot, Emulated, LoadError, Protocol, is_bzimage, is_linux, with_defaults,
};
use crate::machine::memory::Ram;
use crate::machine::stats::{Counters, emulates_ring0, tsc_khz};
use crate::machine::{Kvm, Machine, MachineConfig, MachineError, SlotId, layout};
use crate::report::symbols::Symbols;
use crate::report::{Finding, Findings};
use crate::shadow::accounting::resident_bytes;
use crate::shadow::{
    self, Notify, ObjectLimits, Objects, PageMap, ProcessMemory, Quarantine, QuarantineSize,
    ShadowError, SlotError, Slots, Windows,
};
use console::ConsoleWatch;
pub use file::GuestFile;
pub use marks::Mark;
use marks::Marks;
use monitor::{Monitor, Settings};
pub use outcome::Outcome;
use picture::Timeline;
pub use picture::{Picture, Sample};
use stats::{GuestStats, HostStats, RedzoneStats, ShadowStats, Stats};
use vcpus::Vcpus;

/// Which shadow to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShadowMode {
    /// One byte for each page, byte shadow on demand.
    #[default]
    PerPage,
    /// KASAN's own layout, to compare with.
    Full,
    /// None: the guest runs unchecked.
    Off,
}

impl ShadowMode {
    /// Its name on the command line and in `--stats`.
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
    /// A file for the kernel to find in memory.
    pub initrd: Option<GuestFile>,
    /// Its command line. A Linux kernel's gets some defaults, see [`with_defaults`].
    pub cmdline: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// CPUs, 1 to [`layout::MAX_CPUS`].
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
    /// How much freed memory waits before it is handed out again.
    pub quarantine: QuarantineSize,
    /// How much lies behind each object.
    pub redzone: Redzone,
    /// Host memory for who allocated and freed what, in bytes.
    pub provenance: u64,
    /// How long the guest may run.
    pub timeout: Option<Duration>,
    /// After how many different findings to stop; never if none.
    pub stop_at: Option<usize>,
    /// Find out whether the host counts guest instructions, and read the count. Costs a probe
    /// guest.
    pub count_instructions: bool,
    /// Watch the run for [`Report::picture`]. Without it nothing is sampled.
    pub picture: bool,
    /// Texts on the console at whose first line [`Stats::marks`] tells what the run had cost.
    pub marks: Vec<String>,
    /// Changes what the guest finds by CPUID: how tests show a guest an Umbra that is not this one.
    /// What it is told and what there is are then two things.
    #[doc(hidden)]
    pub discovery: Option<fn(&mut [CpuidLeaf])>,
}

/// An empty kernel with 256 MiB, one CPU and no limits: to name only what is different.
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
            provenance: shadow::objects::DEFAULT_BUDGET,
            timeout: None,
            stop_at: None,
            count_instructions: false,
            picture: false,
            marks: Vec::new(),
            discovery: None,
        }
    }
}

/// The guest's console.
pub struct Console {
    /// Gets what the guest writes.
    pub output: Box<dyn Write + Send>,
    /// What is typed, if the guest is Linux. Ctrl-A begins a command, see [`input`].
    pub input: Option<Box<dyn Read + Send>>,
}

impl<W: Write + Send + 'static> From<Box<W>> for Console {
    fn from(output: Box<W>) -> Self {
        Self { output, input: None }
    }
}

/// Who hears of each new finding while the guest runs, and of its start.
pub trait Observer: Send {
    /// A finding that is the first of its kind.
    fn finding(&mut self, finding: &Finding);

    /// The guest is about to run; `counters` are its vCPUs', if they were asked for and KVM has
    /// them.
    fn starts(&mut self, counters: Option<Arc<Counters>>) {
        let _ = counters;
    }
}

/// Hears nothing.
impl Observer for () {
    fn finding(&mut self, _: &Finding) {}
}

/// Why a run did not begin.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum RunError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Shadow(#[from] ShadowError),
    #[error("cannot start a thread for a vCPU: {0}")]
    Thread(std::io::Error),
    #[error("a vCPU's thread panicked: this is a bug in Umbra")]
    Panicked,
    #[error("{0}, but the run cannot be ended in good order: is its output being read?")]
    Abandoned(Outcome),
}

/// What a run came to.
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// What was found.
    pub findings: Findings,
    /// What it cost.
    pub stats: Stats,
    /// What it looked like, if that was asked for.
    pub picture: Option<Picture>,
    /// What the guest had allocated at the end, what it had freed, and from where.
    pub objects: Objects,
}

impl Report {
    /// The exit status that belongs to it.
    pub fn status(&self) -> u8 {
        self.outcome.status(!self.findings.is_empty())
    }
}

/// How often the waiting thread looks whether it shall stop.
const TICK: Duration = Duration::from_millis(20);
/// How often it looks whether all vCPUs have halted for good.
const LOOK: Duration = Duration::from_millis(500);
/// How long a vCPU may take to come out of the guest.
const PATIENCE: Duration = Duration::from_secs(2);

/// The machine's memory slots, for the shadow.
struct MachineSlots<'a>(&'a Machine);

impl Slots for MachineSlots<'_> {
    fn map(&mut self, gpa: u64, host: *mut u8, len: u64, readonly: bool) -> Result<u32, SlotError> {
        // SAFETY: `Shared` drops the machine before the windows, and the vCPUs' threads hold both;
        // shadow is memory that is meant for the guest to write. Should the windows fail half made,
        // they go first, but no vCPU runs then or later.
        let slot = unsafe { self.0.map(GuestAddress(gpa), host, len, readonly) };
        slot.map(SlotId::into_raw).map_err(|e| SlotError::Kernel(std::io::Error::other(e)))
    }

    fn unmap(&mut self, slot: u32) -> Result<(), SlotError> {
        self.0
            .unmap(SlotId::from_raw(slot))
            .map_err(|e| SlotError::Kernel(std::io::Error::other(e)))
    }
}

/// What all threads hold. The order of the fields is the order in which they are dropped: the
/// machine, whose memory slots lie in the windows, before them.
struct Shared {
    machine: Machine,
    vcpus: Vcpus,
    counters: Option<Arc<Counters>>,
    stop: AtomicBool,
    /// The user typed that the run shall end.
    quit: AtomicBool,
    /// The state. The lock is passed on to who waits for it: a vCPU that makes one exit after the
    /// other keeps no other waiting. It is not lost by a panic, which is told when that thread is
    /// joined; the findings are still good.
    monitor: Mutex<Monitor>,
}

impl Shared {
    fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock()
    }

    /// The state, unless a vCPU's thread holds on to it: it may be writing to a pipe that nobody
    /// reads.
    fn monitor_in_time(&self) -> Option<MutexGuard<'_, Monitor>> {
        self.monitor.try_lock_for(PATIENCE)
    }
}

/// Runs a kernel to its end. `console` is its serial port, `observer` gets its findings; `stop`
/// ends it from outside.
///
/// # Errors
/// The run could not begin: no KVM, a bad kernel, no memory. Once it has begun, everything is an
/// [`Outcome`].
pub fn run(
    config: &Config,
    console: impl Into<Console>,
    mut observer: Box<dyn Observer>,
    stop: &AtomicBool,
) -> Result<Report, RunError> {
    let begin = Instant::now();
    let kvm = Kvm::open()?;
    // Before anything is computed from it.
    Ram::check(config.memory).map_err(MachineError::from)?;
    let layout = shadow::Layout::new(layout::ram_end(config.memory)).map_err(ShadowError::from)?;
    let kernel = config.kernel.read()?;
    let linux = is_linux(&kernel);
    let quarantine = config.quarantine.bytes(config.memory);
    let settings = Settings {
        quarantine,
        quarantine_batch: shadow::quarantine::batch(quarantine, config.cpus),
        redzone: config.redzone,
    };
    let mut extra_cpuid = monitor::discovery(config.shadow, config.notify, settings, &layout);
    if let Some(change) = config.discovery {
        change(&mut extra_cpuid);
    }
    let mut machine = Machine::new(
        &kvm,
        MachineConfig {
            memory_bytes: config.memory,
            cpus: config.cpus,
            extra_cpuid,
            irqchip: config.irqchip || linux,
            pit: config.pit || linux,
        },
    )?;
    let has_irqchip = machine.irq_line(COM1_IRQ).is_some();
    let emulated = (linux || config.count_instructions) && is_emulated(&kvm);
    let cmdline = if linux {
        // Where it is not known, nothing is made of it.
        let host = emulated.then(|| Emulated {
            tsc_khz: tsc_khz(&kvm).unwrap_or(0),
            bzimage: is_bzimage(&kernel),
        });
        with_defaults(&config.cmdline, host)
    } else {
        config.cmdline.clone()
    };
    let initrd = config.initrd.as_ref().map(GuestFile::read).transpose()?;
    machine.load(&Boot {
        image: &kernel,
        cmdline: &cmdline,
        initrd: initrd.as_deref(),
        protocol: config.boot,
        unpack: emulated,
    })?;
    // They are in guest memory now.
    drop((kernel, initrd));
    let vcpus =
        (0..config.cpus).map(|id| machine.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    // Last of what can fail: if it does, no vCPU has run on the slots that it made.
    let mode = match config.shadow {
        ShadowMode::PerPage => Some(shadow::Mode::PerPage),
        ShadowMode::Full => Some(shadow::Mode::Full),
        ShadowMode::Off => None,
    };
    let windows = mode.map(|mode| {
        let ram = layout::ram_ranges(config.memory)
            .into_iter()
            .map(|(gpa, len)| gpa.0..gpa.0 + len)
            .collect();
        let windows =
            shadow::Config { ram, mode, notify: config.notify, limit: config.shadow_limit };
        Windows::new(&windows, &mut MachineSlots(&machine))
    });
    let windows = windows.transpose()?;
    let kernel = config.kernel.clone();
    let counters = config.count_instructions.then(|| Counters::open(&vcpus)).and_then(|counters| {
        counters.inspect_err(|e| log::info!("guest instructions are not counted: {e}")).ok()
    });
    let counters = counters.map(Arc::new);
    observer.starts(counters.clone());
    let Console { output, input } = console.into();
    let (output, tail) = picture::Tail::tee(output, config.picture);
    let mut monitor = Monitor::new(
        windows,
        Devices::new(output, machine.irq_line(COM1_IRQ)),
        Symbols::lazy(move || kernel.contents().map_err(std::io::Error::other)),
        observer,
        config.stop_at,
    );
    monitor.console = ConsoleWatch::new(linux);
    monitor.objects = Objects::new(ObjectLimits::of_budget(config.provenance));
    if monitor.windows.is_some() {
        monitor.quarantine = Quarantine::new(quarantine, config.cpus);
    }
    monitor.timeline = config.picture.then(Timeline::default);
    monitor.marks = Marks::new(config.marks.clone(), counters.clone().filter(|_| emulated));
    let shared = Arc::new(Shared {
        machine,
        vcpus: Vcpus::new(&vcpus),
        counters,
        stop: AtomicBool::new(false),
        quit: AtomicBool::new(false),
        monitor: Mutex::new(monitor),
    });

    let (tell, wait) = mpsc::sync_channel(2 * vcpus.len());
    let started = Instant::now();
    let mut threads = Vec::with_capacity(vcpus.len());
    for vcpu in vcpus {
        match vcpus::spawn(vcpu, shared.clone(), tell.clone()) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                shared.stop.store(true, SeqCst);
                shared.vcpus.end(&threads);
                return Err(RunError::Thread(error));
            }
        }
    }
    drop(tell);
    if let Some(input) = input.filter(|_| linux) {
        input::spawn(input, Arc::downgrade(&shared)).map_err(RunError::Thread)?;
    }
    // A limit beyond what the clock can tell is none.
    let deadline =
        config.timeout.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit)));
    let (mut looked, mut halted) = (Instant::now(), false);
    let mut outcome = loop {
        let tick =
            deadline.map_or(TICK, |(at, _)| TICK.min(at.saturating_duration_since(Instant::now())));
        match wait.recv_timeout(tick) {
            Ok(outcome) => break outcome,
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        // A guest that makes no exits is looked after from here. While it handles one, the other
        // threads do it.
        if config.picture
            && let Some(mut monitor) = shared.monitor.try_lock()
        {
            monitor.sample();
        }
        if has_irqchip && looked.elapsed() >= LOOK {
            // Twice, for one of them may just have been woken by another.
            let place = shared.vcpus.halted_for_good();
            if let (true, Some(rip)) = (std::mem::replace(&mut halted, place.is_some()), place) {
                break Some(Outcome::HaltedForGood { place: shared.monitor().place_of(rip) });
            }
            shared.vcpus.look();
            looked = Instant::now();
        }
        if stop.load(SeqCst) || shared.quit.load(SeqCst) {
            break Some(Outcome::Interrupted);
        }
        if let Some((at, limit)) = deadline
            && at <= Instant::now()
        {
            break Some(Outcome::TimeLimit(limit));
        }
    };
    shared.stop.store(true, SeqCst);
    let left_behind = !shared.vcpus.end(&threads);
    // It may have ended by itself just now.
    if let Some(Some(itself)) = wait.try_iter().find(Option::is_some) {
        outcome = Some(itself);
    }
    for thread in threads {
        if thread.is_finished() && thread.join().is_err() {
            return Err(RunError::Panicked);
        }
    }
    let mut outcome = outcome.ok_or(RunError::Panicked)?;
    let counted = shared.counters.as_ref().and_then(|counters| counters.instructions_emulated());
    let instructions = counted.filter(|_| emulated);
    let Some(mut monitor) = shared.monitor_in_time() else {
        return Err(RunError::Abandoned(outcome));
    };
    if left_behind {
        log::warn!("the host does not let go of a vCPU; its thread is left behind");
    }
    monitor.drain_all(shared.machine.ram());
    monitor.flush();
    outcome = monitor.console_knows(outcome);
    let picture = monitor.timeline.take().map(|timeline| {
        let ram: Vec<_> = layout::ram_ranges(config.memory)
            .into_iter()
            .map(|(gpa, len)| gpa.0..gpa.0 + len)
            .collect();
        Picture {
            samples: timeline.finish(monitor.windows.as_mut()),
            pages: monitor
                .windows
                .as_ref()
                .map(|windows| PageMap::of(windows, &ram, picture::CELLS)),
            console: tail.take(),
        }
    });
    let host = HostStats {
        start_seconds: started.saturating_duration_since(begin).as_secs_f64(),
        seconds: started.elapsed().as_secs_f64(),
        outside_seconds: shared.vcpus.outside().as_secs_f64(),
        ..HostStats::default()
    };
    let stats = figures(config, &outcome, &mut monitor, shared.machine.ram(), instructions, host);
    let findings = std::mem::take(&mut monitor.findings);
    let objects = std::mem::take(&mut monitor.objects);
    Ok(Report { outcome, findings, stats, picture, objects })
}

/// Whether the host emulates ring 0, and so counts the guest's instructions.
fn is_emulated(kvm: &Kvm) -> bool {
    emulates_ring0(kvm).unwrap_or_else(|error| {
        log::info!("it is not known whether the host emulates ring 0: {error}");
        false
    })
}

/// Collects all figures.
fn figures(
    config: &Config,
    outcome: &Outcome,
    monitor: &mut Monitor,
    ram: &Ram,
    instructions: Option<u64>,
    host: HostStats,
) -> Stats {
    let notify = match config.notify {
        Notify::Ring => "ring",
        Notify::Sync => "sync",
    };
    let mut shadow = ShadowStats { mode: config.shadow.as_str(), notify, ..ShadowStats::default() };
    if let Some(windows) = &mut monitor.windows {
        match windows.figures() {
            Ok(figures) => {
                shadow = ShadowStats {
                    page_bytes: figures.page_bytes,
                    byte_mapped_bytes: figures.byte_mapped_bytes,
                    byte_resident_bytes: figures.byte_resident_bytes,
                    byte_peak_resident_bytes: figures.byte_peak_resident_bytes,
                    byte_used_peak_bytes: figures.byte_used_peak_bytes,
                    byte_unused_bytes: figures.byte_unused_bytes,
                    faults: figures.faults,
                    released_bytes: figures.released_bytes,
                    ..shadow
                };
            }
            Err(error) => log::warn!("the shadow's figures are missing: {error}"),
        }
    }
    let (redzone_bytes, redzone_peak_bytes) = monitor.objects.redzone_bytes();
    let mut exits = monitor.exits.clone();
    exits.completed = monitor.completed().clone();
    Stats {
        outcome: outcome.word(),
        console_tail: if outcome.is_regular() {
            Vec::new()
        } else {
            monitor.console.lines().map(str::to_owned).collect()
        },
        marks: monitor.marks.passed().to_vec(),
        findings: monitor.findings.distinct(),
        findings_total: monitor.findings.total(),
        quarantine: monitor.quarantine.figures(),
        redzones: RedzoneStats { bytes: redzone_bytes, peak_bytes: redzone_peak_bytes },
        provenance: monitor.objects.figures(config.provenance),
        guest: GuestStats {
            memory_bytes: config.memory,
            cpus: config.cpus,
            instructions,
            released_bytes: monitor.unused_pages.released(),
        },
        exits,
        events: monitor.events.clone(),
        host: with_memory(host, ram, &shadow),
        shadow,
    }
}

fn with_memory(host: HostStats, ram: &Ram, shadow: &ShadowStats) -> HostStats {
    let guest = ram
        .regions()
        .map(|(_, at, len)| resident_bytes(&(at as u64..at as u64 + len)))
        .sum::<Result<u64, _>>();
    match (ProcessMemory::read(), guest) {
        (Ok(memory), Ok(guest)) => HostStats {
            rss_peak_bytes: memory.resident_peak,
            vmm_overhead_bytes: memory
                .resident
                .saturating_sub(guest + shadow.page_bytes + shadow.byte_resident_bytes),
            ..host
        },
        (Err(error), _) | (_, Err(error)) => {
            log::warn!("this process's memory figures are missing: {error}");
            host
        }
    }
}
