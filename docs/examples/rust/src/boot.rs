//! From the Linux 64-bit boot protocol's entry (long mode, memory mapped one to one) to Rust code
//! in the higher half.

use core::arch::{asm, global_asm};
use core::ops::Range;

/// The start of the direct map of all memory.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// The start of a second map of the first GiB, for the kernel's image.
pub const IMAGE_MAP: u64 = 0xffff_ffff_8000_0000;
/// Bytes of the stack.
pub const STACK: u64 = 64 << 10;

global_asm!(
    ".section .text.boot, \"ax\"",
    ".globl boot_entry",
    "boot_entry:",
    "lea rax, [rip + boot_pml4]",
    "mov cr3, rax",
    "movabs rax, offset boot_high",
    "jmp rax",
    "boot_high:",
    "movabs rsp, offset boot_stack + {stack}",
    "xor ebp, ebp",
    "call kernel_main",
    ".section .data.boot, \"aw\"",
    // One GiB at 0, as direct map, and as image.
    ".balign 4096",
    ".globl boot_pml4",
    "boot_pml4:",
    ".quad boot_pdpt_low - {image} + 3",
    ".fill 255, 8, 0",
    ".quad boot_pdpt_low - {image} + 3",
    ".fill 254, 8, 0",
    ".quad boot_pdpt_high - {image} + 3",
    "boot_pdpt_low:",
    ".quad boot_pd - {image} + 3",
    ".fill 511, 8, 0",
    "boot_pdpt_high:",
    ".fill 510, 8, 0",
    ".quad boot_pd - {image} + 3",
    ".quad 0",
    "boot_pd:",
    ".set at, 0",
    ".rept 512",
    ".quad at + 0x83",
    ".set at, at + 0x200000",
    ".endr",
    ".section .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    ".globl boot_stack",
    "boot_stack:",
    ".skip {stack}",
    ".text",
    stack = const STACK,
    image = const IMAGE_MAP,
);

unsafe extern "C" {
    static boot_stack: u8;
    static image_end: u8;
    static text_start: u8;
    static text_end: u8;
}

/// The start of the stack.
pub fn stack() -> u64 {
    (&raw const boot_stack) as u64
}

/// Bytes from address 0 to the end of the kernel's image in memory.
pub fn image_bytes() -> u64 {
    (&raw const image_end) as u64 - IMAGE_MAP
}

/// The kernel's code.
pub fn text() -> Range<u64> {
    (&raw const text_start) as u64..(&raw const text_end) as u64
}

/// Resets the machine.
pub fn reset() -> ! {
    // SAFETY: the keyboard controller's reset line; if it does nothing, this CPU stops.
    unsafe {
        asm!("out 0x64, al", "2:", "cli", "hlt", "jmp 2b", in("al") 0xfeu8, options(noreturn));
    }
}
