//! What each hypercall does.

use umbra_shadow::Shadow;
use umbra_shadow::abi::{
    self, Features, GuestFlags, Owner, RECORD_BYTES, RECORD_FRAMES, RELEASED_BYTES, RecordBody,
    Released,
};
use vm_memory::GuestAddress;

use super::investigate::Place;
use super::monitor::{Flow, Machine, Monitor};
use super::rings::Event;
use super::{Outcome, investigate};
use crate::hypercall::{Array, Call, CallError, Exit, Named, Regions};
use crate::machine::memory::Ram;
use crate::machine::walk::AddressSpace;
use crate::shadow::{Notify, Objects, ShadowError, quarantine, release_unused};

/// In `sync` mode, how many events pass between two looks for shadow to give back.
const SYNC_RELEASE: u64 = 4096;

impl Monitor {
    /// Decodes and handles call `number`; its arguments are in the vCPU's registers, its result
    /// goes there.
    pub(super) fn hypercall(
        &mut self,
        number: u32,
        machine: &mut Machine,
    ) -> Result<Flow, Outcome> {
        let mut regs = machine.cpu.regs()?;
        let handled = Call::decode(number, regs.rdi, regs.rsi, regs.rcx, regs.r8)
            .map_err(Refused::from)
            .and_then(|call| self.handle(number, call, machine));
        regs.rax = match handled {
            Ok(Answer::Value(value)) => value,
            Ok(Answer::End(outcome)) => return Ok(Flow::End(outcome)),
            Err(Refused::Call(error)) => {
                self.refuse(1, &error);
                error.result()
            }
            Err(Refused::Outcome(outcome)) => return Err(outcome),
        };
        machine.cpu.set_regs(&regs)?;
        Ok(Flow::Continue)
    }

    fn handle(
        &mut self,
        number: u32,
        call: Call,
        machine: &mut Machine,
    ) -> Result<Answer, Refused> {
        let notify = self.windows.as_ref().map(|windows| windows.notify());
        let needed = match call {
            Call::RingSetup { .. } | Call::RingDrain { .. } => Some(Notify::Ring),
            Call::Poison { .. }
            | Call::Unpoison { .. }
            | Call::Allocated { .. }
            | Call::Freed { .. }
            | Call::Related { .. } => Some(Notify::Sync),
            Call::Report { .. } | Call::Quarantine { .. } => notify,
            _ => None,
        };
        let with_shadow = matches!(call, Call::Report { .. } | Call::Quarantine { .. });
        if needed != notify && needed.is_some() || with_shadow && notify.is_none() {
            return Err(CallError::Mode(number).into());
        }
        let mut value = 0;
        match call {
            Call::Hello { flags } => {
                // Without page shadow nothing tells which pages are free.
                let with_pages = self.features().has(Features::PER_PAGE);
                self.unused_pages.hello(if with_pages { flags } else { GuestFlags::default() });
                value = self.features().bits().into();
            }
            Call::RegionAdd(region) => self.regions.add(region, machine.ram.end())?,
            Call::RingSetup { va, records, cpu, text_base } => {
                let bytes = (records + 1) * RECORD_BYTES;
                let gpa = in_ram(&self.regions, machine.ram, va, bytes, "ring address")?;
                self.rings.set_up(cpu, gpa, records, text_base)?;
            }
            Call::RingDrain { cpu, released } => {
                if !self.rings.has(cpu) {
                    return Err(CallError::Argument { what: "CPU", value: cpu.into() }.into());
                }
                machine.others.stop()?;
                self.drain(Some(cpu), machine.ram);
                self.give_back()?;
                if let Some(to) = released.filter(|_| self.quarantine.is_due()) {
                    value = self.release(to, false, machine.ram)?;
                }
            }
            Call::Poison { va, len, code } => {
                let gpa = to_gpa(&self.regions, va, len)?;
                if let Some(windows) = &mut self.windows {
                    windows
                        .poison(gpa, len, code, machine.slots)
                        .map_err(|e| shadow_error(e, va))?;
                }
            }
            Call::Unpoison { va, len, stack } => {
                let gpa = to_gpa(&self.regions, va, len)?;
                if let Some(windows) = &mut self.windows {
                    windows.unpoison(gpa, len, machine.slots).map_err(|e| shadow_error(e, va))?;
                    if let Some(stack) = stack {
                        windows.mark_stack(gpa, len, stack);
                    }
                }
            }
            Call::Allocated { va, size, cache, actor, slot } => {
                let gpa =
                    to_gpa(&self.regions, va, slot.map_or(size, |slot| slot.bytes.max(size)))?;
                if let (Some(windows), Some(slot)) = (&mut self.windows, slot) {
                    windows.unpoison(gpa, size, machine.slots).map_err(|e| shadow_error(e, va))?;
                    let rest = slot.bytes.saturating_sub(size);
                    windows
                        .poison(gpa + size, rest, slot.code, machine.slots)
                        .map_err(|e| shadow_error(e, va))?;
                }
                let frames = self.caller(machine);
                self.events.allocations += 1;
                self.objects.allocated(
                    gpa,
                    size,
                    slot.map_or(0, |slot| slot.bytes),
                    cache,
                    actor.task,
                    &frames,
                );
                self.give_back_now_and_then()?;
            }
            Call::Freed { va, actor, slot, owner } => {
                let waits = match (slot, owner) {
                    (Some(slot), Some(owner)) => Some(released(va, slot.bytes, owner)?),
                    _ => None,
                };
                let gpa = to_gpa(&self.regions, va, slot.map_or(1, |slot| slot.bytes))?;
                if let (Some(windows), Some(slot)) = (&mut self.windows, slot) {
                    windows
                        .poison(gpa, slot.bytes, slot.code, machine.slots)
                        .map_err(|e| shadow_error(e, va))?;
                }
                let frames = self.caller(machine);
                self.events.frees += 1;
                self.objects.freed(gpa, actor.task, &frames);
                self.give_back_now_and_then()?;
                if let Some(memory) = waits {
                    if !self.quarantine.hold(memory) {
                        return Err(QUARANTINE_FULL.into());
                    }
                    value = self.quarantine.is_due().into();
                }
            }
            Call::Report { address, size, access, actor, ip } => {
                machine.others.stop()?;
                self.drain_all(machine.ram);
                let finding = self.investigate(address, size, access, actor, ip, machine);
                if let Flow::End(outcome) = self.found(finding) {
                    return Ok(Answer::End(outcome));
                }
            }
            Call::VirtualAdd { va, len } => {
                let Self { regions, windows, .. } = self;
                let Some(windows) = windows else { return Err(CallError::Mode(number).into()) };
                let none = CallError::Limit {
                    what: "bytes of virtual memory",
                    most: windows.model().memory().layout().virtual_bytes(),
                };
                let key = regions.add_virtual(va, len, || windows.next_key(va, len).ok_or(none))?;
                windows.add_virtual(key, len, machine.slots).map_err(Outcome::from)?;
                return Ok(Answer::Value(key));
            }
            Call::Name { what, va, len } => {
                let mut name = [0; abi::NAME_MAX as usize];
                let name = &mut name[..len as usize];
                if len > 0 {
                    let wrong = CallError::Argument { what: "name address", value: va };
                    let read = match in_ram(&self.regions, machine.ram, va, len, "name address") {
                        Ok(gpa) => machine.ram.read(GuestAddress(gpa), name).is_ok(),
                        // On a stack in virtual memory, for example.
                        Err(_) => {
                            self.regions.to_gpa(va, len).is_some()
                                && AddressSpace::new(&machine.cpu.sregs().map_err(Outcome::from)?)
                                    .read(machine.ram, va, name)
                                    .is_ok()
                        }
                    };
                    if !read {
                        return Err(wrong.into());
                    }
                }
                match what {
                    Named::Cache { id, object_size } => {
                        self.objects.name_cache(id, name, object_size)
                    }
                    Named::Task { id } => self.objects.name_task(id, name),
                }
            }
            Call::Globals { va, count } => {
                // Read through the guest's page tables, when it is: virtual memory (a module's)
                // will do.
                to_gpa(&self.regions, va, count * abi::GLOBAL_BYTES)?;
                self.globals.add(va, count)?;
            }
            Call::Quarantine { to, all } => value = self.release(to, all, machine.ram)?,
            Call::Related { va, actor } => {
                let gpa = to_gpa(&self.regions, va, 1)?;
                let frames = self.caller(machine);
                self.objects.related(gpa, actor.task, &frames);
            }
            Call::Exit(exit) => {
                return Ok(Answer::End(match exit {
                    Exit::Done { failed: false } => Outcome::Done,
                    Exit::Done { failed: true } => Outcome::Failed,
                    Exit::Panic => Outcome::Panic,
                    Exit::Fault { vector, error, rip, address } => Outcome::Fault {
                        vector,
                        error,
                        place: Place::new(rip, &self.symbols).to_string(),
                        address,
                    },
                }));
            }
        }
        Ok(Answer::Value(value))
    }

    /// Writes what leaves the quarantine to guest memory. Returns how many objects.
    fn release(&mut self, to: Array, all: bool, ram: &Ram) -> Result<u64, CallError> {
        let what = "address of released objects";
        let room = to.count.max(1) * RELEASED_BYTES;
        let gpa = in_ram(&self.regions, ram, to.va, room, what)?;
        let taken = self.quarantine.take(to.count as usize, all);
        let bytes: Vec<u8> = taken.iter().flat_map(|memory| memory.encode()).collect();
        ram.write(GuestAddress(gpa), &bytes)
            .map_err(|_| CallError::Argument { what, value: to.va })?;
        Ok(taken.len() as u64)
    }

    /// The return addresses of a call's maker, innermost first.
    fn caller(&self, machine: &Machine) -> Vec<u64> {
        investigate::stack(machine, None, RECORD_FRAMES).ips
    }

    /// Takes the records out of all rings. Every CPU stands still.
    pub fn drain_all(&mut self, ram: &Ram) {
        self.drain(None, ram);
    }

    /// [`Self::drain_all`], for the CPU that asked for it if one did.
    fn drain(&mut self, asked: Option<u16>, ram: &Ram) {
        let Self { rings, objects, quarantine, regions, events, .. } = self;
        let mut refused = 0;
        if let Some(cpu) = asked {
            quarantine.settled(cpu);
        }
        events.ring_drains += rings.drain(asked, ram, |event, last| {
            let Some(waits) = take(event, regions, objects) else {
                refused += 1;
                return;
            };
            match event.record.map(|record| record.body) {
                Ok(RecordBody::Allocated { .. }) => events.allocations += 1,
                Ok(RecordBody::Freed { .. }) => events.frees += 1,
                _ => {}
            }
            // The CPU that asks is done with all that it told, since it tells and poisons at once.
            refused +=
                u64::from(!quarantine.told(event.cpu, waits, last && asked != Some(event.cpu)));
        });
        if refused > 0 {
            self.refuse(refused, &format_args!("{refused} records in rings make no sense"));
        }
    }

    /// Gives host memory behind unused shadow back. In `ring` mode every vCPU stands still. In
    /// `sync` mode only the VMM changes shadow, so the others cannot make use of what goes.
    fn give_back(&mut self) -> Result<(), Outcome> {
        if let Some(windows) = &mut self.windows {
            release_unused(windows)?;
        }
        Ok(())
    }

    fn give_back_now_and_then(&mut self) -> Result<(), Outcome> {
        if (self.events.allocations + self.events.frees).is_multiple_of(SYNC_RELEASE) {
            self.give_back()?;
        }
        Ok(())
    }
}

/// What a call comes to.
enum Answer {
    Value(u64),
    End(Outcome),
}

/// Why a call does not come to anything.
enum Refused {
    Call(CallError),
    Outcome(Outcome),
}

impl From<CallError> for Refused {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl From<Outcome> for Refused {
    fn from(outcome: Outcome) -> Self {
        Self::Outcome(outcome)
    }
}

/// The guest's mistakes are its own; the host's end the run.
fn shadow_error(error: ShadowError, va: u64) -> Refused {
    match error {
        ShadowError::Range(_) => CallError::Argument { what: "address", value: va }.into(),
        error => Outcome::from(error).into(),
    }
}

fn to_gpa(regions: &Regions, va: u64, len: u64) -> Result<u64, CallError> {
    regions.to_gpa(va, len.max(1)).ok_or(CallError::Argument { what: "address", value: va })
}

fn in_ram(
    regions: &Regions,
    ram: &Ram,
    va: u64,
    len: u64,
    what: &'static str,
) -> Result<u64, CallError> {
    regions
        .to_gpa(va, len)
        .filter(|gpa| ram.contains(GuestAddress(*gpa), len))
        .ok_or(CallError::Argument { what, value: va })
}

/// The guest frees and frees, and never fetches what is due.
const QUARANTINE_FULL: CallError =
    CallError::Limit { what: "objects in the quarantine", most: quarantine::MOST as u64 };

/// Freed memory, as the quarantine keeps it.
fn released(va: u64, slot: u64, owner: Owner) -> Result<Released, CallError> {
    let slot =
        u32::try_from(slot).map_err(|_| CallError::Argument { what: "slot", value: slot })?;
    Ok(Released::new(va, slot, owner))
}

/// Takes in one record. Tells what goes into the quarantine; none if the record makes no sense.
fn take(event: &Event, regions: &Regions, objects: &mut Objects) -> Option<Option<Released>> {
    let record = event.record.ok()?;
    let to_gpa = |address, bytes: u32| regions.to_gpa(address, u64::from(bytes).max(1));
    let frames = event.frames.get(..event.depth).unwrap_or_default();
    match record.body {
        RecordBody::Allocated { address, bytes, slot, cache, .. } => {
            let gpa = to_gpa(address, bytes.max(slot))?;
            objects.allocated(gpa, bytes.into(), slot.into(), cache, record.task, frames);
        }
        RecordBody::Freed { address, slot, owner, .. } => {
            objects.freed(to_gpa(address, slot)?, record.task, frames);
            return Some(owner.map(|owner| Released::new(address, slot, owner)));
        }
        RecordBody::Related { address, .. } => {
            objects.related(to_gpa(address, 0)?, record.task, frames);
        }
        RecordBody::Cache { id, object, name } => {
            objects.name_cache(id, name.as_bytes(), object.into());
        }
    }
    Some(None)
}
