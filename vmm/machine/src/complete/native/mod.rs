//! SSE, AVX and AVX-512 instructions, which the host's CPU executes itself.
//!
//! Those that touch only general and vector registers and at most one memory operand ([`class`])
//! need no emulator: the memory operand is copied to a scratch area, the instruction is encoded
//! anew for it, and runs with the guest's registers ([`stub`]). Then the results are copied back.
//! Checks before that find all that could raise an exception on the host's CPU, and raise it in the
//! guest: a missing feature, an unaligned operand, an unmasked floating-point exception.
//!
//! One difference remains: a floating-point underflow that the guest has unmasked is raised only
//! where the result is also inexact, as if it were masked.

mod class;
mod stub;
#[cfg(test)]
mod tests;

use std::io;

use iced_x86::Instruction;

use super::enabled::enabled;
use super::operand::{OperandLocation, OperandUse};
use super::{
    CR4_OSXMMEXCPT, Context, Effect, INVALID_OPCODE, RFLAGS_STATUS, SIMD_EXCEPTION, Stop, is_long,
    state,
};
use class::Plan;
use stub::{Code, Frame};

/// MXCSR: the six exception flags; their masks are [`MXCSR_MASKS`].
const MXCSR_FLAGS: u32 = 0x3f;
const MXCSR_MASKS: u32 = 0x1f80;
const MXCSR_MASK_SHIFT: u32 = 7;
/// Invalid operation, denormal, divide by zero: the CPU finds them before it computes.
const MXCSR_EARLY: u32 = 0x7;

/// Executes instructions here. Holds the host's code for them.
#[derive(Debug, Default)]
pub(super) struct Native(Memory);

/// Memory for the code.
#[derive(Debug, Default)]
enum Memory {
    /// It has not been needed yet, and is made on demand.
    #[default]
    OnDemand,
    /// There is memory for it.
    Made(Code),
    /// It must not be made.
    Never,
}

impl Native {
    /// Makes the memory for the code now.
    pub(super) fn prepared() -> io::Result<Self> {
        Code::new().map(|code| Self(Memory::Made(code)))
    }

    /// Has no code, and makes none.
    pub(super) fn never() -> Self {
        Self(Memory::Never)
    }

    fn execute(&mut self, bytes: &[u8], frame: &mut Frame) -> io::Result<()> {
        if let Memory::OnDemand = self.0 {
            *self = Self::prepared()?;
        }
        match &mut self.0 {
            Memory::Made(code) => code.execute(bytes, frame),
            Memory::OnDemand | Memory::Never => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Whether [`execute`] knows an instruction.
pub(super) fn knows(instruction: &Instruction) -> bool {
    class::plan(instruction).is_some()
}

/// Executes the instruction on the host's CPU.
pub(super) fn execute(c: &mut Context) -> Result<Effect, Stop> {
    // The encoding for the host is of 64-bit code.
    if !is_long(&c.sregs) || !stub::is_possible() {
        return Err(Stop::Unknown);
    }
    let plan = class::plan(&c.instruction).ok_or(Stop::Unknown)?;
    enabled(c, plan.enabled)?;
    if !plan.supported || !stub::has(plan.registers) {
        return Err(Stop::UNDEFINED);
    }
    let place = operand(c, &plan)?;
    let mut frame = Frame::new(c.regs, plan.registers);
    if let (Some(place), true) = (&place, plan.reads) {
        place.read(c.ram, &mut frame.memory[..plan.len])?;
    }
    frame.set_pointer(plan.pointer);
    let area = c.extended()?;
    let before = state::mxcsr(area);
    frame.load(area);
    // No exception on the host; the flags show those that the guest has unmasked.
    frame.set_mxcsr(before & !MXCSR_FLAGS & 0xffff | MXCSR_MASKS);
    c.native.execute(&plan.bytes, &mut frame).map_err(Stop::Host)?;
    let mut raised = frame.mxcsr() & MXCSR_FLAGS;
    let unmasked = raised & !(before >> MXCSR_MASK_SHIFT);
    if unmasked & MXCSR_EARLY != 0 {
        // Nothing was computed, so nothing else was found.
        raised &= MXCSR_EARLY;
    }
    if unmasked != 0 {
        if raised & !before != 0 {
            state::set_mxcsr(c.extended_mut()?, before | raised);
        }
        let vector =
            if c.sregs.cr4 & CR4_OSXMMEXCPT != 0 { SIMD_EXCEPTION } else { INVALID_OPCODE };
        return Err(Stop::Fault { vector, error: None });
    }
    if let (Some(place), true) = (&place, plan.writes) {
        place.write(c.ram, &frame.memory[..plan.len])?;
    }
    frame.set_mxcsr(before | raised);
    if frame.changed(c.extended()?) {
        frame.store(c.extended_mut()?);
    }
    frame.take_registers(&mut c.regs, plan.pointer);
    c.regs.rflags = c.regs.rflags & !RFLAGS_STATUS | frame.flags & RFLAGS_STATUS;
    Ok(Effect::Next)
}

/// The memory operand, which the instruction may access.
fn operand(c: &Context, plan: &Plan) -> Result<Option<OperandLocation>, Stop> {
    if plan.len == 0 {
        return Ok(None);
    }
    let address = c.address()?;
    if !address.is_multiple_of(plan.align) {
        return Err(Stop::PROTECTION);
    }
    let access = if plan.writes { OperandUse::Write } else { OperandUse::Read };
    c.place_at(address, plan.len, access).map(Some)
}
