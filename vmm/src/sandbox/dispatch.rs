//! Handles the exits of a guest.
//!
//! [`Dispatcher::dispatch`] is a plain function of an exit. It takes registers, RAM and
//! memslots through traits and references, so tests feed it with exits that no guest made.

use std::time::Instant;

use umbra_machine::complete::{CompleteError, Completer};
use umbra_machine::devices::{DeviceEvent, Devices};
use umbra_machine::memory::Ram;
use umbra_machine::vcpu::VmExit;
use umbra_provenance::rings::DrainBy;
use umbra_provenance::{Drained, InvalidFree, Provenance, RefusedRecords};
use umbra_report::{Finding, Sample};
use umbra_shadow::abi::{DOORBELL_PORT, PORT};
use vm_memory::GuestAddress;

use super::Outcome;
use super::context::{ExitContext, OtherVcpus};
use super::counts::{EventStats, ExitStats};
use super::guest_info::GuestInfo;
use super::ring_memory::RingRam;
use super::run_shadow::{RunShadow, fault};
use super::session::Session;
use super::watch::{Sign, Watch};
use crate::shadow::{FaultOutcome, Notify, ShadowError};

/// The state of a run, which changes with each exit.
pub struct Dispatcher {
    /// Keeps the machine alive for its interrupts. Dropped before the shadow's windows, in which
    /// the machine's memslots lie.
    pub(super) devices: Devices,
    pub(super) shadow: RunShadow,
    pub(super) provenance: Provenance,
    pub(super) guest: GuestInfo,
    pub(super) session: Session,
    watch: Watch,
    completer: Completer,
    exits: ExitStats,
    /// Calls and records that were refused.
    refused: u64,
    pub(super) begin: Instant,
}

/// Refused calls and records that are logged; the rest are only counted.
const LOGGED: u64 = 16;
/// Why frees in rings are refused that the quarantine has no room for.
const QUEUE_FULL: &str = "the quarantine's queue is full: the guest does not fetch evicted memory";
/// Why a guest in system management mode ends.
const NO_SMM: &str = "it is in system management mode, for which there is no firmware,";
/// The note of a finding that only the record of a free showed.
const FOUND_LATER: &str =
    "the free was found when the CPU's records were read, some time after it happened";

impl Dispatcher {
    /// The state before the first exit.
    pub(super) fn new(
        devices: Devices,
        shadow: RunShadow,
        provenance: Provenance,
        guest: GuestInfo,
        session: Session,
        watch: Watch,
    ) -> Self {
        Self {
            devices,
            shadow,
            provenance,
            guest,
            session,
            watch,
            completer: Completer::default(),
            exits: ExitStats::default(),
            refused: 0,
            begin: Instant::now(),
        }
    }

    /// With something else to complete instructions.
    pub(super) fn with_completer(self, completer: Completer) -> Self {
        Self { completer, ..self }
    }

    /// Handles an exit.
    ///
    /// # Errors
    /// The run ends.
    pub fn dispatch(&mut self, exit: VmExit, context: &mut ExitContext) -> Result<(), Outcome> {
        self.exits.total += 1;
        // Before the exit is handled: a ring drain may reclaim shadow, so the peaks are here.
        self.sample();
        self.shadow.reclaim_guest_pages(self.provenance.rings(), context)?;
        self.handle(exit, context)
    }

    fn handle(&mut self, exit: VmExit, context: &mut ExitContext) -> Result<(), Outcome> {
        match exit {
            VmExit::IoOut { port: PORT, data } if data.as_slice().len() == 4 => {
                self.exits.hypercall += 1;
                self.hypercall(data.value() as u32, context)
            }
            // Where KVM does not signal the doorbell itself.
            VmExit::IoOut { port: DOORBELL_PORT, .. }
                if self.shadow.notify() == Some(Notify::Ring) =>
            {
                self.exits.hypercall += 1;
                self.collect(context.ram, context.others).map(drop)
            }
            VmExit::IoOut { port, data } => self.io_out(port, data.as_slice()),
            VmExit::IoIn { port, len } => {
                self.io_in(port, usize::from(len).min(8), context);
                Ok(())
            }
            VmExit::MmioRead { gpa, len } => self.mmio_read(gpa, usize::from(len).min(8), context),
            VmExit::MmioWrite { gpa, data } => self.mmio_write(gpa, data.as_slice(), context),
            VmExit::MemoryFault { gpa, size, .. } => self.memory_fault(gpa, size, context),
            VmExit::EmulationFailed { bytes, len } => {
                let bytes = &bytes[..usize::from(len).min(bytes.len())];
                self.complete_instruction(bytes, context)
            }
            VmExit::Interrupted | VmExit::TaskPriority => Ok(()),
            VmExit::SystemManagement => Err(self.stuck(NO_SMM.into(), context)),
            VmExit::Hlt => Err(Outcome::Halted),
            VmExit::Shutdown => Err(self.triple_fault(context)),
            VmExit::SystemEvent { .. } => Err(Outcome::Reset),
            VmExit::FailEntry { reason } => {
                Err(self.stuck(format!("entry fails with {reason:#x}"), context))
            }
            VmExit::InternalError { suberror } => {
                Err(self.stuck(format!("internal error {suberror}"), context))
            }
            VmExit::Unsupported { reason } => {
                Err(self.stuck(format!("unexpected exit {reason}"), context))
            }
        }
    }

    fn io_out(&mut self, port: u16, data: &[u8]) -> Result<(), Outcome> {
        self.exits.io += 1;
        let event = self.devices.io_out(port, data);
        let sign = match self.devices.take_line() {
            Some(line) => self.console_line(&line),
            None => Sign::None,
        };
        match (event, sign) {
            (DeviceEvent::Reset, _) => Err(Outcome::Reset),
            (DeviceEvent::DebugExit { value, success }, _) => {
                Err(Outcome::DebugExit { value, success })
            }
            (DeviceEvent::PowerOff, _) | (_, Sign::Stopped) => Err(Outcome::PowerOff),
            (_, Sign::PanicEnd) => Err(Outcome::Panic),
            (DeviceEvent::None, Sign::None) => Ok(()),
        }
    }

    /// The guest has ended a line on its console.
    fn console_line(&mut self, line: &[u8]) -> Sign {
        if self.watch.is_mark(line) {
            let events = self.events();
            self.watch.mark(line, &self.exits, &events, self.shadow.windows_mut());
        }
        self.watch.console_line(line)
    }

    fn io_in(&mut self, port: u16, len: usize, context: &mut ExitContext) {
        self.exits.io += 1;
        let mut data = [0; 8];
        let data = &mut data[..len];
        self.devices.io_in(port, data);
        context.cpu.complete_read(data);
    }

    fn mmio_read(
        &mut self,
        gpa: GuestAddress,
        len: usize,
        context: &mut ExitContext,
    ) -> Result<(), Outcome> {
        let mut data = [0; 8];
        let data = &mut data[..len];
        match self.shadow.windows_at(gpa.0) {
            Some(windows) => match fault(windows, gpa.0, len as u64, false, context)? {
                Ok(outcome) => {
                    self.exits.shadow_fault += u64::from(outcome == FaultOutcome::Mapped);
                    windows.read(gpa.0, data)?;
                }
                Err(ShadowError::OutsideWindow { .. }) => data.fill(0xff),
                Err(error) => return Err(error.into()),
            },
            None => {
                self.exits.mmio += 1;
                match self.shadow.windows() {
                    // The shadow of addresses without memory is poison.
                    Some(windows) if windows.is_reserved(gpa.0) => data.fill(0xff),
                    _ => self.devices.mmio_read(gpa, data),
                }
            }
        }
        context.cpu.complete_read(data);
        Ok(())
    }

    fn mmio_write(
        &mut self,
        gpa: GuestAddress,
        data: &[u8],
        context: &mut ExitContext,
    ) -> Result<(), Outcome> {
        let Some(windows) = self.shadow.windows_at(gpa.0) else {
            self.exits.mmio += 1;
            self.devices.mmio_write(gpa, data);
            return Ok(());
        };
        match fault(windows, gpa.0, data.len() as u64, true, context)? {
            Ok(FaultOutcome::Tampering)
                if windows.stack_store(gpa.0, data, context.memslots)? => {}
            Ok(FaultOutcome::Tampering) => {
                return self.tampering(gpa.0, data.len() as u64, context);
            }
            Ok(outcome) => {
                self.exits.shadow_fault += u64::from(outcome == FaultOutcome::Mapped);
                windows.apply_write(gpa.0, data)?;
            }
            // Half in a window, half beyond: no effect.
            Err(ShadowError::OutsideWindow { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Maps the shadow that a memory fault needs. The guest then repeats the access.
    fn memory_fault(
        &mut self,
        gpa: GuestAddress,
        size: u64,
        context: &mut ExitContext,
    ) -> Result<(), Outcome> {
        let Some(windows) = self.shadow.windows_at(gpa.0) else {
            return Err(
                self.stuck(format!("no memory behind guest-physical {:#x}", gpa.0), context)
            );
        };
        // At most the page that the host names; a chunk is larger.
        match fault(windows, gpa.0, size.clamp(1, 4096), false, context)?? {
            FaultOutcome::Mapped => {
                self.exits.shadow_fault += 1;
                Ok(())
            }
            _ => {
                Err(self.stuck(format!("shadow at {:#x} is mapped and yet faults", gpa.0), context))
            }
        }
    }

    /// Completes an instruction that KVM does not emulate.
    fn complete_instruction(
        &mut self,
        bytes: &[u8],
        context: &mut ExitContext,
    ) -> Result<(), Outcome> {
        match self.completer.complete(context.cpu, context.ram, bytes) {
            Ok(_) => Ok(()),
            Err(CompleteError::Vcpu(error)) => Err(error.into()),
            Err(error) => Err(Outcome::Instruction { error, place: self.location(context) }),
        }
    }

    /// Makes a finding of a guest's own store to a read-only window, which had no effect.
    fn tampering(&mut self, gpa: u64, size: u64, context: &mut ExitContext) -> Result<(), Outcome> {
        context.others.pause()?;
        self.drain_all(context.ram)?;
        let finding = self.investigation(context).tampering(gpa, size, context.cpu.regs()?.rip);
        self.add_finding(finding)
    }

    /// Adds a finding. Ends the run if that was the last one wanted.
    pub(super) fn add_finding(&mut self, finding: Finding) -> Result<(), Outcome> {
        let devices = &mut self.devices;
        self.session.add(finding, || devices.flush())
    }

    /// Drains all rings for a finding or an end. Every vCPU stands still.
    pub(super) fn drain_all(&mut self, ram: &Ram) -> Result<(), Outcome> {
        let frees = self.drain(DrainBy::Vmm, ram).invalid_frees;
        self.report_frees(&frees)
    }

    /// Takes some records out of the rings while CPUs run. Returns whether there may be more.
    pub(super) fn collect(
        &mut self,
        ram: &Ram,
        others: &mut dyn OtherVcpus,
    ) -> Result<bool, Outcome> {
        self.sample();
        let Drained { invalid_frees, more, .. } = self.drain(DrainBy::Collector, ram);
        if !invalid_frees.is_empty() {
            others.pause()?;
            self.report_frees(&invalid_frees)?;
        }
        Ok(more)
    }

    /// Drains all rings; see [`Provenance::drain`].
    pub(super) fn drain(&mut self, by: DrainBy, ram: &Ram) -> Drained {
        let regions = self.guest.regions();
        let drained = self.provenance.drain(by, &RingRam(ram), &|va, len| regions.key_of(va, len));
        let RefusedRecords { senseless, queue_full } = drained.refused;
        if senseless > 0 {
            self.refuse(senseless, &format_args!("{senseless} records in rings make no sense"));
        }
        if queue_full > 0 {
            self.refuse(queue_full, &QUEUE_FULL);
        }
        drained
    }

    /// Makes findings of wrong frees that a drain has shown, which may end the run. Every vCPU
    /// stands still.
    pub(super) fn report_frees(&mut self, frees: &[InvalidFree]) -> Result<(), Outcome> {
        for free in frees {
            let finding = self.known().invalid_free(free, Some(FOUND_LATER));
            self.add_finding(finding)?;
        }
        Ok(())
    }

    /// Counts refused calls or records, and logs the first few.
    pub(super) fn refuse(&mut self, count: u64, why: &dyn std::fmt::Display) {
        let before = self.refused;
        self.refused = before.saturating_add(count);
        if before < LOGGED {
            log::warn!("refused: {why}");
            if self.refused >= LOGGED {
                log::warn!("more of these are only counted");
            }
        }
    }

    /// Samples the shadow, if requested and if it is time for a sample.
    pub(super) fn sample(&mut self) {
        self.watch.sample(self.shadow.windows_mut());
    }

    /// Passes a typed byte to the console. False if there is no room for it at the moment.
    pub(super) fn input(&mut self, byte: u8) -> bool {
        self.devices.input(byte)
    }

    /// Sends a break to the console. False if there is no room for it at the moment.
    pub(super) fn input_break(&mut self) -> bool {
        self.devices.input_break()
    }

    /// Writes out what the console still holds.
    pub(super) fn flush(&mut self) {
        self.devices.flush();
    }

    /// Exits so far.
    pub(super) fn exits(&self) -> ExitStats {
        ExitStats { completed: self.completer.counts().clone(), ..self.exits.clone() }
    }

    /// Events so far.
    pub(super) fn events(&self) -> EventStats {
        let counts = self.provenance.counts();
        EventStats {
            allocations: counts.allocations,
            frees: counts.frees,
            ring_drains: counts.ring_drains,
            collected: counts.collected,
            refused: self.refused,
        }
    }

    /// Console, marks and samples.
    pub(super) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Takes the last sample and returns all of them, if samples were requested.
    pub(super) fn finish_samples(&mut self) -> Option<Vec<Sample>> {
        self.watch.finish_samples(self.shadow.windows_mut())
    }

    /// Where the guest is, for a message.
    pub(super) fn location(&self, context: &ExitContext) -> String {
        self.guest.location(context.rip())
    }

    fn stuck(&self, what: String, context: &ExitContext) -> Outcome {
        Outcome::Stuck { what, place: self.location(context) }
    }
}
