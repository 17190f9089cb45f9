//! The page tables of a kernel that is checked inline: the VMM's, which have all shadow in them,
//! and before them a scratch page.

use core::arch::asm;
use core::ptr::{addr_of_mut, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use umbra_shadow::abi::check_shadow::{CHECK_SLOT, CHECK_SLOTS};
use umbra_shadow::abi::{CallNumber, Features};
use umbra_shadow::codes::PAGE_SIZE;
use umbra_shadow::model::Shadow;
use umbra_shadow::runtime::ForgetFn;
use umbra_shadow::two_level::TwoLevel;

use crate::cpu::without_interrupts;
use crate::shadow::Windows;
use crate::stack::frame_pointer;
use crate::{INLINE, groups, host, state};

/// Entries of a page table.
const ENTRIES: usize = 512;
/// Present and writable.
const TABLE: u64 = 3;

#[repr(C, align(4096))]
struct Table(#[allow(dead_code, reason = "only its address is used")] [u64; ENTRIES]);

/// Three levels of tables, all of whose entries lead to the scratch page behind them.
static mut SCRATCH: [Table; 4] = [const { Table([0; ENTRIES]) }; 4];

/// The kernel's top-level table.
static TOP_LEVEL: AtomicPtr<u64> = AtomicPtr::new(null_mut());

/// Pages of the stack that runs at [`map`], from its innermost frame on, that become byte-checked.
/// The kernel makes the rest so: `umbra_stack_alloc`.
const STACK_PAGES: u64 = 4;

/// Maps one scratch page wherever check shadow will be. The first thing that a kernel does whose
/// compiler checks inline: its entry code calls this before any checked code. Where the page is
/// not zero, because code has stored the shadow of its stack there, checks call the runtime, which
/// reports nothing until [`umbra_activate`](crate::api::umbra_activate).
///
/// `table` is the top-level page table, at an address that may be written as long as the kernel
/// runs. `offset` is what the image's addresses are above the guest-physical ones. CR4.PGE and
/// EFER.NXE are set on each CPU before [`umbra_activate`](crate::api::umbra_activate), and CR0.WP
/// where checked code runs.
///
/// # Safety
/// Nothing else uses the table's upper slots from 472 to 503.
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
    TOP_LEVEL.store(table, Relaxed);
    flush();
}

/// Maps the check shadow and all windows by tables of the VMM, in a kernel whose compiler checks
/// inline. All regions were added. False when the VMM refuses, when CR4.PGE or EFER.NXE is clear,
/// or without [`umbra_early`].
pub fn map(offered: Features) -> bool {
    let table = TOP_LEVEL.load(Relaxed);
    if table.is_null() || !can_use_tables() || !install(table) {
        return false;
    }
    // Checked code that runs on this stack may store its shadow at once.
    let here = frame_pointer() & !(PAGE_SIZE - 1);
    if offered.has(Features::PER_PAGE)
        && let Some(place) = state::place(here, here)
    {
        let end = (0..STACK_PAGES).map(|page| here + page * PAGE_SIZE);
        let pages = end.take_while(|at| state::place(*at, *at).is_some()).count() as u64;
        let _ = without_interrupts(|| TwoLevel::new(Windows).promote(place, pages * PAGE_SIZE));
    }
    true
}

/// Puts the VMM's entries into the top-level table. They never change.
fn install(table: *mut u64) -> bool {
    for slot in CHECK_SLOT..CHECK_SLOT + CHECK_SLOTS {
        let entry = host::hypercall(CallNumber::TopLevel, slot.into(), 0, 0, 0);
        if host::is_error(entry) {
            return false;
        }
        // SAFETY: who called `umbra_early` has promised that nothing else uses the slots.
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
