//! The machine at an exit, as the dispatcher sees it.

use umbra_machine::complete::Cpu;
use umbra_machine::memory::Ram;
use umbra_machine::vcpu::Vcpu;

use super::outcome::Outcome;
use crate::shadow::Memslots;

/// A vCPU as the dispatcher needs it.
pub trait GuestCpu: Cpu {
    /// Completes the read that the last exit asked for.
    fn complete_read(&mut self, value: &[u8]);
}

impl GuestCpu for Vcpu {
    fn complete_read(&mut self, value: &[u8]) {
        self.complete_read(value);
    }
}

/// The other vCPUs of the machine.
pub trait OtherVcpus {
    /// Gets all of them out of the guest, where they stay until this exit has been handled.
    ///
    /// # Errors
    /// A vCPU does not come out of the guest.
    fn pause(&mut self) -> Result<(), Outcome>;
}

/// The vCPU that made an exit, and the machine around it.
pub struct ExitContext<'a> {
    /// The vCPU's number.
    pub id: u8,
    /// The vCPU, stopped.
    pub cpu: &'a mut dyn GuestCpu,
    /// Guest memory.
    pub ram: &'a Ram,
    /// The machine's memslots.
    pub memslots: &'a mut dyn Memslots,
    /// The other vCPUs, which may be running.
    pub others: &'a mut dyn OtherVcpus,
}

impl ExitContext<'_> {
    /// The instruction pointer; 0 if it cannot be read.
    pub(super) fn rip(&self) -> u64 {
        self.cpu.regs().map(|regs| regs.rip).unwrap_or_default()
    }
}
