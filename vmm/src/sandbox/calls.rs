//! Handles hypercalls: one method for each call that does more than change one table.

use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_provenance::rings::{DrainBy, RingError};
use umbra_provenance::{Allocation, Event, InvalidFree, Moment, quarantine};
use umbra_shadow::abi::{
    self, GuestFlags, Owner, RECORD_BYTES, RECORD_FRAMES, RELEASED_BYTES, Released,
};
use vm_memory::GuestAddress;

use super::context::ExitContext;
use super::dispatch::Dispatcher;
use super::{Outcome, investigate, modules};
use crate::hypercall::{
    Actor, BadAccess, Call, CallError, EvictionBuffer, Exit, Named, Region, RingPlace, Slot,
};
use crate::shadow::{CheckedRegion, Notify, ShadowError, Windows};

/// In `sync` mode, the number of events between two scans for byte shadow to reclaim.
const SYNC_RECLAIM: u64 = 4096;

/// The result of a call, which the guest gets in `rax`.
type Handled = Result<u64, CallFailure>;

impl Dispatcher {
    /// Decodes and handles call `number`. Its arguments are in the vCPU's registers, and its result
    /// goes there.
    pub(super) fn hypercall(
        &mut self,
        number: u32,
        context: &mut ExitContext,
    ) -> Result<(), Outcome> {
        let mut regs = context.cpu.regs()?;
        let handled = Call::decode(number, regs.rdi, regs.rsi, regs.rcx, regs.r8)
            .and_then(|call| self.fits_mode(&call, number).map(|()| call))
            .map_err(CallFailure::from)
            .and_then(|call| self.call(call, context));
        regs.rax = match handled {
            Ok(value) => value,
            Err(CallFailure::Guest(error)) => {
                self.refuse(1, &error);
                error.result()
            }
            Err(CallFailure::Run(outcome)) => return Err(outcome),
        };
        context.cpu.set_regs(&regs)?;
        Ok(())
    }

    /// Refuses a call that does not belong to the mode of the run.
    fn fits_mode(&self, call: &Call, number: u32) -> Result<(), CallError> {
        let notify = self.shadow.notify();
        let fits = match call {
            Call::RingSetup { .. } | Call::RingDrain { .. } | Call::TopLevel { .. } => {
                notify == Some(Notify::Ring)
            }
            Call::Poison { .. }
            | Call::Unpoison { .. }
            | Call::Allocated { .. }
            | Call::Freed { .. }
            | Call::Related { .. } => notify == Some(Notify::Sync),
            Call::Report { .. } | Call::Quarantine { .. } | Call::VirtualAdd { .. } => {
                notify.is_some()
            }
            _ => true,
        };
        if fits { Ok(()) } else { Err(CallError::Mode(number)) }
    }

    fn call(&mut self, call: Call, context: &mut ExitContext) -> Handled {
        match call {
            Call::Hello { flags } => self.hello(flags),
            Call::RegionAdd(region) => self.region_add(region, context),
            Call::Activate => Ok(self.guest.activate()),
            Call::TopLevel { slot } => self.top_level(slot, context),
            Call::Module { va } => self.module(va, context),
            Call::RingSetup(ring) => self.ring_setup(&ring, context),
            Call::RingDrain { cpu, released } => self.ring_drain(cpu, released, context),
            Call::Poison { va, len, code } => self.poison(va, len, code, context),
            Call::Unpoison { va, len, stack } => self.unpoison(va, len, stack, context),
            Call::Allocated { va, size, cache, actor, slot } => {
                self.allocated(va, size, cache, actor, slot, context)
            }
            Call::Freed { va, actor, slot, owner } => self.freed(va, actor, slot, owner, context),
            Call::Related { va, actor } => self.related(va, actor, context),
            Call::Report(access) => self.bad_access(&access, context),
            Call::VirtualAdd { va, len } => self.virtual_add(va, len, context),
            Call::Name { what, va, len } => self.name(what, va, len, context),
            Call::Globals { va, count } => self.globals(va, count),
            Call::Quarantine { to, all } => Ok(self.evict(to, all, context.ram)?),
            Call::Exit(exit) => Err(self.exit(exit).into()),
        }
    }

    fn hello(&mut self, flags: GuestFlags) -> Handled {
        if flags.has(GuestFlags::INLINE) && self.shadow.notify() == Some(Notify::Sync) {
            return Err(Outcome::InlineInSync.into());
        }
        self.shadow.allow_reclaim(flags);
        self.guest.hello(flags);
        Ok(self.shadow.features().bits().into())
    }

    fn region_add(&mut self, region: Region, context: &mut ExitContext) -> Handled {
        self.guest.add_region(region, context.ram.end())?;
        self.add_checked(&region, context)?;
        Ok(0)
    }

    /// The tables of the check shadow.
    fn top_level(&mut self, slot: u16, context: &mut ExitContext) -> Handled {
        let regions = self.guest.regions().iter().map(checked);
        let Some(windows) = self.shadow.windows_mut() else { return Ok(0) };
        match windows.top_level(slot, regions, context.memslots) {
            Err(ShadowError::Tables(error)) => Err(CallError::Tables(error).into()),
            other => Ok(other.map_err(Outcome::from)?),
        }
    }

    /// Adds a new region to the tables of the check shadow, if there are any. If it is refused
    /// there, it is no region.
    fn add_checked(
        &mut self,
        region: &Region,
        context: &mut ExitContext,
    ) -> Result<(), CallFailure> {
        let windows = self.shadow.windows_mut().filter(|windows| windows.has_check_shadow());
        let Some(windows) = windows else { return Ok(()) };
        context.others.pause()?;
        match windows.add_checked(checked(region), context.memslots) {
            Err(ShadowError::Tables(error)) => {
                self.guest.remove_last_region();
                Err(CallError::Tables(error).into())
            }
            other => Ok(other.map_err(Outcome::from)?),
        }
    }

    fn ring_setup(&mut self, ring: &RingPlace, context: &ExitContext) -> Handled {
        let bytes = (ring.records + 1) * RECORD_BYTES;
        let gpa = self.guest.in_ram(context.ram, ring.va, bytes, "ring address")?;
        self.provenance.set_up_ring(ring.cpu, gpa, ring.records, ring.text_base)?;
        Ok(0)
    }

    fn ring_drain(
        &mut self,
        cpu: u16,
        released: Option<EvictionBuffer>,
        context: &mut ExitContext,
    ) -> Handled {
        if !self.provenance.rings().has(cpu) {
            return Err(CallError::Argument { what: "CPU", value: cpu.into() }.into());
        }
        let frees = self.drain(DrainBy::Cpu(cpu), context.ram).invalid_frees;
        if !frees.is_empty() {
            context.others.pause()?;
            self.report_frees(&frees)?;
        }
        self.shadow.reclaim_after_drain(context)?;
        match released.filter(|_| self.provenance.quarantine().needs_eviction()) {
            Some(to) => Ok(self.evict(to, false, context.ram)?),
            None => Ok(0),
        }
    }

    fn poison(&mut self, va: u64, len: u64, code: u8, context: &mut ExitContext) -> Handled {
        let key = self.guest.key(va, len)?;
        self.change_shadow(va, |windows| windows.poison(key, len, code, context.memslots))
    }

    fn unpoison(
        &mut self,
        va: u64,
        len: u64,
        stack: Option<bool>,
        context: &mut ExitContext,
    ) -> Handled {
        let key = self.guest.key(va, len)?;
        self.change_shadow(va, |windows| {
            windows.unpoison(key, len, context.memslots)?;
            if let Some(stack) = stack {
                windows.mark_stack(key, len, stack);
            }
            Ok(())
        })
    }

    fn allocated(
        &mut self,
        va: u64,
        size: u64,
        cache: u16,
        actor: Actor,
        slot: Option<Slot>,
        context: &mut ExitContext,
    ) -> Handled {
        let bytes = slot.map_or(0, |slot| slot.bytes);
        let key = self.guest.key(va, bytes.max(size))?;
        if let Some(slot) = slot {
            self.change_shadow(va, |windows| {
                windows.unpoison(key, size, context.memslots)?;
                let rest = slot.bytes.saturating_sub(size);
                windows.poison(key + size, rest, slot.code, context.memslots)
            })?;
        }
        let new = Allocation { key, size, slot: bytes, cache };
        let (at, frames) = (self.now(context), caller(context));
        self.provenance
            .allocated(new, &Event { task: actor.task, at, frames: frames.as_slice().into() });
        self.reclaim_now_and_then()?;
        Ok(0)
    }

    /// Returns whether the guest has to evict from the quarantine, if the memory went into it, or
    /// [`abi::FREE_REFUSED`].
    fn freed(
        &mut self,
        va: u64,
        actor: Actor,
        slot: Option<Slot>,
        owner: Option<Owner>,
        context: &mut ExitContext,
    ) -> Handled {
        let waits = match (slot, owner) {
            (Some(slot), Some(owner)) => Some(released(va, slot.bytes, owner)?),
            _ => None,
        };
        let key = self.guest.key(va, slot.map_or(1, |slot| slot.bytes))?;
        if self.provenance.objects().is_invalid_free(key) {
            return self.invalid_free(va, key, actor, context);
        }
        if let Some(slot) = slot {
            self.change_shadow(va, |windows| {
                windows.poison(key, slot.bytes, slot.code, context.memslots)
            })?;
        }
        let (at, frames) = (self.now(context), caller(context));
        self.provenance
            .freed(key, &Event { task: actor.task, at, frames: frames.as_slice().into() });
        self.reclaim_now_and_then()?;
        let Some(memory) = waits else { return Ok(0) };
        let quarantine = self.provenance.quarantine_mut();
        if !quarantine.push(memory) {
            return Err(QUARANTINE_FULL.into());
        }
        Ok(quarantine.needs_eviction().into())
    }

    /// Reports a free of an address inside of a live object.
    fn invalid_free(
        &mut self,
        address: u64,
        key: u64,
        actor: Actor,
        context: &ExitContext,
    ) -> Handled {
        let (task, at, frames) = (actor.task, self.now(context), caller(context));
        self.provenance.freed(key, &Event { task, at, frames: frames.as_slice().into() });
        let free = InvalidFree { address, key, at, task, frames };
        let finding = self.known().invalid_free(&free, None);
        self.add_finding(finding)?;
        Ok(abi::FREE_REFUSED)
    }

    /// The present, on the vCPU of this exit. The guest's time stamp counters began with the run.
    fn now(&self, context: &ExitContext) -> Moment {
        let micros = u64::try_from(self.begin.elapsed().as_micros()).ok();
        Moment { cpu: context.id.into(), micros }
    }

    fn related(&mut self, va: u64, actor: Actor, context: &ExitContext) -> Handled {
        let key = self.guest.key(va, 1)?;
        let (at, frames) = (self.now(context), caller(context));
        self.provenance
            .related(key, &Event { task: actor.task, at, frames: frames.as_slice().into() });
        Ok(0)
    }

    fn bad_access(&mut self, access: &BadAccess, context: &mut ExitContext) -> Handled {
        context.others.pause()?;
        self.drain_all(context.ram)?;
        let finding = self.investigation(context).bad_access(access);
        self.add_finding(finding)?;
        Ok(0)
    }

    /// Returns the key of the virtual memory.
    fn virtual_add(&mut self, va: u64, len: u64, context: &mut ExitContext) -> Handled {
        let Some(windows) = self.shadow.windows_mut() else { return Ok(0) };
        let none = CallError::Limit {
            what: "bytes of virtual memory",
            max: windows.layout().virtual_bytes(),
        };
        let key = self.guest.add_virtual(va, len, || windows.next_key(va, len).ok_or(none))?;
        windows.add_virtual(key, len, context.memslots).map_err(Outcome::from)?;
        self.add_checked(&Region::virtual_memory(va, len, key), context)?;
        Ok(key)
    }

    fn name(&mut self, what: Named, va: u64, len: u64, context: &ExitContext) -> Handled {
        let mut name = [0; abi::NAME_MAX as usize];
        let name = &mut name[..len as usize];
        if len > 0 && !self.guest.read(context.ram, &*context.cpu, va, name)? {
            return Err(CallError::Argument { what: "name address", value: va }.into());
        }
        match what {
            Named::Cache { id, object_size } => self.provenance.name_cache(id, name, object_size),
            Named::Task { id } => self.provenance.name_task(id, name),
        }
        Ok(0)
    }

    fn module(&mut self, va: u64, context: &ExitContext) -> Handled {
        let space = AddressSpace::new(&context.cpu.sregs().map_err(Outcome::from)?);
        let wrong = CallError::Argument { what: "address of a module", value: va };
        let module = modules::read(va, &space, context.ram).ok_or(wrong)?;
        self.guest.symbols().add_module(module);
        Ok(0)
    }

    fn globals(&mut self, va: u64, count: u64) -> Handled {
        // The descriptions are read later and through the guest's page tables, so they may lie in
        // virtual memory, as those of a module do.
        self.guest.key(va, count * abi::GLOBAL_BYTES)?;
        self.guest.add_globals(va, count)?;
        Ok(0)
    }

    /// Writes a list of evicted objects to guest memory. Returns how many there are.
    fn evict(&mut self, to: EvictionBuffer, all: bool, ram: &Ram) -> Result<u64, CallError> {
        let what = "address of released objects";
        let room = to.count.max(1) * RELEASED_BYTES;
        let gpa = self.guest.in_ram(ram, to.va, room, what)?;
        let evicted = self.provenance.quarantine_mut().evict(to.count as usize, all);
        let mut bytes = Vec::with_capacity(evicted.len() * RELEASED_BYTES as usize);
        evicted.iter().for_each(|memory| bytes.extend_from_slice(&memory.encode()));
        ram.write(GuestAddress(gpa), &bytes)
            .map_err(|_| CallError::Argument { what, value: to.va })?;
        Ok(evicted.len() as u64)
    }

    fn exit(&self, exit: Exit) -> Outcome {
        match exit {
            Exit::Done { failed: false } => Outcome::Done,
            Exit::Done { failed: true } => Outcome::Failed,
            Exit::Panic => Outcome::Panic,
            Exit::Fault { vector, error, rip, address } => {
                Outcome::Fault { vector, error, place: self.guest.location(rip), address }
            }
        }
    }

    /// Changes the shadow for a guest. A wrong range is the guest's mistake; every other error ends
    /// the run.
    fn change_shadow(
        &mut self,
        va: u64,
        change: impl FnOnce(&mut Windows) -> Result<(), ShadowError>,
    ) -> Handled {
        match self.shadow.windows_mut().map(change) {
            None | Some(Ok(())) => Ok(0),
            Some(Err(ShadowError::Range(_))) => {
                Err(CallError::Argument { what: "address", value: va }.into())
            }
            Some(Err(error)) => Err(Outcome::from(error).into()),
        }
    }

    fn reclaim_now_and_then(&mut self) -> Result<(), Outcome> {
        let counts = self.provenance.counts();
        if (counts.allocations + counts.frees).is_multiple_of(SYNC_RECLAIM) {
            self.shadow.reclaim_byte_shadow()?;
        }
        Ok(())
    }
}

/// Why a call has no result.
enum CallFailure {
    /// The guest made a mistake, and gets this error.
    Guest(CallError),
    /// The run ends.
    Run(Outcome),
}

impl From<CallError> for CallFailure {
    fn from(error: CallError) -> Self {
        Self::Guest(error)
    }
}

impl From<RingError> for CallFailure {
    fn from(error: RingError) -> Self {
        Self::Guest(match error {
            RingError::Limit { what, max } => CallError::Limit { what, max },
            RingError::Overlap { gpa } => CallError::Argument { what: "ring address", value: gpa },
        })
    }
}

impl From<Outcome> for CallFailure {
    fn from(outcome: Outcome) -> Self {
        Self::Run(outcome)
    }
}

/// The guest only frees, and never fetches what is to be evicted.
const QUARANTINE_FULL: CallError =
    CallError::Limit { what: "objects in the quarantine", max: quarantine::MAX_OBJECTS as u64 };

/// A region, for the tables of the check shadow.
fn checked(region: &Region) -> CheckedRegion {
    CheckedRegion { va: region.va(), bytes: region.bytes(), key: region.key() }
}

/// The return addresses of the code that made a call, innermost first.
fn caller(context: &ExitContext) -> Vec<u64> {
    investigate::stack(context, None, RECORD_FRAMES).ips
}

/// Freed memory, as the quarantine keeps it.
fn released(va: u64, slot: u64, owner: Owner) -> Result<Released, CallError> {
    let slot =
        u32::try_from(slot).map_err(|_| CallError::Argument { what: "slot", value: slot })?;
    Ok(Released::new(va, slot, owner))
}
