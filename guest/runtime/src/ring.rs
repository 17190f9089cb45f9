//! How allocations and frees reach the VMM: as records in a ring (`ring` mode), or as a call each
//! (`sync` mode).

use core::arch::asm;
use core::hint::spin_loop;
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicPtr, AtomicU64, Ordering::Relaxed, Ordering::Release, compiler_fence,
};

use umbra_shadow::abi::{
    CallNumber, ERR_ARGUMENT, PackedRecord, RECORD_BYTES, RELEASED_BYTES, RELEASED_MAX, RING_SPARE,
    RawRecord, RingHeader, doorbell_interval,
};

use crate::cpu::{interrupts_off, restore_interrupts};
use crate::released::ReleaseBuffer;
use crate::{host, settings, stack, stamp, state, tables};

/// A CPU's event ring. It has a cache line of its own, since its CPU writes to it at events: in one
/// that is shared, they would slow down another CPU's.
#[repr(align(64))]
pub struct Ring {
    /// [`NO_RING`] until it is set up.
    header: AtomicPtr<RingHeader>,
    /// Records that fit; 0 until it is set up.
    records: AtomicU64,
    /// Records up to which [`Ring::write`] needs to look at nothing else: until the ring is full or
    /// the doorbell is due, or none if stamps are counted.
    quick: AtomicU64,
    /// Bytes that went into the quarantine since the last drain.
    quarantined: AtomicU64,
    /// Where the VMM puts what leaves the quarantine: behind the records.
    pub released: ReleaseBuffer,
}

const _: () = assert!(size_of::<Ring>() == 64);

static NO_RING: RingHeader = RingHeader { count: 0, claimed: 0, reserved: [0; 6] };

static RINGS: [Ring; state::CPUS] = [const {
    Ring {
        header: AtomicPtr::new((&raw const NO_RING).cast_mut()),
        records: AtomicU64::new(0),
        quick: AtomicU64::new(0),
        quarantined: AtomicU64::new(0),
        released: ReleaseBuffer::new(),
    }
}; state::CPUS];

/// Hands a CPU's ring memory to the runtime and the VMM. Returns the hypercall's result. With a
/// quarantine, the last quarter of the memory is the CPU's release buffer.
pub fn set_up(cpu: u64, memory: *mut RingHeader, bytes: u64, text_start: u64) -> u64 {
    let Some(ring) = RINGS.get(cpu as usize) else { return ERR_ARGUMENT };
    let all = (bytes / RECORD_BYTES).saturating_sub(1);
    let kept = if settings::batch() != 0 { all / 4 } else { 0 };
    if all - kept <= 2 * RING_SPARE {
        return ERR_ARGUMENT;
    }
    let ring_bytes = bytes - kept * RECORD_BYTES;
    let result = host::hypercall(CallNumber::RingSetup, memory as u64, ring_bytes, cpu, text_start);
    if !host::is_error(result) {
        stack::set_text_start(text_start);
        if kept != 0 {
            let entries = memory.wrapping_add((1 + all - kept) as usize).cast();
            ring.released.place(entries, (kept * RECORD_BYTES / RELEASED_BYTES).min(RELEASED_MAX));
        }
        ring.place(memory, all - kept);
    }
    result
}

/// The ring of the actor's CPU, whether it was set up or not.
#[inline(always)]
pub fn of(actor: u64) -> &'static Ring {
    &RINGS[state::cpu_of(actor)]
}

/// Makes the call of an event at `address`, which changes the shadow of `slot` as well. `low` is
/// what the call has beside the actor. Returns the call's result. For `sync` mode.
#[inline(always)]
pub fn call(number: CallNumber, address: u64, size: u64, low: u16, slot: u64) -> u64 {
    let actor = state::current() & !0xffff | u64::from(low);
    host::hypercall(number, address, size, actor, slot)
}

/// Pushes a record of an event at `address` into this CPU's ring. `fp` is the frame whose caller is
/// the first of the stack. For `ring` mode.
///
/// Once the record is in the ring, other CPUs may rely on it. So an allocation is pushed before its
/// address is handed out, and a free before the memory is poisoned: whoever finds the memory
/// poisoned can find out who freed it. Only where memory goes into the quarantine is it the other
/// way round ([`Ring::write_after`]).
///
/// # Safety
/// As [`stack::return_address`].
#[inline(always)]
pub unsafe fn push(record: PackedRecord, address: u64, fp: u64) {
    // This code must not move to another CPU. What interrupts it nevertheless, such as an NMI, may
    // write records of its own.
    // No closure: it would be too large to be inlined.
    let flags = interrupts_off();
    let actor = state::current();
    // SAFETY: the caller's promise; interrupts are off, and it is this CPU's ring.
    unsafe { of(actor).write(actor, record, address, fp) };
    restore_interrupts(flags);
}

/// [`push`] out of line, for where speed does not matter.
///
/// # Safety
/// As [`stack::return_address`].
#[inline(never)]
pub unsafe fn push_slowly(record: PackedRecord, address: u64, fp: u64) {
    // SAFETY: the caller's promise.
    unsafe { push(record, address, fp) }
}

/// Claims a record of a ring, calls `first`, writes the record, and raises the count. The stamp is
/// taken last.
///
/// # Safety
/// As [`Ring::write`]; `header` is this CPU's ring, and it has room for a record: `set_up` got
/// memory for all of them, and the VMM sets the count to 0 only in a drain that this CPU asks for.
#[inline(always)]
unsafe fn put(
    header: *mut RingHeader,
    record: PackedRecord,
    actor: u64,
    address: u64,
    fp: u64,
    stamp: impl FnOnce(*mut [u32; 2]),
    first: impl FnOnce(),
) {
    // SAFETY: the caller's promises.
    unsafe {
        let n = claim(header);
        first();
        let to = header.add(1).cast::<RawRecord>().add(n as usize);
        let depth = stack::walk(fp, (&raw mut (*to).frames).cast());
        (&raw mut (*to).head).write(record.head(depth));
        (&raw mut (*to).task).write((actor >> 32) as u32);
        (&raw mut (*to).address).write(address);
        (&raw mut (*to).sizes).write(record.sizes());
        stamp(&raw mut (*to).stamp);
        compiler_fence(Release);
        if (&raw const (*header).count).read_volatile() == n {
            publish(header);
        }
    }
}

/// Claims the next record of a ring. It is one instruction: an NMI comes before or after it.
///
/// # Safety
/// `header` is this CPU's ring.
#[inline(always)]
unsafe fn claim(header: *mut RingHeader) -> u64 {
    let mut n = 1u64;
    // SAFETY: adds to a number that only this CPU uses.
    unsafe {
        asm!("xadd [{header} + {claimed}], {n}", header = in(reg) header, n = inout(reg) n,
             claimed = const offset_of!(RingHeader, claimed), options(nostack));
    }
    n
}

/// Raises a ring's count to the records that were begun: this is in the middle of none, so all are
/// complete, those of NMIs that came meanwhile, too. It is one instruction, which copies from
/// memory to memory: an NMI comes before it, and its record is among them, or behind it, and raises
/// or resets the count itself.
///
/// # Safety
/// `header` is this CPU's ring.
#[inline(always)]
unsafe fn publish(header: *mut RingHeader) {
    // SAFETY: both are numbers of the header. The direction flag is clear, as in all code.
    unsafe {
        asm!("movsq", inout("rsi") &raw const (*header).claimed => _,
             inout("rdi") &raw mut (*header).count => _, options(nostack, preserves_flags));
    }
}

/// Waits until no other CPU is in the middle of a record, or for so long that one must have been
/// preempted there: a report on memory that another CPU frees right now then knows who did it.
pub fn wait_for_others(actor: u64) {
    const PATIENCE: u32 = 1 << 12;
    let own = state::cpu_of(actor);
    for (cpu, ring) in RINGS.iter().enumerate() {
        if cpu != own && ring.exists() {
            (0..PATIENCE).take_while(|_| ring.is_in_record()).for_each(|_| spin_loop());
        }
    }
}

impl Ring {
    /// Records go to zeroed `memory` from now on: a header, and so many records.
    pub fn place(&self, memory: *mut RingHeader, records: u64) {
        // An NMI that comes before the second writes nothing.
        self.header.store(memory, Release);
        self.records.store(records, Release);
        self.set_quick(0);
    }

    /// Whether it was set up. If not, nothing is recorded.
    #[inline(always)]
    pub fn exists(&self) -> bool {
        self.records.load(Relaxed) != 0
    }

    /// [`push`], with interrupts off, for the ring of the CPU that runs.
    ///
    /// # Safety
    /// As [`stack::return_address`]; interrupts are off, and this is the ring of the CPU that runs.
    #[inline(always)]
    pub unsafe fn write(&self, actor: u64, record: PackedRecord, address: u64, fp: u64) {
        // SAFETY: the caller's promises.
        unsafe { self.write_after(|| (), actor, record, address, fp) }
    }

    /// [`Ring::write`], whose record becomes visible after `poison` was called. For memory that
    /// goes into the quarantine: what the VMM sees it may release, also when an NMI has recorded
    /// something else in the middle of this.
    ///
    /// # Safety
    /// As [`Ring::write`].
    #[inline(always)]
    pub unsafe fn write_after(
        &self,
        poison: impl FnOnce(),
        actor: u64,
        record: PackedRecord,
        address: u64,
        fp: u64,
    ) {
        let header = self.header.load(Relaxed);
        // SAFETY: without a ring it is a header of no records.
        let claimed = unsafe { (&raw const (*header).claimed).read_volatile() };
        // SAFETY: the caller's promises, and the record fits, also after those of an NMI.
        unsafe {
            if claimed < self.quick.load(Relaxed) {
                let stamp = |to| stamp::tsc(record.is_allocation(), to);
                put(header, record, actor, address, fp, stamp, poison);
            } else {
                self.write_slowly(poison, actor, record, address, fp);
            }
        }
    }

    /// Sets up to which record [`Ring::write`] needs to look at nothing else from record `n` on.
    #[cold]
    fn set_quick(&self, n: u64) {
        let records = self.records.load(Relaxed);
        let interval = doorbell_interval(records).max(1);
        let quick = if stamp::are_counted() { 0 } else { (n / interval + 1) * interval };
        self.quick.store(quick.min(records.saturating_sub(RING_SPARE)), Release);
    }

    /// [`Ring::write_after`] where there is no ring, or it is full, or the doorbell is due, or
    /// stamps are counted. A record for which there is no room in the middle of another one is
    /// lost.
    ///
    /// # Safety
    /// As [`Ring::write`].
    #[cold]
    #[inline(never)]
    unsafe fn write_slowly(
        &self,
        poison: impl FnOnce(),
        actor: u64,
        record: PackedRecord,
        address: u64,
        fp: u64,
    ) {
        let records = self.records.load(Relaxed);
        if records == 0 {
            return poison();
        }
        let header = self.header.load(Relaxed);
        // SAFETY: the caller's promises. The drain empties the ring.
        unsafe {
            let n = (&raw const (*header).claimed).read_volatile();
            if self.is_in_record() {
                // Two that this has interrupted may be about to claim theirs.
                if n + 2 >= records {
                    return poison();
                }
            } else if n != 0 && n + RING_SPARE >= records {
                self.drain(actor);
            } else if n != 0 && n.is_multiple_of(doorbell_interval(records)) {
                // This CPU goes on, and waits the less when its ring is full.
                if settings::has_doorbell() {
                    host::ring_doorbell();
                }
                tables::umbra_tick();
                self.set_quick(n);
            }
            let stamp = |to| stamp::of(record.is_allocation(), to);
            put(header, record, actor, address, fp, stamp, poison);
        }
    }

    /// Whether this has interrupted its CPU in the middle of a record.
    fn is_in_record(&self) -> bool {
        let header = self.header.load(Relaxed);
        // SAFETY: the header of this CPU's ring, or of no records.
        let [count, claimed] = unsafe {
            [&raw const (*header).count, &raw const (*header).claimed].map(|at| at.read_volatile())
        };
        count != claimed
    }

    /// Empties the ring of the CPU that runs, with interrupts off, and fetches what is due to leave
    /// the quarantine. Does nothing in the middle of a record.
    #[cold]
    #[inline(never)]
    pub fn drain(&self, actor: u64) {
        if self.is_in_record() {
            return;
        }
        tables::umbra_tick();
        let cpu = state::cpu_of(actor);
        self.quarantined.store(0, Relaxed);
        // What interrupts this looks at everything.
        self.quick.store(0, Relaxed);
        // The buffer must be empty, or the drain would overwrite what is in it.
        let claimed = settings::batch() != 0 && self.released.claim();
        let (entries, len) = self.released.entries(cpu);
        let len = if claimed && self.released.pending() == 0 { len } else { 0 };
        let due = host::hypercall(CallNumber::RingDrain, cpu as u64, entries as u64, len, 0);
        self.set_quick(0);
        if len != 0 && !host::is_error(due) {
            self.released.set_pending(due);
        }
        if claimed {
            self.released.unclaim();
        }
    }

    /// Counts memory that goes into the quarantine, whose record and poison are in place; with
    /// interrupts off. Drains the ring after a batch, so that the VMM can keep the quarantine to
    /// its size. Returns whether memory is due to leave it.
    #[inline(always)]
    pub fn count_quarantined(&self, actor: u64, slot: u64) -> bool {
        let quarantined = self.quarantined.load(Relaxed) + slot;
        self.quarantined.store(quarantined, Relaxed);
        if quarantined > settings::batch() {
            self.drain(actor);
        }
        self.released.pending() != 0
    }
}
