//! What the runtime knows: the mode, the regions, and whom to ask for the current task.

use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed,
};

use umbra_shadow::abi::features;

/// Most regions a kernel may have.
pub const REGIONS: usize = 16;
/// Most CPUs whose rings and suppression counts are kept.
pub const CPUS: usize = 64;

/// Feature bits in force; 0 as long as checks are off.
static MODE: AtomicU32 = AtomicU32::new(0);
static CURRENT: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static REGION_COUNT: AtomicUsize = AtomicUsize::new(0);
static REGION: [(AtomicU64, AtomicU64); REGIONS] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; REGIONS];
static SUPPRESSED: [AtomicU32; CPUS] = [const { AtomicU32::new(0) }; CPUS];
static REPORTING: [AtomicBool; CPUS] = [const { AtomicBool::new(false) }; CPUS];

static VIOLATIONS: AtomicU64 = AtomicU64::new(0);

/// The features in force.
pub fn mode() -> u32 {
    MODE.load(Relaxed)
}

/// Puts features in force.
pub fn set_mode(features: u32) {
    MODE.store(features, Relaxed);
}

/// Whether the guest writes the shadow itself.
pub fn rings() -> bool {
    mode() & features::RING != 0
}

/// Whether each change is one hypercall.
pub fn sync() -> bool {
    mode() & features::SYNC != 0
}

/// Who runs here: CPU in bits 16..32, task in bits 32..64, as the ABI passes it.
pub type CurrentFn = extern "C" fn() -> u64;

/// Sets whom to ask for CPU and task.
pub fn set_current(current: Option<CurrentFn>) {
    CURRENT.store(current.map_or(core::ptr::null_mut(), |f| f as *mut ()), Relaxed);
}

/// CPU and task that run now.
#[inline]
pub fn current() -> u64 {
    let f = CURRENT.load(Relaxed);
    if f.is_null() {
        return 0;
    }
    // SAFETY: `set_current` stores only null or a `CurrentFn`.
    let f: CurrentFn = unsafe { core::mem::transmute(f) };
    f()
}

/// The CPU out of [`current`]'s word, bounded by [`CPUS`].
#[inline]
pub fn cpu_of(who: u64) -> usize {
    (who >> 16) as u16 as usize % CPUS
}

/// Whether another region can be remembered.
pub fn has_room() -> bool {
    REGION_COUNT.load(Relaxed) < REGIONS
}

/// Remembers a region, of memory that is mapped one to one or of virtual memory; false when the
/// table is full.
pub fn add_region(start: u64, bytes: u64) -> bool {
    let n = REGION_COUNT.load(Relaxed);
    let Some((s, e)) = REGION.get(n) else { return false };
    s.store(start, Relaxed);
    // The last region may end at the very top; its last byte is kept, not its end.
    e.store(start.wrapping_add(bytes - 1), Relaxed);
    REGION_COUNT.store(n + 1, Relaxed);
    true
}

/// Whether all of `first..=last` lies in one region, so that shadow for it is mapped.
#[inline]
pub fn in_region(first: u64, last: u64) -> bool {
    let n = REGION_COUNT.load(Relaxed);
    REGION
        .iter()
        .take(n)
        .any(|(s, e)| s.load(Relaxed) <= first && last <= e.load(Relaxed) && first <= last)
}

/// [`in_region`] for the first region only, which is where most objects are.
#[inline(always)]
pub fn in_first(first: u64, last: u64) -> bool {
    let (s, e) = &REGION[0];
    // Without any region both are 0, and the range is not in it.
    s.load(Relaxed) <= first && last <= e.load(Relaxed) && first <= last
}

/// Turns reports of this CPU off (`+1`) or on again (`-1`), nesting.
pub fn suppress(on: bool) {
    let count = &SUPPRESSED[cpu_of(current())];
    if on {
        count.fetch_add(1, Relaxed);
    } else {
        count.fetch_sub(1, Relaxed);
    }
}

/// Bad accesses that the checks have seen, reported or not.
pub fn violations() -> u64 {
    VIOLATIONS.load(Relaxed)
}

/// Counts a bad access, and runs `report` unless reports are off on this CPU or one is being made
/// already.
pub fn reporting(who: u64, report: impl FnOnce()) {
    VIOLATIONS.fetch_add(1, Relaxed);
    let cpu = cpu_of(who);
    if SUPPRESSED[cpu].load(Relaxed) != 0 || REPORTING[cpu].swap(true, Relaxed) {
        return;
    }
    report();
    REPORTING[cpu].store(false, Relaxed);
}
