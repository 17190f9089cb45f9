//! Exceptions, system registers, and instructions without an effect that a guest could see.

use iced_x86::Mnemonic;

use super::operand::OperandUse;
use super::{
    BREAKPOINT, CR4_FSGSBASE, CR4_OSXSAVE, CR4_PGE, CR4_TSD, Context, DEBUG, Effect, RFLAGS_AC,
    RFLAGS_CF, RFLAGS_STATUS, RFLAGS_ZF, Stop,
};
use crate::walk::WalkError;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_AUX: u32 = 0xc000_0103;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;

impl Context<'_> {
    /// Ends the instruction with `otherwise` outside ring 0.
    fn only_ring0(&self, otherwise: Stop) -> Result<(), Stop> {
        if self.ring0() { Ok(()) } else { Err(otherwise) }
    }

    /// Ends the instruction with #UD if the guest did not set `bit` in CR4.
    fn only_with_cr4(&self, bit: u64) -> Result<(), Stop> {
        if self.sregs.cr4 & bit != 0 { Ok(()) } else { Err(Stop::UNDEFINED) }
    }
}

pub(super) fn int3(_: &mut Context) -> Result<Effect, Stop> {
    Ok(Effect::Trap(BREAKPOINT))
}

pub(super) fn int1(_: &mut Context) -> Result<Effect, Stop> {
    Ok(Effect::Trap(DEBUG))
}

pub(super) fn int(c: &mut Context) -> Result<Effect, Stop> {
    // Ring 3 needs the gate's permission; that case does not come here, as ring 3 is not emulated.
    c.only_ring0(Stop::Unknown)?;
    Ok(Effect::Interrupt(c.instruction.immediate8()))
}

pub(super) fn ud(_: &mut Context) -> Result<Effect, Stop> {
    Err(Stop::UNDEFINED)
}

pub(super) fn nothing(_: &mut Context) -> Result<Effect, Stop> {
    Ok(Effect::Next)
}

pub(super) fn nothing_in_ring0(c: &mut Context) -> Result<Effect, Stop> {
    let otherwise = if c.instruction.mnemonic() == Mnemonic::Wbnoinvd {
        Stop::PROTECTION
    } else {
        Stop::UNDEFINED
    };
    c.only_ring0(otherwise)?;
    Ok(Effect::Next)
}

pub(super) fn verw(c: &mut Context) -> Result<Effect, Stop> {
    if c.is_memory(0) {
        c.place(2, OperandUse::Read)?;
    }
    c.regs.rflags |= RFLAGS_ZF;
    Ok(Effect::Next)
}

pub(super) fn flush_line(c: &mut Context) -> Result<Effect, Stop> {
    match c.place(1, OperandUse::Read) {
        // Devices have no lines.
        Ok(_) | Err(Stop::Memory(WalkError::NotRam { .. })) => Ok(Effect::Next),
        Err(stop) => Err(stop),
    }
}

pub(super) fn stac(c: &mut Context) -> Result<Effect, Stop> {
    c.only_ring0(Stop::UNDEFINED)?;
    c.regs.rflags |= RFLAGS_AC;
    Ok(Effect::Next)
}

pub(super) fn clac(c: &mut Context) -> Result<Effect, Stop> {
    c.only_ring0(Stop::UNDEFINED)?;
    c.regs.rflags &= !RFLAGS_AC;
    Ok(Effect::Next)
}

pub(super) fn rdtscp(c: &mut Context) -> Result<Effect, Stop> {
    if !c.ring0() && c.sregs.cr4 & CR4_TSD != 0 {
        return Err(Stop::PROTECTION);
    }
    let tsc = c.cpu.msr(IA32_TSC)?;
    (c.regs.rax, c.regs.rdx) = (tsc & 0xffff_ffff, tsc >> 32);
    c.regs.rcx = c.cpu.msr(IA32_TSC_AUX)? & 0xffff_ffff;
    Ok(Effect::Next)
}

pub(super) fn rdpid(c: &mut Context) -> Result<Effect, Stop> {
    let id = c.cpu.msr(IA32_TSC_AUX)? & 0xffff_ffff;
    c.set_value(0, id)?;
    Ok(Effect::Next)
}

/// `rdrand` and `rdseed`, from the host kernel's generator.
pub(super) fn random(c: &mut Context) -> Result<Effect, Stop> {
    let mut bytes = [0; 8];
    // SAFETY: the buffer has the length that is given.
    let got =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    let good = got == bytes.len() as isize;
    // Without entropy the result is zero and no carry.
    c.set_value(0, if good { u64::from_le_bytes(bytes) } else { 0 })?;
    c.regs.rflags = c.regs.rflags & !RFLAGS_STATUS | if good { RFLAGS_CF } else { 0 };
    Ok(Effect::Next)
}

pub(super) fn swapgs(c: &mut Context) -> Result<Effect, Stop> {
    c.only_ring0(Stop::PROTECTION)?;
    let user = c.cpu.msr(IA32_KERNEL_GS_BASE)?;
    c.cpu.set_msr(IA32_KERNEL_GS_BASE, c.sregs.gs.base)?;
    c.sregs.gs.base = user;
    c.cpu.set_sregs(&c.sregs)?;
    Ok(Effect::Next)
}

pub(super) fn read_base(c: &mut Context) -> Result<Effect, Stop> {
    c.only_with_cr4(CR4_FSGSBASE)?;
    let segment =
        if c.instruction.mnemonic() == Mnemonic::Rdfsbase { &c.sregs.fs } else { &c.sregs.gs };
    let base = segment.base;
    c.set_value(0, base)?;
    Ok(Effect::Next)
}

pub(super) fn write_base(c: &mut Context) -> Result<Effect, Stop> {
    c.only_with_cr4(CR4_FSGSBASE)?;
    let base = c.value(0)?;
    if !c.space.is_canonical(base) {
        return Err(Stop::PROTECTION);
    }
    let segment = if c.instruction.mnemonic() == Mnemonic::Wrfsbase {
        &mut c.sregs.fs
    } else {
        &mut c.sregs.gs
    };
    segment.base = base;
    c.cpu.set_sregs(&c.sregs)?;
    Ok(Effect::Next)
}

pub(super) fn xgetbv(c: &mut Context) -> Result<Effect, Stop> {
    c.only_with_cr4(CR4_OSXSAVE)?;
    if c.regs.rcx as u32 != 0 {
        return Err(Stop::PROTECTION);
    }
    let value = c.xcr0()?;
    (c.regs.rax, c.regs.rdx) = (value & 0xffff_ffff, value >> 32);
    Ok(Effect::Next)
}

pub(super) fn xsetbv(c: &mut Context) -> Result<Effect, Stop> {
    c.only_with_cr4(CR4_OSXSAVE)?;
    let value = c.regs.rax & 0xffff_ffff | c.regs.rdx << 32;
    c.only_ring0(Stop::PROTECTION)?;
    if c.regs.rcx as u32 != 0 {
        return Err(Stop::PROTECTION);
    }
    // KVM refuses components that the guest's CPU does not have.
    c.cpu.set_xcr0(value).map_err(|_| Stop::PROTECTION)?;
    Ok(Effect::Next)
}

/// Invalidates everything, which is always allowed.
pub(super) fn invpcid(c: &mut Context) -> Result<Effect, Stop> {
    c.only_ring0(Stop::PROTECTION)?;
    let kind = c.value(0)?;
    let mut descriptor = [0; 16];
    c.place(16, OperandUse::Read)?.read(c.ram, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
    let pcid_used = kind < 2;
    if kind > 3 || pcid_used && pcid > 0xfff || kind == 0 && !c.space.is_canonical(address) {
        return Err(Stop::PROTECTION);
    }
    // As kernels do without the instruction: a change of CR4.PGE flushes all translations.
    let mut flush = c.sregs;
    flush.cr4 ^= CR4_PGE;
    c.cpu.set_sregs(&flush)?;
    c.cpu.set_sregs(&c.sregs)?;
    Ok(Effect::Next)
}
