//! The functions that a kernel calls: start-up, allocators, stacks, names, the end. All of them are
//! C functions named `umbra_*`. Without Umbra underneath each returns at once.

use core::ffi::c_void;
use core::mem::MaybeUninit;

use umbra_shadow::abi::{
    self, Access, CallNumber, ExitReason, Features, GuestFlags, MemoryUse, NameKind, Owner,
    PackedRecord, Slot,
};
use umbra_shadow::codes;
use umbra_shadow::runtime::{CurrentFn, Offer, ReleaseFn, Trap};

use crate::cpu::without_interrupts;
use crate::ring;
use crate::stack::{self, frame_pointer, return_address};
use crate::{INLINE, checks, groups, host, object, quarantine, settings, shadow, state, tables};

/// Looks for Umbra and makes the first call. Returns the features, also stored in `offer`. 0
/// without Umbra, or if the ABI versions differ; `offer.version` then has the VMM's.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_discover(offer: &mut Offer) -> u32 {
    *offer = Offer::default();
    let Some(host) = host::discover() else { return 0 };
    offer.version = host.version;
    let inline = if INLINE { GuestFlags::INLINE } else { GuestFlags::default() };
    let flags = (GuestFlags::REPORTS_ACTIVATION | inline).bits();
    groups::set_host(&host);
    if host::is_error(host::hypercall(CallNumber::Hello, abi::VERSION.into(), flags, 0, 0)) {
        return 0;
    }
    offer.features = host.features.bits();
    settings::set(Some(&host));
    // Where the compiler checks inline, the kernel maps nothing: `umbra_activate` does.
    if !INLINE {
        (offer.page_window, offer.page_window_bytes) = host.page_window;
        (offer.byte_window, offer.byte_window_bytes) = host.byte_window;
    }
    offer.virtual_bytes = host.virtual_bytes;
    offer.features
}

/// Adds a region: `bytes` of guest-physical memory from `gpa` on, mapped one to one at `start`. Its
/// shadow must be mapped as well. False when a table is full or a value is refused.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_region_add(start: u64, bytes: u64, gpa: u64) -> bool {
    bytes != 0
        && !host::is_error(host::hypercall(CallNumber::RegionAdd, start, bytes, gpa, 0))
        && state::add_region(start, bytes, gpa)
}

/// Asks for shadow for virtual memory that maps single pages, which come and go: `bytes` from
/// `start` on, both multiples of 4096. All of it is poisoned with `VMALLOC_INVALID` until an
/// allocator hands it out. Returns the key of `start`, a guest-physical address that stands for it,
/// or 0 when the request is refused. The kernel maps the windows for the memory before it uses it,
/// as for a region that begins at the key. This may be called after [`umbra_activate`].
#[unsafe(no_mangle)]
pub extern "C" fn umbra_virtual_add(start: u64, bytes: u64) -> u64 {
    if !state::has_room() {
        return 0;
    }
    let key = host::hypercall(CallNumber::VirtualAdd, start, bytes, 0, 0);
    if host::is_error(key) || !state::add_region(start, bytes, key) {
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
/// code ends at `text_end`; `current` returns CPU and task (may be null).
///
/// Where the compiler checks inline, this maps the windows. False when that fails, and checks stay
/// off then.
///
/// # Safety
/// Shadow is mapped for all regions, or the compiler checks inline, and no other CPU runs yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umbra_activate(
    offered: u32,
    text_end: u64,
    current: Option<CurrentFn>,
) -> bool {
    let offered = Features::from_bits(offered);
    if INLINE && offered.has(Features::SHADOW) && !tables::map(offered) {
        return false;
    }
    stack::set_text_end(text_end);
    state::set_current(current);
    state::set_mode(offered);
    if offered.has(Features::SHADOW) {
        // SAFETY: the caller's promise.
        unsafe { checks::activate(offered) }
        host::hypercall(CallNumber::Activate, 0, 0, 0, 0);
    }
    true
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
    checks::check_range(address, bytes, access(write), ip)
}

fn access(write: bool) -> Access {
    if write { Access::Write } else { Access::Read }
}

/// Whether the byte at `address` is known to be inaccessible. Nothing is reported. False where
/// there is no shadow.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_is_poisoned(address: u64) -> bool {
    shadow::value(address) >= codes::POISON_MIN
}

/// An allocator hands out `bytes` at `address`, at the start of a slot of `slot` bytes. The object
/// becomes accessible, and the rest of the slot gets `redzone` as code. `cache` is an id named by
/// [`umbra_name_cache`], or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_alloc(address: u64, bytes: u64, slot: u64, redzone: u8, cache: u16) {
    let mode = state::mode();
    if mode.has(Features::RING) {
        let in_slot = object::allocated(mode, address, bytes, slot, redzone)
            || allocated_slowly(address, bytes, slot, redzone);
        let record = if in_slot {
            PackedRecord::allocated_in_slot(cache, bytes, slot)
        } else {
            PackedRecord::allocated(cache, bytes)
        };
        // SAFETY: this function's own frame.
        unsafe { ring::push(record, address, frame_pointer()) }
    } else if mode.has(Features::SYNC) {
        // The ABI wants a code even if the slot has no redzone.
        let code = redzone.max(codes::POISON_MIN);
        let slot = slot_register(slot.max(bytes), code);
        ring::call(CallNumber::Allocated, address, bytes, cache, slot);
    }
}

/// A slot in a register; none if it has no bytes.
#[inline(always)]
fn slot_register(bytes: u64, code: u8) -> u64 {
    if bytes == 0 { 0 } else { Slot { bytes, code }.to_register() }
}

/// Changes the shadow for [`umbra_alloc`] where the fast path does not fit. Returns whether a
/// record can hold the slot.
#[cold]
#[inline(never)]
fn allocated_slowly(address: u64, bytes: u64, slot: u64, redzone: u8) -> bool {
    shadow::unpoison(address, bytes);
    if slot > bytes {
        shadow::poison(address.wrapping_add(bytes), slot - bytes, redzone);
    }
    slot < 1 << 16 && bytes <= slot
}

/// An allocator takes back what was at `address`. The slot of `slot` bytes becomes inaccessible
/// with `code`. Returns false, after a report, when that memory is free already or `address` is not
/// the object's start (`start`); the allocator must not free it then.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_free(address: u64, start: u64, slot: u64, code: u8) -> bool {
    let mode = state::mode();
    if mode == Features::default() {
        return true;
    }
    free_now(mode, address, start, slot, code, frame_pointer())
}

/// [`umbra_free`] with checks on; `fp` is the frame of the C function.
#[inline(always)]
fn free_now(mode: Features, address: u64, start: u64, slot: u64, code: u8, fp: u64) -> bool {
    if mode.has(Features::RING)
        && address == start
        && !stack::is_near(fp, start)
        && let Some(memory) = object::slot(mode, start, slot, code)
        && memory.is_accessible()
    {
        // SAFETY: the frame is the caller's.
        unsafe { ring::push(PackedRecord::freed(), start, fp) }
        memory.poison(code);
        return true;
    }
    freed_slowly(mode, address, start, slot, code, 0, fp)
}

/// [`free_now`] for memory that does not go through the quarantine.
#[inline(never)]
fn free_without_quarantine(
    mode: Features,
    address: u64,
    start: u64,
    slot: u64,
    code: u8,
    fp: u64,
) -> bool {
    free_now(mode, address, start, slot, code, fp)
}

/// As [`umbra_free`], but the memory goes into the quarantine, if there is one for `allocator`
/// ([`umbra_quarantine_add`]); then the allocator's release function gets `start`, `slot` and
/// `note` later. True: the caller frees now. False: it must not.
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
    if mode == Features::default() {
        return true;
    }
    if !quarantine::accepts(allocator, slot) {
        return free_without_quarantine(mode, address, start, slot, code, frame_pointer());
    }
    let owner = Owner { allocator, note };
    if mode.has(Features::RING)
        && address == start
        && !stack::is_near(frame_pointer(), start)
        && let Some(memory) = object::slot(mode, start, slot, code)
    {
        let record = PackedRecord::quarantined(owner, slot as u32);
        let fp = frame_pointer();
        let due = without_interrupts(|| {
            let actor = state::current();
            let ring = ring::of(actor);
            if !ring.exists() || !memory.is_accessible() {
                return None;
            }
            // SAFETY: the frame is this function's own; interrupts are off, and it is this CPU's
            // ring.
            unsafe { ring.write_after(move || memory.poison(code), actor, record, start, fp) }
            Some(ring.count_quarantined(actor, slot))
        });
        if let Some(due) = due {
            if due {
                quarantine::drain(false);
            }
            return false;
        }
    }
    freed_slowly(mode, address, start, slot, code, owner.to_bits(), frame_pointer())
}

/// The slow path of [`free_now`] and [`umbra_free_later`], also for bad frees. `fp` is their frame.
/// `owner` holds the bits of an [`Owner`], whose memory goes into the quarantine; 0 for none. (An
/// `Option<Owner>` would be packed and unpacked on the way.)
#[cold]
#[inline(never)]
fn freed_slowly(
    mode: Features,
    address: u64,
    start: u64,
    slot: u64,
    code: u8,
    owner: u16,
    fp: u64,
) -> bool {
    if !mode.has(Features::SHADOW) {
        return true;
    }
    // SAFETY: the frame is the caller's.
    if let Some(access) = unsafe { bad_free(address, start, fp) } {
        // SAFETY: the frame is the caller's.
        checks::report(address, 0, access, unsafe { return_address(fp) });
        return false;
    }
    if mode.has(Features::SYNC) {
        let due = ring::call(CallNumber::Freed, start, 0, owner, slot_register(slot, code));
        if due == abi::FREE_REFUSED {
            return false;
        }
        // After an error the memory is not in the quarantine.
        let quarantined = owner != 0 && !host::is_error(due);
        if quarantined && due != 0 {
            quarantine::drain(false);
        }
        return !quarantined;
    }
    if let Some(owner) = Owner::from_bits(owner) {
        return quarantined_slowly(start, slot, code, owner, fp);
    }
    // SAFETY: the frame is the caller's.
    unsafe { ring::push_slowly(PackedRecord::freed(), start, fp) };
    shadow::poison(start, slot, code);
    true
}

/// The slow path for memory that goes into the quarantine. The result is that of
/// [`umbra_free_later`].
fn quarantined_slowly(start: u64, slot: u64, code: u8, owner: Owner, fp: u64) -> bool {
    let due = without_interrupts(|| {
        let actor = state::current();
        let ring = ring::of(actor);
        let poison = || shadow::poison(start, slot, code);
        if !ring.exists() {
            poison();
            return None;
        }
        let record = PackedRecord::quarantined(owner, slot as u32);
        // SAFETY: the frame is that of a caller; interrupts are off, and it is this CPU's ring.
        unsafe { ring.write_after(poison, actor, record, start, fp) }
        Some(ring.count_quarantined(actor, slot))
    });
    if due == Some(true) {
        quarantine::drain(false);
    }
    // Without a record the memory is not in the quarantine.
    due.is_none()
}

/// Numbers an allocator whose freed memory goes through the quarantine. `release` takes memory back
/// from there. Its arguments are the object's start, slot and note, as in [`umbra_free_later`], and
/// `context`. It runs on any CPU, inside [`umbra_free_later`] or [`umbra_quarantine_drain`].
/// Returns 0, which is no allocator's number, where there is no quarantine. Called after
/// [`umbra_activate`].
#[unsafe(no_mangle)]
pub extern "C" fn umbra_quarantine_add(release: ReleaseFn, context: *mut c_void) -> u8 {
    quarantine::add(release, context)
}

/// Empties the quarantine, for an allocator that has no memory left and tries again afterwards.
/// Returns the number of objects that their allocators got back. The caller holds no lock that a
/// release function takes.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_quarantine_drain() -> u64 {
    if settings::batch() == 0 { 0 } else { quarantine::drain(true) }
}

/// Work on the object that holds `address` is queued, such as work that will free it. A finding on
/// the object shows the stack of this function's caller. The last two stacks are kept.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_aux_stack(address: u64) {
    let mode = state::mode();
    if mode.has(Features::RING) {
        // SAFETY: this function's own frame.
        unsafe { ring::push_slowly(PackedRecord::related(), address, frame_pointer()) }
    } else if mode.has(Features::SYNC) {
        ring::call(CallNumber::Related, address, 0, 0, 0);
    }
}

/// Bytes of redzone that an allocator puts behind objects of `object` bytes. 0 where there is no
/// Umbra, or where redzones are switched off: then memory is laid out as without checks.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_redzone(object: u64) -> u64 {
    settings::redzone_of(object)
}

/// Classifies a free of `address`, where the allocator has an object that starts at `start`. `fp`
/// is the innermost frame. `None` if it is good, as far as the guest can tell.
///
/// # Safety
/// As [`return_address`].
unsafe fn bad_free(address: u64, start: u64, fp: u64) -> Option<Access> {
    match shadow::value(start) {
        _ if address != start => Some(Access::InvalidFree),
        // An allocator that trusts a header before the memory takes a variable for an object.
        // SAFETY: the caller's promise.
        _ if stack::is_near(fp, start) && unsafe { stack::holds(fp, start) } => {
            Some(Access::InvalidFree)
        }
        codes::FREE_PAGE | codes::SLAB_FREE | codes::SLAB_FREE_TRACK => Some(Access::DoubleFree),
        // The stack of a thread that has ended goes back to its allocator.
        codes::STACK_AFTER_RETURN => None,
        codes::POISON_MIN.. => Some(Access::InvalidFree),
        _ => None,
    }
}

/// Reports a free of something that no allocator knows.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_invalid_free(address: u64) {
    if state::mode().has(Features::SHADOW) {
        // SAFETY: this function's own frame.
        let ip = unsafe { return_address(frame_pointer()) };
        checks::report(address, 0, Access::InvalidFree, ip);
    }
}

/// A thread gets a stack. It becomes accessible, and stays byte-checked.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_stack_alloc(start: u64, bytes: u64) {
    if state::mode().has(Features::SYNC) {
        // The VMM promotes at the first poisoning.
        shadow::unpoison_for(start, bytes, MemoryUse::Stack);
    } else {
        // Byte-checked pages stay so: what interrupts this stack may store its shadow.
        shadow::set_on_stack(start, bytes / codes::GRANULE, 0);
    }
}

/// A thread has ended, and nothing runs on its stack any more. The stack becomes inaccessible,
/// until an allocator, another thread or [`umbra_unpoison`] makes it accessible again.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_stack_free(start: u64, bytes: u64) {
    if state::mode().has(Features::SYNC) {
        // Compiled code must not change this shadow any more.
        shadow::unpoison_for(start, bytes, MemoryUse::NotStack);
    }
    shadow::poison(start, bytes, codes::STACK_AFTER_RETURN);
}

/// Names a cache whose objects have `object` bytes.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_name_cache(id: u16, text: *const u8, len: u64, object: u64) {
    name(NameKind::Cache, u64::from(id), text, len, object);
}

/// Names a task.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_name_task(id: u32, text: *const u8, len: u64) {
    name(NameKind::Task, u64::from(id), text, len, 0);
}

fn name(kind: NameKind, id: u64, text: *const u8, len: u64, object: u64) {
    if state::mode() != Features::default() {
        let len_and_id = len.min(abi::NAME_MAX) | id << 32;
        host::hypercall(CallNumber::Name, kind.into(), text as u64, len_and_id, object);
    }
}

/// Turns reports on this CPU off, for code that works on poisoned memory on purpose, such as an
/// allocator that keeps its free list inside freed objects. Calls nest.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_suppress_begin() {
    state::suppress(true);
}

/// The counterpart of [`umbra_suppress_begin`].
#[unsafe(no_mangle)]
pub extern "C" fn umbra_suppress_end() {
    state::suppress(false);
}

/// The number of bad accesses and frees so far on all CPUs, reported or not. A kernel's own tests
/// use it: a bug that is caught raises it.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_violations() -> u64 {
    state::violations()
}

/// Reports a bad access that the kernel found by a fault, such as a stack that has grown into its
/// guard page. The shadow at `address` decides the kind of bug: a guard page is poisoned as a
/// stack. `trap` holds the registers at the fault, where the stack of the report begins.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn umbra_report(address: u64, bytes: u64, write: bool, trap: &Trap) {
    if !state::mode().has(Features::SHADOW) {
        return;
    }
    // The interrupted stack may be anywhere. The VMM follows a frame pointer to it that is marked
    // with bit 0, as Linux marks one to saved registers (`struct pt_regs`).
    let mut registers = [const { MaybeUninit::uninit() }; 20];
    for (at, value) in [(4, trap.rbp), (16, trap.rip), (17, KERNEL_CODE), (19, trap.rsp)] {
        registers[at].write(value);
    }
    let fp = registers.as_ptr() as u64 | 1;
    checks::report_from(fp, address, bytes, access(write), trap.rip);
}

/// A selector of kernel code, for saved registers; which one does not matter.
const KERNEL_CODE: u64 = 8;

/// The kernel's page-fault handler calls this first. If the fault happened in a check's shadow
/// lookup, the checked access is to an address without shadow. Then the access is reported, `trap`
/// is set so that the check returns, and the result is true. The access itself faults on its own.
///
/// # Safety
/// `trap` holds the registers at the fault.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn umbra_page_fault(trap: &mut Trap) -> bool {
    if INLINE && groups::is_stale_store(trap.rip) {
        return true;
    }
    let Some((size, access)) = checks::running(trap.rip, trap.rsi) else { return false };
    // SAFETY: the fast paths push nothing, so the return address is on top of the stack; the slow
    // paths do not fault, since they look at regions first.
    let ip = unsafe { *(trap.rsp as *const u64) };
    // The fast paths have no frame. It is made here, at the place of a `push rbp`, so that the
    // chain goes on in the interrupted stack.
    let fp = trap.rsp - 8;
    // The word there is restored later: where exceptions run on the interrupted stack, it belongs
    // to the CPU's own frame. SAFETY: mapped stack, below the word that was read above.
    let kept = unsafe { core::ptr::replace(fp as *mut u64, trap.rbp) };
    // The access may be good: a lookup may go one byte beyond a region's shadow.
    if !shadow::check(trap.rdi, size) {
        checks::report_from(fp, trap.rdi, size, access, ip);
    }
    // SAFETY: as above.
    unsafe { *(fp as *mut u64) = kept };
    trap.rip = ip;
    trap.rsp += 8;
    true
}

/// Ends the guest, whose work is done. 0 is success.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_exit(code: u64) -> ! {
    host::exit(ExitReason::Done, code, 0, 0)
}

/// Ends the guest after a panic.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_exit_panic() -> ! {
    host::exit(ExitReason::Panic, 0, 0, 0)
}

/// Ends the guest after a CPU exception that it cannot handle.
#[unsafe(no_mangle)]
pub extern "C" fn umbra_exit_fault(vector: u32, error: u32, rip: u64, address: u64) -> ! {
    host::exit(ExitReason::Fault, u64::from(vector) | u64::from(error) << 32, rip, address)
}
