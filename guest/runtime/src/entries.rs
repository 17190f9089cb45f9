//! Ready entry points for a kernel's interrupt table: page fault and double fault.
//!
//! Both are for interrupt gates of 64-bit kernel code. A double fault needs a stack of its own (an
//! IST entry), or it cannot tell of a stack that has overflowed.

use core::arch::global_asm;

use crate::api::{umbra_exit_fault, umbra_page_fault};

// The CPU has aligned the stack to 16 bytes and pushed six words: error code, rip, cs, rflags, rsp,
// ss. Nine registers and the five words of a `Trap` follow, so the calls find it aligned again.
global_asm!(
    ".macro umbra_fault_entry",
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
    "cld",
    "call {page_fault}",
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
    "umbra_fault_entry",
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
    "umbra_fault_entry",
    // A double fault has no way back, but a bad access that led to it is reported.
    "umbra_fault_exit 8",
    ".size umbra_double_fault_entry, . - umbra_double_fault_entry",
    page_fault = sym umbra_page_fault,
    exit_fault = sym umbra_exit_fault,
);
