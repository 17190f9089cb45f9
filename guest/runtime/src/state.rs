//! The runtime's state: the mode, the regions, the current CPU and task.

use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed,
};

use umbra_shadow::abi::Features;
use umbra_shadow::group::GROUP_SHIFT;
use umbra_shadow::runtime::CurrentFn;

use crate::INLINE;

/// Most regions a kernel may have.
pub const REGIONS: usize = 16;
/// The bits of a place in its group.
const GROUP_MASK: u64 = (1 << GROUP_SHIFT) - 1;
/// Most CPUs whose rings and suppression counts are kept.
pub const CPUS: usize = 64;

static MODE: AtomicU32 = AtomicU32::new(0);
static CURRENT: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static REGION_COUNT: AtomicUsize = AtomicUsize::new(0);
static REGION: [RegionState; REGIONS] = [const {
    RegionState {
        first: AtomicU64::new(u64::MAX),
        last: AtomicU64::new(0),
        to_place: AtomicU64::new(0),
    }
}; REGIONS];
/// The groups from this place on have memory of no region but the first, if they have any of that
/// one.
static ALIASED_END: AtomicU64 = AtomicU64::new(0);
static SUPPRESSED: [AtomicU32; CPUS] = [const { AtomicU32::new(0) }; CPUS];
static REPORTING: [AtomicBool; CPUS] = [const { AtomicBool::new(false) }; CPUS];

static VIOLATIONS: AtomicU64 = AtomicU64::new(0);

/// A region, as its users need it.
struct RegionState {
    first: AtomicU64,
    /// A region may end at the top of memory, so its last byte is kept, not its end.
    last: AtomicU64,
    /// What is added to an address to get its place.
    to_place: AtomicU64,
}

impl RegionState {
    /// The place of `first..=last`, if this region has all of it.
    #[inline(always)]
    fn place(&self, first: u64, last: u64) -> Option<u64> {
        let holds =
            self.first.load(Relaxed) <= first && last <= self.last.load(Relaxed) && first <= last;
        holds.then(|| if INLINE { first.wrapping_add(self.to_place.load(Relaxed)) } else { first })
    }

    /// The first and the last place of the region, in a kernel that is checked inline.
    fn places(&self) -> [u64; 2] {
        let to_place = self.to_place.load(Relaxed);
        [&self.first, &self.last].map(|at| at.load(Relaxed).wrapping_add(to_place))
    }
}

/// The features in force; none as long as checks are off.
#[inline]
pub fn mode() -> Features {
    Features::from_bits(MODE.load(Relaxed))
}

/// Sets the features in force.
pub fn set_mode(features: Features) {
    MODE.store(features.bits(), Relaxed);
}

/// Sets the kernel's function that returns CPU and task.
pub fn set_current(current: Option<CurrentFn>) {
    CURRENT.store(current.map_or(core::ptr::null_mut(), |f| f as *mut ()), Relaxed);
}

/// CPU and task that run now, as the ABI's [`Actor`](umbra_shadow::abi::Actor) in a register.
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

/// The CPU of an actor, below [`CPUS`].
#[inline]
pub fn cpu_of(actor: u64) -> usize {
    (actor >> 16) as u16 as usize % CPUS
}

/// Whether there is room for another region.
pub fn has_room() -> bool {
    REGION_COUNT.load(Relaxed) < REGIONS
}

/// The place behind the group of a place.
fn group_end(place: u64) -> u64 {
    (place | GROUP_MASK).wrapping_add(1)
}

/// Adds a region of memory that is mapped one to one, or of virtual memory, whose start has this
/// key. False when the table is full.
pub fn add_region(start: u64, bytes: u64, key: u64) -> bool {
    let n = REGION_COUNT.load(Relaxed);
    let Some(region) = REGION.get(n) else { return false };
    region.to_place.store(key.wrapping_sub(start), Relaxed);
    region.first.store(start, Relaxed);
    region.last.store(start.wrapping_add(bytes - 1), Relaxed);
    let ([first, last], [_, last_of_first]) = (region.places(), REGION[0].places());
    if n == 0 {
        ALIASED_END.store(group_end(first), Relaxed);
    } else if first < group_end(last_of_first) {
        ALIASED_END.fetch_max(group_end(last), Relaxed);
    }
    REGION_COUNT.store(n + 1, Relaxed);
    true
}

/// Where the shadow of `first..=last` is looked up, if all of it is in one region: by its address,
/// or in a kernel that is checked inline by its key.
#[inline(always)]
pub fn place(first: u64, last: u64) -> Option<u64> {
    match place_in_first(first, last) {
        None => place_in_others(first, last),
        some => some,
    }
}

#[inline]
fn place_in_others(first: u64, last: u64) -> Option<u64> {
    let n = REGION_COUNT.load(Relaxed);
    REGION.iter().take(n).skip(1).find_map(|region| region.place(first, last))
}

/// [`place`] for the first region only, where most objects are.
#[inline(always)]
pub fn place_in_first(first: u64, last: u64) -> Option<u64> {
    REGION[0].place(first, last)
}

/// The only address of the group at this place, if it has memory of the first region, and of no
/// other one.
#[inline(always)]
pub fn only_address(place: u64) -> Option<u64> {
    let address = place.wrapping_sub(REGION[0].to_place.load(Relaxed));
    (place >= ALIASED_END.load(Relaxed) && address <= REGION[0].last.load(Relaxed))
        .then_some(address)
}

/// The addresses of the group at this place in all regions that have memory of it.
pub fn addresses(place: u64) -> impl Iterator<Item = u64> {
    let n = REGION_COUNT.load(Relaxed);
    REGION.iter().take(n).filter_map(move |region| {
        let [first, last] = region.places();
        (first <= place | GROUP_MASK && place <= last)
            .then(|| place.wrapping_sub(region.to_place.load(Relaxed)))
    })
}

/// Whether the kernel tells its CPUs apart.
pub fn knows_cpu() -> bool {
    !CURRENT.load(Relaxed).is_null()
}

/// Turns reports on this CPU off, or on again. Calls nest.
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

/// Counts a bad access, and runs `report`. Does not run it while this CPU's reports are off, or
/// inside another report.
pub fn reporting(actor: u64, report: impl FnOnce()) {
    VIOLATIONS.fetch_add(1, Relaxed);
    let cpu = cpu_of(actor);
    if SUPPRESSED[cpu].load(Relaxed) != 0 || REPORTING[cpu].swap(true, Relaxed) {
        return;
    }
    report();
    REPORTING[cpu].store(false, Relaxed);
}
