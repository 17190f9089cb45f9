//! From the entry of the 64-bit boot protocol to Rust code in the higher half, and the page tables.
//!
//! The VMM enters in long mode with memory mapped one to one and `rsi` pointing to the boot
//! parameters. The first page tables are part of the image. They map the first GiB at 0 (for the
//! jump), as direct map and as kernel image.

use core::arch::{asm, global_asm};
use core::ptr::{read_unaligned, write_volatile};

use umbra_guest::Mapping;

use crate::layout::{DIRECT_MAP, IMAGE_MAP};
use crate::page;

/// Bytes of the kernel's first stack.
pub const BOOT_STACK: u64 = 64 << 10;

global_asm!(
    ".section .text.boot, \"ax\"",
    ".globl boot_entry",
    "boot_entry:",
    "cld",
    "lea rax, [rip + boot_pml4]",
    "mov cr3, rax",
    "movabs rax, offset boot_high",
    "jmp rax",
    "boot_high:",
    "movabs rsp, offset boot_stack + {stack}",
    "xor ebp, ebp",
    // Write protection, global pages, and the no-execute bit.
    "mov rax, cr0",
    "or rax, 0x10000",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x80",
    "mov cr4, rax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x800",
    "wrmsr",
    "push rsi",
    "push rsi",
    "movabs rdi, offset boot_pml4",
    "movabs rsi, {image}",
    "call umbra_early",
    "pop rdi",
    "pop rsi",
    "call kernel_main",
    "ud2",
    ".section .data.boot, \"aw\"",
    ".balign 4096",
    ".globl boot_pml4",
    "boot_pml4:",
    ".quad boot_pdpt_low - {image} + 3",
    ".fill 255, 8, 0",
    ".quad boot_pdpt_direct - {image} + 3",
    ".fill 254, 8, 0",
    ".quad boot_pdpt_high - {image} + 3",
    "boot_pdpt_low:",
    "boot_pdpt_direct:",
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
    stack = const BOOT_STACK,
    image = const IMAGE_MAP,
);

unsafe extern "C" {
    static mut boot_pml4: [u64; 512];
    static boot_stack: u8;
    static __image_start: u8;
    static __image_end: u8;
    static __text_start: u8;
    static __text_end: u8;
    static __init_array_start: extern "C" fn();
    static __init_array_end: extern "C" fn();
}

/// The virtual addresses of the kernel's code.
pub fn text() -> core::ops::Range<u64> {
    (&raw const __text_start) as u64..(&raw const __text_end) as u64
}

/// The first stack.
pub fn stack() -> u64 {
    (&raw const boot_stack) as u64
}

/// The guest-physical address behind the image.
pub fn image_end() -> u64 {
    (&raw const __image_end) as u64 - IMAGE_MAP
}

/// Runs the constructors that the compiler made. Each registers the globals of a compilation unit.
pub fn run_constructors() {
    // SAFETY: the linker script bounds the array, and this runs once.
    unsafe {
        umbra_guest::run_constructors(&raw const __init_array_start, &raw const __init_array_end);
    }
}

/// The boot parameters (`struct boot_params`, the kernel's zero page).
pub struct BootInfo {
    /// The largest usable range of memory from 1 MiB on: guest-physical start and end.
    pub memory: (u64, u64),
    /// The command line.
    pub command_line: &'static str,
    /// The initrd; empty if there is none.
    pub initrd: &'static [u8],
}

impl BootInfo {
    /// The end of free memory. The initrd is at the end of all memory.
    pub fn free_end(&self) -> u64 {
        let initrd = (self.initrd.as_ptr() as u64).wrapping_sub(DIRECT_MAP);
        if !self.initrd.is_empty() && (self.memory.0..self.memory.1).contains(&initrd) {
            initrd & !0xfff
        } else {
            self.memory.1
        }
    }
}

/// Reads the boot parameters at guest-physical `at`, below 1 MiB. Nothing else uses that memory.
pub fn boot_info(at: u64) -> BootInfo {
    let zero_page = (DIRECT_MAP + at) as *const u8;
    let mut memory = (0, 0);
    // SAFETY: the VMM put a `boot_params` there: number of E820 entries at 0x1e8, entries of 20
    // bytes from 0x2d0 on, address of the zero-terminated command line at 0x228, address and bytes
    // of the initrd at 0x218 and 0x21c (Documentation/arch/x86/zero-page.rst, boot.rst).
    unsafe {
        for i in 0..usize::from(*zero_page.add(0x1e8)) {
            let entry = zero_page.add(0x2d0 + 20 * i);
            let start = read_unaligned(entry.cast::<u64>());
            let bytes = read_unaligned(entry.add(8).cast::<u64>());
            let usable = read_unaligned(entry.add(16).cast::<u32>()) == 1;
            if usable && start >= 1 << 20 && bytes > memory.1 - memory.0 {
                memory = (start, start + bytes);
            }
        }
        let line = (DIRECT_MAP + u64::from(read_unaligned(zero_page.add(0x228).cast::<u32>())))
            as *const u8;
        let mut len = 0;
        while len < 4096 && *line.add(len) != 0 {
            len += 1;
        }
        let command_line =
            core::str::from_utf8(core::slice::from_raw_parts(line, len)).unwrap_or("");
        let number = |at: usize| u64::from(read_unaligned(zero_page.add(at).cast::<u32>()));
        let initrd = match (number(0x218), number(0x21c)) {
            (0, _) | (_, 0) => &[],
            (at, bytes) => {
                core::slice::from_raw_parts((DIRECT_MAP + at) as *const u8, bytes as usize)
            }
        };
        BootInfo { memory, command_line, initrd }
    }
}

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;
/// The address in a page table's entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const LARGE_PAGE: u64 = 2 << 20;

/// Maps `mapping`, in large pages where both addresses allow it. `table` hands out zeroed page
/// frames. A large page may map more than the window; there is no memory there.
pub fn map(mapping: &Mapping, table: &mut impl FnMut() -> u64) {
    let mut done = 0;
    while done < mapping.bytes {
        let (at, gpa) = (mapping.start + done, mapping.gpa + done);
        let large = (at | gpa).is_multiple_of(LARGE_PAGE);
        let mut entries = &raw mut boot_pml4 as *mut u64;
        let last = if large { 21 } else { 12 };
        for shift in [39, 30, 21, 12] {
            // SAFETY: `entries` is a page table, in the image or handed out by `table`, and in the
            // direct map.
            let entry = unsafe { entries.add((at >> shift & 511) as usize) };
            if shift == last {
                let flags = if large { PRESENT_WRITABLE | LARGE } else { PRESENT_WRITABLE };
                // SAFETY: as above; the addresses mapped are unused until now.
                unsafe { write_volatile(entry, gpa | flags) };
                break;
            }
            // SAFETY: as above.
            unsafe {
                if *entry & 1 == 0 {
                    write_volatile(entry, table() | PRESENT_WRITABLE);
                }
                entries = (DIRECT_MAP + (*entry & FRAME)) as *mut u64;
            }
        }
        done += if large { LARGE_PAGE } else { 4096 };
    }
}

/// The page-table entry of a small page, if it is mapped.
fn entry_of(at: u64) -> Option<*mut u64> {
    let mut entries = &raw mut boot_pml4 as *mut u64;
    for shift in [39, 30, 21] {
        // SAFETY: a page table, in the image or in the direct map.
        let entry = unsafe { *entries.add((at >> shift & 511) as usize) };
        if entry & 1 == 0 || entry & LARGE != 0 {
            return None;
        }
        entries = (DIRECT_MAP + (entry & FRAME)) as *mut u64;
    }
    // SAFETY: as above.
    let entry = unsafe { entries.add((at >> 12 & 511) as usize) };
    // SAFETY: as above.
    (unsafe { *entry } & 1 != 0).then_some(entry)
}

/// The guest-physical address of the small page that is mapped at `at`.
pub fn translate(at: u64) -> Option<u64> {
    // SAFETY: a page table's entry.
    entry_of(at).map(|entry| unsafe { *entry } & FRAME)
}

/// Unmaps the small page at `at`, on this CPU. Returns its guest-physical address.
pub fn unmap(at: u64) -> Option<u64> {
    let gpa = translate(at)?;
    // SAFETY: the caller does not use the page any more.
    unsafe {
        write_volatile(entry_of(at)?, 0);
        asm!("invlpg [{}]", in(reg) at, options(nostack));
    }
    Some(gpa)
}

/// Maps or unmaps a page of the direct map. No other CPU uses the page; their translations of it
/// are not flushed.
pub fn set_mapped(at: u64, mapped: bool) {
    let mut entries = &raw mut boot_pml4 as *mut u64;
    for shift in [39, 30, 21, 12] {
        // SAFETY: a page table that the direct map reaches: the first ones, or one that `map` or
        // this function made. The entry of one page is changed.
        unsafe {
            let entry = entries.add((at >> shift & 511) as usize);
            if shift == 12 {
                write_volatile(entry, if mapped { at - DIRECT_MAP | PRESENT_WRITABLE } else { 0 });
            } else if *entry & LARGE != 0 {
                let Some(table) = page::alloc(0) else { return };
                let first = *entry & !(LARGE_PAGE - 1);
                for i in 0..512 {
                    write_volatile(
                        (table as *mut u64).add(i),
                        first + i as u64 * 4096 | PRESENT_WRITABLE,
                    );
                }
                write_volatile(entry, table - DIRECT_MAP | PRESENT_WRITABLE);
            }
            entries = (DIRECT_MAP + (*entry & FRAME)) as *mut u64;
        }
    }
    // SAFETY: drops cached translations.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack)) };
}

/// Copies the top-level page table to `to`. The copy maps the first GiB one to one as well.
///
/// # Safety
/// Only the caller uses the page `to`.
pub unsafe fn copy_tables(to: *mut u64) {
    const DIRECT: usize = 256;
    // SAFETY: the table is in the image; the caller's promise.
    unsafe {
        core::ptr::copy_nonoverlapping(&raw const boot_pml4 as *const u64, to, 512);
        to.write(to.add(DIRECT).read());
    }
}

/// Switches this CPU to the kernel's page tables.
pub fn use_tables() {
    let tables = &raw const boot_pml4 as u64 - IMAGE_MAP;
    // SAFETY: they map all that the kernel uses.
    unsafe { asm!("mov cr3, {}", in(reg) tables, options(nostack)) };
}

/// Completes the page tables: adds the rest of the direct map and the mappings in `extra`, and
/// removes those at 0.
pub fn map_all(memory_end: u64, extra: &[Mapping], mut table: impl FnMut() -> u64) {
    const MAPPED_AT_BOOT: u64 = 1 << 30;
    if memory_end > MAPPED_AT_BOOT {
        let bytes = (memory_end - MAPPED_AT_BOOT).next_multiple_of(LARGE_PAGE);
        map(
            &Mapping { start: DIRECT_MAP + MAPPED_AT_BOOT, gpa: MAPPED_AT_BOOT, bytes },
            &mut table,
        );
    }
    for mapping in extra {
        map(mapping, &mut table);
    }
    // SAFETY: nothing runs at a low address any more; writing cr3 drops the cached translations.
    unsafe {
        write_volatile(&raw mut boot_pml4 as *mut u64, 0);
        asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack));
    }
}
