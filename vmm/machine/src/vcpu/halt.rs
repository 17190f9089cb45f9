//! A vCPU that waits in KVM.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};

use super::Vcpu;
use crate::irqchip;

impl Vcpu {
    /// The `rip` of a vCPU that only another one can wake: it waits to be started, or has halted
    /// with interrupts off and gets no non-maskable ones. Only interrupt controllers let a vCPU
    /// stay in such a state.
    pub fn halted_for_good(&self) -> Option<u64> {
        const INTERRUPTS_ON: u64 = 1 << 9;
        let state = self.fd.get_mp_state().ok()?.mp_state;
        let regs = self.regs().ok()?;
        let waits = matches!(state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED);
        let halted = state == KVM_MP_STATE_HALTED && regs.rflags & INTERRUPTS_ON == 0;
        (waits || halted && !self.may_get_nmi()).then_some(regs.rip)
    }

    /// Whether a device may interrupt this vCPU with interrupts off. The timer can, as the watchdog
    /// of old kernels: through the first local input of the APIC, or by the I/O APIC.
    fn may_get_nmi(&self) -> bool {
        const LOCAL_INPUT_0: usize = 0x350;
        let local = self.fd.get_lapic().is_ok_and(|apic| {
            let bytes = [0, 1, 2, 3].map(|i| apic.regs[LOCAL_INPUT_0 + i] as u8);
            irqchip::raises_nmi(u32::from_le_bytes(bytes))
        });
        local || irqchip::io_apic_raises_nmi(self.vm.fd())
    }
}
