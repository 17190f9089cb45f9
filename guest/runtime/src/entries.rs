//! Ready entry points for a kernel's interrupt table: page fault and double fault.
//!
//! Both are for interrupt gates of 64-bit kernel code. A double fault needs a stack of its own (an
//! IST entry), or it cannot tell of a stack that has overflowed.

use core::arch::global_asm;

use umbra_shadow::codes::PAGE_SIZE;
use umbra_shadow::runtime::Trap;

use crate::api::{umbra_exit_fault, umbra_is_poisoned, umbra_page_fault, umbra_report};

// The CPU has aligned the stack to 16 bytes and pushed six words: error code, rip, cs, rflags, rsp,
// ss. Nine registers and the five words of a `Trap` follow, so the calls find it aligned again.
global_asm!(
    ".macro umbra_fault_entry handler",
    "push rax",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push qword ptr [rsp + 72 + 32]", // rsp
    "push qword ptr [rsp + 80 + 8]",  // rip
    "push rbp",
    "push rsi",
    "push rdi",
    "mov rdi, rsp",
    "mov rsi, cr2",
    "cld",
    "call \\handler",
    ".endm",
    ".macro umbra_fault_exit vector",
    "mov edi, \\vector",
    "mov esi, [rsp + 112]",
    "mov rdx, [rsp + 120]",
    "mov rcx, cr2",
    "call {exit_fault}",
    "ud2",
    ".endm",
    ".text",
    ".globl umbra_page_fault_entry",
    ".type umbra_page_fault_entry, @function",
    "umbra_page_fault_entry:",
    "umbra_fault_entry {page_fault}",
    "test al, al",
    "jz 2f",
    // The check returns.
    "mov rax, [rsp + 24]",
    "mov [rsp + 120], rax",
    "mov rax, [rsp + 32]",
    "mov [rsp + 144], rax",
    "add rsp, 40",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 8",
    "iretq",
    "2:",
    "umbra_fault_exit 14",
    ".size umbra_page_fault_entry, . - umbra_page_fault_entry",
    ".globl umbra_double_fault_entry",
    ".type umbra_double_fault_entry, @function",
    "umbra_double_fault_entry:",
    "umbra_fault_entry {double_fault}",
    // A double fault has no way back, but a bad access that led to it is reported.
    "umbra_fault_exit 8",
    ".size umbra_double_fault_entry, . - umbra_double_fault_entry",
    page_fault = sym umbra_page_fault,
    double_fault = sym double_fault,
    exit_fault = sym umbra_exit_fault,
);

/// Reports the bad access that led to a double fault: a check's, for an address without shadow, or
/// the CPU's own, which could not push the frame of an exception, because the stack has grown into
/// memory that is poisoned.
///
/// # Safety
/// `trap` holds the registers at the fault. `address` is cr2.
unsafe extern "C" fn double_fault(trap: &mut Trap, address: u64) {
    // SAFETY: the caller's promise.
    if unsafe { umbra_page_fault(trap) } {
        return;
    }
    let below = trap.rsp.wrapping_sub(address);
    if below <= PAGE_SIZE && umbra_is_poisoned(address) {
        umbra_report(address, 8, true, trap);
    }
}
