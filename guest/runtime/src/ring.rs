//! Telling the VMM about allocations and frees: records in a ring (`ring`), or a call each
//! (`sync`).

use core::arch::asm;
use core::ptr::null_mut;
use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};

use umbra_shadow::abi::{
    RECORD_BYTES, RECORD_FRAMES, RELEASED_BYTES, RELEASED_MAX, Record, Released, RingHeader, call,
};

use crate::cpu::without_interrupts;
use crate::{host, quarantine, state};

/// What a CPU tells its events by.
pub struct Ring {
    header: AtomicPtr<RingHeader>,
    records: AtomicU64,
    /// Bytes that went into the quarantine since the last drain.
    waiting: AtomicU64,
    /// Where the VMM puts what leaves the quarantine: behind the records.
    pub(crate) released: AtomicPtr<Released>,
    pub(crate) released_fit: AtomicU64,
    /// How many are there to be given back.
    pub(crate) due: AtomicU64,
    /// Somebody works on them.
    pub(crate) releasing: AtomicBool,
}

static RINGS: [Ring; state::CPUS] = [const {
    Ring {
        header: AtomicPtr::new(null_mut()),
        records: AtomicU64::new(0),
        waiting: AtomicU64::new(0),
        released: AtomicPtr::new(null_mut()),
        released_fit: AtomicU64::new(0),
        due: AtomicU64::new(0),
        releasing: AtomicBool::new(false),
    }
}; state::CPUS];
/// Where the kernel's code starts, which recorded addresses are told from.
static TEXT_BASE: AtomicU64 = AtomicU64::new(0);
/// The bytes of it. A return address outside ends a stack.
static TEXT_BYTES: AtomicU64 = AtomicU64::new(0);
static SEQUENCE: AtomicU32 = AtomicU32::new(0);

/// Hands a CPU's ring memory to the runtime and the VMM. Returns the hypercall's result. With a
/// quarantine, the last quarter of it is where the VMM puts what leaves that.
pub fn set_up(cpu: u64, memory: *mut RingHeader, bytes: u64, text_start: u64) -> u64 {
    let Some(ring) = RINGS.get(cpu as usize) else { return umbra_shadow::abi::ERR_ARGUMENT };
    let all = (bytes / RECORD_BYTES).saturating_sub(1);
    let kept = if quarantine::batch() != 0 { all / 4 } else { 0 };
    let result = host::hypercall(
        call::RING_SETUP,
        memory as u64,
        bytes - kept * RECORD_BYTES,
        cpu,
        text_start,
    );
    if !host::is_error(result) {
        TEXT_BASE.store(text_start, Relaxed);
        ring.records.store(all - kept, Relaxed);
        if kept != 0 {
            ring.released.store(memory.wrapping_add((1 + all - kept) as usize).cast(), Relaxed);
            ring.released_fit
                .store((kept * RECORD_BYTES / RELEASED_BYTES).min(RELEASED_MAX), Relaxed);
        }
        ring.header.store(memory, Release);
    }
    result
}

/// The ring of the CPU in [`state::current`]'s word, whether it was set up or not.
#[inline(always)]
pub fn of(who: u64) -> &'static Ring {
    &RINGS[state::cpu_of(who)]
}

/// Says where the kernel's code ends.
pub fn set_text_end(end: u64) {
    TEXT_BYTES.store(end.saturating_sub(TEXT_BASE.load(Relaxed)).min(1 << 32), Relaxed);
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

/// One step of [`walk`]: the frame at `$fp` is the `$depth`th, and leads to the one at `$next`.
macro_rules! frame {
    ($depth:literal, $fp:literal, $next:literal, $deeper:literal) => {
        concat!(
            "mov {address}, [",
            $fp,
            " + 8]\n",
            "mov ",
            $next,
            ", [",
            $fp,
            "]\n",
            "sub {address}, {base}\n",
            "cmp {address}, {text}\n",
            "jae 2",
            $depth,
            "f\n",
            "mov [{to} + 4 * ",
            $depth,
            "], {address:e}\n",
            "lea {address}, [",
            $next,
            " - 1]\n",
            "sub {address}, ",
            $fp,
            "\n",
            "cmp {address}, {farthest}\n",
            "jae 2",
            $deeper,
            "f\n",
        )
    };
}

/// The end of [`walk`] with so many frames.
macro_rules! ends_with {
    ($depth:literal) => {
        concat!("2", $depth, ": mov {depth:e}, ", $depth, "\njmp 30f")
    };
}

/// Fills `frames` with return addresses as distances from the text base, innermost first; returns
/// how many.
///
/// It runs for every event and is most of what one costs: ten instructions a frame, the two
/// registers taking turns.
///
/// # Safety
/// As [`return_address`].
#[inline(always)]
unsafe fn walk(fp: u64, frames: *mut u32) -> u64 {
    let depth: u64;
    // SAFETY: reads the given frame, and each that it leads to a short way up the same stack;
    // writes at most `RECORD_FRAMES` frames.
    unsafe {
        asm!(
            frame!(0, "{a}", "{b}", 1),
            frame!(1, "{b}", "{a}", 2),
            frame!(2, "{a}", "{b}", 3),
            frame!(3, "{b}", "{a}", 4),
            frame!(4, "{a}", "{b}", 5),
            frame!(5, "{b}", "{a}", 6),
            frame!(6, "{a}", "{b}", 7),
            frame!(7, "{b}", "{a}", 8),
            frame!(8, "{a}", "{b}", 9),
            frame!(9, "{b}", "{a}", 10),
            ends_with!(10), ends_with!(0), ends_with!(1), ends_with!(2), ends_with!(3), ends_with!(4),
            ends_with!(5), ends_with!(6), ends_with!(7), ends_with!(8), ends_with!(9),
            "30:",
            a = inout(reg) fp => _, b = out(reg) _, address = out(reg) _, depth = out(reg) depth,
            base = in(reg) TEXT_BASE.load(Relaxed), text = in(reg) TEXT_BYTES.load(Relaxed),
            to = in(reg) frames, farthest = const MAX_FRAME, options(nostack),
        );
    }
    depth
}
const _: () = assert!(RECORD_FRAMES == 10);

/// Tells of an event at `address`, by a call that changes the shadow of `slot` too. `low` is what
/// the ABI has in the lowest 16 bits of who did it. Returns the call's result. For `sync` mode.
#[inline(always)]
pub fn call(number: u32, address: u64, size: u64, low: u16, slot: u64) -> u64 {
    let word = state::current() & !0xffff | u64::from(low);
    host::hypercall(number, address, size, word, slot)
}

/// The first bytes of a record, without its depth.
pub const fn head(kind: u8, low: u16) -> u64 {
    kind as u64 | (low as u64) << 16
}

/// Tells of an event at `address`, with a record's [`head`] and size; `fp` is the frame whose
/// caller is the first of the stack. For `ring` mode.
///
/// Another CPU may take the record for true as soon as it is in the ring. So an allocation is told
/// of before anyone is told its address, and a free before the memory is poisoned: whoever finds it
/// poisoned finds out who freed it.
///
/// # Safety
/// As [`return_address`].
#[inline(always)]
pub unsafe fn tell(head: u64, address: u64, size: u32, fp: u64) {
    // Nothing else may write to this CPU's ring meanwhile, nor may this go on on another CPU.
    without_interrupts(|| {
        let who = state::current();
        // SAFETY: the caller's promise; interrupts are off, and it is this CPU's ring.
        unsafe { of(who).write(who, head, address, size, fp) }
    });
}

impl Ring {
    /// Whether it was set up. If not, nothing is told.
    #[inline(always)]
    pub fn exists(&self) -> bool {
        !self.header.load(Relaxed).is_null()
    }

    /// [`tell`], with interrupts off, for the ring of the CPU that runs.
    ///
    /// # Safety
    /// As [`return_address`]; and what is said above.
    #[inline(always)]
    pub unsafe fn write(&self, who: u64, head: u64, address: u64, size: u32, fp: u64) {
        let header = self.header.load(Relaxed);
        if header.is_null() {
            return;
        }
        // SAFETY: `set_up` got memory of `records` records behind the header for this CPU alone,
        // and `count` is below `records`: it is raised by one below, and the VMM sets it to 0 in a
        // drain that this CPU asks for only.
        unsafe {
            let count = &raw mut (*header).count;
            let mut n = count.read_volatile();
            if n >= self.records.load(Relaxed) {
                self.drain(who);
                n = 0;
            }
            let to = header.add(1).cast::<Record>().add(n as usize);
            let depth = walk(fp, (&raw mut (*to).frames).cast());
            let words = to.cast::<u64>();
            let task = who & !0xffff_ffff;
            words.write(head | depth << 8 | task);
            words.add(1).write(address);
            let sequence = SEQUENCE.fetch_add(1, Relaxed);
            words.add(2).write(u64::from(size) | u64::from(sequence) << 32);
            core::sync::atomic::compiler_fence(Release);
            count.write_volatile(n + 1);
        }
    }

    /// Empties the ring of the CPU that runs, with interrupts off, and fetches what is due to leave
    /// the quarantine.
    #[cold]
    #[inline(never)]
    pub fn drain(&self, who: u64) {
        let cpu = state::cpu_of(who);
        self.waiting.store(0, Relaxed);
        // What was fetched before must be gone, or it would be overwritten.
        let free = quarantine::batch() != 0 && !self.releasing.swap(true, Acquire);
        let (to, fit) = quarantine::fetched(cpu);
        let fit = if free && self.due.load(Relaxed) == 0 { fit } else { 0 };
        let due = host::hypercall(call::RING_DRAIN, cpu as u64, to as u64, fit, 0);
        if fit != 0 && !host::is_error(due) {
            self.due.store(due, Relaxed);
        }
        if free {
            self.releasing.store(false, Release);
        }
    }

    /// Counts memory that goes into the quarantine, whose record and poison are in place; with
    /// interrupts off. Empties the ring after a batch, so that the VMM can keep to the quarantine's
    /// size. Returns whether memory is due to leave it.
    #[inline(always)]
    pub fn waits(&self, who: u64, slot: u64) -> bool {
        let waiting = self.waiting.load(Relaxed) + slot;
        self.waiting.store(waiting, Relaxed);
        if waiting > quarantine::batch() {
            self.drain(who);
        }
        self.due.load(Relaxed) != 0
    }
}

/// [`tell`] where it does not matter what it costs.
///
/// # Safety
/// As [`return_address`].
#[inline(never)]
pub unsafe fn tell_slowly(head: u64, address: u64, size: u32, fp: u64) {
    // SAFETY: the caller's promise.
    unsafe { tell(head, address, size, fp) }
}

// Where `write` writes the words of a record.
const _: () = {
    use core::mem::offset_of;
    assert!(
        offset_of!(Record, kind) == 0
            && offset_of!(Record, depth) == 1
            && offset_of!(Record, cache) == 2
    );
    assert!(offset_of!(Record, task) == 4 && offset_of!(Record, address) == 8);
    assert!(offset_of!(Record, size) == 16 && offset_of!(Record, sequence) == 20);
};
