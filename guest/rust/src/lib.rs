//! Umbra for Rust kernels: safe bindings to the guest runtime.
//!
//! A kernel calls [`discover`], maps the [`Offer::mappings`] of each of its linear regions, and
//! calls [`start`]. Its allocators then call [`alloc`] and [`free`], or it wraps a `GlobalAlloc` in
//! [`Checked`]. On a machine without Umbra all of this does nothing.
#![no_std]
#![warn(clippy::missing_errors_doc)]

mod checked;
mod ffi;

pub use checked::Checked;
pub use umbra_shadow::runtime::{CurrentFn, ForgetFn, Mapping, Offer, Region, ReleaseFn, Trap};
pub use umbra_shadow::{abi, codes};

/// Looks for Umbra. `features` is 0 where there is none, or where it keeps no shadow.
pub fn discover() -> Offer {
    let mut offer = Offer::default();
    // SAFETY: fills the offer; CPUID and a port write that is only made when Umbra was found.
    unsafe { ffi::umbra_discover(&mut offer) };
    offer
}

/// A kernel, for [`start`].
pub struct StartConfig<'a> {
    /// The linear regions, whose [`Offer::mappings`] are mapped.
    pub regions: &'a [Region],
    /// The addresses of the kernel's code.
    pub text: core::ops::Range<u64>,
    /// 64-byte aligned, zeroed memory in a region for the first CPU's ring.
    pub ring: &'static mut [u8],
    /// Returns CPU and task.
    pub current: Option<CurrentFn>,
}

/// Why checks could not be turned on.
#[derive(Clone, Copy, Debug)]
pub enum StartError {
    /// The region was refused, by the VMM or because there are too many.
    Region(Region),
    /// The ring's memory was refused.
    Ring,
    /// The compiler checks inline, and the VMM refused the page tables of the check shadow, or
    /// CR4.PGE or EFER.NXE is clear.
    Tables,
}

/// Turns checks on. Does nothing when `offer` has none.
///
/// # Errors
/// A region, the ring or the page tables were refused; checks stay off.
///
/// # Safety
/// Shadow is mapped for all regions, or the compiler checks inline, and this maps it. The ring is
/// used for nothing else, and no other CPU runs yet.
pub unsafe fn start(offer: &Offer, config: StartConfig) -> Result<(), StartError> {
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
        if ffi::umbra_activate(offer.features, config.text.end, config.current) {
            Ok(())
        } else {
            Err(StartError::Tables)
        }
    }
}

/// Asks for shadow for virtual memory that maps single pages, which come and go (vmalloc): `bytes`
/// from `start` on, both multiples of 4096; at most [`Offer::virtual_bytes`] in all. All of it is
/// poisoned with [`codes::VMALLOC_INVALID`] until an allocator calls [`alloc`]. Returns it as a
/// region. The kernel maps its [`Offer::mappings`] once, before it uses the memory. `None` when the
/// request is refused, or `offer` has no checks.
pub fn add_virtual(offer: &Offer, start: u64, bytes: u64) -> Option<Region> {
    // SAFETY: takes any values.
    let gpa = if offer.checks() { unsafe { ffi::umbra_virtual_add(start, bytes) } } else { 0 };
    (gpa != 0).then_some(Region { start, bytes, gpa })
}

/// Gives another CPU its ring, before that CPU runs code that allocates. The allocations and frees
/// of a CPU without a ring are not recorded. False when it was refused. Does nothing when `offer`
/// wants no rings.
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

macro_rules! safe_bindings {
    ($(
        $(#[$doc:meta])*
        $name:ident = $ffi:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)?;
    )*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name($($arg: $type),*) $(-> $result)? {
            // SAFETY: the function takes any values; it touches shadow of added regions and the
            // ring only.
            unsafe { ffi::$ffi($($arg),*) }
        }
    )*};
}

safe_bindings! {
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
    /// False, after a report, when that is a double or an invalid free: the allocator must not free
    /// it then.
    free = umbra_free(address: u64, start: u64, slot: u64, code: u8) -> bool;
    /// As [`free`], but the memory goes into the quarantine, if there is one for `allocator`
    /// ([`quarantine_add`]). Then the result is false too, and the allocator's release function
    /// gets `start`, `slot` and `note` later. Release functions are called from here, for other
    /// memory: the caller holds no lock that they take.
    free_later = umbra_free_later(
        address: u64,
        start: u64,
        slot: u64,
        code: u8,
        allocator: u8,
        note: u8,
    ) -> bool;
    /// Empties the quarantine, for an allocator that has no memory left. Returns the number of
    /// objects that their allocators got back. The caller holds no lock that a release function
    /// takes.
    quarantine_drain = umbra_quarantine_drain() -> u64;
    /// Bytes of redzone that an allocator puts behind objects of `object` bytes. The number is the
    /// same during a whole run. 0 without Umbra, or where redzones are switched off: then memory is
    /// laid out as without checks.
    redzone = umbra_redzone(object: u64) -> u64;
    /// Work on the object that holds `address` is queued, such as work that will free it. A finding
    /// on the object shows the stack of the caller. The last two stacks are kept.
    aux_stack = umbra_aux_stack(address: u64);
    /// Reports a free of something that no allocator knows.
    invalid_free = umbra_invalid_free(address: u64);
    /// Reports a bad access that the kernel found by a fault; `trap` holds the registers at the
    /// fault.
    report = umbra_report(address: u64, bytes: u64, write: bool, trap: &Trap);
    /// The number of bad accesses and frees so far on all CPUs, reported or not: for a kernel's own
    /// tests.
    violations = umbra_violations() -> u64;
    /// A thread gets a stack.
    stack_alloc = umbra_stack_alloc(start: u64, bytes: u64);
    /// A thread has ended, and nothing runs on its stack any more. The stack becomes inaccessible,
    /// until it is allocated again, becomes a stack again, or is unpoisoned. It may be freed.
    stack_free = umbra_stack_free(start: u64, bytes: u64);
    /// This CPU forgets translations of check shadow that other CPUs have changed. Each CPU calls
    /// this at its timer's tick, when it was idle, and when it switches to another task, and then
    /// finds what other CPUs have freed or poisoned as whole pages until now. It is a comparison if
    /// nothing has changed, or where the compiler makes calls.
    tick = umbra_tick();
    /// Sets what is called when a CPU forgets a translation of check shadow: for kernels that test
    /// themselves with page tables that lag behind.
    on_forget = umbra_on_forget(call: ForgetFn);
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

/// Numbers an allocator for [`free_later`]. `release` takes memory back from the quarantine. It
/// runs on any CPU, inside a call that frees. Returns 0, which is no allocator's number, where
/// there is no quarantine. Called after [`start`].
///
/// # Safety
/// `release` may be called with `context` until the guest ends.
pub unsafe fn quarantine_add(release: ReleaseFn, context: *mut core::ffi::c_void) -> u8 {
    // SAFETY: the caller's promise.
    unsafe { ffi::umbra_quarantine_add(release, context) }
}

/// Runs the constructors from `start` up to `end`, in order. Those that the compiler makes register
/// the redzones of global variables, so this comes after [`start`]. The linker script has them:
///
/// ```text
/// .init_array : {
///     constructors_start = .;
///     KEEP(*(SORT_BY_INIT_PRIORITY(.init_array.*) .init_array))
///     constructors_end = .;
/// }
/// ```
///
/// # Safety
/// Between the pointers there are functions that may be called, each once.
///
/// [`start`]: fn@start
pub unsafe fn run_constructors(start: *const extern "C" fn(), end: *const extern "C" fn()) {
    let mut next = start;
    while next < end {
        // SAFETY: the caller's promise.
        unsafe {
            (*next)();
            next = next.add(1);
        }
    }
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

/// A page-fault handler calls this first. If the fault was a check's, for an address without
/// shadow, the access is reported, `trap` is set to where the kernel goes on, and the result is
/// true.
///
/// # Safety
/// `trap` holds the registers at the fault.
pub unsafe fn page_fault(trap: &mut Trap) -> bool {
    // SAFETY: the caller's promise.
    unsafe { ffi::umbra_page_fault(trap) }
}

/// The address of a ready page-fault entry for an interrupt gate of 64-bit kernel code. It handles
/// faults as [`page_fault`] does; any other page fault ends the guest ([`exit_fault`]).
pub fn page_fault_entry() -> u64 {
    ffi::umbra_page_fault_entry as *const () as u64
}

/// The address of a ready double-fault entry, for a gate with a stack of its own (an IST entry). It
/// reports the bad access that led to the fault, if a check made it, or a stack that has grown into
/// poisoned memory, such as a guard page. Then it ends the guest ([`exit_fault`]). Without such an
/// entry the guest triple-faults, and on AMD's CPUs nothing of what it was doing is left.
pub fn double_fault_entry() -> u64 {
    ffi::umbra_double_fault_entry as *const () as u64
}
