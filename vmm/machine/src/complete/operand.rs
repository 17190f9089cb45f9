//! The operands of an instruction: general registers, and memory through the guest's page tables
//! with the faults that the hardware would raise.

use std::arch::asm;

use iced_x86::{OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{CR0_WP, CR4_SMAP, Context, RFLAGS_AC, STACK_FAULT, Stop, is_long};
use crate::layout::PAGE;
use crate::memory::{NotRam, Ram};
use crate::walk::WalkError;

/// Bits of a page fault's error code.
mod fault {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
}

/// An instruction's use of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OperandUse {
    Read,
    Write,
}

/// A memory operand that the guest may access as a whole.
#[derive(Debug)]
pub(super) struct OperandLocation {
    /// Its linear address.
    pub gva: u64,
    /// Its parts, page by page: guest-physical address and bytes.
    parts: Vec<(GuestAddress, usize)>,
}

impl OperandLocation {
    /// Copies the first bytes out, as many as `to` has.
    pub fn read(&self, ram: &Ram, to: &mut [u8]) -> Result<(), Stop> {
        self.read_at(ram, 0, to)
    }

    /// Copies it out from `offset` on.
    pub fn read_at(&self, ram: &Ram, offset: usize, to: &mut [u8]) -> Result<(), Stop> {
        let mut rest = to;
        for (gpa, len) in self.from(offset) {
            let (now, later) = rest.split_at_mut(len.min(rest.len()));
            ram.read(gpa, now).map_err(|e| self.outside(e))?;
            rest = later;
        }
        Ok(())
    }

    /// Copies `from` to its beginning.
    pub fn write(&self, ram: &Ram, from: &[u8]) -> Result<(), Stop> {
        self.write_at(ram, 0, from)
    }

    /// Copies `from` to `offset`.
    pub fn write_at(&self, ram: &Ram, offset: usize, from: &[u8]) -> Result<(), Stop> {
        let mut rest = from;
        for (gpa, len) in self.from(offset) {
            let (now, later) = rest.split_at(len.min(rest.len()));
            ram.write(gpa, now).map_err(|e| self.outside(e))?;
            rest = later;
        }
        Ok(())
    }

    /// The parts without the first `skip` bytes.
    fn from(&self, mut skip: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        self.parts.iter().filter_map(move |(gpa, len)| {
            let skipped = skip.min(*len);
            skip -= skipped;
            (skipped < *len).then(|| (GuestAddress(gpa.0 + skipped as u64), len - skipped))
        })
    }

    /// Replaces its 16 bytes, which are aligned, with `new` if they are `expected`, atomically for
    /// other vCPUs. Returns the old bytes.
    pub fn compare_exchange(&self, ram: &Ram, expected: u128, new: u128) -> Result<u128, Stop> {
        let [(gpa, 16)] = self.parts[..] else { return Err(Stop::Unknown) };
        let slice =
            ram.inner().get_slice(gpa, 16).map_err(|_| self.outside(NotRam { gpa, len: 16 }))?;
        let guard = slice.ptr_guard_mut();
        let to = guard.as_ptr().cast::<u128>();
        if !to.is_aligned() || !std::is_x86_feature_detected!("cmpxchg16b") {
            return Err(Stop::Unknown);
        }
        let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
        // SAFETY: the CPU has the instruction; `to` is aligned and points to 16 bytes of guest
        // memory, to which there is no reference. rbx, which cannot be an operand, is restored.
        unsafe {
            asm!(
                "xchg rbx, {new}", "lock cmpxchg16b [rdi]", "mov rbx, {new}",
                new = inout(reg) new as u64 => _, in("rdi") to, in("rcx") (new >> 64) as u64,
                inout("rax") low, inout("rdx") high, options(nostack),
            );
        }
        Ok(u128::from(low) | u128::from(high) << 64)
    }

    fn outside(&self, e: NotRam) -> Stop {
        Stop::Memory(WalkError::NotRam { gva: self.gva, gpa: e.gpa.0 })
    }
}

impl Context<'_> {
    /// Whether the guest is in its ring 0.
    pub fn ring0(&self) -> bool {
        self.sregs.ss.dpl == 0
    }

    /// The linear address of the memory operand.
    pub fn address(&self) -> Result<u64, Stop> {
        let operand = self.memory_index().ok_or(Stop::Unknown)?;
        let linear = self.instruction.virtual_address(operand, 0, |register, _, _| {
            Some(
                segment_base(&self.sregs, register)
                    .unwrap_or_else(|| register_value(&self.regs, register)),
            )
        });
        linear.ok_or(Stop::Unknown)
    }

    fn memory_index(&self) -> Option<u32> {
        (0..self.instruction.op_count()).find(|i| self.instruction.op_kind(*i) == OpKind::Memory)
    }

    /// Whether operand `index` is in memory.
    pub fn is_memory(&self, index: u32) -> bool {
        self.instruction.op_kind(index) == OpKind::Memory
    }

    /// The first `len` bytes of the memory operand.
    pub fn place(&self, len: usize, access: OperandUse) -> Result<OperandLocation, Stop> {
        self.place_at(self.address()?, len, access)
    }

    /// `len` bytes at the linear address `gva`, which contain the memory operand or are behind it.
    pub fn place_at(
        &self,
        gva: u64,
        len: usize,
        access: OperandUse,
    ) -> Result<OperandLocation, Stop> {
        let mut parts = Vec::with_capacity(2);
        let mut done = 0;
        while done < len {
            let at = gva.wrapping_add(done as u64);
            let now = (len - done).min((PAGE - at % PAGE) as usize);
            let gpa = self.translate(at, access)?;
            if !self.ram.contains(gpa, now as u64) {
                return Err(Stop::Memory(WalkError::NotRam { gva: at, gpa: gpa.0 }));
            }
            parts.push((gpa, now));
            done += now;
        }
        // Only now: a fault at a later page leaves the earlier ones untouched.
        let mut done = 0;
        for (_, len) in &parts {
            let at = gva.wrapping_add(done);
            self.space.mark(self.ram, at, access == OperandUse::Write).map_err(Stop::Memory)?;
            done += *len as u64;
        }
        Ok(OperandLocation { gva, parts })
    }

    /// Translates an address for an access of the guest's current privilege (Intel SDM volume 3,
    /// 4.6 and 4.7). It ignores protection keys, which matter for user pages only.
    fn translate(&self, gva: u64, access: OperandUse) -> Result<GuestAddress, Stop> {
        let user = self.sregs.ss.dpl == 3;
        let write = access == OperandUse::Write;
        let mut error = if write { fault::WRITE } else { 0 } | if user { fault::USER } else { 0 };
        match self.space.translate(self.ram, gva) {
            Ok(to) => {
                let smap = self.sregs.cr4 & CR4_SMAP != 0 && self.regs.rflags & RFLAGS_AC == 0;
                let refused =
                    if user { !to.user } else { to.user && smap && self.space.is_paged() }
                        || write && !to.writable && (user || self.sregs.cr0 & CR0_WP != 0);
                if refused {
                    error |= fault::PRESENT;
                    return Err(Stop::PageFault { address: gva, error });
                }
                Ok(to.gpa)
            }
            Err(WalkError::NotPresent { .. }) => Err(Stop::PageFault { address: gva, error }),
            Err(WalkError::Reserved { .. }) => {
                error |= fault::PRESENT | fault::RESERVED;
                Err(Stop::PageFault { address: gva, error })
            }
            Err(WalkError::NotCanonical { .. }) => Err(self.not_canonical()),
            Err(error) => Err(Stop::Memory(error)),
        }
    }

    /// #SS where the operand is relative to the stack segment, else #GP.
    fn not_canonical(&self) -> Stop {
        match self.instruction.memory_segment() {
            Register::SS => Stop::Fault { vector: STACK_FAULT, error: Some(0) },
            _ => Stop::PROTECTION,
        }
    }

    /// The value of operand `index`: a general register, an immediate, or memory of up to 8 bytes.
    pub fn value(&self, index: u32) -> Result<u64, Stop> {
        match self.instruction.op_kind(index) {
            OpKind::Register => Ok(register_value(&self.regs, self.instruction.op_register(index))),
            OpKind::Memory => {
                let len = self.instruction.memory_size().size();
                let mut bytes = [0; 8];
                let to = bytes.get_mut(..len).ok_or(Stop::Unknown)?;
                self.place(len, OperandUse::Read)?.read(self.ram, to)?;
                Ok(u64::from_le_bytes(bytes))
            }
            _ => self.instruction.try_immediate(index).map_err(|_| Stop::Unknown),
        }
    }

    /// Writes operand `index`: a general register, or memory of up to 8 bytes.
    pub fn set_value(&mut self, index: u32, value: u64) -> Result<(), Stop> {
        if self.is_memory(index) {
            let len = self.instruction.memory_size().size();
            let bytes = value.to_le_bytes();
            let from = bytes.get(..len).ok_or(Stop::Unknown)?;
            return self.place(len, OperandUse::Write)?.write(self.ram, from);
        }
        set_register(&mut self.regs, self.instruction.op_register(index), value);
        Ok(())
    }

    /// Bits of the general register that is operand `index`.
    pub fn register_bits(&self, index: u32) -> u32 {
        8 * self.instruction.op_register(index).size() as u32
    }
}

/// The base that a segment register adds to an address; `None`: not a segment register.
fn segment_base(sregs: &kvm_sregs, register: Register) -> Option<u64> {
    match register {
        Register::FS => Some(sregs.fs.base),
        Register::GS => Some(sregs.gs.base),
        Register::CS | Register::DS | Register::ES | Register::SS if is_long(sregs) => Some(0),
        Register::CS => Some(sregs.cs.base),
        Register::DS => Some(sregs.ds.base),
        Register::ES => Some(sregs.es.base),
        Register::SS => Some(sregs.ss.base),
        _ => None,
    }
}

/// The field of a general register; `None`: it is no general register.
pub(super) fn slot(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
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

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

/// A general register of 1, 2, 4 or 8 bytes, the rest zero.
pub(super) fn register_value(regs: &kvm_regs, register: Register) -> u64 {
    let mut regs = *regs;
    let value = slot(&mut regs, register).map_or(0, |r| *r);
    match register.size() {
        1 if is_high_byte(register) => value >> 8 & 0xff,
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Writes a general register as an instruction does: 4 bytes clear the upper half, 2 bytes leave
/// the rest.
pub(super) fn set_register(regs: &mut kvm_regs, register: Register, value: u64) {
    if let Some(slot) = slot(regs, register) {
        *slot = match register.size() {
            1 if is_high_byte(register) => *slot & !0xff00 | (value & 0xff) << 8,
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }
}
