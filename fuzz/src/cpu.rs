//! Registers of a vCPU that does not exist.

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use kvm_bindings::{kvm_regs, kvm_sregs};
use umbra::machine::complete;
use umbra::machine::vcpu::{VcpuError, XsaveArea};
use umbra::sandbox::GuestCpu;

/// EFER.LMA: long mode.
const LONG_MODE: u64 = 1 << 10;
/// CR0.PG: paging.
const PAGING: u64 = 1 << 31;

/// The registers, and what was done to the CPU.
pub struct Cpu {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xcr0: u64,
    pub area: Box<XsaveArea>,
    msrs: BTreeMap<u32, u64>,
    /// An exception, an interrupt or a single step was delivered.
    pub interrupted: bool,
}

/// The state of the CPU that decides how instructions are executed.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct State {
    cr0: u8,
    cr4: u32,
    cr3: u8,
    xcr0: u8,
    paging: bool,
    /// 64-bit, 32-bit or 16-bit code.
    width: u8,
    ring3: bool,
    flags: u32,
    base: u32,
}

impl Default for Cpu {
    /// 64-bit code in ring 0, without paging (which does not exist), SSE and AVX enabled.
    fn default() -> Self {
        let mut cpu = Self {
            regs: kvm_regs { rip: 0x10_0000, rsp: 0x20_0000, ..kvm_regs::default() },
            sregs: kvm_sregs::default(),
            xcr0: 7,
            area: Box::default(),
            msrs: BTreeMap::new(),
            interrupted: false,
        };
        (cpu.sregs.efer, cpu.sregs.cs.l) = (LONG_MODE, 1);
        // OSFXSR, OSXMMEXCPT, OSXSAVE.
        cpu.sregs.cr4 = 0x40600;
        // As at reset.
        cpu.area.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        cpu.area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        cpu
    }
}

impl Cpu {
    /// Changes the state. Page tables are where the guest has them, in the first 1 MiB.
    pub fn set(&mut self, state: &State) {
        self.sregs.cr0 = u64::from(state.cr0) | u64::from(state.cr0 >> 4) << 16;
        self.sregs.cr0 |= if state.paging { PAGING } else { 0 };
        self.sregs.cr3 = u64::from(state.cr3) << 12;
        self.sregs.cr4 = state.cr4.into();
        self.xcr0 = u64::from(state.xcr0) | 1;
        self.sregs.cs.l = u8::from(state.width & 3 < 2);
        self.sregs.cs.db = u8::from(state.width & 3 == 2);
        self.sregs.ss.dpl = if state.ring3 { 3 } else { 0 };
        self.regs.rflags = state.flags.into();
        (self.sregs.gs.base, self.sregs.fs.base) = (state.base.into(), u64::MAX - 0xff);
        self.sregs.ds.base = u64::from(state.base & 0xf0);
    }
}

impl complete::Cpu for Cpu {
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
        Ok(self.msrs.get(&index).copied().unwrap_or(0))
    }
    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError> {
        self.msrs.insert(index, value);
        Ok(())
    }
    fn xcr0(&self) -> Result<u64, VcpuError> {
        Ok(self.xcr0)
    }
    fn set_xcr0(&mut self, value: u64) -> Result<(), VcpuError> {
        // As KVM refuses what the hardware would.
        if value & 1 == 0 {
            return Err(VcpuError::NoMsr { index: 0 });
        }
        self.xcr0 = value;
        Ok(())
    }
    fn xsave(&self) -> Result<Box<XsaveArea>, VcpuError> {
        Ok(self.area.clone())
    }
    fn set_xsave(&mut self, area: &XsaveArea) -> Result<(), VcpuError> {
        *self.area = *area;
        Ok(())
    }
    fn inject_exception(&mut self, _: u8, _: Option<u32>) -> Result<(), VcpuError> {
        self.interrupted = true;
        Ok(())
    }
    fn inject_interrupt(&mut self, _: u8) -> Result<(), VcpuError> {
        self.interrupted = true;
        Ok(())
    }
    fn inject_single_step(&mut self) -> Result<(), VcpuError> {
        self.interrupted = true;
        Ok(())
    }
    fn end_interrupt_shadow(&mut self) -> Result<(), VcpuError> {
        Ok(())
    }
}

impl GuestCpu for Cpu {
    fn complete_read(&mut self, value: &[u8]) {
        assert!(value.len() <= 8, "a read of {} bytes", value.len());
    }
}
