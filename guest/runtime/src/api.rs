//! The calls a kernel makes: start-up, allocators, stacks, names, the end. All of them are C
//! functions named `umbra_*`; without Umbra underneath each is a quick no-op.

use core::ffi::c_void;

use umbra_shadow::abi::{self, access, call, exit, features, record};
use umbra_shadow::codes;

use crate::cpu::without_interrupts;
use crate::ring::{self, frame_pointer, return_address};
use crate::{checks, host, object, quarantine, shadow, state};

/// What the VMM offers, for the kernel to map.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Offer {
    /// `features` bits of the ABI; 0 without Umbra.
    pub features: u32,
    /// ABI version of the VMM.
    pub version: u32,
    /// Guest-physical start of the page-shadow window.
    pub page_window: u64,
    /// Its bytes; 0 if there is none.
    pub page_window_bytes: u64,
    /// Guest-physical start of the byte-shadow window.
    pub byte_window: u64,
    /// Its bytes; 0 if there is none.
    pub byte_window_bytes: u64,
    /// Bytes of virtual memory that [`umbra_virtual_add`] has shadow for.
    pub virtual_bytes: u64,
}

/// Looks for Umbra and says hello. Returns the features in `offer`, and 0 where there is no Umbra,
/// or one of another ABI version (then `offer.version` tells).
#[unsafe(no_mangle)]
pub extern "C" fn umbra_discover(offer: &mut Offer) -> u32 {
    *offer = Offer::default();
    let Some(found) = host::discover() else { return 0 };
    offer.version = found.version;
    if host::is_error(host::hypercall(call::HELLO, u64::from(abi::VERSION), 0, 0, 0)) {
        return 0;
    }
    offer.features = found.features;
    quarantine::set(Some(&found));
    (offer.page_window, offer.page_window_bytes) = found.page_window;
    (offer.byte_window, offer.byte_window_bytes) = found.byte_window;
    offer.virtual_bytes = found.virtual_bytes;
    offer.features
}

/// Says that `bytes` of guest-physical memory from `gpa` on are mapped one to one at `start`. Its
/// shadow must be mapped as well. False when a table is full or a value is refused.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_region_add(start: u64, bytes: u64, gpa: u64) -> bool {
    bytes != 0
        && !host::is_error(host::hypercall(call::REGION_ADD, start, bytes, gpa, 0))
        && state::add_region(start, bytes)
}

/// Asks for shadow of its own for virtual memory that maps single pages, which come and go: `bytes`
/// from `start` on, both multiples of 4096. All of it is poisoned with `VMALLOC_INVALID` until an
/// allocator hands it out. Returns a guest-physical address that stands for `start`, and 0 when it
/// is refused: the windows are mapped for it before the memory is used, as for a region that begins
/// there. Also after [`umbra_activate`].
#[unsafe(no_mangle)]
pub extern "C" fn umbra_virtual_add(start: u64, bytes: u64) -> u64 {
    if !state::has_room() {
        return 0;
    }
    let key = host::hypercall(call::VIRTUAL_ADD, start, bytes, 0, 0);
    if host::is_error(key) || !state::add_region(start, bytes) {
        return 0;
    }
    key
}

/// Hands over 64-byte aligned, zeroed memory for a CPU's ring, in an added region. `text_start` is
/// where the kernel's code starts, the same for all rings: stacks are recorded as distances from
/// it. Only needed when `features` has `RING`.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_ring_setup(
    cpu: u64,
    memory: *mut abi::RingHeader,
    bytes: u64,
    text_start: u64,
) -> bool {
    !host::is_error(ring::set_up(cpu, memory, bytes, text_start))
}

/// Turns the checks on. Windows are mapped, regions added and rings set up by now. The kernel's
/// code ends at `text_end`; `current` tells CPU and task (may be null).
///
/// # Safety
/// Shadow is mapped for all regions, and no other CPU runs yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umbra_activate(
    offered: u32,
    text_end: u64,
    current: Option<state::CurrentFn>,
) {
    ring::set_text_end(text_end);
    state::set_current(current);
    state::set_mode(offered);
    if offered & (features::PER_PAGE | features::FULL) != 0 {
        // SAFETY: the caller's promise.
        unsafe { checks::activate(offered) }
    }
}

/// Makes `bytes` from `address` on inaccessible.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_poison(address: u64, bytes: u64, code: u8) {
    shadow::poison(address, bytes, code);
}

/// Makes `bytes` from `address` on accessible.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_unpoison(address: u64, bytes: u64) {
    shadow::unpoison(address, bytes);
}

/// Checks a range by hand, as `__asan_loadN` does; false when it was reported.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_check(address: u64, bytes: u64, write: bool) -> bool {
    // SAFETY: this function's own frame.
    let ip = unsafe { return_address(frame_pointer()) };
    checks::check_range(address, bytes, if write { access::WRITE } else { access::READ }, ip)
}

/// Whether the byte at `address` is known to be inaccessible. Nothing is reported. False where
/// there is no shadow.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_is_poisoned(address: u64) -> bool {
    shadow::value(address) >= codes::POISON_MIN
}

/// An allocator hands out `bytes` at `address`, at the start of a slot of `slot` bytes: the object
/// becomes accessible, the rest of the slot gets `redzone` as code. `cache` is an id named by
/// [`umbra_name_cache`], or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_alloc(address: u64, bytes: u64, slot: u64, redzone: u8, cache: u16) {
    let mode = state::mode();
    if mode & features::RING != 0 {
        let (kind, size) = if object::allocated(mode, address, bytes, slot, redzone) {
            in_slot(bytes, slot)
        } else {
            allocated_slowly(address, bytes, slot, redzone)
        };
        // SAFETY: this function's own frame.
        unsafe { ring::tell(ring::head(kind, cache), address, size, frame_pointer()) }
    } else if mode & features::SYNC != 0 {
        // A slot without redzone needs no code; it has one all the same, as the ABI wants it.
        let slot = slot.max(bytes);
        let slot = if slot == 0 { 0 } else { abi::slot(slot, redzone.max(codes::POISON_MIN)) };
        ring::call(call::ALLOCATED, address, bytes, cache, slot);
    }
}

/// Kind and size of an allocation's record, in a slot below 64 KiB.
#[inline(always)]
fn in_slot(bytes: u64, slot: u64) -> (u8, u32) {
    (record::ALLOCATED_IN_SLOT, (bytes | (slot - bytes) << 16) as u32)
}

#[cold]
#[inline(never)]
fn allocated_slowly(address: u64, bytes: u64, slot: u64, redzone: u8) -> (u8, u32) {
    shadow::unpoison(address, bytes);
    if slot > bytes {
        shadow::poison(address.wrapping_add(bytes), slot - bytes, redzone);
    }
    if slot < 1 << 16 && bytes <= slot {
        in_slot(bytes, slot)
    } else {
        (record::ALLOCATED, bytes.min(u32::MAX.into()) as u32)
    }
}

/// An allocator takes back what was at `address`: the slot of `slot` bytes becomes inaccessible
/// with `code`. Returns false, after a report, when that memory is free already or `address` is not
/// the object's start (`start`); the allocator must leave it alone then.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_free(address: u64, start: u64, slot: u64, code: u8) -> bool {
    let mode = state::mode();
    if mode == 0 {
        return true;
    }
    free_now(mode, address, start, slot, code, frame_pointer())
}

/// [`umbra_free`] with checks on; `fp` is the frame of what was called.
#[inline(always)]
fn free_now(mode: u32, address: u64, start: u64, slot: u64, code: u8, fp: u64) -> bool {
    if mode & features::RING != 0
        && address == start
        && let Some(memory) = object::slot(mode, start, slot, code)
    {
        // SAFETY: the frame is the caller's.
        let tell = || unsafe { ring::tell(ring::head(record::FREED, 0), start, 0, fp) };
        if memory.freed(code, tell) {
            return true;
        }
    }
    freed_slowly(mode, address, start, slot, code, 0, fp)
}

/// [`free_now`] where there might have been a quarantine.
#[inline(never)]
fn free_without_quarantine(
    mode: u32,
    address: u64,
    start: u64,
    slot: u64,
    code: u8,
    fp: u64,
) -> bool {
    free_now(mode, address, start, slot, code, fp)
}

/// As [`umbra_free`], but the memory waits in the quarantine, if there is one for `allocator`
/// ([`umbra_quarantine_add`]): then the result is false too, and the allocator's release function
/// gets `start`, `slot` and `note` later. True: the allocator takes it back now.
///
/// Release functions are called from here, for other memory: the caller holds no lock that they
/// take.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_free_later(
    address: u64,
    start: u64,
    slot: u64,
    code: u8,
    allocator: u8,
    note: u8,
) -> bool {
    let mode = state::mode();
    if mode == 0 {
        return true;
    }
    if !quarantine::takes(allocator, slot) {
        return free_without_quarantine(mode, address, start, slot, code, frame_pointer());
    }
    let wait = abi::wait(allocator, note);
    if mode & features::RING != 0
        && address == start
        && let Some(memory) = object::slot(mode, start, slot, code)
    {
        let head = ring::head(record::FREED, wait);
        let fp = frame_pointer();
        // Both together: the VMM may hand the memory out again as soon as something else follows on
        // this CPU.
        let due = without_interrupts(|| {
            let who = state::current();
            let ring = ring::of(who);
            // SAFETY: the frame is this function's own; interrupts are off, and it is this CPU's
            // ring.
            let tell = || unsafe { ring.write(who, head, start, slot as u32, fp) };
            (ring.exists() && memory.freed(code, tell)).then(|| ring.waits(who, slot))
        });
        if let Some(due) = due {
            if due {
                quarantine::release(false);
            }
            return false;
        }
    }
    freed_slowly(mode, address, start, slot, code, wait, frame_pointer())
}

/// Both of these where the short way is closed, or where something is wrong. `fp` is their frame;
/// memory waits if `wait` is not 0.
#[cold]
#[inline(never)]
fn freed_slowly(
    mode: u32,
    address: u64,
    start: u64,
    slot: u64,
    code: u8,
    wait: u16,
    fp: u64,
) -> bool {
    if mode & (features::PER_PAGE | features::FULL) == 0 {
        return true;
    }
    if let Some(kind) = bad_free(address, start) {
        // SAFETY: the frame is the caller's.
        checks::report(address, 0, kind, unsafe { return_address(fp) });
        return false;
    }
    if mode & features::SYNC != 0 {
        let due = ring::call(
            call::FREED,
            start,
            0,
            wait,
            if slot == 0 { 0 } else { abi::slot(slot, code) },
        );
        // Not an error, in which case the VMM has not taken it.
        let waits = wait != 0 && !host::is_error(due);
        if waits && due != 0 {
            quarantine::release(false);
        }
        return !waits;
    }
    if wait != 0 {
        return waits_slowly(start, slot, code, wait, fp);
    }
    // SAFETY: the frame is the caller's.
    unsafe { ring::tell_slowly(ring::head(record::FREED, 0), start, 0, fp) };
    shadow::poison(start, slot, code);
    true
}

/// A free of what the short way is closed for, and that waits. Its result is that of
/// [`umbra_free_later`].
fn waits_slowly(start: u64, slot: u64, code: u8, wait: u16, fp: u64) -> bool {
    let due = without_interrupts(|| {
        let who = state::current();
        let ring = ring::of(who);
        let exists = ring.exists();
        if exists {
            // SAFETY: the frame is that of a caller; interrupts are off, and it is this CPU's ring.
            unsafe { ring.write(who, ring::head(record::FREED, wait), start, slot as u32, fp) }
        }
        shadow::poison(start, slot, code);
        exists.then(|| ring.waits(who, slot))
    });
    if due == Some(true) {
        quarantine::release(false);
    }
    // What nobody was told of does not wait.
    due.is_none()
}

/// Numbers an allocator whose memory shall wait before it is handed out again. `release` gets what
/// has waited long enough: the start of the object, the bytes of its slot and the note that
/// [`umbra_free_later`] got, and `context`. It runs on any CPU, in whatever calls
/// [`umbra_free_later`] or [`umbra_quarantine_drain`]. 0, which is no allocator's number, where
/// there is no quarantine. To be called after [`umbra_activate`].
#[unsafe(no_mangle)]
pub extern "C" fn umbra_quarantine_add(release: quarantine::ReleaseFn, context: *mut c_void) -> u8 {
    quarantine::add(release, context)
}

/// Gives all that waits back to its allocators, for one that has no memory left: it tries again
/// then. Returns how many objects came back. The caller holds no lock that a release function
/// takes.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_quarantine_drain() -> u64 {
    if quarantine::batch() == 0 { 0 } else { quarantine::release(true) }
}

/// Work is made that has to do with the object that holds `address`, and will run later: it may
/// free it, for instance. A finding on the object tells the stack of the caller. The last two are
/// kept.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_aux_stack(address: u64) {
    let mode = state::mode();
    if mode & features::RING != 0 {
        // SAFETY: this function's own frame.
        unsafe { ring::tell_slowly(ring::head(record::RELATED, 0), address, 0, frame_pointer()) }
    } else if mode & features::SYNC != 0 {
        ring::call(call::RELATED, address, 0, 0, 0);
    }
}

/// Bytes of redzone that an allocator shall put behind objects of `object` bytes. 0 where there is
/// no Umbra, or where redzones are switched off: then memory is laid out as without checks.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_redzone(object: u64) -> u64 {
    quarantine::redzone_of(object)
}

/// What is wrong with a free of `address`, where the allocator says that the object starts at
/// `start`.
fn bad_free(address: u64, start: u64) -> Option<u16> {
    match shadow::value(start) {
        _ if address != start => Some(access::INVALID_FREE),
        codes::FREE_PAGE | codes::SLAB_FREE | codes::SLAB_FREE_TRACK => Some(access::DOUBLE_FREE),
        codes::POISON_MIN.. => Some(access::INVALID_FREE),
        _ => None,
    }
}

/// Reports a free of something that no allocator knows.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_invalid_free(address: u64) {
    if state::mode() & (features::PER_PAGE | features::FULL) != 0 {
        // SAFETY: this function's own frame.
        let ip = unsafe { return_address(frame_pointer()) };
        checks::report(address, 0, access::INVALID_FREE, ip);
    }
}

/// A thread's stack comes into being: accessible, and byte-checked from now on.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_stack_alloc(start: u64, bytes: u64) {
    shadow::unpoison_for(start, bytes, abi::memory::STACK);
    shadow::promote(start, bytes);
}

/// A thread's stack is given back: whatever its frames left poisoned is accessible again.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_stack_free(start: u64, bytes: u64) {
    shadow::unpoison_for(start, bytes, abi::memory::NO_STACK);
}

/// Names a cache. `object` is the bytes of one of its slots' objects.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_name_cache(id: u16, name: *const u8, len: u64, object: u64) {
    named(abi::name::CACHE, u64::from(id), name, len, object);
}

/// Names a task.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_name_task(id: u32, name: *const u8, len: u64) {
    named(abi::name::TASK, u64::from(id), name, len, 0);
}

fn named(kind: u64, id: u64, name: *const u8, len: u64, object: u64) {
    if state::mode() != 0 {
        host::hypercall(call::NAME, kind, name as u64, len.min(abi::NAME_MAX) | id << 32, object);
    }
}

/// Turns reports on this CPU off, nesting: for code that works on poisoned memory on purpose, such
/// as an allocator that keeps its free list inside freed objects.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_suppress_begin() {
    state::suppress(true);
}

/// The counterpart of [`umbra_suppress_begin`].
#[unsafe(no_mangle)]
pub extern "C" fn umbra_suppress_end() {
    state::suppress(false);
}

/// Bad accesses and frees seen so far on all CPUs, those included that were not reported because
/// reports were off. For a kernel's tests of its own: what must be caught moves it.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_violations() -> u64 {
    state::violations()
}

/// Reports a bad access that the kernel found itself, by a fault: a stack that has grown into its
/// guard page, say. What kind of bug it is, the shadow at `address` tells: that of a guard page is
/// poisoned as a stack. `trap` holds the registers at the fault, from which the stack of the report
/// begins.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_report(address: u64, bytes: u64, write: bool, trap: &Trap) {
    if state::mode() & (features::PER_PAGE | features::FULL) == 0 {
        return;
    }
    // As if the code at the fault had called the handler.
    let frame = [trap.rbp, trap.rip];
    let access = if write { access::WRITE } else { access::READ };
    checks::report_from(frame.as_ptr() as u64, address, bytes, access, trap.rip);
}

/// The registers that [`umbra_page_fault`] reads and changes.
#[repr(C)]
pub struct Trap {
    /// First argument of the interrupted function, if it was a check.
    pub rdi: u64,
    /// Second argument.
    pub rsi: u64,
    /// Frame pointer.
    pub rbp: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
}

/// To be called by the kernel's page-fault handler first. When the fault happened in a check's
/// shadow lookup, the access it checked is to an address without shadow: that is reported, `trap`
/// is set so that the check returns, and true comes back. The access itself then faults on its own.
///
/// # Safety
/// `trap` holds the registers at the fault.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_page_fault(trap: &mut Trap) -> bool {
    let Some((size, access)) = checks::running(trap.rip, trap.rsi) else { return false };
    // SAFETY: the fast paths push nothing, so the return address is on top of the stack; the slow
    // paths take no fault, since they look at regions first.
    let ip = unsafe { *(trap.rsp as *const u64) };
    // The fast paths have no frame. It is made here, where their `push rbp` would have put it, so
    // that the chain goes on in the interrupted stack.
    let fp = trap.rsp - 8;
    // What lies there now is put back: where exceptions run on the stack that they interrupt, it is
    // the CPU's own frame. SAFETY: mapped stack, below the word that was read above.
    let kept = unsafe { core::ptr::replace(fp as *mut u64, trap.rbp) };
    // A look-up may also have gone one byte beyond a region's shadow for an access that is good.
    if !shadow::check(trap.rdi, size) {
        checks::report_from(fp, trap.rdi, size, access, ip);
    }
    // SAFETY: as above.
    unsafe { *(fp as *mut u64) = kept };
    trap.rip = ip;
    trap.rsp += 8;
    true
}

// `guest/c/umbra.h` asserts the same of its structures.
const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Offer>() == 48 && offset_of!(Offer, version) == 4);
    assert!(offset_of!(Offer, page_window) == 8 && offset_of!(Offer, page_window_bytes) == 16);
    assert!(offset_of!(Offer, byte_window) == 24 && offset_of!(Offer, byte_window_bytes) == 32);
    assert!(offset_of!(Offer, virtual_bytes) == 40);
    assert!(size_of::<Trap>() == 40 && offset_of!(Trap, rsi) == 8 && offset_of!(Trap, rbp) == 16);
    assert!(offset_of!(Trap, rip) == 24 && offset_of!(Trap, rsp) == 32);
    assert!(size_of::<abi::RingHeader>() == 64 && abi::VERSION == 1 && abi::NAME_MAX == 64);
    assert!(
        features::PER_PAGE == 1
            && features::FULL == 2
            && features::RING == 4
            && features::SYNC == 8
    );
};

/// Ends the guest: it is done. 0 is success.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_exit(code: u64) -> ! {
    host::exit(exit::DONE, code, 0, 0)
}

/// Ends the guest: it panicked.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_exit_panic() -> ! {
    host::exit(exit::PANIC, 0, 0, 0)
}

/// Ends the guest: a CPU exception it has no answer to.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_exit_fault(vector: u32, error: u32, rip: u64, address: u64) -> ! {
    host::exit(exit::FAULT, u64::from(vector) | u64::from(error) << 32, rip, address)
}
