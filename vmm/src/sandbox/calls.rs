//! What each hypercall does.

use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_provenance::rings::{Event, RingError};
use umbra_provenance::{Objects, quarantine};
use umbra_shadow::Shadow;
use umbra_shadow::abi::{
    self, RECORD_BYTES, RECORD_FRAMES, RELEASED_BYTES, Released, features, record,
};
use vm_memory::GuestAddress;

use super::investigate::Place;
use super::monitor::{Flow, Machine, Monitor};
use super::ring_memory::RingRam;
use super::{Outcome, investigate};
use crate::hypercall::{Array, Call, CallError, Exit, Named, Regions};
use crate::shadow::{Notify, ShadowError, release_unused};

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
                let with_pages = self.features() & features::PER_PAGE != 0;
                self.unused_pages.hello(if with_pages { flags } else { 0 });
                value = self.features().into();
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
            Call::Freed { va, actor, slot, wait } => {
                let waits = match slot {
                    Some(slot) if wait != 0 => Some(released(va, slot.bytes, wait)?),
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
        let bytes: Vec<u8> = taken.iter().flat_map(|memory| memory.to_bytes()).collect();
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
        events.ring_drains += rings.drain(asked, &RingRam(ram), |event, last| {
            let Some(waits) = take(event, regions, objects) else {
                refused += 1;
                return;
            };
            match event.record.kind {
                record::ALLOCATED | record::ALLOCATED_IN_SLOT => events.allocations += 1,
                record::FREED => events.frees += 1,
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

impl From<RingError> for Refused {
    fn from(error: RingError) -> Self {
        Self::Call(match error {
            RingError::Limit { what, most } => CallError::Limit { what, most },
            RingError::Overlap { gpa } => CallError::Argument { what: "ring address", value: gpa },
        })
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
fn released(va: u64, slot: u64, wait: u16) -> Result<Released, CallError> {
    let slot =
        u32::try_from(slot).map_err(|_| CallError::Argument { what: "slot", value: slot })?;
    Ok(Released { address: va, slot, wait, reserved: 0 })
}

/// Takes in one record. Tells what goes into the quarantine; none if the record makes no sense.
fn take(event: &Event, regions: &Regions, objects: &mut Objects) -> Option<Option<Released>> {
    let r = &event.record;
    if r.kind == record::CACHE {
        objects.name_cache(r.cache, r.name().get(..r.depth.into())?, r.size.into());
        return Some(None);
    }
    let (size, slot) = match r.kind {
        record::ALLOCATED => (r.size, 0),
        record::ALLOCATED_IN_SLOT => (r.size & 0xffff, (r.size & 0xffff) + (r.size >> 16)),
        record::FREED => (r.size, 0),
        record::RELATED => (0, 0),
        _ => return None,
    };
    let gpa = regions.to_gpa(r.address, u64::from(size.max(slot)).max(1))?;
    let frames = event.frames.get(..event.depth).unwrap_or_default();
    match r.kind {
        record::FREED => objects.freed(gpa, r.task, frames),
        record::RELATED => objects.related(gpa, r.task, frames),
        _ => objects.allocated(gpa, size.into(), slot.into(), r.cache, r.task, frames),
    }
    let wait = if r.kind == record::FREED { r.cache } else { 0 };
    Some((wait != 0).then_some(Released { address: r.address, slot: size, wait, reserved: 0 }))
}
