//! The values that page shadow and byte shadow hold.
//!
//! Byte-shadow codes are those of Linux's generic KASAN (`mm/kasan/kasan.h`), so readers of KASAN
//! reports know them. A poison code has the same meaning in the page shadow, for a whole page.

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes a page-shadow value stands for.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of the granule size.
pub const GRANULE_SHIFT: u32 = 3;
/// Bytes a byte-shadow value stands for.
pub const GRANULE: u64 = 1 << GRANULE_SHIFT;
/// Byte-shadow bytes behind one page of guest memory.
pub const SHADOW_PER_PAGE: u64 = PAGE_SIZE >> GRANULE_SHIFT;

/// Page shadow: the whole page is accessible.
pub const PAGE_VALID: u8 = 0x00;
/// Page shadow: the byte shadow decides. The value is 1: one unsigned comparison with it separates
/// an accessible page (below), a byte-checked page (equal) and everything else (above).
pub const PAGE_BYTES: u8 = 0x01;
/// Page shadow: a promotion fills the byte shadow of this page. The VMM must not reclaim the host
/// memory behind it, and a check on another CPU waits for [`PAGE_BYTES`].
pub const PAGE_BUSY: u8 = 0x02;

/// Values from here on are poison codes, in both shadows.
pub const POISON_MIN: u8 = 0x80;

/// Poison without a reason. Page-shadow values that are never written (between [`PAGE_BUSY`] and
/// [`POISON_MIN`]) count as this one.
pub const UNKNOWN: u8 = 0x80;

/// A free page, as the page allocator holds it.
pub const FREE_PAGE: u8 = 0xFF;
/// Redzone behind a large (page-backed) allocation; in the checked Linux also a slab object that
/// was never handed out.
pub const LARGE_REDZONE: u8 = 0xFE;
/// Redzone inside or behind a slab object.
pub const SLAB_REDZONE: u8 = 0xFC;
/// A freed slab object.
pub const SLAB_FREE: u8 = 0xFB;
/// A freed slab object whose free stack is known.
pub const SLAB_FREE_TRACK: u8 = 0xFA;
/// Redzone behind a global variable.
pub const GLOBAL_REDZONE: u8 = 0xF9;
/// A stack variable whose scope has ended.
pub const USE_AFTER_SCOPE: u8 = 0xF8;
/// Virtual memory that belongs to no allocation, or is behind the bytes asked for (Linux's
/// `KASAN_VMALLOC_INVALID`). [`USE_AFTER_SCOPE`] has the same value; Linux removed that code before
/// it introduced this one. The address decides which of them is meant.
pub const VMALLOC_INVALID: u8 = 0xF8;
/// Redzone left of the first variable of a stack frame.
pub const STACK_LEFT: u8 = 0xF1;
/// Redzone between two variables of a stack frame.
pub const STACK_MID: u8 = 0xF2;
/// Redzone right of the last variable of a stack frame.
pub const STACK_RIGHT: u8 = 0xF3;
/// Partial redzone of a stack variable (older compilers).
pub const STACK_PARTIAL: u8 = 0xF4;
/// The stack of a thread that has ended. (ASan has this code for a frame whose function has
/// returned, which compilers do not use in kernels.)
pub const STACK_AFTER_RETURN: u8 = 0xF5;
/// Redzone left of an `alloca` region.
pub const ALLOCA_LEFT: u8 = 0xCA;
/// Redzone right of an `alloca` region.
pub const ALLOCA_RIGHT: u8 = 0xCB;

/// Whether a compiler may store this value in the byte shadow of a stack: valid bytes, and the
/// codes of stacks.
pub const fn on_stack(value: u8) -> bool {
    matches!(
        value,
        0..GRANULE_U8
            | STACK_LEFT..=STACK_AFTER_RETURN
            | USE_AFTER_SCOPE
            | ALLOCA_LEFT
            | ALLOCA_RIGHT
    )
}

const GRANULE_U8: u8 = GRANULE as u8;
