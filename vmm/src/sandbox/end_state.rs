//! The state of a vCPU when its run ends, and what that says about a run that did not end well.

use umbra_machine::complete::Cpu;
use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_report::stack::walk;
use umbra_report::{CpuState, Registers};
use umbra_shadow::abi::{Access, Actor};
use umbra_shadow::codes::PAGE_SIZE;

use super::Outcome;
use super::context::ExitContext;
use super::dispatch::Dispatcher;
use crate::hypercall::BadAccess;

/// Most frames of a CPU's stack.
const FRAMES: usize = 32;
/// Where an x86 CPU starts after a reset.
const RESET_RIP: u64 = 0xfff0;
/// How far below mapped memory a stack pointer may be that has run off its stack, in bytes.
const OVERFLOW: u64 = 64 << 10;

/// A vCPU when its thread ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndState {
    registers: Registers,
    space: AddressSpace,
}

impl EndState {
    /// The state of a vCPU that stands still. None if KVM does not give it.
    pub(super) fn of(cpu: &dyn Cpu) -> Option<Self> {
        let (r, s) = (cpu.regs().ok()?, cpu.sregs().ok()?);
        let registers = Registers {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rbp: r.rbp,
            rsp: r.rsp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
            cr2: s.cr2,
            cr3: s.cr3,
        };
        Some(Self { registers, space: AddressSpace::new(&s) })
    }

    fn read(&self, ram: &Ram, at: u64) -> Option<u64> {
        self.space.read_u64(ram, at).ok()
    }

    /// A sentence if the stack pointer has run off a stack.
    fn overflow(&self, ram: &Ram) -> Option<String> {
        let rsp = self.registers.rsp;
        // A push stores below the stack pointer.
        let below = rsp.checked_sub(8)?;
        if self.read(ram, below & !7).is_some() {
            return None;
        }
        let mut above = (0..OVERFLOW / PAGE_SIZE).map(|i| rsp.saturating_add(i * PAGE_SIZE));
        let mapped = above.find(|at| self.read(ram, at & !7).is_some())?;
        Some(format!(
            "the stack has overflowed: the stack pointer {rsp:#x} is at the end of mapped memory, \
             which begins at {:#x}",
            mapped & !(PAGE_SIZE - 1)
        ))
    }

    /// The state for people, with names.
    fn describe(&self, cpu: u8, dispatcher: &Dispatcher, ram: &Ram) -> CpuState {
        let symbols = dispatcher.guest.symbols();
        let registers = self.registers;
        if registers.rip == RESET_RIP {
            let lost = "the CPU was reset: its registers are lost";
            return CpuState { cpu, registers, notes: vec![lost.into()], ..CpuState::default() };
        }
        let stack = walk(&mut |at| self.read(ram, at), registers.rbp, None, FRAMES - 1);
        let mut frames =
            symbols.frames(registers.rip, umbra_report::symbols::Position::Instruction);
        frames.extend(symbols.stack(&stack.ips));
        let notes = self.overflow(ram).into_iter().chain(stack.notes()).collect();
        CpuState { cpu, registers, frames, notes }
    }
}

impl Outcome {
    /// Whether the state of the CPUs explains how the run ended.
    pub(super) fn shows_cpus(&self) -> bool {
        matches!(
            self,
            Self::TripleFault { .. }
                | Self::Stuck { .. }
                | Self::Instruction { .. }
                | Self::HaltedForGood { .. }
                | Self::TimeLimit(_)
        )
    }
}

impl Dispatcher {
    /// The states of the CPUs for people.
    pub(super) fn cpu_states(
        &self,
        ends: impl Iterator<Item = (u8, EndState)>,
        ram: &Ram,
    ) -> Vec<CpuState> {
        self.guest.symbols().begin();
        ends.map(|(cpu, end)| end.describe(cpu, self, ram).bounded()).collect()
    }

    /// The guest has triple-faulted. If that was in a check's lookup, the checked access is bad,
    /// and nobody but this reports it.
    pub(super) fn triple_fault(&mut self, context: &mut ExitContext) -> Outcome {
        let reset = context.cpu.regs().is_ok_and(|regs| regs.rip == RESET_RIP);
        if reset {
            // KVM for AMD resets a vCPU before it tells of the triple fault.
            let place = "an unknown place: the CPU was reset, and its registers are lost".into();
            return Outcome::TripleFault { place };
        }
        let place = self.location(context);
        if let Some(access) = self.running_check(context)
            && context.others.pause().is_ok()
            && self.drain_all(context.ram).is_ok()
        {
            let finding = self.investigation(context).faulted_check(&access);
            // The run ends anyway.
            let _ = self.add_finding(finding);
        }
        Outcome::TripleFault { place }
    }

    /// The access whose check runs at the vCPU's instruction pointer, by the check's name.
    fn running_check(&self, context: &ExitContext) -> Option<BadAccess> {
        let state = EndState::of(context.cpu)?;
        let Registers { rip, rdi, rsi, rsp, .. } = state.registers;
        let symbol = self.guest.symbols().lookup(rip)?;
        let (access, size) = check(&symbol.name)?;
        let ip = state.read(context.ram, rsp)?;
        let actor = Actor { cpu: context.id.into(), task: 0 };
        Some(BadAccess { address: rdi, size: size.unwrap_or(rsi), access, actor, ip })
    }
}

/// The access that a function of this name checks, and its bytes; no bytes if they are the second
/// argument. The names are the compilers' (`-fsanitize=kernel-address`).
fn check(name: &str) -> Option<(Access, Option<u64>)> {
    let name = name.strip_prefix("__asan_")?;
    let name = name.strip_suffix("_noabort").unwrap_or(name);
    let (access, size) = match (name.strip_prefix("load"), name.strip_prefix("store")) {
        (Some(size), _) => (Access::Read, size),
        (_, Some(size)) => (Access::Write, size),
        _ => return None,
    };
    match size {
        "N" => Some((access, None)),
        "1" | "2" | "4" | "8" | "16" => Some((access, size.parse().ok())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_known_by_name() {
        assert_eq!(check("__asan_load8_noabort"), Some((Access::Read, Some(8))));
        assert_eq!(check("__asan_store16"), Some((Access::Write, Some(16))));
        assert_eq!(check("__asan_storeN_noabort"), Some((Access::Write, None)));
        for other in ["__asan_memcpy", "__asan_load", "__asan_load3", "load8", "__asan_store8_x"] {
            assert_eq!(check(other), None, "{other}");
        }
    }
}
