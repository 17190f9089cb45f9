//! Runs a kernel: set up, watch, tear down.
//!
//! Each vCPU runs in a thread of its own. The calling thread waits for them, watches the time limit
//! and the stop flag, and gets the vCPUs out of the guest. If one does not come out, the run still
//! ends with its findings.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use umbra_machine::complete::Completer;
use umbra_machine::cpuid::may_emulate_ring0;
use umbra_machine::devices::{COM1_IRQ, Devices};
use umbra_machine::loader::{
    Boot, Emulated, Limit, LoadError, is_bzimage, is_linux, with_defaults,
};
use umbra_machine::memory::Ram;
use umbra_machine::stats::{Counters, emulates_ring0, time_stamp, tsc_khz};
use umbra_machine::vcpu::Vcpu;
use umbra_machine::{Kvm, Machine, MachineConfig, MachineError, layout};
use umbra_provenance::rings::Clock;
use umbra_provenance::{ObjectLimits, Objects, Provenance, Quarantine, quarantine};
use umbra_report::Picture;
use umbra_report::symbols::{Deadline, Symbols};
use umbra_shadow::abi::Features;

use super::collector::{self, Doorbell};
use super::console::ConsoleWatch;
use super::discovery::{self, Settings};
use super::dispatch::Dispatcher;
use super::gate::Gate;
use super::guest_info::GuestInfo;
use super::marks::Marks;
use super::picture::{self, Tail, Timeline};
use super::run_shadow::RunShadow;
use super::session::Session;
use super::shared::{MachineMemslots, Shared};
use super::vcpu_thread;
use super::vcpus::Vcpus;
use super::watch::Watch;
use super::{
    Config, Console, GuestFile, Irqchip, Observer, Outcome, RunError, RunReport, ShadowMode, input,
    instrumentation, stats,
};
use crate::jail::Jail;
use crate::shadow::{Layout, Notify, ShadowError, Windows, WindowsConfig, page_map};

/// Poll interval for the stop flag.
const TICK: Duration = Duration::from_millis(20);
/// Longest interval between two checks whether all vCPUs have halted for good.
const HALT_CHECK: Duration = Duration::from_millis(500);
/// The interval is the run's time until then, divided by this, so that short runs end soon.
const HALT_CHECK_PART: u32 = 8;
/// How long a lookup of symbols may go on when the run is to end.
const LOOKUP_END: Duration = Duration::from_millis(500);
/// How long the lookups may take that tell of the end.
const LAST_LOOKUPS: Duration = Duration::from_secs(3);

/// Runs a kernel to its end. `console` is its serial port, `observer` gets its findings, and `stop`
/// ends the run.
///
/// # Errors
/// The run could not begin: no KVM, a bad kernel, no memory. Later errors are an [`Outcome`].
pub fn run(
    config: &Config,
    console: impl Into<Console>,
    observer: Box<dyn Observer>,
    stop: &AtomicBool,
) -> Result<RunReport, RunError> {
    let begin = Instant::now();
    // A limit that overflows the clock is none.
    let deadline = config.timeout.and_then(|limit| Some((begin.checked_add(limit)?, limit)));
    let limit = Limit { stop: Some(stop), deadline: deadline.map(|(at, _)| at) };
    let prepared = set_up(config, console.into(), observer, &limit);
    let prepared = prepared.map_err(|error| ended_early(error, config))?;
    let running = prepared.start(begin, config.jail.clone())?;
    let outcome = running.watch(config, deadline, stop);
    running.tear_down(config, outcome)
}

/// An error of the set-up. Where the user or the time limit ended it, it is a run that ended.
fn ended_early(error: RunError, config: &Config) -> RunError {
    match (error, config.timeout) {
        (RunError::Load(LoadError::Interrupted), _) => RunError::NotBegun(Outcome::Interrupted),
        (RunError::Load(LoadError::TimeLimit), Some(limit)) => {
            RunError::NotBegun(Outcome::TimeLimit(limit))
        }
        (error, _) => error,
    }
}

/// A loaded machine.
struct Hardware {
    machine: Machine,
    vcpus: Vec<Vcpu>,
    /// The kernel is Linux.
    linux: bool,
    /// The host emulates ring 0, and so counts the guest's instructions.
    emulated: bool,
    /// What stamps of records say about time.
    clock: Clock,
    completer: Completer,
}

/// A run that can start.
struct Prepared {
    shared: Arc<Shared>,
    vcpus: Vec<Vcpu>,
    input: Option<Box<dyn Read + Send>>,
    /// The end of the console, if a picture was requested.
    tail: Tail,
    has_irqchip: bool,
    emulated: bool,
}

fn set_up(
    config: &Config,
    console: Console,
    mut observer: Box<dyn Observer>,
    limit: &Limit,
) -> Result<Prepared, RunError> {
    let Hardware { machine, vcpus, linux, emulated, clock, completer } = hardware(config, limit)?;
    // The last step that can fail: if it does, no vCPU has run on its memslots.
    let windows = windows(config, &machine)?;
    let counters = config.count_instructions.then(|| Counters::open(&vcpus)).and_then(|counters| {
        counters.inspect_err(|e| log::info!("guest instructions are not counted: {e}")).ok()
    });
    let counters = counters.map(Arc::new);
    observer.starts(counters.clone());
    let (output, tail) = Tail::tee(console.output, config.picture);
    let com1 = machine.irq_line(COM1_IRQ);
    let has_irqchip = com1.is_some();
    let quarantine = match &windows {
        Some(_) => Quarantine::new(config.quarantine.bytes(config.memory), config.cpus),
        None => Quarantine::new(0, 1),
    };
    let lookups = Deadline::default();
    let kernel = config.kernel.clone();
    let symbols = Symbols::lazy(move || kernel.contents().map_err(std::io::Error::other))
        .with_modules_in(config.modules.clone())
        .with_deadline(lookups.clone());
    let dispatcher = Dispatcher::new(
        Devices::new(output, com1).with_debug_exit(config.debug_exit.success(linux)),
        RunShadow::new(windows),
        Provenance::new(Objects::new(ObjectLimits::of_budget(config.provenance)), quarantine)
            .with_clock(clock),
        GuestInfo::new(symbols),
        Session::new(observer, config.distinct, config.stop_at),
        Watch::new(
            ConsoleWatch::new(linux).with_oopses(!config.ignore_oops),
            Marks::new(config.marks.clone(), counters.clone().filter(|_| emulated)),
            config.picture.then(Timeline::default),
        ),
    )
    .with_completer(completer);
    let collects = config.shadow != ShadowMode::Off && config.notify == Notify::Ring;
    let doorbell = collects.then(|| Doorbell::new(&machine).map_err(RunError::Doorbell));
    let shared = Arc::new(Shared {
        machine,
        doorbell: doorbell.transpose()?,
        vcpus: Vcpus::new(&vcpus),
        counters,
        stop: AtomicBool::new(false),
        quit: AtomicBool::new(false),
        lookups,
        dispatcher: Mutex::new(dispatcher),
    });
    let input = console.input.filter(|_| linux);
    Ok(Prepared { shared, vcpus, input, tail, has_irqchip, emulated })
}

/// What completes instructions. In a jail, executable memory is made now or never. Only where ring
/// 0 is emulated is there anything to execute in it.
fn completer(config: &Config) -> Result<Completer, RunError> {
    match config.jail {
        Some(_) => Completer::fixed(may_emulate_ring0()).map_err(RunError::Code),
        None => Ok(Completer::default()),
    }
}

/// Makes the machine and loads the kernel.
fn hardware(config: &Config, limit: &Limit) -> Result<Hardware, RunError> {
    let kvm = Kvm::open()?;
    // Check it before it is used.
    Ram::check(config.memory).map_err(MachineError::from)?;
    let stamps = discovery::stamps(config.cpus, may_emulate_ring0());
    let mut machine = Machine::new(
        &kvm,
        MachineConfig {
            memory_bytes: config.memory,
            cpus: config.cpus,
            extra_cpuid: cpuid(config, stamps)?,
            irqchip: config.irqchip == Irqchip::On,
        },
    )?;
    let kernel = config.kernel.source();
    let linux = is_linux(machine.ram(), kernel, limit)?;
    if config.shadow != ShadowMode::Off {
        instrumentation::warnings(kernel, limit)?.iter().for_each(|text| log::warn!("{text}"));
    }
    if linux && config.irqchip == Irqchip::Off {
        return Err(RunError::LinuxWithoutIrqchip);
    }
    let bzimage = is_bzimage(kernel)?;
    let emulated = (linux || config.count_instructions) && is_emulated(&kvm);
    let cmdline = if linux {
        let host = emulated.then(|| Emulated {
            // 0 where it is not known.
            tsc_khz: tsc_khz(&kvm).unwrap_or(0),
            bzimage,
        });
        with_defaults(&config.cmdline, host)
    } else {
        config.cmdline.clone()
    };
    machine.load(&Boot {
        image: kernel,
        cmdline: &cmdline,
        initrd: config.initrd.as_ref().map(GuestFile::source),
        protocol: config.boot,
        unpack: emulated,
        limit: *limit,
    })?;
    let vcpus = machine.create_vcpus()?;
    let clock = match vcpus.first().filter(|_| stamps.has(Features::STAMPS_TSC)) {
        Some(vcpu) => Clock::tsc(vcpu.tsc_khz().unwrap_or(0), time_stamp()),
        None => Clock::default(),
    };
    Ok(Hardware { machine, vcpus, linux, emulated, clock, completer: completer(config)? })
}

/// The CPUID leaves by which the guest finds Umbra.
fn cpuid(
    config: &Config,
    stamps: Features,
) -> Result<Vec<umbra_machine::cpuid::CpuidLeaf>, RunError> {
    let layout = Layout::new(layout::ram_end(config.memory)).map_err(ShadowError::from)?;
    let quarantine = config.quarantine.bytes(config.memory);
    let settings = Settings {
        quarantine,
        quarantine_batch: quarantine::batch(quarantine, config.cpus),
        redzone: config.redzone,
        stamps,
    };
    let mut leaves = discovery::leaves(config.shadow, config.notify, settings, &layout);
    for leaf in &config.cpuid {
        leaves.retain(|own| own.function != leaf.function);
        leaves.push(*leaf);
    }
    Ok(leaves)
}

/// Whether the host emulates ring 0, and so counts the guest's instructions.
fn is_emulated(kvm: &Kvm) -> bool {
    emulates_ring0(kvm).unwrap_or_else(|error| {
        log::info!("it is not known whether the host emulates ring 0: {error}");
        false
    })
}

/// The guest-physical ranges that are RAM.
fn ram_ranges(config: &Config) -> Vec<Range<u64>> {
    let ranges = layout::ram_ranges(config.memory).into_iter();
    ranges.map(|(gpa, len)| gpa.0..gpa.0 + len).collect()
}

fn windows(config: &Config, machine: &Machine) -> Result<Option<Windows>, ShadowError> {
    let windows = config.shadow.mode().map(|mode| {
        let windows = WindowsConfig {
            ram: ram_ranges(config),
            mode,
            notify: config.notify,
            limit: config.shadow_limit,
        };
        Windows::new(&windows, &mut MachineMemslots(machine))
    });
    windows.transpose()
}

/// A run whose vCPUs run.
struct Running {
    shared: Arc<Shared>,
    /// Those of the vCPUs, then that of the collector.
    threads: Vec<JoinHandle<()>>,
    /// How the run ended, from the thread that ended it; then `None` from each thread.
    outcomes: Receiver<Option<Outcome>>,
    tail: Tail,
    has_irqchip: bool,
    emulated: bool,
    /// When the set-up began.
    begin: Instant,
    /// When the vCPUs were started.
    started: Instant,
}

impl Prepared {
    /// Starts the vCPUs, once all threads have closed the jail.
    fn start(self, begin: Instant, jail: Option<Arc<Jail>>) -> Result<Running, RunError> {
        let Self { shared, vcpus, input, tail, has_irqchip, emulated } = self;
        // The vCPUs and the collector.
        let (sender, outcomes) = mpsc::sync_channel(2 * (vcpus.len() + 1));
        let started = Instant::now();
        let gate = Arc::new(Gate::new(jail));
        let mut threads = Vec::with_capacity(vcpus.len());
        let start = || {
            for vcpu in vcpus {
                let (shared, sender) = (shared.clone(), sender.clone());
                threads.push(vcpu_thread::spawn(vcpu, shared, sender, gate.clone())?);
            }
            if shared.doorbell.is_some() {
                threads.push(collector::spawn(shared.clone(), sender, gate.clone())?);
            }
            let others = if input.is_some() { input::THREADS } else { 0 };
            input.map_or(Ok(()), |input| input::spawn(input, Arc::downgrade(&shared), &gate))?;
            gate.open(threads.len() + others)
        };
        if let Err(error) = start() {
            gate.decide(false);
            shared.stop();
            shared.vcpus.end(&threads);
            return Err(RunError::Thread(error));
        }
        Ok(Running { shared, threads, outcomes, tail, has_irqchip, emulated, begin, started })
    }
}

impl Running {
    /// Waits until the run is to end: by a vCPU or the collector, the time limit, the user, or an
    /// idle machine. None if a thread panicked.
    fn watch(
        &self,
        config: &Config,
        deadline: Option<(Instant, Duration)>,
        stop: &AtomicBool,
    ) -> Option<Outcome> {
        if let Some((at, _)) = deadline {
            let left = at.saturating_duration_since(Instant::now());
            self.shared.lookups.set(left.saturating_add(LOOKUP_END));
        }
        let mut halts = HaltCheck::new();
        loop {
            let tick = deadline
                .map_or(TICK, |(at, _)| TICK.min(at.saturating_duration_since(Instant::now())));
            match self.outcomes.recv_timeout(tick) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // For a guest that makes no exits. While it handles one, its thread takes the sample.
            if config.picture
                && let Some(mut dispatcher) = self.shared.try_dispatcher()
            {
                dispatcher.sample();
            }
            if self.has_irqchip
                && let Some(outcome) = halts.check(&self.shared)
            {
                return Some(outcome);
            }
            if stop.load(SeqCst) || self.shared.quit.load(SeqCst) {
                return Some(Outcome::Interrupted);
            }
            if let Some((at, limit)) = deadline
                && at <= Instant::now()
            {
                return Some(Outcome::TimeLimit(limit));
            }
        }
    }

    /// Ends all threads and collects the report.
    fn tear_down(
        mut self,
        config: &Config,
        outcome: Option<Outcome>,
    ) -> Result<RunReport, RunError> {
        let (outcome, left_behind) = self.end_threads(outcome)?;
        let shared = &self.shared;
        let Some(mut dispatcher) = shared.dispatcher_in_time() else {
            return Err(RunError::Abandoned(outcome));
        };
        shared.lookups.set(LAST_LOOKUPS);
        if left_behind {
            log::warn!("the host does not let go of a thread of the run; it is left behind");
        }
        // The run ends as it did, whatever is found only now.
        let _ = dispatcher.drain_all(shared.machine.ram());
        dispatcher.flush();
        let outcome = dispatcher.watch().correct(outcome);
        let picture = picture(config, &mut dispatcher, std::mem::take(&mut self.tail));
        let counted = shared.counters.as_ref().and_then(|c| c.instructions_emulated());
        let host = stats::HostStats {
            start_seconds: self.started.saturating_duration_since(self.begin).as_secs_f64(),
            seconds: self.started.elapsed().as_secs_f64(),
            ..stats::HostStats::of(&shared.vcpus)
        };
        let stats = stats::collect(
            config,
            &outcome,
            &mut dispatcher,
            shared.machine.ram(),
            counted.filter(|_| self.emulated),
            host,
        );
        let cpus = match outcome.shows_cpus() {
            true => dispatcher.cpu_states(shared.vcpus.ends(), shared.machine.ram()),
            false => Vec::new(),
        };
        let findings = dispatcher.session.take_findings();
        let objects = dispatcher.provenance.take_objects();
        drop(dispatcher);
        if !left_behind {
            self.outlive_the_console();
        }
        let require_checks = config.require_checks;
        Ok(RunReport { outcome, findings, stats, picture, cpus, objects, require_checks })
    }

    /// Waits until the console's threads let go of what they share with the run: its end takes
    /// system calls that they may not make.
    fn outlive_the_console(&self) {
        let begin = Instant::now();
        while Arc::strong_count(&self.shared) > 1 && begin.elapsed() < LOOKUP_END {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gets all vCPUs out of the guest and joins their threads. Returns how the run ended, and
    /// whether a thread had to be left behind.
    fn end_threads(&mut self, outcome: Option<Outcome>) -> Result<(Outcome, bool), RunError> {
        self.shared.lookups.set(LOOKUP_END);
        self.shared.stop();
        let left_behind = !self.shared.vcpus.end(&self.threads);
        // The guest may just have ended the run itself.
        let itself = self.outcomes.try_iter().find(Option::is_some).flatten();
        for thread in self.threads.drain(..) {
            if thread.is_finished() && thread.join().is_err() {
                return Err(RunError::Panicked);
            }
        }
        Ok((itself.or(outcome).ok_or(RunError::Panicked)?, left_behind))
    }
}

/// Finds out whether all vCPUs have halted for good.
struct HaltCheck {
    begin: Instant,
    /// When the vCPUs were last asked, and for how long nothing more is done.
    last: Instant,
    wait: Duration,
    /// They had halted at the check before.
    halted: bool,
}

impl HaltCheck {
    fn new() -> Self {
        let now = Instant::now();
        Self { begin: now, last: now, wait: TICK, halted: false }
    }

    /// The outcome, if at two checks in a row all vCPUs had halted: one may just have been woken by
    /// another at the first.
    fn check(&mut self, shared: &Shared) -> Option<Outcome> {
        if self.last.elapsed() < self.wait {
            return None;
        }
        let rip = shared.vcpus.halted_for_good();
        if let (true, Some(rip)) = (std::mem::replace(&mut self.halted, rip.is_some()), rip) {
            shared.lookups.set(LAST_LOOKUPS);
            let place = shared.dispatcher_in_time().map(|state| state.guest.location(rip));
            let place = place.unwrap_or_else(|| format!("rip {rip:#x}"));
            return Some(Outcome::HaltedForGood { place });
        }
        shared.vcpus.check_halted();
        self.last = Instant::now();
        self.wait = if self.halted {
            TICK
        } else {
            ((self.last - self.begin) / HALT_CHECK_PART).clamp(TICK, HALT_CHECK)
        };
        None
    }
}

/// Data for the page about the run, if requested.
fn picture(config: &Config, dispatcher: &mut Dispatcher, tail: Tail) -> Option<Picture> {
    let samples = dispatcher.finish_samples()?;
    let windows = dispatcher.shadow.windows();
    let pages = windows.map(|windows| page_map(windows, &ram_ranges(config), picture::CELLS));
    Some(Picture { samples, pages, console: tail.take() })
}
