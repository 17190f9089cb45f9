//! What the shadow needs of a virtual machine.

use std::io;

/// The memslots of a virtual machine.
pub trait Memslots {
    /// Shows `len` bytes of host memory at `host` to the guest at `gpa`. Returns a handle for
    /// [`Self::unmap`].
    ///
    /// The memory stays valid as long as the [`Windows`](super::Windows) that pass it exist. An
    /// implementation must not let the guest run on it for longer.
    ///
    /// # Errors
    /// There are no more memslots, or the kernel refuses.
    fn map(
        &mut self,
        gpa: u64,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<u32, MemslotError>;

    /// Removes a memslot. When it returns, no vCPU can reach the memory any more.
    ///
    /// # Errors
    /// The kernel refuses.
    fn unmap(&mut self, memslot: u32) -> Result<(), MemslotError>;
}

/// A memslot could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum MemslotError {
    /// The host allows no more of them.
    #[error("the host allows no more than {0} memslots")]
    Exhausted(u32),
    /// The kernel refused.
    #[error("the kernel refused the memslot")]
    Kernel(#[source] io::Error),
}
