//! Umbra for Rust kernels: a safe face of the guest runtime.
//!
//! A kernel [`discover`]s Umbra, maps what [`Offer::mappings`] lists for each of its linear
//! regions, calls [`start`], and lets its allocators say what they do ([`alloc`], [`free`]), or
//! wraps a `GlobalAlloc` in [`Checked`]. On a machine without Umbra all of this does nothing.
#![no_std]

mod checked;
mod ffi;

pub use checked::Checked;
pub use umbra_shadow::runtime::{CurrentFn, Mapping, Offer, Region, ReleaseFn, Trap};
pub use umbra_shadow::{abi, codes};

/// Looks for Umbra. `features` is 0 where there is none, or where it keeps no shadow.
pub fn discover() -> Offer {
    let mut offer = Offer::default();
    // SAFETY: fills the offer; CPUID and a port write that is only made when Umbra was found.
    unsafe { ffi::umbra_discover(&mut offer) };
    offer
}

/// What [`start`] needs to know of a kernel.
pub struct Config<'a> {
    /// The linear regions, whose [`Offer::mappings`] are mapped.
    pub regions: &'a [Region],
    /// Where return addresses lie.
    pub text: core::ops::Range<u64>,
    /// 64-byte aligned, zeroed memory in a region for the first CPU's ring.
    pub ring: &'static mut [u8],
    /// Tells CPU and task.
    pub current: Option<CurrentFn>,
}

/// Why checks could not be turned on.
#[derive(Clone, Copy, Debug)]
pub enum StartError {
    /// The region was refused, by the VMM or because there are too many.
    Region(Region),
    /// The ring's memory was refused.
    Ring,
}

/// Turns checks on. Does nothing when `offer` has none.
///
/// # Errors
/// A region or the ring was refused; checks stay off.
///
/// # Safety
/// Shadow is mapped for all regions, the ring is used for nothing else, and no other CPU runs yet.
pub unsafe fn start(offer: &Offer, config: Config) -> Result<(), StartError> {
    if !offer.checks() {
        return Ok(());
    }
    // SAFETY: the caller's promises are those of the C functions.
    unsafe {
        for region in config.regions {
            if !ffi::umbra_region_add(region.start, region.bytes, region.gpa) {
                return Err(StartError::Region(*region));
            }
        }
        let ring = config.ring;
        if offer.rings()
            && !ffi::umbra_ring_setup(
                0,
                ring.as_mut_ptr().cast(),
                ring.len() as u64,
                config.text.start,
            )
        {
            return Err(StartError::Ring);
        }
        ffi::umbra_activate(offer.features, config.text.end, config.current);
    }
    Ok(())
}

/// Asks for shadow of its own for virtual memory that maps single pages, which come and go
/// (vmalloc): `bytes` from `start` on, both multiples of 4096; at most [`Offer::virtual_bytes`] in
/// all. All of it is poisoned with [`codes::VMALLOC_INVALID`] until an allocator hands it out by
/// [`alloc`]. Returns it as a region, whose [`Offer::mappings`] are to be mapped before the memory
/// is used: once, for all that ever comes and goes there. `None` when it is refused, or `offer` has
/// no checks.
pub fn add_virtual(offer: &Offer, start: u64, bytes: u64) -> Option<Region> {
    // SAFETY: takes any values.
    let gpa = if offer.checks() { unsafe { ffi::umbra_virtual_add(start, bytes) } } else { 0 };
    (gpa != 0).then_some(Region { start, bytes, gpa })
}

/// Gives another CPU its ring. To be called before that CPU runs code that allocates; without a
/// ring its allocations and frees are not told. False when it was refused. Does nothing when
/// `offer` wants no rings.
///
/// # Safety
/// [`start`] was called, with the same `text`. `ring` is 64-byte aligned, zeroed memory in a
/// region, and used for nothing else.
pub unsafe fn add_cpu(
    offer: &Offer,
    cpu: u16,
    text: &core::ops::Range<u64>,
    ring: &'static mut [u8],
) -> bool {
    // SAFETY: the caller's promises are those of the C function.
    !offer.checks()
        || !offer.rings()
        || unsafe {
            ffi::umbra_ring_setup(
                cpu.into(),
                ring.as_mut_ptr().cast(),
                ring.len() as u64,
                text.start,
            )
        }
}

macro_rules! safe_face {
    ($($(#[$doc:meta])* $name:ident = $ffi:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name($($arg: $type),*) $(-> $result)? {
            // SAFETY: the function takes any values; it touches shadow of added regions and the
            // ring only.
            unsafe { ffi::$ffi($($arg),*) }
        }
    )*};
}

safe_face! {
    /// Makes `bytes` from `address` on inaccessible, with a code of [`codes`].
    poison = umbra_poison(address: u64, bytes: u64, code: u8);
    /// Makes `bytes` from `address` on accessible.
    unpoison = umbra_unpoison(address: u64, bytes: u64);
    /// Checks a range by hand; false when it was reported.
    check = umbra_check(address: u64, bytes: u64, write: bool) -> bool;
    /// Whether the byte at `address` is known to be inaccessible. Nothing is reported. False where
    /// there is no shadow.
    is_poisoned = umbra_is_poisoned(address: u64) -> bool;
    /// An allocator hands out `bytes` at `address`, the start of a slot of `slot` bytes.
    alloc = umbra_alloc(address: u64, bytes: u64, slot: u64, redzone: u8, cache: u16);
    /// An allocator takes back `address`, whose object starts at `start` in a slot of `slot` bytes.
    /// False, after a report, when that is a double or an invalid free: the allocator must leave it
    /// alone then.
    free = umbra_free(address: u64, start: u64, slot: u64, code: u8) -> bool;
    /// As [`free`], but the memory waits in the quarantine, if there is one for `allocator`
    /// ([`quarantine_add`]): then the result is false too, and the allocator's release function
    /// gets `start`, `slot` and `note` later. Release functions are called from here, for other
    /// memory: the caller holds no lock that they take.
    free_later = umbra_free_later(address: u64, start: u64, slot: u64, code: u8, allocator: u8, note: u8) -> bool;
    /// Gives all that waits in the quarantine back to its allocators, for one that has no memory
    /// left. Returns how many objects came back. The caller holds no lock that a release function
    /// takes.
    quarantine_drain = umbra_quarantine_drain() -> u64;
    /// Bytes of redzone that an allocator shall put behind objects of `object` bytes: the same
    /// during a whole run. 0 without Umbra, or where redzones are switched off; then memory is laid
    /// out as without checks.
    redzone = umbra_redzone(object: u64) -> u64;
    /// Work is made that has to do with the object that holds `address`, and will run later: it may
    /// free it, for instance. A finding on the object tells the stack of the caller. The last two
    /// are kept.
    aux_stack = umbra_aux_stack(address: u64);
    /// Reports a free of something that no allocator knows.
    invalid_free = umbra_invalid_free(address: u64);
    /// Reports a bad access that the kernel found itself, by a fault; `trap` holds the registers at
    /// the fault.
    report = umbra_report(address: u64, bytes: u64, write: bool, trap: &Trap);
    /// Bad accesses and frees seen so far on all CPUs, reported or not: for a kernel's tests of its
    /// own.
    violations = umbra_violations() -> u64;
    /// A thread's stack comes into being.
    stack_alloc = umbra_stack_alloc(start: u64, bytes: u64);
    /// A thread's stack is given back.
    stack_free = umbra_stack_free(start: u64, bytes: u64);
    /// Ends the guest, 0 for success. Needs Umbra underneath.
    exit = umbra_exit(code: u64) -> !;
    /// Ends the guest after a panic. Needs Umbra underneath.
    exit_panic = umbra_exit_panic() -> !;
    /// Ends the guest after a CPU exception. Needs Umbra underneath.
    exit_fault = umbra_exit_fault(vector: u32, error: u32, rip: u64, address: u64) -> !;
}

/// Names a cache whose objects have `object` bytes.
pub fn name_cache(id: u16, name: &str, object: u64) {
    // SAFETY: pointer and length are a string's.
    unsafe { ffi::umbra_name_cache(id, name.as_ptr(), name.len() as u64, object) }
}

/// Names a task.
pub fn name_task(id: u32, name: &str) {
    // SAFETY: pointer and length are a string's.
    unsafe { ffi::umbra_name_task(id, name.as_ptr(), name.len() as u64) }
}

/// Numbers an allocator for [`free_later`]. `release` gets what has waited long enough, on any CPU,
/// in whatever frees. 0, which is no allocator's number, where there is no quarantine. To be called
/// after [`start`].
///
/// # Safety
/// `release` may be called with `context` until the guest ends.
pub unsafe fn quarantine_add(release: ReleaseFn, context: *mut core::ffi::c_void) -> u8 {
    // SAFETY: the caller's promise.
    unsafe { ffi::umbra_quarantine_add(release, context) }
}

/// Runs `work` with this CPU's reports off: for code that uses poisoned memory on purpose.
pub fn suppressed<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: counts up and down on this CPU.
    unsafe { ffi::umbra_suppress_begin() };
    let result = work();
    // SAFETY: as above.
    unsafe { ffi::umbra_suppress_end() };
    result
}

/// Lets a page-fault handler ask whether the fault was a check's, of an address without shadow. If
/// so the access has been reported, `trap` is where to go on, and true comes back.
///
/// # Safety
/// `trap` holds the registers at the fault.
pub unsafe fn page_fault(trap: &mut Trap) -> bool {
    // SAFETY: the caller's promise.
    unsafe { ffi::umbra_page_fault(trap) }
}
