//! A vCPU's events and extended state, for completed instructions.

use kvm_bindings::{KVM_VCPUEVENT_VALID_SHADOW, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::SyncReg;

use super::{Vcpu, VcpuError};

/// DR6.BS: the debug exception is that of a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// The extended state of a vCPU, in the standard format of `xsave64`: KVM's `kvm_xsave` without the
/// state that a process must ask for beforehand (AMX).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; 4096]);

impl Default for XsaveArea {
    fn default() -> Self {
        Self([0; 4096])
    }
}

impl std::fmt::Debug for XsaveArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("XsaveArea")
    }
}

impl Vcpu {
    /// Extended control register 0: the register sets that `xsave` saves.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn xcr0(&self) -> Result<u64, VcpuError> {
        let xcrs = self.fd.get_xcrs().map_err(|e| self.error("KVM_GET_XCRS", e))?;
        Ok(xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(0, |x| x.value))
    }

    /// Sets extended control register 0.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_xcr0(&mut self, value: u64) -> Result<(), VcpuError> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value, ..Default::default() };
        self.fd.set_xcrs(&xcrs).map_err(|e| self.error("KVM_SET_XCRS", e))
    }

    /// The extended state: x87, SSE, AVX and all other components.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn xsave(&self) -> Result<Box<XsaveArea>, VcpuError> {
        let from = self.fd.get_xsave().map_err(|e| self.error("KVM_GET_XSAVE", e))?;
        let mut area = Box::<XsaveArea>::default();
        for (to, from) in area.0.chunks_exact_mut(4).zip(from.region) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        Ok(area)
    }

    /// Sets the extended state.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_xsave(&mut self, area: &XsaveArea) -> Result<(), VcpuError> {
        let mut xsave = kvm_xsave::default();
        for (to, from) in xsave.region.iter_mut().zip(area.0.chunks_exact(4)) {
            *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        }
        // SAFETY: KVM reads more than `region` only for state that this process never asked
        // permission for.
        unsafe { self.fd.set_xsave(&xsave) }.map_err(|e| self.error("KVM_SET_XSAVE", e))
    }

    /// Pending exceptions and interrupts.
    fn events(&self) -> Result<kvm_vcpu_events, VcpuError> {
        if self.synced {
            return Ok(self.fd.sync_regs().events);
        }
        self.fd.get_vcpu_events().map_err(|e| self.error("KVM_GET_VCPU_EVENTS", e))
    }

    fn set_events(&mut self, events: &kvm_vcpu_events) -> Result<(), VcpuError> {
        if self.synced {
            self.fd.sync_regs_mut().events = *events;
            self.fd.set_sync_dirty_reg(SyncReg::VcpuEvents);
            return Ok(());
        }
        self.fd.set_vcpu_events(events).map_err(|e| self.error("KVM_SET_VCPU_EVENTS", e))
    }

    /// Delivers a CPU exception (vector 0 to 31) before the next instruction.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn inject_exception(
        &mut self,
        vector: u8,
        error_code: Option<u32>,
    ) -> Result<(), VcpuError> {
        let mut events = self.events()?;
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = u8::from(error_code.is_some());
        events.exception.error_code = error_code.unwrap_or(0);
        events.exception.pending = 0;
        events.flags &= KVM_VCPUEVENT_VALID_SHADOW;
        self.set_events(&events)
    }

    /// Delivers a software interrupt (`int n`) before the next instruction.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError> {
        let mut events = self.events()?;
        // KVM queued #UD when it gave up on the instruction.
        events.exception.injected = 0;
        events.exception.pending = 0;
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = 1;
        events.flags &= KVM_VCPUEVENT_VALID_SHADOW;
        self.set_events(&events)
    }

    /// Delivers the debug exception of a single step before the next instruction.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn inject_single_step(&mut self) -> Result<(), VcpuError> {
        let mut debug = self.fd.get_debug_regs().map_err(|e| self.error("KVM_GET_DEBUGREGS", e))?;
        debug.dr6 |= DR6_SINGLE_STEP;
        self.fd.set_debug_regs(&debug).map_err(|e| self.error("KVM_SET_DEBUGREGS", e))?;
        self.inject_exception(1, None)
    }

    /// Ends the interrupt shadow of an `sti` or `mov ss` just before, if there is one.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn end_interrupt_shadow(&mut self) -> Result<(), VcpuError> {
        let mut events = self.events()?;
        if events.interrupt.shadow == 0 {
            return Ok(());
        }
        events.interrupt.shadow = 0;
        // KVM may have queued #UD when it gave up on the instruction.
        events.exception.injected = 0;
        events.exception.pending = 0;
        events.flags = KVM_VCPUEVENT_VALID_SHADOW;
        self.set_events(&events)
    }
}
