//! Check shadow that lags behind, in a kernel whose compiler checks inline: `lag` on the command
//! line, for the work of [`stress`](crate::stress).
//!
//! Each CPU gets copies of the check shadow's page tables for the direct map. An entry of such a
//! copy changes only when the runtime has this CPU forget its translation of that shadow. So a CPU
//! has old translations for as long as it may have them on any machine, and at every chance.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use umbra_guest::abi::check_shadow::{CHECK_SLOT, ENTRY_WINDOW};

use crate::layout::DIRECT_MAP;
use crate::{boot, cpu, page};

/// Entries of a page table, and pages of each level above the last.
const ENTRIES: u64 = 512;
const UPPER: u64 = 3;
/// Bytes of memory that have their check shadow in a page, and in all pages of a table.
const GROUP: u64 = 32 << 10;
const TABLE_COVERS: u64 = ENTRIES * GROUP;
/// Present, writable, accessed.
const TABLE: u64 = 0x23;

/// Where each CPU's copies begin; 0 if it has none.
static COPIES: [AtomicU64; cpu::CPUS] = [const { AtomicU64::new(0) }; cpu::CPUS];

fn groups() -> u64 {
    (page::end() - DIRECT_MAP) / GROUP
}

/// Whether a CPU has copies.
pub fn is_on() -> bool {
    COPIES[0].load(Relaxed) != 0
}

/// From here on, this CPU has copies. They are kept as long as the kernel runs.
pub fn begin(number: usize) {
    let tables = groups().div_ceil(ENTRIES);
    let order = (UPPER + tables).next_power_of_two().ilog2() as usize;
    let Some(at) = page::alloc(order).filter(|_| tables <= ENTRIES) else {
        panic!("no memory for page tables that lag");
    };
    let frame = |table: u64| (at + table * 4096 - DIRECT_MAP) | TABLE;
    let [top, second, third] = [0, 1, 2].map(|table| (at + table * 4096) as *mut u64);
    // SAFETY: the pages are this function's.
    unsafe {
        boot::copy_tables(top);
        // What that maps one to one.
        top.write(0);
        (second.write_bytes(0, 512), third.write_bytes(0, 512));
        top.add(CHECK_SLOT.into()).write(frame(1));
        second.write(frame(2));
        (0..tables).for_each(|table| third.add(table as usize).write(frame(UPPER + table)));
    }
    COPIES[number].store(at + UPPER * 4096, Relaxed);
    forget(u64::MAX);
    umbra_guest::on_forget(forget);
    // SAFETY: they map all that the others map.
    unsafe { asm!("mov cr3, {}", in(reg) at - DIRECT_MAP, options(nostack)) };
}

/// Copies the entry for an address, or for `u64::MAX` all.
extern "C" fn forget(address: u64) {
    let copies = COPIES[cpu::number()].load(Relaxed);
    let group = address.wrapping_sub(DIRECT_MAP) / GROUP;
    let groups = match address {
        u64::MAX => 0..groups(),
        _ if group < groups() => group..group + 1,
        // The image's tables do not lag.
        _ => return,
    };
    if copies == 0 {
        return;
    }
    for group in groups {
        let [from, to] = [ENTRY_WINDOW, copies].map(|all| (all + 8 * group) as *mut u64);
        // SAFETY: entries of all groups are there, and this CPU's copies.
        unsafe { to.write_volatile(entry(from)) };
    }
}

/// Reads an entry, which is outside all checked memory.
///
/// # Safety
/// It is one.
unsafe fn entry(at: *const u64) -> u64 {
    let entry: u64;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("mov {}, [{}]", out(reg) entry, in(reg) at, options(nostack, readonly));
    }
    entry
}

const _: () = assert!(TABLE_COVERS == 16 << 20);
