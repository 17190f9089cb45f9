//! Completes instructions that KVM's emulator gives up on.
//!
//! A host without hardware virtualisation for the guest's ring 0 emulates every kernel instruction,
//! and its emulator lacks some that kernels use. Those are completed here, on the vCPU's registers
//! and the guest's memory. `table.rs` lists them; the host's CPU executes SSE and AVX instructions
//! (`native/`). An instruction takes its whole effect, or raises the exception that the hardware
//! would raise, or ends the run with an error; then nothing has changed.
//!
//! Semantics are those of Intel's and AMD's manuals (Intel SDM volumes 1 and 2).

mod enabled;
mod integer;
mod native;
mod operand;
mod state;
mod system;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::sync::LazyLock;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic};
use kvm_bindings::{kvm_regs, kvm_sregs};
use thiserror::Error;

use native::Native;

use super::memory::Ram;
use super::vcpu::{MAX_INSTRUCTION, Vcpu, VcpuError, XsaveArea};
use super::walk::{AddressSpace, WalkError};

/// #DB, a debug exception.
const DEBUG: u8 = 1;
/// #BP, a breakpoint.
const BREAKPOINT: u8 = 3;
/// #UD, an invalid opcode.
const INVALID_OPCODE: u8 = 6;
/// #NM, the extended state is not available.
const DEVICE_NOT_AVAILABLE: u8 = 7;
/// #SS, a stack fault.
const STACK_FAULT: u8 = 12;
/// #GP, a general protection fault.
const GENERAL_PROTECTION: u8 = 13;
/// #PF, a page fault.
const PAGE_FAULT: u8 = 14;
/// #XM, a floating-point exception of SSE or AVX.
const SIMD_EXCEPTION: u8 = 19;

const RFLAGS_CF: u64 = 1 << 0;
const RFLAGS_ZF: u64 = 1 << 6;
const RFLAGS_SF: u64 = 1 << 7;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_OF: u64 = 1 << 11;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_AC: u64 = 1 << 18;
/// CF, PF, AF, ZF, SF and OF.
const RFLAGS_STATUS: u64 = 0x8d5;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR0_WP: u64 = 1 << 16;
const CR4_TSD: u64 = 1 << 2;
const CR4_PGE: u64 = 1 << 7;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_LMA: u64 = 1 << 10;

/// Why an instruction was not completed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum CompleteError {
    #[error("the host cannot execute {mnemonic} ({bytes}) at rip {rip:#x}")]
    Unknown { mnemonic: String, bytes: String, rip: u64 },
    #[error("the instruction at rip {rip:#x} cannot be read: {source}")]
    Fetch { rip: u64, source: WalkError },
    #[error("{mnemonic} ({bytes}) at rip {rip:#x} uses memory that cannot be used: {source}")]
    Operand { mnemonic: &'static str, bytes: String, rip: u64, source: WalkError },
    #[error("the host has no memory to execute {mnemonic} in: {source}")]
    Host { mnemonic: &'static str, source: io::Error },
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// The registers of a vCPU, as far as completion needs them. Tests have one without KVM. Each
/// method fails if KVM refuses.
#[allow(clippy::missing_errors_doc)]
pub trait Cpu {
    /// General registers.
    fn regs(&self) -> Result<kvm_regs, VcpuError>;
    /// Sets the general registers.
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError>;
    /// Control and segment registers.
    fn sregs(&self) -> Result<kvm_sregs, VcpuError>;
    /// Sets control and segment registers.
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError>;
    /// A model-specific register.
    fn msr(&self, index: u32) -> Result<u64, VcpuError>;
    /// Sets a model-specific register.
    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError>;
    /// Extended control register 0.
    fn xcr0(&self) -> Result<u64, VcpuError>;
    /// Sets extended control register 0.
    fn set_xcr0(&mut self, value: u64) -> Result<(), VcpuError>;
    /// The extended state (x87, SSE, AVX and all other components), in the standard format of
    /// `xsave64`.
    fn xsave(&self) -> Result<Box<XsaveArea>, VcpuError>;
    /// Sets the extended state.
    fn set_xsave(&mut self, area: &XsaveArea) -> Result<(), VcpuError>;
    /// Delivers an exception before the next instruction.
    fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), VcpuError>;
    /// Delivers a software interrupt before the next instruction.
    fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError>;
    /// Delivers the debug exception of a single step before the next instruction.
    fn inject_single_step(&mut self) -> Result<(), VcpuError>;
    /// Ends the interrupt shadow of an `sti` or `mov ss` just before, if there is one.
    fn end_interrupt_shadow(&mut self) -> Result<(), VcpuError>;
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
    fn set_xcr0(&mut self, value: u64) -> Result<(), VcpuError> {
        self.set_xcr0(value)
    }
    fn xsave(&self) -> Result<Box<XsaveArea>, VcpuError> {
        self.xsave()
    }
    fn set_xsave(&mut self, area: &XsaveArea) -> Result<(), VcpuError> {
        self.set_xsave(area)
    }
    fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), VcpuError> {
        self.inject_exception(vector, error_code)
    }
    fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.inject_interrupt(vector)
    }
    fn inject_single_step(&mut self) -> Result<(), VcpuError> {
        self.inject_single_step()
    }
    fn end_interrupt_shadow(&mut self) -> Result<(), VcpuError> {
        self.end_interrupt_shadow()
    }
}

/// The event after an instruction that takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Go on after it.
    Next,
    /// An exception after it.
    Trap(u8),
    /// A software interrupt after it.
    Interrupt(u8),
}

/// The reason why an instruction takes no effect.
#[derive(Debug)]
enum Stop {
    /// An exception at the instruction.
    Fault { vector: u8, error: Option<u32> },
    /// A page fault at the instruction.
    PageFault { address: u64, error: u32 },
    /// This form of the instruction is not known.
    Unknown,
    /// A memory operand is not in memory that completion can access.
    Memory(WalkError),
    /// The host cannot make code for it.
    Host(io::Error),
    /// The vCPU's registers cannot be read.
    Vcpu(VcpuError),
}

impl From<VcpuError> for Stop {
    fn from(error: VcpuError) -> Self {
        Self::Vcpu(error)
    }
}

impl Stop {
    /// #UD.
    const UNDEFINED: Self = Self::Fault { vector: INVALID_OPCODE, error: None };
    /// #GP(0).
    const PROTECTION: Self = Self::Fault { vector: GENERAL_PROTECTION, error: Some(0) };
}

/// An instruction, and all state that it may read and change. Its changes of `regs` count only if
/// it takes effect.
struct Context<'a> {
    cpu: &'a mut dyn Cpu,
    ram: &'a Ram,
    native: &'a mut Native,
    space: AddressSpace,
    regs: kvm_regs,
    sregs: kvm_sregs,
    instruction: Instruction,
    /// The extended state, after the first use.
    extended: Option<Box<XsaveArea>>,
    /// It differs from the vCPU's.
    extended_changed: bool,
    /// XCR0, after the first use.
    xcr0: Option<u64>,
}

impl Context<'_> {
    fn xcr0(&mut self) -> Result<u64, Stop> {
        Ok(match self.xcr0 {
            Some(value) => value,
            None => *self.xcr0.insert(self.cpu.xcr0()?),
        })
    }

    /// The extended state.
    fn extended(&mut self) -> Result<&XsaveArea, Stop> {
        Ok(match &mut self.extended {
            Some(area) => area,
            none => none.insert(self.cpu.xsave()?),
        })
    }

    /// The extended state, to be changed. The change counts at once, so all that can fail comes
    /// before.
    fn extended_mut(&mut self) -> Result<&mut XsaveArea, Stop> {
        self.extended_changed = true;
        Ok(match &mut self.extended {
            Some(area) => area,
            none => none.insert(self.cpu.xsave()?),
        })
    }

    /// Executes the instruction at `rip`. If it takes no effect, the registers do not change.
    fn step(&mut self, fetched: &Fetched) -> Result<Effect, Stop> {
        self.instruction = fetched.instruction;
        let before = self.regs;
        let result = match table::handler(self.instruction.mnemonic()) {
            Some(handler) => handler(self),
            None => native::execute(self),
        };
        if result.is_ok() {
            self.regs.rip = before.rip.wrapping_add(self.instruction.len() as u64);
            self.regs.rflags &= !RFLAGS_RF;
        } else {
            self.regs = before;
        }
        result
    }

    /// Writes a changed extended state to the vCPU.
    fn commit(&mut self) -> Result<(), VcpuError> {
        if let (Some(area), true) = (&self.extended, self.extended_changed) {
            self.cpu.set_xsave(area)?;
        }
        Ok(())
    }

    /// Writes the registers after the instructions to the vCPU; the last one has `effect`.
    fn retire(&mut self, effect: Effect) -> Result<(), VcpuError> {
        self.commit()?;
        self.cpu.set_regs(&self.regs)?;
        self.cpu.end_interrupt_shadow()?;
        match effect {
            Effect::Next if self.regs.rflags & RFLAGS_TF != 0 => self.cpu.inject_single_step(),
            Effect::Next => Ok(()),
            Effect::Trap(vector) => self.cpu.inject_exception(vector, None),
            Effect::Interrupt(vector) => self.cpu.inject_interrupt(vector),
        }
    }

    /// The next instruction, if the host's CPU can execute it, too.
    fn next_native(&self) -> Option<Fetched> {
        let next = fetch(self.ram, &self.space, &self.sregs, self.regs.rip, &[]).ok()?;
        let instruction = &next.instruction;
        (table::handler(instruction.mnemonic()).is_none() && native::knows(instruction))
            .then_some(next)
    }
}

/// Executes an instruction.
type Handler = fn(&mut Context) -> Result<Effect, Stop>;

/// Most instructions that are completed at once.
const MAX_AT_ONCE: u32 = 256;

/// Completes instructions, and counts them by mnemonic.
#[derive(Debug, Default)]
pub struct Completer {
    counts: BTreeMap<&'static str, u64>,
    native: Native,
}

impl Completer {
    /// A completer that makes no executable memory later: with `native` it is made now, and without
    /// it there is none, and SSE and AVX instructions end the run.
    ///
    /// # Errors
    /// The host has no such memory.
    pub fn fixed(native: bool) -> io::Result<Self> {
        let native = if native { Native::prepared()? } else { Native::never() };
        Ok(Self { native, ..Self::default() })
    }

    /// How often each instruction was completed.
    pub fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.counts
    }

    /// Completes the instruction at `rip`, of which KVM gave `bytes` (none: they are read from
    /// memory). The next run goes on after it, or in the handler of the exception that it raised.
    /// Returns its mnemonic.
    ///
    /// After an SSE or AVX instruction this completes those that follow directly, too: they seldom
    /// come alone, and the exit and the exchange of the extended state cost many times the
    /// instruction.
    ///
    /// # Errors
    /// The instruction is not known, it or its operand cannot be read, or KVM refuses the
    /// registers.
    pub fn complete(
        &mut self,
        cpu: &mut dyn Cpu,
        ram: &Ram,
        bytes: &[u8],
    ) -> Result<&'static str, CompleteError> {
        let regs = cpu.regs()?;
        let sregs = cpu.sregs()?;
        let space = AddressSpace::new(&sregs);
        let fetched = fetch(ram, &space, &sregs, regs.rip, bytes)?;
        let mnemonic = name(fetched.instruction.mnemonic());
        let mut context = Context {
            cpu,
            ram,
            native: &mut self.native,
            space,
            regs,
            sregs,
            instruction: fetched.instruction,
            extended: None,
            extended_changed: false,
            xcr0: None,
        };
        match context.step(&fetched) {
            Ok(effect) => {
                *self.counts.entry(mnemonic).or_default() += 1;
                if effect == Effect::Next
                    && context.extended.is_some()
                    && regs.rflags & RFLAGS_TF == 0
                {
                    for _ in 1..MAX_AT_ONCE {
                        let Some(next) = context.next_native() else { break };
                        // It stops again when it is the first one.
                        if !matches!(context.step(&next), Ok(Effect::Next)) {
                            break;
                        }
                        *self.counts.entry(name(next.instruction.mnemonic())).or_default() += 1;
                    }
                }
                context.retire(effect)?;
                return Ok(mnemonic);
            }
            Err(Stop::Fault { vector, error }) => {
                // Flags of MXCSR, which a floating-point exception leaves behind.
                context.commit()?;
                context.cpu.inject_exception(vector, error)?;
            }
            Err(Stop::PageFault { address, error }) => {
                cpu.set_sregs(&kvm_sregs { cr2: address, ..sregs })?;
                cpu.inject_exception(PAGE_FAULT, Some(error))?;
            }
            Err(Stop::Unknown) => {
                let invalid = fetched.instruction.is_invalid();
                return Err(CompleteError::Unknown {
                    mnemonic: if invalid { "an invalid instruction" } else { mnemonic }.into(),
                    bytes: fetched.hex(),
                    rip: regs.rip,
                });
            }
            Err(Stop::Memory(source)) => {
                let bytes = fetched.hex();
                return Err(CompleteError::Operand { mnemonic, bytes, rip: regs.rip, source });
            }
            Err(Stop::Host(source)) => return Err(CompleteError::Host { mnemonic, source }),
            Err(Stop::Vcpu(error)) => return Err(error.into()),
        }
        *self.counts.entry(mnemonic).or_default() += 1;
        Ok(mnemonic)
    }
}

/// The lower-case name of a mnemonic.
fn name(mnemonic: Mnemonic) -> &'static str {
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
        let name = |m| match m {
            // iced-x86 has the name of the opcode.
            Mnemonic::Wait => "fwait".into(),
            m => format!("{m:?}").to_lowercase(),
        };
        Mnemonic::values().map(name).collect()
    });
    NAMES.get(mnemonic as usize).map_or("?", String::as_str)
}

/// An instruction and its bytes.
struct Fetched {
    instruction: Instruction,
    bytes: [u8; MAX_INSTRUCTION],
    len: usize,
}

impl Fetched {
    fn hex(&self) -> String {
        self.bytes[..self.len].iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
    }
}

/// Decodes the instruction at `rip`: from `bytes`, or from memory when they are not all of it.
fn fetch(
    ram: &Ram,
    space: &AddressSpace,
    sregs: &kvm_sregs,
    rip: u64,
    bytes: &[u8],
) -> Result<Fetched, CompleteError> {
    let long = is_long(sregs);
    let bits = match (long, sregs.cs.db) {
        (true, _) => 64,
        (false, 0) => 16,
        (false, _) => 32,
    };
    let decode = |from: &[u8]| {
        let from = &from[..from.len().min(MAX_INSTRUCTION)];
        let mut decoder = Decoder::with_ip(bits, from, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let cut_off = decoder.last_error() == DecoderError::NoMoreBytes;
        let len =
            if instruction.is_invalid() { from.len() } else { instruction.len().min(from.len()) };
        let mut bytes = [0; MAX_INSTRUCTION];
        bytes[..len].copy_from_slice(&from[..len]);
        (Fetched { instruction, bytes, len }, cut_off)
    };
    let (fetched, cut_off) = decode(bytes);
    if !cut_off {
        return Ok(fetched);
    }
    let mut read = [0; MAX_INSTRUCTION];
    let linear = if long { rip } else { sregs.cs.base.wrapping_add(rip) };
    let len = space.read_some(ram, linear, &mut read);
    if len == 0 {
        let source =
            space.translate(ram, linear).err().unwrap_or(WalkError::NotRam { gva: linear, gpa: 0 });
        return Err(CompleteError::Fetch { rip, source });
    }
    Ok(decode(&read[..len]).0)
}

/// Whether the CPU executes 64-bit code.
fn is_long(sregs: &kvm_sregs) -> bool {
    sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0
}
