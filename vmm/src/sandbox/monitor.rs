//! The state of a run, and what each exit of the guest does to it.
//!
//! [`Monitor::dispatch`] is a plain function of an exit: it takes registers, RAM and memory slots
//! through traits and references, so tests feed it with exits that no guest made.

use umbra_shadow::abi::{self, CPUID_FIRST, CPUID_STEP, Features, PORT};
use vm_memory::GuestAddress;

use super::console::{ConsoleWatch, Sign};
use super::globals::Globals;
use super::investigate::Place;
use super::marks::Marks;
use super::picture::Timeline;
use super::rings::Rings;
use super::stats::{EventStats, ExitStats};
use super::unused_pages::UnusedPages;
use super::{Observer, Outcome, Redzone, ShadowMode};
use crate::hypercall::Regions;
use crate::machine::complete::{CompleteError, Completer, Cpu};
use crate::machine::cpuid::CpuidLeaf;
use crate::machine::devices::{DeviceEvent, Devices};
use crate::machine::memory::Ram;
use crate::machine::vcpu::{Vcpu, VmExit};
use crate::report::Findings;
use crate::report::symbols::Symbols;
use crate::shadow::{
    FaultOutcome, Layout, Mode, Notify, Objects, Quarantine, ShadowError, Slots, Windows,
};

/// A vCPU as the dispatcher needs it.
pub trait GuestCpu: Cpu {
    /// Gives the value of the read that the last exit asked for.
    fn complete_read(&mut self, value: &[u8]);
}

impl GuestCpu for Vcpu {
    fn complete_read(&mut self, value: &[u8]) {
        self.complete_read(value);
    }
}

/// The other vCPUs of a machine, as the dispatcher needs them.
pub trait Others {
    /// Gets all of them out of the guest, where they stay until this exit has been handled.
    ///
    /// # Errors
    /// The host does not let go of one.
    fn stop(&mut self) -> Result<(), Outcome>;
}

/// What goes with an exit: the machine that the guest runs on.
pub struct Machine<'a> {
    /// The vCPU's number.
    pub id: u8,
    /// The vCPU, stopped.
    pub cpu: &'a mut dyn GuestCpu,
    /// Guest memory.
    pub ram: &'a Ram,
    /// Its memory slots.
    pub slots: &'a mut dyn Slots,
    /// The other vCPUs, which may be running.
    pub others: &'a mut dyn Others,
}

/// What to do after an exit.
#[derive(Debug)]
pub enum Flow {
    /// Run the guest on.
    Continue,
    /// End the run.
    End(Outcome),
}

/// The state of a run.
pub struct Monitor {
    /// Holds on to the machine for its interrupts: dropped before the windows, which the machine's
    /// slots lie in.
    devices: Devices,
    /// The shadow; none with `--shadow off`.
    pub windows: Option<Windows>,
    /// Who allocated and freed what.
    pub objects: Objects,
    /// Freed memory that waits.
    pub quarantine: Quarantine,
    /// What the guest has found wrong.
    pub findings: Findings,
    /// Exits so far.
    pub exits: ExitStats,
    /// Events so far.
    pub events: EventStats,
    pub(super) regions: Regions,
    pub(super) rings: Rings,
    pub(super) globals: Globals,
    pub(super) unused_pages: UnusedPages,
    pub(super) symbols: Symbols,
    pub(super) observer: Box<dyn Observer>,
    pub(super) stop_at: Option<usize>,
    /// What the console says.
    pub(super) console: ConsoleWatch,
    /// What of it is looked for.
    pub(super) marks: Marks,
    /// The shadow over time, if that was asked for.
    pub(super) timeline: Option<Timeline>,
    completer: Completer,
}

/// Bad calls that are logged; the rest are only counted.
const LOGGED: u64 = 16;

impl Monitor {
    /// The state at the start.
    pub fn new(
        windows: Option<Windows>,
        devices: Devices,
        symbols: Symbols,
        observer: Box<dyn Observer>,
        stop_at: Option<usize>,
    ) -> Self {
        Self {
            windows,
            objects: Objects::default(),
            quarantine: Quarantine::new(0, 1),
            findings: Findings::default(),
            exits: ExitStats::default(),
            events: EventStats::default(),
            regions: Regions::default(),
            rings: Rings::default(),
            globals: Globals::default(),
            unused_pages: UnusedPages::default(),
            symbols,
            observer,
            stop_at,
            console: ConsoleWatch::default(),
            marks: Marks::default(),
            timeline: None,
            devices,
            completer: Completer::default(),
        }
    }

    /// Does what an exit asks for.
    pub fn dispatch(&mut self, exit: VmExit, machine: &mut Machine) -> Flow {
        self.exits.total += 1;
        // Before the exit is handled: a ring drain may give shadow back, so the peaks are here.
        self.sample();
        if self.unused_pages.is_due()
            && let Err(outcome) = self.give_unused_back(UnusedPages::give_back, machine)
        {
            return Flow::End(outcome);
        }
        let flow = match exit {
            VmExit::IoOut { port: PORT, data } if data.as_slice().len() == 4 => {
                self.exits.hypercall += 1;
                self.hypercall(data.value() as u32, machine)
            }
            VmExit::IoOut { port, data } => {
                self.exits.io += 1;
                let event = self.devices.io_out(port, data.as_slice());
                let sign =
                    self.devices.take_line().map(|line| self.line(&line, machine)).transpose();
                sign.map(|sign| match (event, sign.unwrap_or(Sign::None)) {
                    (DeviceEvent::Reset, _) => Flow::End(Outcome::Reset),
                    (DeviceEvent::PowerOff, _) | (_, Sign::Stopped) => Flow::End(Outcome::PowerOff),
                    (_, Sign::PanicEnd) => Flow::End(Outcome::Panic),
                    (DeviceEvent::None, Sign::None) => Flow::Continue,
                })
            }
            VmExit::IoIn { port, len } => {
                self.exits.io += 1;
                let mut data = [0; 8];
                let data = &mut data[..usize::from(len).min(8)];
                self.devices.io_in(port, data);
                machine.cpu.complete_read(data);
                Ok(Flow::Continue)
            }
            VmExit::MmioRead { gpa, len } => self.mmio_read(gpa, usize::from(len).min(8), machine),
            VmExit::MmioWrite { gpa, data } => self.mmio_write(gpa, data.as_slice(), machine),
            VmExit::MemoryFault { gpa, size, .. } => self.memory_fault(gpa, size, machine),
            VmExit::Interrupted => Ok(Flow::Continue),
            VmExit::Hlt => Ok(Flow::End(Outcome::Halted)),
            VmExit::EmulationFailed { bytes, len } => {
                let bytes = &bytes[..usize::from(len).min(bytes.len())];
                match self.completer.complete(machine.cpu, machine.ram, bytes) {
                    Ok(_) => Ok(Flow::Continue),
                    Err(CompleteError::Vcpu(error)) => Err(error.into()),
                    Err(error) => Ok(Flow::End(Outcome::Instruction {
                        error,
                        place: self.place(machine).to_string(),
                    })),
                }
            }
            VmExit::Shutdown => {
                Ok(Flow::End(Outcome::TripleFault { place: self.place(machine).to_string() }))
            }
            VmExit::SystemEvent { .. } => Ok(Flow::End(Outcome::Reset)),
            VmExit::FailEntry { reason } => {
                self.stuck(format!("entry fails with {reason:#x}"), machine)
            }
            VmExit::InternalError { suberror } => {
                self.stuck(format!("internal error {suberror}"), machine)
            }
            VmExit::Unsupported { reason } => {
                self.stuck(format!("unexpected exit {reason}"), machine)
            }
        };
        flow.unwrap_or_else(Flow::End)
    }

    /// Takes a sample of the shadow if samples were asked for and it is time for one.
    pub(super) fn sample(&mut self) {
        if let (Some(timeline), Some(windows)) = (&mut self.timeline, &mut self.windows) {
            timeline.sample(windows);
        }
    }

    /// Takes in a line of the console.
    fn line(&mut self, line: &[u8], machine: &mut Machine) -> Result<Sign, Outcome> {
        // So that the memory at a mark is that of the mark, and not of some moment before.
        if self.marks.wants(line) && self.unused_pages.is_allowed() {
            self.give_unused_back(UnusedPages::give_all_back, machine)?;
        }
        self.marks.line(line, &self.exits, &self.events, self.windows.as_mut());
        Ok(self.console.line(line))
    }

    /// Gives host memory back that lies behind unused pages of the guest.
    fn give_unused_back(
        &mut self,
        how: fn(&mut UnusedPages, &Windows, &Rings, &Ram),
        machine: &mut Machine,
    ) -> Result<(), Outcome> {
        if let Some(windows) = &self.windows {
            machine.others.stop()?;
            how(&mut self.unused_pages, windows, &self.rings, machine.ram);
        }
        Ok(())
    }

    /// Instructions completed so far, by mnemonic.
    pub fn completed(&self) -> &std::collections::BTreeMap<&'static str, u64> {
        self.completer.counts()
    }

    /// What the end of a guest really was, by what it said before: Linux resets or halts the
    /// machine when it has panicked.
    pub fn console_knows(&self, outcome: Outcome) -> Outcome {
        match (outcome, self.console.panic()) {
            (
                Outcome::Reset
                | Outcome::PowerOff
                | Outcome::Halted
                | Outcome::HaltedForGood { .. }
                | Outcome::Panic
                | Outcome::TripleFault { .. }
                | Outcome::TimeLimit(_),
                Some(message),
            ) => Outcome::LinuxPanic(message.to_owned()),
            // Others halt like this on purpose.
            (Outcome::HaltedForGood { .. }, None) if !self.console.is_linux() => Outcome::Halted,
            (outcome, _) => outcome,
        }
    }

    /// Gives a typed byte to the console. False if there is no room for it at the moment.
    pub fn input(&mut self, byte: u8) -> bool {
        self.devices.input(byte)
    }

    /// Sends a break to the console. False if there is no room for it at the moment.
    pub fn input_break(&mut self) -> bool {
        self.devices.input_break()
    }

    /// Writes out what the console still holds.
    pub fn flush(&mut self) {
        self.devices.flush();
    }

    /// The feature bits of this run ([`features`]).
    pub(super) fn features(&self) -> Features {
        let Some(windows) = &self.windows else { return Features::default() };
        let mode = match windows.mode() {
            Mode::PerPage => ShadowMode::PerPage,
            Mode::Full => ShadowMode::Full,
        };
        offer(mode, windows.notify())
    }

    fn stuck(&self, what: String, machine: &Machine) -> Result<Flow, Outcome> {
        Ok(Flow::End(Outcome::Stuck { what, place: self.place(machine).to_string() }))
    }

    /// An address in the guest's code, for a message.
    pub fn place_of(&self, rip: u64) -> String {
        Place::new(rip, &self.symbols).to_string()
    }

    /// Where the guest is, for a message.
    pub fn place(&self, machine: &Machine) -> Place {
        Place::new(machine.cpu.regs().map(|regs| regs.rip).unwrap_or_default(), &self.symbols)
    }

    fn mmio_read(
        &mut self,
        gpa: GuestAddress,
        len: usize,
        machine: &mut Machine,
    ) -> Result<Flow, Outcome> {
        let mut data = [0; 8];
        let data = &mut data[..len];
        match self.windows.as_mut().filter(|windows| windows.contains(gpa.0)) {
            Some(windows) => match shadow_fault(windows, gpa.0, len as u64, false, machine)? {
                Ok(outcome) => {
                    self.exits.shadow_fault += u64::from(outcome == FaultOutcome::Mapped);
                    windows.read(gpa.0, data)?;
                }
                Err(ShadowError::OutsideWindow { .. }) => data.fill(0xff),
                Err(error) => return Err(error.into()),
            },
            None => {
                self.exits.mmio += 1;
                match &self.windows {
                    // The shadow of what is no memory is poison.
                    Some(windows) if windows.is_reserved(gpa.0) => data.fill(0xff),
                    _ => self.devices.mmio_read(gpa, data),
                }
            }
        }
        machine.cpu.complete_read(data);
        Ok(Flow::Continue)
    }

    fn mmio_write(
        &mut self,
        gpa: GuestAddress,
        data: &[u8],
        machine: &mut Machine,
    ) -> Result<Flow, Outcome> {
        let Some(windows) = self.windows.as_mut().filter(|windows| windows.contains(gpa.0)) else {
            self.exits.mmio += 1;
            self.devices.mmio_write(gpa, data);
            return Ok(Flow::Continue);
        };
        match shadow_fault(windows, gpa.0, data.len() as u64, true, machine)? {
            Ok(FaultOutcome::Tampering) if windows.stack_store(gpa.0, data, machine.slots)? => {}
            Ok(FaultOutcome::Tampering) => {
                return self.tampering(gpa.0, data.len() as u64, machine);
            }
            Ok(outcome) => {
                self.exits.shadow_fault += u64::from(outcome == FaultOutcome::Mapped);
                windows.apply_write(gpa.0, data)?;
            }
            // Half in a window, half beyond: nothing is there.
            Err(ShadowError::OutsideWindow { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Flow::Continue)
    }

    /// The access runs again afterwards.
    fn memory_fault(
        &mut self,
        gpa: GuestAddress,
        size: u64,
        machine: &mut Machine,
    ) -> Result<Flow, Outcome> {
        let Some(windows) = self.windows.as_mut().filter(|windows| windows.contains(gpa.0)) else {
            return self.stuck(format!("no memory behind guest-physical {:#x}", gpa.0), machine);
        };
        // At most the page that the host names; a chunk is larger.
        match shadow_fault(windows, gpa.0, size.clamp(1, 4096), false, machine)?? {
            FaultOutcome::Mapped => {
                self.exits.shadow_fault += 1;
                Ok(Flow::Continue)
            }
            _ => self.stuck(format!("shadow at {:#x} is mapped and yet faults", gpa.0), machine),
        }
    }

    /// Counts a guest's mistakes, and logs the first few.
    pub(super) fn refuse(&mut self, count: u64, what: &dyn std::fmt::Display) {
        let before = self.events.refused;
        self.events.refused = before.saturating_add(count);
        if before < LOGGED {
            log::warn!("refused: {what}");
            if self.events.refused >= LOGGED {
                log::warn!("more of these are only counted");
            }
        }
    }
}

/// [`Windows::fault`]. At the limit, unused chunks make room; but while other vCPUs go from chunk
/// to chunk, each may look used when it is looked at. So the limit counts when they stand still.
fn shadow_fault(
    windows: &mut Windows,
    gpa: u64,
    len: u64,
    write: bool,
    machine: &mut Machine,
) -> Result<Result<FaultOutcome, ShadowError>, Outcome> {
    match windows.fault(gpa, len, write, machine.slots) {
        Err(ShadowError::Limit { .. }) => {
            machine.others.stop()?;
            Ok(windows.fault(gpa, len, write, machine.slots))
        }
        outcome => Ok(outcome),
    }
}

/// What a run offers.
fn offer(mode: ShadowMode, notify: Notify) -> Features {
    let notify = match notify {
        Notify::Ring => Features::RING,
        Notify::Sync => Features::SYNC,
    };
    match mode {
        ShadowMode::PerPage => Features::PER_PAGE | notify,
        ShadowMode::Full => Features::FULL | notify,
        ShadowMode::Off => Features::default(),
    }
}

/// What a guest's runtime is told to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Bytes of the quarantine; 0 for none.
    pub quarantine: u64,
    /// Bytes that a CPU may put into it between two drains.
    pub quarantine_batch: u64,
    /// How much its allocators put behind each object.
    pub redzone: Redzone,
}

/// The CPUID leaves that a guest finds Umbra by (see [`umbra_shadow::abi`]). One block beyond KVM's
/// own.
pub fn discovery(
    mode: ShadowMode,
    notify: Notify,
    settings: Settings,
    layout: &Layout,
) -> Vec<CpuidLeaf> {
    let base = CPUID_FIRST + CPUID_STEP;
    let offered = offer(mode, notify);
    let leaf =
        |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuidLeaf { function, eax, ebx, ecx, edx };
    let window =
        |gpa: u64, bytes: u64| [gpa as u32, (gpa >> 32) as u32, bytes as u32, (bytes >> 32) as u32];
    let page = if mode == ShadowMode::PerPage {
        window(layout.page.gpa, layout.page.bytes)
    } else {
        [0; 4]
    };
    let byte =
        if mode == ShadowMode::Off { [0; 4] } else { window(layout.byte.gpa, layout.byte.bytes) };
    let keys = if mode == ShadowMode::Off { 0 } else { layout.virtual_bytes() };
    let settings = match mode {
        ShadowMode::Off => [0, Redzone::Off.to_register(), 0, 0],
        _ => [
            settings.quarantine_batch as u32,
            settings.redzone.to_register(),
            settings.quarantine as u32,
            (settings.quarantine >> 32) as u32,
        ],
    };
    let [s0, s1, s2] = abi::CPUID_SIGNATURE;
    vec![
        leaf(base, [base + abi::CPUID_LEAF_SETTINGS, s0, s1, s2]),
        leaf(base + abi::CPUID_LEAF_FEATURES, [abi::VERSION, u32::from(PORT), offered.bits(), 0]),
        leaf(base + abi::CPUID_LEAF_PAGE_WINDOW, page),
        leaf(base + abi::CPUID_LEAF_BYTE_WINDOW, byte),
        leaf(base + abi::CPUID_LEAF_VIRTUAL, [keys as u32, (keys >> 32) as u32, 0, 0]),
        leaf(base + abi::CPUID_LEAF_SETTINGS, settings),
    ]
}
