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
    NoSlot(usize),
    #[error("KVM refused a memslot of {len:#x} bytes at {gpa:#x}: {source}")]
    Kvm { gpa: u64, len: u64, source: io::Error },
}

/// A memslot in use. It cannot be copied, so it is removed at most once.
#[derive(Debug, PartialEq, Eq)]
pub struct SlotId(u32);

impl SlotId {
    /// The bare number, for code that stores it as one.
    pub fn into_raw(self) -> u32 {
        self.0
    }

    /// The slot with a number from [`SlotId::into_raw`].
    pub fn from_raw(number: u32) -> Self {
        Self(number)
    }
}

#[derive(Debug)]
struct Slots {
    free: Vec<u32>,
    next: u32,
    limit: usize,
}

/// State that a machine and its vCPUs share.
#[derive(Debug)]
pub(super) struct Vm {
    fd: VmFd,
    slots: Mutex<Slots>,
    /// Last: dropped when KVM is done with it.
    ram: Ram,
}

impl Vm {
    pub(super) fn new(fd: VmFd, ram: Ram, slot_limit: usize) -> Result<Self, MapError> {
        let slots = Mutex::new(Slots { free: Vec::new(), next: 0, limit: slot_limit });
        let vm = Self { fd, slots, ram };
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
    ) -> Result<SlotId, MapError> {
        let aligned = |n: u64| n.is_multiple_of(layout::PAGE);
        if len == 0 || !aligned(len) || !aligned(gpa.0) || !aligned(host as u64) {
            return Err(MapError::Unaligned { gpa: gpa.0, len });
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match slots.free.last() {
            Some(&slot) => slot,
            None if (slots.next as usize) < slots.limit => slots.next,
            None => return Err(MapError::NoSlot(slots.limit)),
        };
        // SAFETY: the caller vouches for the host memory; the slot number is not in use.
        unsafe { self.set(slot, gpa, host, len, readonly) }?;
        if slots.free.pop().is_none() {
            slots.next += 1;
        }
        Ok(SlotId(slot))
    }

    /// See [`super::Machine::unmap`].
    pub(super) fn unmap(&self, SlotId(slot): SlotId) -> Result<(), MapError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: length 0 removes the slot; no memory is used.
        unsafe { self.set(slot, GuestAddress(0), std::ptr::null_mut(), 0, false) }?;
        slots.free.push(slot);
        Ok(())
    }

    unsafe fn set(
        &self,
        slot: u32,
        gpa: GuestAddress,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<(), MapError> {
        let region = kvm_userspace_memory_region {
            slot,
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
