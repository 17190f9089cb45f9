//! The local APIC: how CPUs send each other interrupts.

use core::arch::asm;

use crate::layout::DIRECT_MAP;

/// Guest-physical address of each CPU's own local APIC after a reset.
pub const GPA: u64 = 0xfee0_0000;
/// Virtual address of its registers.
pub const REGISTERS: u64 = DIRECT_MAP + GPA;
/// The register that a CPU writes at the end of an interrupt (Intel SDM volume 3, table 11-1).
pub const END_OF_INTERRUPT: u64 = 0xb0;
const SPURIOUS_VECTOR: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;

/// An interrupt; its vector is added (Intel SDM volume 3, section 11.6.1).
pub const FIXED: u32 = 0x4000;
/// A non-maskable interrupt.
pub const NMI: u32 = 0x4400;
/// Resets a CPU, which waits for [`STARTUP`].
pub const INIT: u32 = 0x4500;
/// Starts a CPU in real mode; the number of the page to start at is added.
pub const STARTUP: u32 = 0x4600;

fn write(register: u64, value: u32) {
    // SAFETY: the local APIC is mapped there wherever there are several CPUs. Not checked: it is no
    // memory.
    unsafe {
        asm!("mov [{}], {:e}", in(reg) REGISTERS + register, in(reg) value, options(nostack))
    };
}

/// Turns this CPU's local APIC on.
pub fn enable() {
    write(SPURIOUS_VECTOR, 0x100 | 0xff);
}

/// Sends a command to the CPU with this APIC id.
pub fn send(id: u8, command: u32) {
    write(COMMAND_HIGH, u32::from(id) << 24);
    write(COMMAND_LOW, command);
}
