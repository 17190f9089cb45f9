//! From a reported access to a finding: what the shadow says about the address, what object it
//! belongs to, who allocated and freed that, and which code was at it.

use std::fmt;

use umbra_shadow::codes::{
    GRANULE, GRANULE_SHIFT, LARGE_REDZONE, PAGE_SHIFT, PAGE_SIZE, SLAB_REDZONE, STACK_LEFT,
    UNKNOWN, VMALLOC_INVALID,
};
use umbra_shadow::{BugKind, Cause, Shadow, Violation, classify};

use super::Outcome;
use super::monitor::{Flow, Machine, Monitor};
use crate::hypercall::{Access, Actor};
use crate::machine::walk::AddressSpace;
use crate::report::frame::{self, DESCRIPTION_MAX, FRAME_MAGIC, StackFrame};
use crate::report::stack::{Stack, walk};
use crate::report::symbols::{Position, Symbols};
use crate::report::{self, Added, Event, Finding, Frame, Object, ROW_SHADOW, ShadowDump, Task};
use crate::shadow::{At, Model, objects};

/// [`GRANULE`], as shadow bytes count.
const GRANULE_BYTES: u8 = GRANULE as u8;
/// How far below an address the start of its stack frame is looked for, in bytes.
const STACK_SEARCH: u64 = 64 << 10;
/// Most frames in a finding's stack.
const FRAMES: usize = 32;

/// A place in the guest's code, for a message.
pub struct Place {
    rip: u64,
    frame: Option<Frame>,
}

impl Place {
    /// The place of the instruction at `rip`.
    pub fn new(rip: u64, symbols: &Symbols) -> Self {
        Self { rip, frame: symbols.frames(rip, Position::Instruction).pop() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rip {:#x}", self.rip)?;
        let Some((frame, symbol)) = self.frame.as_ref().and_then(|f| Some((f, f.symbol.as_ref()?)))
        else {
            return Ok(());
        };
        write!(f, ", in {symbol}+{:#x}", frame.offset)
    }
}

/// The stack that begins at the vCPU's frame pointer.
pub(super) fn stack(machine: &Machine, start_ip: Option<u64>, most: usize) -> Stack {
    let (regs, sregs) =
        (machine.cpu.regs().unwrap_or_default(), machine.cpu.sregs().unwrap_or_default());
    let space = AddressSpace::new(&sregs);
    walk(&mut |at| space.read_u64(machine.ram, at).ok(), regs.rbp, start_ip, most)
}

impl Monitor {
    /// Makes a finding of what the guest reported. All rings are drained.
    pub(super) fn investigate(
        &self,
        address: u64,
        size: u64,
        access: Access,
        actor: Actor,
        ip: u64,
        machine: &Machine,
    ) -> Finding {
        let region = self.regions.find(address);
        let gpa = region.map(|(gpa, _)| gpa);
        let violation = match (&self.windows, region) {
            // A free has no size; its address is what is wrong.
            (Some(windows), Some((gpa, left))) => {
                access_violation(windows.model(), gpa, size.max(1), left)
            }
            _ => Some(Violation {
                address: gpa.unwrap_or(address),
                code: UNKNOWN,
                cause: Cause::Outside,
            }),
        };
        let kind = BugKind::of_free(access).unwrap_or_else(|| match (&violation, &self.windows) {
            (Some(violation), Some(windows)) => {
                classify(windows.model(), violation, address, size, access)
            }
            _ => BugKind::Unknown,
        });
        // The shadow is keyed by guest-physical address; the guest knows the virtual one.
        let bad_gpa = violation.map_or(gpa, |v| gpa.map(|_| v.address));
        let first_bad = match (bad_gpa, gpa) {
            (Some(bad), Some(gpa)) if BugKind::of_free(access).is_none() => {
                address.wrapping_add(bad.wrapping_sub(gpa))
            }
            _ => address,
        };
        let bad_gpa = if BugKind::of_free(access).is_some() { gpa } else { bad_gpa };

        let stack_frame = match kind {
            BugKind::StackOutOfBounds | BugKind::UseAfterScope => {
                self.stack_frame(first_bad, machine)
            }
            _ => None,
        };
        // One code says both, of virtual memory. Of a stack there, the frame is known.
        let kind = match kind {
            BugKind::UseAfterScope
                if stack_frame.is_none() && bad_gpa.is_some_and(|gpa| self.is_virtual(gpa)) =>
            {
                BugKind::VmallocOutOfBounds
            }
            kind => kind,
        };

        let stack = stack(machine, Some(ip), FRAMES);
        let frames = self.symbols.stack(&stack.ips);
        let mut notes = stack.notes();
        let on_heap = !matches!(
            kind,
            BugKind::StackOutOfBounds
                | BugKind::GlobalOutOfBounds
                | BugKind::AllocaOutOfBounds
                | BugKind::UseAfterScope
        );
        let found = match bad_gpa {
            Some(gpa) if on_heap => {
                let state = self.windows.as_ref().map(|windows| windows.model().state(gpa));
                let at = match state {
                    Some(1..GRANULE_BYTES | LARGE_REDZONE) => At::Behind,
                    Some(SLAB_REDZONE) => At::Redzone,
                    _ => At::Anywhere,
                };
                self.objects.nearest(gpa, at).map(|found| (gpa, found))
            }
            _ => None,
        };
        let mut event = |event: &objects::Event| {
            if event.lost {
                notes.push("a stack is missing: too many different ones were recorded".into());
            }
            Event { task: task(event.task, event.name), frames: self.symbols.stack(event.frames) }
        };
        let (mut allocated, mut freed, mut related_work, mut previous) =
            (None, None, Vec::new(), None);
        if let Some((gpa, found)) = &found {
            allocated = found.allocated.as_ref().map(&mut event);
            freed = found.freed.as_ref().map(&mut event);
            related_work.extend(found.related.iter().map(&mut event));
            // Only if the pointer may have been to that object.
            let before = found
                .previous
                .as_ref()
                .filter(|p| (p.start..p.start.saturating_add(p.size)).contains(gpa));
            previous = before.map(|before| report::Previous {
                start: first_bad.wrapping_sub(gpa - before.start),
                size: before.size,
                allocated: before.allocated.as_ref().map(&mut event),
                freed: event(&before.freed),
            });
        }
        let object = found.map(|(gpa, found)| {
            let offset = gpa.wrapping_sub(found.start).cast_signed();
            Object {
                start: first_bad.wrapping_sub(offset.cast_unsigned()),
                size: found.size,
                cache: found.cache.map(|cache| cache.name.to_owned()),
                cache_size: found.cache.map_or(0, |cache| cache.object_size),
                offset,
            }
        });
        let variable = match kind {
            // The compiler's description knows the size without the redzone; the symbol table does
            // not.
            BugKind::GlobalOutOfBounds => {
                let sregs = machine.cpu.sregs().unwrap_or_default();
                let mut variable = self
                    .globals
                    .find(first_bad, &AddressSpace::new(&sregs), machine.ram)
                    .or_else(|| self.symbols.lookup_data(first_bad));
                if let Some(variable) = &mut variable {
                    self.symbols.declare(variable);
                }
                variable
            }
            _ => None,
        };
        notes.extend(self.symbols.notes());
        let counts = self.objects.counts();
        if counts.dropped + counts.evicted > 0 && on_heap {
            // What is beside an object may belong to one that was forgotten.
            let sure = |object: &&Object| (0..object.size.cast_signed()).contains(&object.offset);
            if object.as_ref().filter(sure).is_none() {
                notes.push("the table of objects was full: the object may be missing in it".into());
            } else if allocated.is_none() {
                notes.push(
                    "the table of objects was full: who allocated the object was forgotten".into(),
                );
            }
        }
        Finding {
            kind: kind.as_str(),
            access: match access {
                Access::Read => report::Access::Read,
                Access::Write => report::Access::Write,
                Access::DoubleFree | Access::InvalidFree => report::Access::Free,
            },
            size,
            address,
            ip,
            // Not the number that the guest gave: this one cannot be wrong.
            cpu: machine.id.into(),
            task: task(actor.task, self.objects.task_name(actor.task)),
            frames,
            object,
            variable,
            stack_frame,
            allocated,
            freed,
            related_work,
            previous,
            shadow: self.shadow_around(first_bad),
            notes,
        }
    }

    /// Whether a key stands for virtual memory.
    fn is_virtual(&self, key: u64) -> bool {
        self.windows
            .as_ref()
            .is_some_and(|windows| key >= windows.model().memory().layout().virtual_start)
    }

    /// Whether all of the page of `gpa` belongs to no allocation of virtual memory: a guard page.
    fn is_guard(&self, gpa: u64) -> bool {
        let Some(windows) = &self.windows else { return false };
        let page = gpa & !(PAGE_SIZE - 1);
        let mut granules = (page..page + PAGE_SIZE).step_by(GRANULE as usize);
        self.is_virtual(gpa) && granules.all(|at| windows.model().state(at) == VMALLOC_INVALID)
    }

    /// The frame that `first_bad` lies in. Its start is that of the nearest left redzone below, if
    /// what the compiler puts there is there (as `kasan_get_stack_frame_info` finds it,
    /// `mm/kasan/report_generic.c`).
    fn stack_frame(&self, first_bad: u64, machine: &Machine) -> Option<StackFrame> {
        let model = self.windows.as_ref()?.model();
        let state = |at| Some(model.state(self.regions.to_gpa(at, GRANULE)?));
        let mut base = first_bad & !(GRANULE - 1);
        let lowest = base.checked_sub(STACK_SEARCH)?;
        let mut page = None;
        while state(base)? != STACK_LEFT {
            // A stack does not go on below its guard page.
            if page.replace(base / PAGE_SIZE) != Some(base / PAGE_SIZE)
                && self.is_guard(self.regions.to_gpa(base, GRANULE)?)
            {
                return None;
            }
            base = base.checked_sub(GRANULE).filter(|at| *at >= lowest)?;
        }
        while state(base.wrapping_sub(GRANULE)).is_some_and(|state| state == STACK_LEFT) {
            base = base.checked_sub(GRANULE).filter(|at| *at >= lowest)?;
        }
        let sregs = machine.cpu.sregs().ok()?;
        let space = AddressSpace::new(&sregs);
        let word = |i: u64| space.read_u64(machine.ram, base.checked_add(8 * i)?).ok();
        if word(0)? != FRAME_MAGIC {
            return None;
        }
        let mut text = [0; DESCRIPTION_MAX];
        let len = space.read_some(machine.ram, word(1)?, &mut text);
        let text = text.get(..len)?.split(|byte| *byte == 0).next()?;
        let pc = word(2)?;
        let function = self.symbols.lookup(pc).map(|symbol| {
            format!("{}+{:#x}/{:#x}", symbol.name, pc.wrapping_sub(symbol.start), symbol.size)
        });
        Some(StackFrame { offset: first_bad - base, function, variables: frame::parse(text)? })
    }

    fn shadow_around(&self, first_bad: u64) -> ShadowDump {
        ShadowDump::around(first_bad, |at| {
            let model = self.windows.as_ref()?.model();
            let gpa = self.regions.to_gpa(at, GRANULE * ROW_SHADOW as u64)?;
            Some(std::array::from_fn(|i| model.state(gpa + i as u64 * GRANULE)))
        })
    }

    /// Makes a finding of a guest's own store into a read-only window, which had no effect.
    pub(super) fn tampering(
        &mut self,
        gpa: u64,
        size: u64,
        machine: &mut Machine,
    ) -> Result<Flow, Outcome> {
        machine.others.stop()?;
        self.drain_all(machine.ram);
        let ip = machine.cpu.regs()?.rip;
        // Through which address of its own the guest came is not known; it has the shadow of its
        // regions mapped where the checks look.
        let address = self.windows.as_ref().and_then(|windows| {
            let in_page = windows.page_window().and_then(|window| window.offset(gpa, 1));
            let (offset, shift) = match in_page {
                Some(offset) => (offset, PAGE_SHIFT),
                None => (windows.byte_window().offset(gpa, 1)?, GRANULE_SHIFT),
            };
            let va = self.regions.to_va(offset << shift)?;
            Some((va.cast_signed() >> shift).cast_unsigned())
        });
        let stack = stack(machine, None, FRAMES - 1);
        let mut frames = self.symbols.frames(ip, Position::Instruction);
        frames.extend(self.symbols.stack(&stack.ips));
        let mut notes = self.symbols.notes();
        if address.is_none() {
            notes.push(
                "the address is the guest-physical one: no region belongs to this shadow".into(),
            );
        }
        let finding = Finding {
            kind: BugKind::ShadowTampering.as_str(),
            access: report::Access::Write,
            size,
            address: address.unwrap_or(gpa),
            ip,
            cpu: machine.id.into(),
            task: Task::default(),
            frames,
            object: None,
            variable: None,
            stack_frame: None,
            allocated: None,
            freed: None,
            related_work: Vec::new(),
            previous: None,
            shadow: ShadowDump::default(),
            notes,
        };
        Ok(self.found(finding))
    }

    /// Takes a finding in: tells the observer of a new one, and ends the run when there are enough.
    pub(super) fn found(&mut self, finding: Finding) -> Flow {
        if let Added::New(at) = self.findings.add(finding) {
            self.flush();
            if let Some((finding, _)) = self.findings.get(at) {
                self.observer.finding(finding);
            }
            if self.stop_at.is_some_and(|most| self.findings.distinct() >= most) {
                return Flow::End(Outcome::FindingLimit(self.findings.distinct()));
            }
        }
        Flow::Continue
    }
}

/// What is wrong with an access to `size` bytes at `gpa`, whose region ends `left` bytes behind it.
/// What follows there is other memory to the guest.
fn access_violation(model: &Model, gpa: u64, size: u64, left: u64) -> Option<Violation> {
    // A negative size is wrong wherever it is.
    if size <= left || size > i64::MAX as u64 {
        return model.check(gpa, size).err();
    }
    let behind =
        Violation { address: gpa.saturating_add(left), code: UNKNOWN, cause: Cause::Outside };
    model.check(gpa, left).err().or(Some(behind))
}

fn task(id: u32, name: Option<&str>) -> Task {
    Task { id, name: name.unwrap_or_default().to_owned() }
}
