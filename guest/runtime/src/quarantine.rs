//! Freed memory that waits before its allocator gets it back, so that uses of it are found for
//! longer.
//!
//! The VMM keeps the queue: it hears of each free anyway, and costs the guest neither memory nor
//! instructions. A free that waits is told with the bytes of its slot and the number of its
//! allocator. From time to time, at drains of the ring, the VMM says that some of it is due; the
//! guest then fetches a list, and calls the allocators' release functions.
//!
//! Memory must not come out before its free has poisoned it. So a CPU tells of a free and poisons
//! the memory with interrupts off, and the VMM keeps back the last free of every CPU but the one
//! that asks for a drain.

use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{
    AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};

use umbra_shadow::abi::{Released, call, features, redzone};

use crate::cpu::without_interrupts;
use crate::host::Offer;
use crate::{host, ring, state};

/// Gives memory back to its allocator: address, bytes of the slot, the note of the free, and the
/// allocator's context.
pub type ReleaseFn = extern "C" fn(u64, u64, u8, *mut c_void);

/// Most allocators, number 0 included, which is none.
const ALLOCATORS: usize = 64;
/// What is fetched at a time where there is no ring to hold it.
const FEW: usize = 8;

static BATCH: AtomicU64 = AtomicU64::new(0);
static REDZONE: AtomicU32 = AtomicU32::new(UNKNOWN);
/// Nobody has asked the VMM yet.
const UNKNOWN: u32 = u32::MAX;

struct Allocator {
    release: AtomicPtr<()>,
    context: AtomicPtr<c_void>,
}

static ALLOCATOR: [Allocator; ALLOCATORS] = [const {
    Allocator { release: AtomicPtr::new(null_mut()), context: AtomicPtr::new(null_mut()) }
}; ALLOCATORS];
static ALLOCATOR_COUNT: AtomicUsize = AtomicUsize::new(0);

struct Fetched(UnsafeCell<[Released; FEW]>);

// SAFETY: each is used by whoever has set its CPU's `releasing`.
unsafe impl Sync for Fetched {}

static FETCHED: [Fetched; state::CPUS] = [const {
    Fetched(UnsafeCell::new([Released { address: 0, slot: 0, wait: 0, reserved: 0 }; FEW]))
}; state::CPUS];

/// Takes note of the settings that the VMM tells, if there is one that keeps shadow.
pub fn set(offer: Option<&Offer>) {
    let offer = offer.filter(|offer| offer.features & (features::FULL | features::PER_PAGE) != 0);
    BATCH.store(offer.map_or(0, |offer| offer.quarantine_batch), Relaxed);
    REDZONE.store(offer.map_or(redzone::OFF, |offer| offer.redzone.min(redzone::MAX)), Relaxed);
}

/// Bytes that a CPU may put into the quarantine between two drains. 0 if there is none.
#[inline(always)]
pub fn batch() -> u64 {
    BATCH.load(Relaxed)
}

/// Whether a free goes through the quarantine. Slots that are larger than a batch do not.
#[inline(always)]
pub fn takes(allocator: u8, slot: u64) -> bool {
    allocator != 0 && slot.wrapping_sub(1) < batch()
}

/// Bytes of redzone behind an object. By default KASAN's (`optimal_redzone`, `mm/kasan/common.c`):
/// objects with their redzones fill 32, 64, 128, ... bytes, where a redzone is a quarter of that,
/// or less for large ones.
///
/// The setting holds for the whole run, also for what is allocated before checks are on: an
/// allocator may compute it again when the object is freed.
pub fn redzone_of(object: u64) -> u64 {
    const MOST: [(u64, u64); 7] = [
        (64, 16),
        (128, 32),
        (512, 64),
        (4096, 128),
        (1 << 14, 256),
        (1 << 15, 512),
        (1 << 16, 1024),
    ];
    if REDZONE.load(Relaxed) == UNKNOWN {
        set(host::discover().as_ref());
    }
    match REDZONE.load(Relaxed) {
        redzone::ADAPTIVE => {
            MOST.iter().find(|(room, redzone)| object <= room - redzone).map_or(2048, |fits| fits.1)
        }
        bytes => u64::from(bytes),
    }
}

/// Numbers an allocator. 0 if there is no quarantine, or no number left.
pub fn add(release: ReleaseFn, context: *mut c_void) -> u8 {
    let (to, _) = fetched(state::cpu_of(state::current()));
    if batch() == 0 || host::is_error(host::hypercall(call::QUARANTINE, 0, to as u64, 0, 0)) {
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

/// Where the VMM puts what leaves the quarantine, and how many fit.
pub fn fetched(cpu: usize) -> (*mut Released, u64) {
    let ring = ring::of((cpu as u64) << 16);
    match ring.released.load(Relaxed) {
        to if to.is_null() => (FETCHED[cpu].0.get().cast(), FEW as u64),
        to => (to, ring.released_fit.load(Relaxed)),
    }
}

/// Gives what was fetched, what is due, or all that can be had, back to its allocators. Returns how
/// many objects. The caller holds no lock that a release function takes.
#[cold]
#[inline(never)]
pub fn release(all: bool) -> u64 {
    let cpu = state::cpu_of(state::current());
    let ring = ring::of((cpu as u64) << 16);
    if all && state::rings() {
        // So that the VMM knows of all that waits.
        without_interrupts(|| {
            let who = state::current();
            ring::of(who).drain(who);
        });
    }
    if ring.releasing.swap(true, Acquire) {
        // A release function has freed something, or an interrupt's handler has; or another CPU has
        // taken this thread over.
        return 0;
    }
    let (to, fit) = fetched(cpu);
    let mut released = 0;
    let mut n = ring.due.swap(0, Relaxed);
    loop {
        for i in 0..n.min(fit) {
            // SAFETY: the VMM has filled so many of them, and nobody else works on them until
            // `releasing` is false again.
            let memory = unsafe { to.add(i as usize).read_volatile() };
            give_back(memory);
        }
        released += n;
        // After a drain there is more only if this was all that fits. In `sync` mode nothing is
        // fetched before.
        if released != 0 && n < fit && !all {
            break;
        }
        n = host::hypercall(call::QUARANTINE, u64::from(all), to as u64, fit, 0);
        if n == 0 || host::is_error(n) {
            break;
        }
    }
    ring.releasing.store(false, Release);
    released
}

#[inline(always)]
fn give_back(memory: Released) {
    let allocator = &ALLOCATOR[memory.wait as usize % ALLOCATORS];
    let release = allocator.release.load(Acquire);
    if !release.is_null() {
        // SAFETY: `add` stores only null or a `ReleaseFn`.
        let release: ReleaseFn = unsafe { core::mem::transmute(release) };
        release(
            memory.address,
            memory.slot.into(),
            (memory.wait >> 8) as u8,
            allocator.context.load(Relaxed),
        );
    }
}
