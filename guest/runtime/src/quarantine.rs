//! The quarantine: freed memory waits before its allocator gets it back, so that uses of it are
//! found for longer.
//!
//! The VMM keeps the queue. It sees each free anyway, so the queue costs the guest neither memory
//! nor instructions. The record of such a free has the bytes of its slot and the number of its
//! allocator. At drains of the ring the VMM evicts some of the memory; the guest then fetches a
//! list of it, and calls the allocators' release functions.
//!
//! Memory must not leave before its free has poisoned it. So the record of such a free becomes
//! visible after that. A report of another CPU on that memory waits for the record
//! ([`ring::wait_for_others`]).

use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{
    AtomicPtr, AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use umbra_shadow::abi::{CallNumber, Features, Released};
use umbra_shadow::runtime::ReleaseFn;

use crate::cpu::without_interrupts;
use crate::settings::batch;
use crate::{host, ring, state};

/// Most allocators, with number 0, which is none.
const ALLOCATORS: usize = 64;

struct Allocator {
    release: AtomicPtr<()>,
    context: AtomicPtr<c_void>,
}

static ALLOCATOR: [Allocator; ALLOCATORS] = [const {
    Allocator { release: AtomicPtr::new(null_mut()), context: AtomicPtr::new(null_mut()) }
}; ALLOCATORS];
static ALLOCATOR_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Whether a free goes through the quarantine. Slots that are larger than a batch do not.
#[inline(always)]
pub fn accepts(allocator: u8, slot: u64) -> bool {
    allocator != 0 && slot.wrapping_sub(1) < batch()
}

/// Numbers an allocator. 0 if there is no quarantine, or no number left.
pub fn add(release: ReleaseFn, context: *mut c_void) -> u8 {
    let actor = state::current();
    let (entries, _) = ring::of(actor).released.entries(state::cpu_of(actor));
    let accepted = || host::hypercall(CallNumber::Quarantine, 0, entries as u64, 0, 0);
    if batch() == 0 || host::is_error(accepted()) {
        return 0;
    }
    let taken =
        ALLOCATOR_COUNT.fetch_update(Relaxed, Relaxed, |n| (n + 1 < ALLOCATORS).then_some(n + 1));
    let Ok(n) = taken else { return 0 };
    let allocator = &ALLOCATOR[n + 1];
    allocator.context.store(context, Relaxed);
    allocator.release.store(release as *mut (), Release);
    (n + 1) as u8
}

/// Returns memory to its allocators: the memory that was evicted, or all of the quarantine. The
/// result is the number of objects. The caller holds no lock that a release function takes.
#[cold]
#[inline(never)]
pub fn drain(all: bool) -> u64 {
    let actor = state::current();
    let buffer = &ring::of(actor).released;
    if all && state::mode().has(Features::RING) {
        // Then the VMM has seen all frees.
        without_interrupts(|| {
            let actor = state::current();
            ring::of(actor).drain(actor);
        });
    }
    if !buffer.claim() {
        // A release function or an interrupt handler has freed something; or this thread has moved
        // to another CPU, and somebody else uses the buffer.
        return 0;
    }
    let (entries, len) = buffer.entries(state::cpu_of(actor));
    let mut released = 0;
    let mut n = buffer.take_pending();
    loop {
        for i in 0..n.min(len) {
            // SAFETY: the VMM has filled that many entries, and nobody else uses them while the
            // buffer is claimed.
            give_back(unsafe { entries.add(i as usize).read_volatile() });
        }
        released += n;
        // After a drain of the ring there is more only if this list was full. In `sync` mode
        // nothing was fetched before.
        if released != 0 && n < len && !all {
            break;
        }
        n = host::hypercall(CallNumber::Quarantine, u64::from(all), entries as u64, len, 0);
        if n == 0 || host::is_error(n) {
            break;
        }
    }
    buffer.unclaim();
    released
}

#[inline(always)]
fn give_back(memory: Released) {
    let allocator = &ALLOCATOR[usize::from(memory.owner.allocator) % ALLOCATORS];
    let release = allocator.release.load(Acquire);
    if !release.is_null() {
        // SAFETY: `add` stores only null or a `ReleaseFn`.
        let release: ReleaseFn = unsafe { core::mem::transmute(release) };
        let context = allocator.context.load(Relaxed);
        release(memory.address, memory.slot.into(), memory.owner.note, context);
    }
}
