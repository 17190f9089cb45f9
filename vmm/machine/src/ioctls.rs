//! The numbers of KVM's ioctls that are made once the guest runs, for a jail that allows no others.

use kvm_bindings::{
    KVMIO, kvm_debugregs, kvm_fpu, kvm_irq_level, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE};

/// Number of an ioctl (Linux, include/uapi/asm-generic/ioctl.h).
const fn number(direction: u32, nr: u32, bytes: usize) -> u32 {
    direction << 30 | (bytes as u32) << 16 | KVMIO << 8 | nr
}

const fn read<T>(nr: u32) -> u32 {
    number(_IOC_READ, nr, size_of::<T>())
}

const fn write<T>(nr: u32) -> u32 {
    number(_IOC_WRITE, nr, size_of::<T>())
}

/// Those on a vCPU, the most frequent one first.
pub const VCPU: [u32; 20] = [
    number(_IOC_NONE, 0x80, 0), // KVM_RUN
    read::<kvm_regs>(0x81),
    write::<kvm_regs>(0x82),
    read::<kvm_sregs>(0x83),
    write::<kvm_sregs>(0x84),
    number(_IOC_READ | _IOC_WRITE, 0x88, size_of::<kvm_msrs>()),
    write::<kvm_msrs>(0x89),
    read::<kvm_fpu>(0x8c),
    write::<kvm_fpu>(0x8d),
    read::<kvm_lapic_state>(0x8e),
    read::<kvm_mp_state>(0x98),
    read::<kvm_vcpu_events>(0x9f),
    write::<kvm_vcpu_events>(0xa0),
    read::<kvm_debugregs>(0xa1),
    write::<kvm_debugregs>(0xa2),
    read::<kvm_xsave>(0xa4),
    write::<kvm_xsave>(0xa5),
    read::<kvm_xcrs>(0xa6),
    write::<kvm_xcrs>(0xa7),
    number(_IOC_NONE, 0xa3, 0), // KVM_GET_TSC_KHZ
];

/// Those on a VM: memslots, interrupt lines, and a look at the interrupt controllers.
pub const VM: [u32; 3] = [
    write::<kvm_userspace_memory_region>(0x46),
    write::<kvm_irq_level>(0x61),
    number(_IOC_READ | _IOC_WRITE, 0x62, size_of::<kvm_irqchip>()),
];

/// The bits of an ioctl's number that say whose it is, and their value for KVM's.
pub const KVM: (u32, u32) = (0xff00, KVMIO << 8);
