//! The page tables of a kernel that is checked inline: the VMM's, which have all shadow in them, and
//! before them a scratch page.

use core::arch::asm;
use core::ops::RangeInclusive;
use core::ptr::{addr_of_mut, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use umbra_shadow::abi::check_shadow::{CHECK_SLOT, CHECK_SLOTS, check_address, slot_of};
use umbra_shadow::abi::{CallNumber, Features};
use umbra_shadow::model::Shadow;
use umbra_shadow::runtime::ForgetFn;
use umbra_shadow::two_level::TwoLevel;

use crate::shadow::Windows;
use crate::{INLINE, groups, host, state};

/// Entries of a page table.
const ENTRIES: usize = 512;
/// Present and writable.
const TABLE: u64 = 3;

#[repr(C, align(4096))]
struct Table(#[allow(dead_code, reason = "only its address is used")] [u64; ENTRIES]);

/// Three levels of tables, all of whose entries lead to the scratch page behind them.
static mut SCRATCH: [Table; 4] = [const { Table([0; ENTRIES]) }; 4];

/// The top-level table, once the VMM's tables are there.
static TOP_LEVEL: AtomicPtr<u64> = AtomicPtr::new(null_mut());

/// Whether this runtime is for kernels whose compiler checks inline.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_is_inline() -> bool {
    INLINE
}

/// Maps one scratch page wherever check shadow will be. The first thing that a kernel does whose
/// compiler checks inline: its entry code calls this before any checked code. Where the page is
/// not zero, because code has stored the shadow of its stack there, checks call the runtime, which
/// reports nothing until [`umbra_activate`](crate::api::umbra_activate).
///
/// `table` is the top-level page table, at an address that may be written. `offset` is what the
/// image's addresses are above the guest-physical ones.
///
/// # Safety
/// Nothing else uses the table.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umbra_early(table: *mut u64, offset: u64) {
    if !INLINE {
        return;
    }
    let scratch = addr_of_mut!(SCRATCH).cast::<u64>();
    let link = |level: usize| {
        let at = scratch as u64 + (size_of::<Table>() * level) as u64;
        at.wrapping_sub(offset) | TABLE
    };
    // SAFETY: the scratch tables are this function's own, and the caller's promise.
    unsafe {
        for level in 0..3 {
            for entry in 0..ENTRIES {
                scratch.add(level * ENTRIES + entry).write_volatile(link(level + 1));
            }
        }
        for slot in 0..CHECK_SLOTS {
            table.add(usize::from(CHECK_SLOT + slot)).write_volatile(link(0));
        }
    }
    flush();
}

/// Maps the check shadow and all windows by tables of the VMM, in a kernel whose compiler checks
/// inline. All regions were added. The stack that runs now is from `stack` on, so many bytes: its
/// shadow can be stored to afterwards. False when the VMM refuses, or CR4.PGE or EFER.NXE is clear.
///
/// # Safety
/// As [`umbra_early`]; no other CPU runs yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umbra_map(
    offered: u32,
    table: *mut u64,
    stack: u64,
    stack_bytes: u64,
) -> bool {
    if !INLINE {
        return true;
    }
    if !can_use_tables() {
        return false;
    }
    TOP_LEVEL.store(table, Relaxed);
    if !install(CHECK_SLOT..=CHECK_SLOT + CHECK_SLOTS - 1) {
        return false;
    }
    if Features::from_bits(offered).has(Features::PER_PAGE)
        && let Some(place) = state::place(stack, stack.wrapping_add(stack_bytes.wrapping_sub(1)))
    {
        let _ = TwoLevel::new(Windows).promote(place, stack_bytes);
    }
    true
}

/// Installs the tables again that have the check shadow of `bytes` (not 0) from `start` on, which
/// are a region now. False when the VMM refuses.
pub fn add_region(start: u64, bytes: u64) -> bool {
    let last = check_address(start.wrapping_add(bytes - 1));
    install(slot_of(check_address(start))..=slot_of(last))
}

/// Puts the VMM's entries into slots of the top-level table, if there is one.
fn install(slots: RangeInclusive<u16>) -> bool {
    let table = TOP_LEVEL.load(Relaxed);
    if table.is_null() {
        return true;
    }
    for slot in slots {
        let entry = host::hypercall(CallNumber::TopLevel, slot.into(), 0, 0, 0);
        if host::is_error(entry) {
            return false;
        }
        // SAFETY: who called `umbra_map` has promised that nothing else uses the slots.
        unsafe { table.add(slot.into()).write_volatile(entry) };
    }
    flush();
    true
}

/// This CPU forgets translations of check shadow that other CPUs have changed. Each CPU calls this
/// at its timer's tick, when it was idle, and when it switches to another task, and then finds what
/// other CPUs have freed or poisoned as whole pages until now. It is a comparison if nothing has
/// changed, or where the compiler makes calls.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_tick() {
    if INLINE && state::mode().has(Features::PER_PAGE) {
        groups::tick();
    }
}

/// Sets what is called when a CPU forgets a translation of check shadow: for kernels that test
/// themselves with page tables that lag behind.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_on_forget(call: ForgetFn) {
    groups::set_on_forget(call);
}

/// Whether global pages and the no-execute bit are on, which the entries use.
fn can_use_tables() -> bool {
    const PGE: u64 = 1 << 7;
    const EFER: u32 = 0xc000_0080;
    const NXE: u32 = 1 << 11;
    let (cr4, efer): (u64, u32);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack));
        asm!("rdmsr", in("ecx") EFER, out("eax") efer, out("edx") _, options(nomem, nostack));
    }
    cr4 & PGE != 0 && efer & NXE != 0
}

/// Drops this CPU's translations that are not global.
fn flush() {
    // SAFETY: the same tables again.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack)) };
}
