//! Telling the VMM about allocations and frees: records in a ring (`ring`), or a call each (`sync`).

use core::arch::asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};

use umbra_shadow::abi::{RECORD_BYTES, RECORD_FRAMES, Record, RingHeader, call, record};

use crate::{host, state};

struct Ring {
    header: AtomicPtr<RingHeader>,
    records: AtomicU64,
}

static RINGS: [Ring; state::CPUS] =
    [const { Ring { header: AtomicPtr::new(core::ptr::null_mut()), records: AtomicU64::new(0) } };
        state::CPUS];
static TEXT_BASE: AtomicU64 = AtomicU64::new(0);
static SEQUENCE: AtomicU32 = AtomicU32::new(0);

/// Hands a CPU's ring memory to the runtime and the VMM. Returns the hypercall's result.
pub fn set_up(cpu: u64, memory: *mut RingHeader, bytes: u64, text_base: u64) -> u64 {
    let Some(ring) = RINGS.get(cpu as usize) else { return umbra_shadow::abi::ERR_ARGUMENT };
    let result = host::hypercall(call::RING_SETUP, memory as u64, bytes, cpu, text_base);
    if !host::is_error(result) {
        TEXT_BASE.store(text_base, Relaxed);
        ring.records.store(bytes / RECORD_BYTES - 1, Relaxed);
        ring.header.store(memory, Release);
    }
    result
}

/// The caller's frame pointer. The runtime is compiled with frame pointers throughout.
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let fp;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) fp, options(nomem, nostack, preserves_flags)) };
    fp
}

/// The return address of the frame at `fp`.
///
/// # Safety
/// `fp` comes from [`frame_pointer`] in a function that has not returned.
#[inline(always)]
pub unsafe fn return_address(fp: u64) -> u64 {
    // SAFETY: the System V frame layout: saved rbp, then the return address.
    unsafe { *((fp + 8) as *const u64) }
}

/// Farthest that two neighbouring frames may lie apart; beyond it a chain is taken for broken.
const MAX_FRAME: u64 = 64 << 10;

/// Fills `frames` with return addresses as distances from `base`, innermost first; returns how many.
///
/// # Safety
/// As [`return_address`].
#[inline(always)]
unsafe fn walk(mut fp: u64, base: u64, frames: &mut [u32; RECORD_FRAMES]) -> u8 {
    let (start, end) = state::text();
    let mut depth = 0;
    for frame in frames.iter_mut() {
        // SAFETY: `fp` is the given frame, or was read from one and lies a short way up the same stack.
        let (next, address) = unsafe { (*(fp as *const u64), return_address(fp)) };
        if address.wrapping_sub(start) >= end - start {
            break;
        }
        *frame = u32::try_from(address.wrapping_sub(base)).unwrap_or(0);
        depth += 1;
        if next.wrapping_sub(fp + 1) >= MAX_FRAME || next & 7 != 0 {
            break;
        }
        fp = next;
    }
    depth
}

/// Tells of an event at `address`, by a call that changes the shadow of `slot` too. For `sync` mode.
#[inline(always)]
pub fn call(kind: u8, address: u64, size: u64, cache: u16, slot: u64) {
    let word = state::current() & !0xffff | u64::from(cache);
    let number = if kind == record::ALLOCATED { call::ALLOCATED } else { call::FREED };
    host::hypercall(number, address, size, word, slot);
}

/// Tells of an event at `address`; `fp` is the frame whose caller is the first of the stack. For `ring` mode.
///
/// # Safety
/// As [`return_address`].
#[inline(always)]
pub unsafe fn tell(kind: u8, address: u64, size: u64, cache: u16, fp: u64) {
    let who = state::current();
    let cpu = state::cpu_of(who);
    let ring = &RINGS[cpu];
    let header = ring.header.load(Relaxed);
    if header.is_null() {
        return;
    }
    // SAFETY: `set_up` got memory of `records` records behind the header for this CPU alone, and `count` is below
    // `records`: it is raised by one below, and the VMM sets it to 0 in a drain.
    unsafe {
        let count = &raw mut (*header).count;
        let mut n = count.read_volatile();
        if n >= ring.records.load(Relaxed) {
            host::hypercall(call::RING_DRAIN, cpu as u64, 0, 0, 0);
            n = 0;
        }
        let to = header.add(1).cast::<Record>().add(n as usize);
        (*to).depth = walk(fp, TEXT_BASE.load(Relaxed), &mut (*to).frames);
        (*to).kind = kind;
        (*to).cache = cache;
        (*to).task = (who >> 32) as u32;
        (*to).address = address;
        (*to).size = u32::try_from(size).unwrap_or(u32::MAX);
        (*to).sequence = SEQUENCE.fetch_add(1, Relaxed);
        core::sync::atomic::compiler_fence(Release);
        count.write_volatile(n + 1);
    }
}
