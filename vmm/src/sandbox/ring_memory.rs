//! Guest RAM, as the rings read it.

use umbra_machine::memory::Ram;
use umbra_provenance::rings::RingMemory;
use vm_memory::GuestAddress;

/// Guest RAM for [`umbra_provenance::rings::Rings`], which know no machine.
pub(super) struct RingRam<'a>(pub &'a Ram);

impl RingMemory for RingRam<'_> {
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        self.0.read(GuestAddress(gpa), to).is_ok()
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        self.0.write(GuestAddress(gpa), from).is_ok()
    }

    fn load(&self, gpa: u64) -> Option<u64> {
        self.0.load(GuestAddress(gpa)).ok()
    }
}
