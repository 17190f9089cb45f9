//! Completes instructions that KVM's emulator gives up on.
//!
//! A host without hardware virtualisation for the guest's ring 0 emulates every kernel instruction, and its
//! emulator lacks some that kernels use. Those are done here, on the vCPU's registers and the guest's memory.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};
use thiserror::Error;

use super::memory::Ram;
use super::vcpu::{MAX_INSTRUCTION, Vcpu, VcpuError};
use super::walk::{AddressSpace, WalkError};

const VECTOR_BREAKPOINT: u8 = 3;
const VECTOR_INVALID_OPCODE: u8 = 6;
const VECTOR_GENERAL_PROTECTION: u8 = 13;
const VECTOR_PAGE_FAULT: u8 = 14;
const IA32_TSC: u32 = 0x10;
const IA32_TSC_AUX: u32 = 0xc000_0103;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
const RFLAGS_STATUS: u64 = 0x8d5; // CF, PF, AF, ZF, SF, OF
const RFLAGS_ZF: u64 = 1 << 6;
const RFLAGS_AC: u64 = 1 << 18;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LMA: u64 = 1 << 10;

/// Why an instruction was not completed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum CompleteError {
    #[error("the host cannot execute {mnemonic} ({bytes}) at rip {rip:#x}")]
    Unknown { mnemonic: String, bytes: String, rip: u64 },
    #[error("the instruction at rip {rip:#x} cannot be read: {source}")]
    Fetch { rip: u64, source: WalkError },
    #[error("{mnemonic} at rip {rip:#x} uses memory that cannot be read: {source}")]
    Operand { mnemonic: &'static str, rip: u64, source: WalkError },
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// The registers of a vCPU, as far as completion needs them. Tests have one without KVM.
pub trait Cpu {
    /// General registers.
    fn regs(&self) -> Result<kvm_regs, VcpuError>;
    /// Sets them.
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError>;
    /// Control and segment registers.
    fn sregs(&self) -> Result<kvm_sregs, VcpuError>;
    /// Sets them.
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError>;
    /// A model-specific register.
    fn msr(&self, index: u32) -> Result<u64, VcpuError>;
    /// Sets it.
    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError>;
    /// Extended control register 0.
    fn xcr0(&self) -> Result<u64, VcpuError>;
    /// Delivers an exception before the next instruction.
    fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), VcpuError>;
    /// Delivers a software interrupt before the next instruction.
    fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError>;
}

impl Cpu for Vcpu {
    fn regs(&self) -> Result<kvm_regs, VcpuError> {
        self.regs()
    }
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError> {
        self.set_regs(regs)
    }
    fn sregs(&self) -> Result<kvm_sregs, VcpuError> {
        self.sregs()
    }
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError> {
        self.set_sregs(sregs)
    }
    fn msr(&self, index: u32) -> Result<u64, VcpuError> {
        self.msr(index)
    }
    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError> {
        self.set_msr(index, value)
    }
    fn xcr0(&self) -> Result<u64, VcpuError> {
        self.xcr0()
    }
    fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), VcpuError> {
        self.inject_exception(vector, error_code)
    }
    fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.inject_interrupt(vector)
    }
}

/// Completes instructions, and counts them by mnemonic.
#[derive(Debug, Default)]
pub struct Completer {
    counts: BTreeMap<&'static str, u64>,
}

/// What an instruction comes to.
enum Effect {
    /// Registers as given; go on after the instruction.
    Next(kvm_regs),
    /// An exception at the instruction itself.
    Fault(u8, Option<u32>),
    /// An exception or software interrupt after the instruction.
    Trap(u8),
    SoftInterrupt(u8),
}

impl Completer {
    /// How often each instruction was completed.
    pub fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.counts
    }

    /// Completes the instruction at `rip`, of which KVM gave `bytes` (none: they are read from memory). The next
    /// run goes on after it, or in the handler of the exception that it raised. Returns its mnemonic.
    pub fn complete(
        &mut self,
        cpu: &mut (impl Cpu + ?Sized),
        ram: &Ram,
        bytes: &[u8],
    ) -> Result<&'static str, CompleteError> {
        let mut regs = cpu.regs()?;
        let sregs = cpu.sregs()?;
        let space = AddressSpace::new(&sregs);
        let rip = regs.rip;
        let (instruction, bytes) = decode(ram, &space, &sregs, rip, bytes)?;
        let unknown = || CompleteError::Unknown {
            mnemonic: if instruction.is_invalid() {
                "an invalid instruction".into()
            } else {
                format!("{:?}", instruction.mnemonic()).to_lowercase()
            },
            bytes: bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
            rip,
        };
        let ring0 = sregs.ss.dpl == 0;
        let undefined = Effect::Fault(VECTOR_INVALID_OPCODE, None);
        let (name, effect) = match instruction.mnemonic() {
            Mnemonic::Int3 => ("int3", Effect::Trap(VECTOR_BREAKPOINT)),
            // Ring 3 needs the gate's permission; that case does not come here, as ring 3 is not emulated.
            Mnemonic::Int if ring0 => ("int", Effect::SoftInterrupt(instruction.immediate8())),
            Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => ("ud2", undefined),
            Mnemonic::Stac if !ring0 => ("stac", undefined),
            Mnemonic::Clac if !ring0 => ("clac", undefined),
            Mnemonic::Stac => {
                regs.rflags |= RFLAGS_AC;
                ("stac", Effect::Next(regs))
            }
            Mnemonic::Clac => {
                regs.rflags &= !RFLAGS_AC;
                ("clac", Effect::Next(regs))
            }
            // Flushes buffers of the host's CPU, which is the host's affair.
            Mnemonic::Verw => {
                regs.rflags |= RFLAGS_ZF;
                ("verw", Effect::Next(regs))
            }
            // Waits for x87 exceptions, which kernels keep masked.
            Mnemonic::Wait => ("fwait", Effect::Next(regs)),
            // The emulator and the exit order everything already.
            Mnemonic::Lfence => ("lfence", Effect::Next(regs)),
            Mnemonic::Sfence => ("sfence", Effect::Next(regs)),
            Mnemonic::Mfence => ("mfence", Effect::Next(regs)),
            Mnemonic::Xgetbv if sregs.cr4 & CR4_OSXSAVE == 0 => ("xgetbv", undefined),
            Mnemonic::Xgetbv if regs.rcx as u32 != 0 => {
                ("xgetbv", Effect::Fault(VECTOR_GENERAL_PROTECTION, Some(0)))
            }
            Mnemonic::Xgetbv => {
                let value = cpu.xcr0()?;
                (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
                ("xgetbv", Effect::Next(regs))
            }
            Mnemonic::Rdtscp => {
                let tsc = cpu.msr(IA32_TSC)?;
                (regs.rax, regs.rdx) = (tsc & 0xffff_ffff, tsc >> 32);
                regs.rcx = cpu.msr(IA32_TSC_AUX)? & 0xffff_ffff;
                ("rdtscp", Effect::Next(regs))
            }
            Mnemonic::Swapgs if !ring0 => ("swapgs", Effect::Fault(VECTOR_GENERAL_PROTECTION, Some(0))),
            Mnemonic::Swapgs => {
                let mut swapped = sregs;
                swapped.gs.base = cpu.msr(IA32_KERNEL_GS_BASE)?;
                cpu.set_msr(IA32_KERNEL_GS_BASE, sregs.gs.base)?;
                cpu.set_sregs(&swapped)?;
                ("swapgs", Effect::Next(regs))
            }
            Mnemonic::Popcnt => ("popcnt", popcnt(cpu, ram, &space, &sregs, &instruction, regs)?),
            _ => return Err(unknown()),
        };
        let next = rip.wrapping_add(instruction.len() as u64);
        match effect {
            Effect::Next(regs) => cpu.set_regs(&kvm_regs { rip: next, ..regs })?,
            Effect::Fault(vector, error) => cpu.inject_exception(vector, error)?,
            Effect::Trap(vector) => {
                cpu.set_regs(&kvm_regs { rip: next, ..regs })?;
                cpu.inject_exception(vector, None)?;
            }
            Effect::SoftInterrupt(vector) => {
                cpu.set_regs(&kvm_regs { rip: next, ..regs })?;
                cpu.inject_interrupt(vector)?;
            }
        }
        *self.counts.entry(name).or_default() += 1;
        Ok(name)
    }
}

/// Decodes the instruction at `rip`: from `bytes`, or from memory when they are not all of it.
fn decode(
    ram: &Ram,
    space: &AddressSpace,
    sregs: &kvm_sregs,
    rip: u64,
    bytes: &[u8],
) -> Result<(Instruction, Vec<u8>), CompleteError> {
    let long = sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0;
    let bits = match (long, sregs.cs.db) {
        (true, _) => 64,
        (false, 0) => 16,
        (false, _) => 32,
    };
    let try_bytes = |bytes: &[u8]| {
        let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let cut_off = decoder.last_error() == DecoderError::NoMoreBytes;
        let len = if instruction.is_invalid() { bytes.len() } else { instruction.len() };
        (instruction, bytes[..len.min(bytes.len())].to_vec(), cut_off)
    };
    let (instruction, used, cut_off) = try_bytes(bytes);
    if !cut_off {
        return Ok((instruction, used));
    }
    let mut fetched = [0; MAX_INSTRUCTION];
    let linear = if long { rip } else { sregs.cs.base.wrapping_add(rip) };
    let len = space.read_some(ram, linear, &mut fetched);
    if len == 0 {
        let source = space.translate(ram, linear).err().unwrap_or(WalkError::NotRam { gva: linear, gpa: 0 });
        return Err(CompleteError::Fetch { rip, source });
    }
    let (instruction, used, _) = try_bytes(&fetched[..len]);
    Ok((instruction, used))
}

fn popcnt(
    cpu: &mut (impl Cpu + ?Sized),
    ram: &Ram,
    space: &AddressSpace,
    sregs: &kvm_sregs,
    instruction: &Instruction,
    mut regs: kvm_regs,
) -> Result<Effect, CompleteError> {
    let bytes = match instruction.code() {
        Code::Popcnt_r16_rm16 => 2,
        Code::Popcnt_r32_rm32 => 4,
        _ => 8,
    };
    let source = if instruction.op1_kind() == OpKind::Register {
        register(&regs, instruction.op1_register())
    } else {
        let gva = instruction.virtual_address(1, 0, |r, _, _| {
            Some(segment_base(sregs, r).unwrap_or_else(|| register(&regs, r)))
        });
        let gva = gva.unwrap_or(0);
        let mut value = [0; 8];
        match space.read(ram, gva, &mut value[..bytes]) {
            Ok(()) => u64::from_le_bytes(value),
            // The guest's own fault: it gets the exception that the instruction would have raised.
            Err(WalkError::NotPresent { gva, .. }) => {
                cpu.set_sregs(&kvm_sregs { cr2: gva, ..*sregs })?;
                let user = if sregs.ss.dpl == 3 { 1 << 2 } else { 0 };
                return Ok(Effect::Fault(VECTOR_PAGE_FAULT, Some(user)));
            }
            Err(WalkError::NotCanonical { .. }) => {
                return Ok(Effect::Fault(VECTOR_GENERAL_PROTECTION, Some(0)));
            }
            Err(source) => {
                return Err(CompleteError::Operand { mnemonic: "popcnt", rip: regs.rip, source });
            }
        }
    };
    let source = if bytes == 8 { source } else { source & ((1 << (8 * bytes)) - 1) };
    set_register(&mut regs, instruction.op0_register(), u64::from(source.count_ones()));
    regs.rflags &= !RFLAGS_STATUS;
    if source == 0 {
        regs.rflags |= RFLAGS_ZF;
    }
    Ok(Effect::Next(regs))
}

/// The base that a segment register adds to an address in 64-bit mode; `None`: not a segment register.
fn segment_base(sregs: &kvm_sregs, register: Register) -> Option<u64> {
    let long = sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0;
    match register {
        Register::FS => Some(sregs.fs.base),
        Register::GS => Some(sregs.gs.base),
        Register::CS | Register::DS | Register::ES | Register::SS if long => Some(0),
        Register::CS => Some(sregs.cs.base),
        Register::DS => Some(sregs.ds.base),
        Register::ES => Some(sregs.es.base),
        Register::SS => Some(sregs.ss.base),
        _ => None,
    }
}

fn slot(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

/// A general register of 2, 4 or 8 bytes, the rest zero.
fn register(regs: &kvm_regs, register: Register) -> u64 {
    let mut regs = *regs;
    let value = slot(&mut regs, register).map_or(0, |r| *r);
    match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Writes a general register as an instruction does: 4 bytes clear the upper half, 2 bytes leave the rest.
fn set_register(regs: &mut kvm_regs, register: Register, value: u64) {
    if let Some(slot) = slot(regs, register) {
        *slot = match register.size() {
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout;
    use std::cell::RefCell;
    use vm_memory::GuestAddress;

    #[derive(Default)]
    struct FakeCpu {
        regs: kvm_regs,
        sregs: kvm_sregs,
        msrs: RefCell<BTreeMap<u32, u64>>,
        injected: Option<(u8, Option<u32>)>,
        interrupt: Option<u8>,
    }

    impl Cpu for FakeCpu {
        fn regs(&self) -> Result<kvm_regs, VcpuError> {
            Ok(self.regs)
        }
        fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError> {
            self.regs = *regs;
            Ok(())
        }
        fn sregs(&self) -> Result<kvm_sregs, VcpuError> {
            Ok(self.sregs)
        }
        fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError> {
            self.sregs = *sregs;
            Ok(())
        }
        fn msr(&self, index: u32) -> Result<u64, VcpuError> {
            Ok(self.msrs.borrow().get(&index).copied().unwrap_or(0))
        }
        fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError> {
            self.msrs.borrow_mut().insert(index, value);
            Ok(())
        }
        fn xcr0(&self) -> Result<u64, VcpuError> {
            Ok(0x2_0000_0007)
        }
        fn inject_exception(&mut self, vector: u8, error: Option<u32>) -> Result<(), VcpuError> {
            self.injected = Some((vector, error));
            Ok(())
        }
        fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError> {
            self.interrupt = Some(vector);
            Ok(())
        }
    }

    /// A CPU in 64-bit mode without paging (which does not exist, but keeps the tests short).
    fn cpu() -> FakeCpu {
        let mut cpu = FakeCpu::default();
        cpu.sregs.efer = EFER_LMA;
        cpu.sregs.cs.l = 1;
        cpu.regs.rip = 0x10_0000;
        cpu
    }

    fn ram() -> Ram {
        Ram::new(layout::MIN_MEMORY).unwrap()
    }

    fn run(cpu: &mut FakeCpu, bytes: &[u8]) -> Result<&'static str, CompleteError> {
        Completer::default().complete(cpu, &ram(), bytes)
    }

    #[test]
    fn popcnt_of_registers() {
        let mut c = cpu();
        (c.regs.rcx, c.regs.rax, c.regs.rflags) = (0xff_ffff_0003, u64::MAX, 0xfff);
        run(&mut c, &[0xf3, 0x48, 0x0f, 0xb8, 0xc1]).unwrap(); // popcnt rax, rcx
        assert_eq!((c.regs.rax, c.regs.rip, c.regs.rflags), (26, 0x10_0005, 0xfff & !RFLAGS_STATUS));
        let mut c = cpu();
        (c.regs.rcx, c.regs.rax) = (0xff_0000_0003, u64::MAX);
        run(&mut c, &[0xf3, 0x0f, 0xb8, 0xc1, 0x90]).unwrap(); // popcnt eax, ecx
        assert_eq!((c.regs.rax, c.regs.rip), (2, 0x10_0004));
        let mut c = cpu();
        (c.regs.rcx, c.regs.rax) = (0xff_0000, u64::MAX);
        run(&mut c, &[0x66, 0xf3, 0x0f, 0xb8, 0xc1]).unwrap(); // popcnt ax, cx
        assert_eq!((c.regs.rax, c.regs.rflags & RFLAGS_ZF), (!0xffff, RFLAGS_ZF));
    }

    #[test]
    fn popcnt_of_memory() {
        let (mut c, ram) = (cpu(), ram());
        ram.write(GuestAddress(0x10_1010), &[0xff, 1, 0xff, 0xff]).unwrap();
        (c.regs.rbx, c.regs.rsi) = (0x10_0000, 0x400);
        c.sregs.gs.base = 0x10;
        let mut completer = Completer::default();
        // popcnt eax, gs:[rbx + 4 * rsi], of which KVM gave the first byte only
        let bytes = [0x65, 0xf3, 0x0f, 0xb8, 0x04, 0xb3];
        ram.write(GuestAddress(0x10_0000), &bytes).unwrap();
        completer.complete(&mut c, &ram, &bytes[..1]).unwrap();
        assert_eq!((c.regs.rax, c.regs.rip), (25, 0x10_0006));
        assert_eq!(completer.counts().get("popcnt"), Some(&1));
        // Relative to rip; beyond RAM.
        c.regs.rip = 0x10_0000;
        let far = [0xf3, 0x0f, 0xb8, 0x05, 0, 0, 0, 0x70];
        let error = completer.complete(&mut c, &ram, &far).unwrap_err();
        assert!(matches!(error, CompleteError::Operand { source: WalkError::NotRam { .. }, .. }));
        assert_eq!(c.regs.rip, 0x10_0000);
        // With empty page tables it is the guest's page fault.
        (c.sregs.cr0, c.sregs.cr3, c.regs.rbx) = (1 << 31, 0x18_0000, 0x1234);
        completer.complete(&mut c, &ram, &[0xf3, 0x0f, 0xb8, 0x03]).unwrap();
        assert_eq!((c.injected, c.sregs.cr2), (Some((14, Some(0))), 0x1234));
    }

    #[test]
    fn exceptions() {
        let mut c = cpu();
        run(&mut c, &[0xcc]).unwrap();
        assert_eq!((c.injected, c.regs.rip), (Some((3, None)), 0x10_0001));
        let mut c = cpu();
        run(&mut c, &[0xcd, 0x80]).unwrap();
        assert_eq!((c.interrupt, c.injected, c.regs.rip), (Some(0x80), None, 0x10_0002));
        let mut c = cpu();
        run(&mut c, &[0x0f, 0x0b]).unwrap();
        assert_eq!((c.injected, c.regs.rip), (Some((6, None)), 0x10_0000));
        let mut c = cpu();
        c.sregs.ss.dpl = 3;
        run(&mut c, &[0x0f, 0x01, 0xcb]).unwrap();
        assert_eq!((c.injected, c.regs.rip), (Some((6, None)), 0x10_0000));
    }

    #[test]
    fn flags_and_system_registers() {
        let mut c = cpu();
        run(&mut c, &[0x0f, 0x01, 0xcb]).unwrap(); // stac
        assert_eq!((c.regs.rflags, c.regs.rip), (RFLAGS_AC, 0x10_0003));
        c.regs.rip = 0x10_0000;
        run(&mut c, &[0x0f, 0x01, 0xca]).unwrap(); // clac
        assert_eq!(c.regs.rflags, 0);
        run(&mut c, &[0x0f, 0x01, 0xd0]).unwrap(); // xgetbv without OSXSAVE
        assert_eq!(c.injected, Some((6, None)));
        c.sregs.cr4 = CR4_OSXSAVE;
        run(&mut c, &[0x0f, 0x01, 0xd0]).unwrap();
        assert_eq!((c.regs.rax, c.regs.rdx), (7, 2));
        c.sregs.gs.base = 1;
        c.msrs.borrow_mut().insert(IA32_KERNEL_GS_BASE, 2);
        run(&mut c, &[0x0f, 0x01, 0xf8]).unwrap(); // swapgs
        assert_eq!((c.sregs.gs.base, c.msrs.borrow()[&IA32_KERNEL_GS_BASE]), (2, 1));
        for skipped in [&[0x9b][..], &[0x0f, 0xae, 0xe8], &[0x0f, 0x00, 0xe8]] {
            c.regs.rip = 0x10_0000;
            run(&mut c, skipped).unwrap(); // fwait, lfence, verw ax
            assert_eq!(c.regs.rip, 0x10_0000 + skipped.len() as u64);
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        let mut c = cpu();
        let error = run(&mut c, &[0x0f, 0x58, 0xc1, 0x90]).unwrap_err();
        assert_eq!(error.to_string(), "the host cannot execute addps (0f 58 c1) at rip 0x100000");
        let error = run(&mut c, &[0x06, 0x06]).unwrap_err();
        assert!(error.to_string().contains("an invalid instruction (06 06)"), "{error}");
        c.regs.rip = 0x1234_5678_9abc;
        assert!(matches!(run(&mut c, &[]), Err(CompleteError::Fetch { .. })));
        assert_eq!(c.regs.rip, 0x1234_5678_9abc);
    }
}
