//! The checks that instrumented code calls: `__asan_load8_noabort` and its kin.
//!
//! They run for every memory access of the guest, so their fast paths are assembly. Each check is a
//! *stub* of [`STUB`] bytes: first a patchable part that starts out as a bare `ret`, then what it
//! jumps to. [`activate`] copies in one of two fast paths, for the two-level or the full shadow, so
//! that neither pays for the other (as with Linux's static calls).
//!
//! Instructions from entry to return, the `ret` included:
//!
//! | access | untyped page | byte-checked, whole granule | byte-checked, partial granule |
//! | --- | --- | --- | --- |
//! | 1 byte | 5 | 10 | 13 |
//! | 2, 4 bytes, aligned | 7 | 12 | 15 |
//! | 8, 16 bytes, aligned | 7 | 11 | |
//! | 2 to 8 bytes, unaligned | 7 (13 beside another kind of page) | 15 | 20 to 23 |
//! | 16 bytes, unaligned | 7 (12) | model | model |
//! | up to 8 bytes, by `__asan_loadN` | 11 | 23 to 25 | 28 |
//!
//! Two-level: `rax` is the page shadow's address, and one unsigned comparison with `PAGE_BYTES`
//! separates the three cases. An aligned access is in one page and one granule (two granules for 16
//! bytes). An unaligned one of up to 8 bytes looks at two granules at once, unless it begins in the
//! last granule of its page. Then it takes up to five more instructions, or the model if it goes on
//! in the next page and not both are untyped.
//!
//! A wild address has no shadow mapped: the lookup itself faults, and
//! [`crate::api::umbra_page_fault`] finds the access by the stub of `rip`.

use core::arch::{asm, global_asm};

use umbra_shadow::abi::Access::{self, Read, Write};
use umbra_shadow::abi::Features;

use crate::stack::frame_pointer;
use crate::{INLINE, groups, host, ring, shadow, state};

/// Bytes of one check's stub.
pub const STUB: usize = 384;
/// Bytes of its patchable part.
pub const PATCH: usize = 64;

/// The access that each stub checks: bytes (0: the caller's second argument) and kind.
const STUBS: [(u64, Access); 12] = [
    (1, Read),
    (2, Read),
    (4, Read),
    (8, Read),
    (16, Read),
    (0, Read),
    (1, Write),
    (2, Write),
    (4, Write),
    (8, Write),
    (16, Write),
    (0, Write),
];

// Displacements in the templates are written out by hand, since the templates are copied before
// they run. A displacement is the target's offset in the stub less the offset behind the jump.
global_asm!(
    // Offsets in a stub.
    ".set UMBRA_PATCH, 64",
    ".set UMBRA_BYTES, 64",      // the page is not untyped
    ".set UMBRA_UNALIGNED, 128", // an unaligned access, two-level
    ".set UMBRA_GRANULES, 208",  // an unaligned access whose granules are not both whole
    ".set UMBRA_PARTIAL, 288",   // an aligned access whose granule is not whole, full shadow
    ".set UMBRA_SLOW, 320",      // to the model
    ".set UMBRA_STUB, 384",
    ".macro umbra_slow size, access",
    "push rbp",
    "mov rbp, rsp",
    ".if \\size",
    "mov esi, \\size",
    ".endif",
    "mov edx, \\access",
    "mov rcx, [rbp + 8]",
    "call umbra_slow_check",
    "pop rbp",
    "ret",
    ".endm",
    // One check of a fixed size.
    ".macro umbra_stub name, size, access",
    ".balign 64, 0xcc",
    ".globl \\name",
    ".type \\name, @function",
    "\\name:",
    "ret",
    ".org \\name + UMBRA_BYTES, 0xcc",
    // Page shadow was not below PAGE_BYTES; the flags are still those of that comparison. The
    // address is shifted in place, which saves a copy: a lookup in the byte shadow of a
    // byte-checked page does not fault.
    "8:",
    "jne 9f",
    ".if \\size < 8",
    "lea ecx, [rdi + \\size - 1]",
    ".endif",
    "sar rdi, 3",
    ".if \\size == 16",
    "cmp word ptr [rdi], 0",
    ".else",
    "cmp byte ptr [rdi], 0",
    ".endif",
    "jne 1f",
    "ret",
    "1:",
    ".if \\size < 8",
    // The granule is not wholly valid. Poison is negative.
    "and ecx, 7",
    "cmp cl, [rdi]",
    "jge 2f",
    "ret",
    "2:",
    "sub ecx, \\size - 1",
    "lea rdi, [rdi * 8 + rcx]",
    ".else",
    "shl rdi, 3",
    ".endif",
    "jmp 9f",
    ".org \\name + UMBRA_UNALIGNED, 0xcc",
    ".if \\size > 1",
    // Looks at this page and the next at once, which are neighbours in the page shadow. Behind the
    // last page of a region that may fault; then `umbra_page_fault` asks the model.
    "cmp word ptr [rax], 0",
    "jne 2f",
    "ret",
    "2:",
    ".if \\size == 16",
    "cmp byte ptr [rax], 1",
    "jae 9f",
    // An untyped page beside one of another kind. If the access goes on in the next page, its last
    // byte is one of the first there.
    "lea ecx, [rdi + \\size - 1]",
    "test ecx, 0x1000 - \\size",
    "je 9f",
    "ret",
    ".else",
    // Whether the second of the two granules is in the next page, whose class is its own.
    "lea ecx, [rdi + 8]",
    "test ecx, 0xff8",
    ".if \\size == 8",
    "je 9f",
    ".else",
    "je 5f",
    ".endif",
    "cmp byte ptr [rax], 1",
    "jne 3f",
    "sar rdi, 3",
    "cmp word ptr [rdi], 0",
    "jne 4f",
    "ret",
    // An untyped page beside one of another kind.
    "3:",
    "ja 9f",
    "ret",
    ".if \\size < 8",
    "5:", // The last granule of a page.
    "lea ecx, [rdi + \\size - 1]",
    "test ecx, 0x1000 - \\size",
    "je 9f", // The access goes on in the next page.
    "cmp byte ptr [rax], 1",
    "jae 8b",
    "ret",
    ".endif",
    ".endif",
    ".endif",
    ".org \\name + UMBRA_GRANULES, 0xcc",
    ".if (\\size > 1) && (\\size < 16)",
    "lea ecx, [rdi + 8]",
    "sar rdi, 3",
    // The offset of the access in its first granule. At most one of the two granules is whole.
    "4:",
    "and ecx, 7",
    "cmp byte ptr [rdi], 0",
    ".if \\size == 8",
    // The access reaches into the second granule; the offset of its last byte there is one less.
    "jne 7f",
    "cmp cl, [rdi + 1]",
    "jg 7f",
    "ret",
    "7:",
    "lea rdi, [rdi * 8 + rcx]",
    ".else",
    "jne 6f",
    "cmp ecx, 8 - \\size",
    "ja 5f",
    "ret",
    "5:", // Its last byte is in the second granule.
    "sub ecx, 9 - \\size",
    "cmp cl, [rdi + 1]",
    "jge 5f",
    "ret",
    // The offset of its last byte from the first granule. If the byte is in the second one, the
    // first never has so many valid bytes.
    "6:",
    "add ecx, \\size - 1",
    "cmp cl, [rdi]",
    "jge 6f",
    "ret",
    "5:",
    "add ecx, 8",
    "6:",
    "lea rdi, [rdi * 8 + rcx - (\\size - 1)]",
    ".endif",
    "jmp 9f",
    ".endif",
    ".org \\name + UMBRA_PARTIAL, 0xcc",
    ".if \\size < 8",
    "lea ecx, [rdi + \\size - 1]",
    "and ecx, 7",
    "cmp cl, [rax]",
    "jge 9f",
    "ret",
    ".endif",
    ".org \\name + UMBRA_SLOW, 0xcc",
    "9:",
    "umbra_slow \\size, \\access",
    ".org \\name + UMBRA_STUB, 0xcc",
    ".size \\name, UMBRA_STUB",
    ".endm",
    // One check of any size (rsi).
    ".macro umbra_stub_any name, access",
    ".balign 64, 0xcc",
    ".globl \\name",
    ".type \\name, @function",
    "\\name:",
    "ret",
    ".org \\name + UMBRA_BYTES, 0xcc",
    // Two-level, all in one page that is not untyped; the flags are those of the comparison with
    // PAGE_BYTES. Up to 8 bytes are in the first or in the last granule.
    "jne 9f",
    "cmp rsi, 8",
    "ja 9f",
    "lea rcx, [rdi + rsi - 1]",
    "mov rax, rdi",
    "mov rdx, rcx",
    "sar rax, 3",
    "sar rdx, 3",
    "cmp rax, rdx",
    "je 1f",
    "cmp byte ptr [rax], 0",
    "jne 9f",
    "1:",
    "cmp byte ptr [rdx], 0",
    "jne 2f",
    "ret",
    "2:",
    "and ecx, 7",
    "cmp cl, [rdx]",
    "jge 9f",
    "ret",
    ".org \\name + UMBRA_SLOW, 0xcc",
    "9:",
    "umbra_slow 0, \\access",
    ".org \\name + UMBRA_STUB, 0xcc",
    ".size \\name, UMBRA_STUB",
    ".endm",
    // Templates. `code` + 4 displacement bytes, to offset `to` of the stub from offset `behind`.
    ".macro umbra_jump code, to, behind",
    ".byte 0x0f, \\code",
    ".long \\to - \\behind",
    ".endm",
    ".macro umbra_two_level size",
    ".balign 64, 0xcc",
    "mov rax, rdi", // 0..3
    "sar rax, 12",  // 3..7
    ".if \\size > 1",
    "test dil, \\size - 1", // 7..11
    "umbra_jump 0x85, UMBRA_UNALIGNED, 17",
    "cmp byte ptr [rax], 1", // 17..20
    "umbra_jump 0x83, UMBRA_BYTES, 26",
    ".else",
    "cmp byte ptr [rax], 1", // 7..10
    "umbra_jump 0x83, UMBRA_BYTES, 16",
    ".endif",
    "ret",
    ".balign 64, 0xcc",
    ".endm",
    ".macro umbra_full size",
    ".balign 64, 0xcc",
    "mov rax, rdi", // 0..3
    "sar rax, 3",   // 3..7
    ".if \\size > 1",
    "test dil, \\size - 1", // 7..11
    "umbra_jump 0x85, 32, 17",
    ".if \\size == 16",
    "cmp word ptr [rax], 0", // 17..21
    "umbra_jump 0x85, UMBRA_SLOW, 27",
    ".elseif \\size == 8",
    "cmp byte ptr [rax], 0", // 17..20
    "umbra_jump 0x85, UMBRA_SLOW, 26",
    ".else",
    "cmp byte ptr [rax], 0",
    "umbra_jump 0x85, UMBRA_PARTIAL, 26",
    ".endif",
    ".else",
    "cmp byte ptr [rax], 0", // 7..10
    "umbra_jump 0x85, UMBRA_PARTIAL, 16",
    ".endif",
    "ret",
    // Unaligned: all granules that it may touch.
    ".if \\size > 1",
    ".balign 32, 0xcc",
    "cmp word ptr [rax], 0", // 32..36
    ".if \\size == 16",
    "umbra_jump 0x85, UMBRA_SLOW, 42",
    "cmp byte ptr [rax + 2], 0", // 42..46
    "umbra_jump 0x85, UMBRA_SLOW, 52",
    ".else",
    "umbra_jump 0x85, UMBRA_GRANULES, 42",
    ".endif",
    "ret",
    ".endif",
    ".balign 64, 0xcc",
    ".endm",
    ".macro umbra_model",
    ".byte 0xe9",
    ".long UMBRA_SLOW - 5",
    ".balign 64, 0xcc",
    ".endm",
    ".section .text.umbra_checks, \"ax\", @progbits",
    ".balign 64, 0xcc",
    // Global, since the code that uses them may land in another object of the archive.
    ".globl umbra_stubs, umbra_templates_two_level, umbra_templates_full, umbra_templates_model",
    ".hidden umbra_stubs, umbra_templates_two_level, umbra_templates_full, umbra_templates_model",
    "umbra_stubs:",
    "umbra_stub __asan_load1_noabort, 1, 0",
    "umbra_stub __asan_load2_noabort, 2, 0",
    "umbra_stub __asan_load4_noabort, 4, 0",
    "umbra_stub __asan_load8_noabort, 8, 0",
    "umbra_stub __asan_load16_noabort, 16, 0",
    "umbra_stub_any __asan_loadN_noabort, 0",
    "umbra_stub __asan_store1_noabort, 1, 1",
    "umbra_stub __asan_store2_noabort, 2, 1",
    "umbra_stub __asan_store4_noabort, 4, 1",
    "umbra_stub __asan_store8_noabort, 8, 1",
    "umbra_stub __asan_store16_noabort, 16, 1",
    "umbra_stub_any __asan_storeN_noabort, 1",
    // What code that checks inline calls when its check fails.
    ".macro umbra_report_entry name, size, access",
    ".globl \\name",
    ".type \\name, @function",
    "\\name:",
    "umbra_slow \\size, \\access",
    ".size \\name, . - \\name",
    ".endm",
    ".irp bytes, 1, 2, 4, 8, 16",
    "umbra_report_entry __asan_report_load\\bytes\\()_noabort, \\bytes, 0",
    "umbra_report_entry __asan_report_store\\bytes\\()_noabort, \\bytes, 1",
    ".endr",
    "umbra_report_entry __asan_report_load_n_noabort, 0, 0",
    "umbra_report_entry __asan_report_store_n_noabort, 0, 1",
    // With `-fno-sanitize-recover` compilers leave the suffix off. Here the VMM decides whether to
    // stop.
    ".macro umbra_abort_name name",
    ".globl __asan_\\name",
    ".set __asan_\\name, __asan_\\name\\()_noabort",
    ".endm",
    ".irp bytes, 1, 2, 4, 8, 16, N",
    "umbra_abort_name load\\bytes",
    "umbra_abort_name store\\bytes",
    ".endr",
    ".section .rodata.umbra_checks, \"a\", @progbits",
    ".balign 64",
    "umbra_templates_two_level:",
    "umbra_two_level 1",
    "umbra_two_level 2",
    "umbra_two_level 4",
    "umbra_two_level 8",
    "umbra_two_level 16",
    // Any size: within one page, and that page untyped.
    "lea rcx, [rdi + rsi - 1]",        // 0..5
    "cmp rcx, rdi",                    // 5..8
    "umbra_jump 0x82, UMBRA_SLOW, 14", // wraps, or nothing to check
    "mov rax, rdi",                    // 14..17
    "sar rax, 12",                     // 17..21
    "sar rcx, 12",                     // 21..25
    "cmp rax, rcx",                    // 25..28
    "umbra_jump 0x85, UMBRA_SLOW, 34",
    "cmp byte ptr [rax], 1", // 34..37
    "umbra_jump 0x83, UMBRA_BYTES, 43",
    "ret",
    ".balign 64, 0xcc",
    "umbra_templates_full:",
    "umbra_full 1",
    "umbra_full 2",
    "umbra_full 4",
    "umbra_full 8",
    "umbra_full 16",
    // Any size: straight to the model.
    "umbra_model",
    // Where the compiler checks inline, few calls are left.
    "umbra_templates_model:",
    ".rept 6",
    "umbra_model",
    ".endr",
    ".text",
);

unsafe extern "C" {
    static umbra_stubs: [[u8; STUB]; STUBS.len()];
    static umbra_templates_two_level: [[u8; PATCH]; STUBS.len() / 2];
    static umbra_templates_full: [[u8; PATCH]; STUBS.len() / 2];
    static umbra_templates_model: [[u8; PATCH]; STUBS.len() / 2];
}

/// Puts the fast paths for `features` into the stubs.
///
/// # Safety
/// No other CPU runs instrumented code, and the shadow windows are mapped for all regions.
pub unsafe fn activate(features: Features) {
    let write_protect = 1u64 << 16;
    // SAFETY: the stubs are this module's own code, and with CR0.WP clear ring 0 may write a
    // read-only page; interrupts stay off meanwhile. A `cpuid` makes the CPU drop instructions that
    // it fetched before.
    unsafe {
        let (flags, cr0): (u64, u64);
        asm!("pushfq", "pop {}", "cli", "mov {}, cr0", out(reg) flags, out(reg) cr0);
        asm!("mov cr0, {}", in(reg) cr0 & !write_protect, options(nostack));
        let templates = if INLINE {
            &raw const umbra_templates_model
        } else if features.has(Features::FULL) {
            &raw const umbra_templates_full
        } else {
            &raw const umbra_templates_two_level
        };
        let stubs = (&raw const umbra_stubs).cast_mut();
        for i in 0..STUBS.len() {
            let from = (&raw const (*templates)[i % (STUBS.len() / 2)]).cast::<u64>();
            let to = (&raw mut (*stubs)[i]).cast::<u64>();
            // The first word goes in last: it replaces the `ret` that keeps the check off.
            for word in (0..PATCH / 8).rev() {
                to.add(word).write_volatile(from.add(word).read());
            }
        }
        asm!("mov cr0, {}", in(reg) cr0, options(nostack));
        let _ = core::arch::x86_64::__cpuid(0);
        asm!("push {}", "popfq", in(reg) flags);
    }
}

/// The access whose check was running at `rip`: bytes and kind, if it was one.
pub fn running(rip: u64, second_argument: u64) -> Option<(u64, Access)> {
    let start = (&raw const umbra_stubs) as u64;
    let &(size, access) = STUBS.get(usize::try_from(rip.checked_sub(start)?).ok()? / STUB)?;
    Some((if size == 0 { second_argument } else { size }, access))
}

/// The whole check, for accesses that the fast path did not pass.
#[unsafe(no_mangle)]
extern "C" fn umbra_slow_check(address: u64, size: u64, write: bool, ip: u64) {
    let good = check_range(address, size, if write { Write } else { Read }, ip);
    if INLINE && good {
        // An inline check has found the memory poisoned in a translation that is out of date.
        groups::forget(address);
        groups::forget(address.wrapping_add(size.wrapping_sub(1)));
    }
}

/// Checks any range. Returns false when it reported a violation.
#[inline]
pub fn check_range(address: u64, size: u64, access: Access, ip: u64) -> bool {
    shadow::check(address, size) || !report(address, size, access, ip)
}

/// Reports a violation, unless reports are off on this CPU. Returns whether it did.
#[inline(never)]
pub fn report(address: u64, size: u64, access: Access, ip: u64) -> bool {
    report_from(frame_pointer(), address, size, access, ip)
}

/// [`report`], with a stack that begins at frame pointer `fp`.
pub fn report_from(fp: u64, address: u64, size: u64, access: Access, ip: u64) -> bool {
    let actor = state::current();
    let mut reported = false;
    state::reporting(actor, || {
        ring::wait_for_others(actor);
        host::report(fp, address, size, actor & !0xffff | u64::from(access), ip);
        reported = true;
    });
    reported
}
