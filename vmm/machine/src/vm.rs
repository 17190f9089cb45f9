//! The VM's file descriptor, its RAM, and its memslots.

use std::io;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::GuestAddress;

use super::layout;
use super::memory::Ram;

/// Why a memslot was not added or removed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MapError {
    #[error(
        "memslot of {len:#x} bytes at {gpa:#x}: start, length and host address must be multiples \
         of 4096"
    )]
    Unaligned { gpa: u64, len: u64 },
    #[error("all {0} memslots of the host are in use")]
    NoMemslot(usize),
    #[error("KVM refused a memslot of {len:#x} bytes at {gpa:#x}: {source}")]
    Kvm { gpa: u64, len: u64, source: io::Error },
}

/// The number of a memslot in use. It is not `Copy`, so that [`Machine::unmap`] takes it away.
///
/// [`Machine::unmap`]: super::Machine::unmap
#[derive(Debug, PartialEq, Eq)]
pub struct MemslotId(u32);

impl MemslotId {
    /// The bare number, for code that stores it as one.
    pub fn into_raw(self) -> u32 {
        self.0
    }

    /// The memslot with a number from [`MemslotId::into_raw`]. Its caller sees to it that each
    /// number is used for one removal; KVM refuses to remove a memslot that is not there.
    pub fn from_raw(number: u32) -> Self {
        Self(number)
    }
}

#[derive(Debug)]
struct Memslots {
    free: Vec<u32>,
    next: u32,
    limit: usize,
}

/// State that a machine and its vCPUs share.
#[derive(Debug)]
pub(super) struct Vm {
    fd: VmFd,
    memslots: Mutex<Memslots>,
    /// Last: dropped when KVM is done with it.
    ram: Ram,
}

impl Vm {
    pub(super) fn new(fd: VmFd, ram: Ram, memslot_limit: usize) -> Result<Self, MapError> {
        let memslots = Mutex::new(Memslots { free: Vec::new(), next: 0, limit: memslot_limit });
        let vm = Self { fd, memslots, ram };
        for (gpa, host, len) in vm.ram.clone().regions() {
            // SAFETY: the mapping belongs to `ram`, which is dropped after `fd`.
            unsafe { vm.map(gpa, host, len, false) }?;
        }
        Ok(vm)
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// See [`super::Machine::map`].
    pub(super) unsafe fn map(
        &self,
        gpa: GuestAddress,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<MemslotId, MapError> {
        let aligned = |n: u64| n.is_multiple_of(layout::PAGE);
        if len == 0 || !aligned(len) || !aligned(gpa.0) || !aligned(host as u64) {
            return Err(MapError::Unaligned { gpa: gpa.0, len });
        }
        let mut memslots = self.memslots.lock().unwrap_or_else(PoisonError::into_inner);
        let memslot = match memslots.free.last() {
            Some(&memslot) => memslot,
            None if (memslots.next as usize) < memslots.limit => memslots.next,
            None => return Err(MapError::NoMemslot(memslots.limit)),
        };
        // SAFETY: the caller vouches for the host memory; the memslot number is not in use.
        unsafe { self.set(memslot, gpa, host, len, readonly) }?;
        if memslots.free.pop().is_none() {
            memslots.next += 1;
        }
        Ok(MemslotId(memslot))
    }

    /// See [`super::Machine::unmap`].
    pub(super) fn unmap(&self, MemslotId(memslot): MemslotId) -> Result<(), MapError> {
        let mut memslots = self.memslots.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: length 0 removes the memslot; no memory is used.
        unsafe { self.set(memslot, GuestAddress(0), std::ptr::null_mut(), 0, false) }?;
        memslots.free.push(memslot);
        Ok(())
    }

    unsafe fn set(
        &self,
        memslot: u32,
        gpa: GuestAddress,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<(), MapError> {
        let region = kvm_userspace_memory_region {
            slot: memslot,
            flags: if readonly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: gpa.0,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller's promise.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|e| MapError::Kvm {
            gpa: gpa.0,
            len,
            source: e.into(),
        })
    }
}
