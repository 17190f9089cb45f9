//! Makes a finding of a report of a guest.
//!
//! The shadow has the bad address and its kind. The table of objects has the object, and who
//! allocated and freed it. The frame pointers give the stack; ELF and DWARF give names and lines.

use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_report::frame::{self, DESCRIPTION_MAX, FRAME_MAGIC, StackFrame};
use umbra_report::stack::{Stack, holds, walk};
use umbra_report::symbols::Position;
use umbra_report::{AccessKind, Finding, Variable};
use umbra_shadow::codes::{GRANULE, GRANULE_SHIFT, PAGE_SHIFT, PAGE_SIZE, STACK_LEFT, UNKNOWN};
use umbra_shadow::{BugKind, Cause, Shadow as _, Violation, classify};

use super::context::ExitContext;
use super::dispatch::Dispatcher;
use super::known::{BadAddress, Known, task};
use crate::hypercall::{Access, BadAccess};
use crate::shadow::Model;

/// Most bytes below an address to search for the start of its stack frame.
const STACK_SEARCH: u64 = 64 << 10;
/// Most bytes of an access to search for the first bad one. The work is that of an exit, and a
/// guest may claim an access to all its memory.
const ACCESS_SEARCH: u64 = 2 << 20;
/// Most frames in a finding's stack.
const FRAMES: usize = 32;

/// The stack that begins at the vCPU's frame pointer.
pub(super) fn stack(context: &ExitContext, start_ip: Option<u64>, max: usize) -> Stack {
    let (regs, sregs) =
        (context.cpu.regs().unwrap_or_default(), context.cpu.sregs().unwrap_or_default());
    let space = AddressSpace::new(&sregs);
    walk(&mut |at| space.read_u64(context.ram, at).ok(), regs.rbp, start_ip, max)
}

impl Dispatcher {
    /// An investigation of the state at this exit.
    pub(super) fn investigation<'a, 'b>(
        &'a self,
        context: &'a ExitContext<'b>,
    ) -> Investigation<'a, 'b> {
        Investigation {
            known: self.known(),
            context,
            space: AddressSpace::new(&context.cpu.sregs().unwrap_or_default()),
        }
    }
}

/// The state that a finding is made of. The rings are drained, and every vCPU stands still.
pub(super) struct Investigation<'a, 'b> {
    known: Known<'a>,
    context: &'a ExitContext<'b>,
    space: AddressSpace,
}

impl Investigation<'_, '_> {
    /// A finding about an access that the guest reported.
    pub(super) fn bad_access(&self, access: &BadAccess) -> Finding {
        self.finding(access, &stack(self.context, Some(access.ip), FRAMES))
    }

    /// A finding about an access whose check faulted, and so could not report it. The check has no
    /// frame: its return address is on top of the stack.
    pub(super) fn faulted_check(&self, access: &BadAccess) -> Finding {
        let mut stack = stack(self.context, None, FRAMES - 1);
        stack.ips.insert(0, access.ip);
        self.finding(access, &stack)
    }

    fn finding(&self, access: &BadAccess, stack: &Stack) -> Finding {
        let mut bad = self.locate(access);
        let mut stack_frame = match bad.kind {
            BugKind::StackOutOfBounds | BugKind::UseAfterScope => self.stack_frame(bad.va),
            _ => None,
        };
        // In virtual memory one code means both. It is a use after scope if there is a stack frame.
        if bad.kind == BugKind::UseAfterScope
            && stack_frame.is_none()
            && bad.key.is_some_and(|key| self.known.shadow.is_virtual(key))
        {
            bad.kind = BugKind::VmallocOutOfBounds;
        }
        let frames = self.known.guest.symbols().stack(&stack.ips);
        let mut notes = stack.notes();
        let history = self.known.history(&bad, &mut notes);
        let mut variable = match bad.kind {
            BugKind::GlobalOutOfBounds => self.variable(bad.va),
            _ => None,
        };
        // A variable may be freed, or lie in a part of the image that is free after the boot.
        if history.object.is_none()
            && matches!(
                bad.kind,
                BugKind::InvalidFree | BugKind::DoubleFree | BugKind::UseAfterFree
            )
        {
            stack_frame = self.stack_frame(bad.va);
            variable = if stack_frame.is_none() { self.variable_of(&bad) } else { None };
        }
        notes.extend(self.known.guest.symbols().notes());
        notes.extend(self.known.forgotten(&bad, &history));
        Finding {
            kind: bad.kind.as_str(),
            access: match access.access {
                Access::Read => AccessKind::Read,
                Access::Write => AccessKind::Write,
                Access::DoubleFree | Access::InvalidFree => AccessKind::Free,
            },
            size: access.size,
            address: access.address,
            ip: access.ip,
            // Not the guest's own number: this one cannot be wrong.
            cpu: self.context.id.into(),
            task: task(
                access.actor.task,
                self.known.provenance.objects().task_name(access.actor.task),
            ),
            frames,
            object: history.object,
            variable,
            stack_frame,
            allocated: history.allocated,
            freed: history.freed,
            related_work: history.related_work,
            previous: history.previous,
            shadow: self.known.shadow_around(bad.va),
            notes,
            image: self.known.guest.symbols().image(),
        }
    }

    /// Finds the first bad address of an access, and what is wrong with it.
    fn locate(&self, access: &BadAccess) -> BadAddress {
        let BadAccess { address, size, .. } = *access;
        let region = self.known.guest.regions().find(address);
        let key = region.map(|(key, _)| key);
        // Only the address of a free is wrong, whatever the shadow says.
        if let Some(kind) = BugKind::of_free(access.access) {
            return BadAddress { va: address, key, kind };
        }
        let violation = match (self.known.shadow.model(), region) {
            (Some(model), Some((key, left))) => access_violation(model, key, size.max(1), left),
            _ => Some(Violation {
                address: key.unwrap_or(address),
                code: UNKNOWN,
                cause: Cause::Outside,
            }),
        };
        let kind = match (&violation, self.known.shadow.model()) {
            (Some(violation), Some(model)) => {
                classify(model, violation, address, size, access.access)
            }
            _ => BugKind::Unknown,
        };
        // The violation is at a key; the guest knows the virtual address.
        let bad_key = key.map(|key| violation.map_or(key, |violation| violation.address));
        let va = match (bad_key, key) {
            (Some(bad), Some(key)) => address.wrapping_add(bad.wrapping_sub(key)),
            _ => address,
        };
        BadAddress { va, key: bad_key, kind }
    }

    /// The global variable of a bad address. The compiler's description knows its size without the
    /// redzone; the symbol table does not.
    fn variable(&self, va: u64) -> Option<Variable> {
        let described = self.described(&[va]).map(|(_, variable)| variable);
        let symbols = self.known.guest.symbols();
        let mut variable = described.or_else(|| symbols.lookup_data(va))?;
        symbols.declare(&mut variable);
        Some(variable)
    }

    /// The variable that the compiler describes for one of these addresses, and that address.
    fn described(&self, addresses: &[u64]) -> Option<(u64, Variable)> {
        self.known.guest.globals().find(addresses, &self.space, self.context.ram)
    }

    /// As [`Investigation::variable`], also by the other addresses of the same memory.
    fn variable_of(&self, bad: &BadAddress) -> Option<Variable> {
        let aliases: Vec<_> = self.known.guest.regions().aliases(bad.key?).collect();
        let symbols = self.known.guest.symbols();
        // One that only lies before it explains nothing.
        let holds = |(va, variable): &(u64, Variable)| {
            va.checked_sub(variable.start).is_some_and(|offset| offset < variable.size)
        };
        let described = self.described(&aliases).filter(holds);
        let named = || {
            let mut all = aliases.iter().filter_map(|va| Some((*va, symbols.lookup_data(*va)?)));
            all.find(holds)
        };
        let (va, mut variable) = described.or_else(named)?;
        symbols.declare(&mut variable);
        let start = variable.start.wrapping_add(bad.va.wrapping_sub(va));
        Some(Variable { start, ..variable })
    }

    /// The frame that a bad address on a stack lies in. Its start is that of the nearest left
    /// redzone below, if what the compiler puts there is there (as `kasan_get_stack_frame_info`
    /// finds it, `mm/kasan/report_generic.c`).
    fn stack_frame(&self, va: u64) -> Option<StackFrame> {
        let base = self.frame_base(va)?;
        let ram = self.context.ram;
        let word = |i: u64| self.space.read_u64(ram, base.checked_add(8 * i)?).ok();
        if word(0)? != FRAME_MAGIC {
            return None;
        }
        let variables = frame::parse(&self.text(word(1)?, ram)?)?;
        let pc = word(2)?;
        let function = self.known.guest.symbols().lookup(pc).map(|symbol| {
            format!("{}+{:#x}/{:#x}", symbol.name, pc.wrapping_sub(symbol.start), symbol.size)
        });
        let current = self.is_on_current_stack(va);
        Some(StackFrame { offset: va - base, current, function, variables })
    }

    /// Whether `va` is on the stack of the code that made the access.
    fn is_on_current_stack(&self, va: u64) -> bool {
        let regs = self.context.cpu.regs().unwrap_or_default();
        let mut read = |at| self.space.read_u64(self.context.ram, at).ok();
        holds(&mut read, regs.rsp, regs.rbp, va)
    }

    /// The compiler's description of a frame at `va`.
    fn text(&self, va: u64, ram: &Ram) -> Option<Vec<u8>> {
        let mut text = [0; DESCRIPTION_MAX];
        let len = self.space.read_some(ram, va, &mut text);
        Some(text.get(..len)?.split(|byte| *byte == 0).next()?.to_vec())
    }

    /// The start of the left redzone that a stack frame begins with.
    fn frame_base(&self, va: u64) -> Option<u64> {
        let model = self.known.shadow.model()?;
        let regions = self.known.guest.regions();
        let state = |at| Some(model.state(regions.key_of(at, GRANULE)?));
        let mut base = va & !(GRANULE - 1);
        let lowest = base.checked_sub(STACK_SEARCH)?;
        let mut page = None;
        while state(base)? != STACK_LEFT {
            // A stack ends at its guard page.
            if page.replace(base / PAGE_SIZE) != Some(base / PAGE_SIZE)
                && self.known.shadow.is_guard(regions.key_of(base, GRANULE)?)
            {
                return None;
            }
            base = base.checked_sub(GRANULE).filter(|at| *at >= lowest)?;
        }
        while state(base.wrapping_sub(GRANULE)).is_some_and(|state| state == STACK_LEFT) {
            base = base.checked_sub(GRANULE).filter(|at| *at >= lowest)?;
        }
        Some(base)
    }

    /// A finding about a guest's own store to a read-only window, by the instruction at `ip`.
    pub(super) fn tampering(&self, gpa: u64, size: u64, ip: u64) -> Finding {
        let address = self.window_address(gpa);
        let symbols = self.known.guest.symbols();
        let mut frames = symbols.frames(ip, Position::Instruction);
        frames.extend(symbols.stack(&stack(self.context, None, FRAMES - 1).ips));
        let mut notes = symbols.notes();
        if address.is_none() {
            notes.push(
                "the address is the guest-physical one: no region belongs to this shadow".into(),
            );
        }
        Finding {
            kind: BugKind::ShadowTampering.as_str(),
            size,
            address: address.unwrap_or(gpa),
            ip,
            cpu: self.context.id.into(),
            frames,
            notes,
            image: symbols.image(),
            ..Finding::new(AccessKind::Write)
        }
    }

    /// The guest's own address of a place in a window. It is not known which mapping the guest
    /// used; this is the one that its checks use.
    fn window_address(&self, gpa: u64) -> Option<u64> {
        let windows = self.known.shadow.windows()?;
        let in_page = windows.page_window().and_then(|window| window.offset(gpa, 1));
        let (offset, shift) = match in_page {
            Some(offset) => (offset, PAGE_SHIFT),
            None => (windows.byte_window().offset(gpa, 1)?, GRANULE_SHIFT),
        };
        let va = self.known.guest.regions().to_va(offset << shift)?;
        Some((va.cast_signed() >> shift).cast_unsigned())
    }
}

/// What is wrong with an access to `size` bytes at `key`, whose region ends `left` bytes behind it.
/// The memory behind it is another region, or none. Poison is only looked for in the first
/// [`ACCESS_SEARCH`] bytes.
fn access_violation(model: &Model, key: u64, size: u64, left: u64) -> Option<Violation> {
    let poisoned = |bytes: u64| model.check(key, bytes.min(ACCESS_SEARCH)).err();
    // A negative size is wrong wherever it is, without a search.
    if size > i64::MAX as u64 {
        return model.check(key, size).err();
    }
    if size <= left {
        return poisoned(size);
    }
    let behind =
        Violation { address: key.saturating_add(left), code: UNKNOWN, cause: Cause::Outside };
    poisoned(left).or(Some(behind))
}
