//! The local APIC of the CPU that starts first.

use super::{Vcpu, VcpuError};

/// The spurious-interrupt vector register (Intel SDM volume 3, figure 11-23). Its bit 8 lets the
/// APIC take interrupts.
const SPURIOUS: usize = 0xf0;
const SPURIOUS_ENABLED: std::ffi::c_char = 1;

impl Vcpu {
    /// Switches the local APIC on, as firmware leaves that of the first CPU (MultiProcessor
    /// Specification 1.4, 3.6.2.2, virtual wire mode). A kernel may calibrate by the interval
    /// timer's interrupts through the I/O APIC before it sets up its local APIC. KVM has connected
    /// the old controllers to local input 0 already.
    ///
    /// # Errors
    /// KVM refuses, also where it has no interrupt controllers.
    pub(crate) fn enable_local_apic(&mut self) -> Result<(), VcpuError> {
        let mut apic = self.fd.get_lapic().map_err(|e| self.error("KVM_GET_LAPIC", e))?;
        // The second byte of the register.
        apic.regs[SPURIOUS + 1] |= SPURIOUS_ENABLED;
        self.fd.set_lapic(&apic).map_err(|e| self.error("KVM_SET_LAPIC", e))
    }
}
