//! Work for all CPUs at once: `smp=OPERATIONS` on the command line.
//!
//! First a legal stress: each CPU allocates, uses and frees, and swaps objects with the others
//! through a few shared slots. So another CPU than the allocating one frees most objects. The
//! kernel prints the number of events; the host must have received as many. Then a legal race: all
//! CPUs make their parts of the same pages accessible at once. Then a planted bug for each pair of
//! CPUs: one frees an object and the other uses it.

use core::sync::atomic::{
    AtomicU64, AtomicUsize, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};

use umbra_guest::codes::{PAGE_SIZE, SLAB_REDZONE};

use crate::scenarios::churn::Random;
use crate::slab::{kfree, kmalloc, krealloc};
use crate::{cpu, lag, page, println, smp, thread};

/// Slots that all CPUs share.
const PLACES: usize = 32;
/// Objects that a CPU keeps for itself.
const OWN: usize = 32;
/// Most CPUs that get planted bugs.
const PLANTED: usize = 4;

static OPERATIONS: AtomicU64 = AtomicU64::new(0);
static PLACE: [AtomicU64; PLACES] = [const { AtomicU64::new(0) }; PLACES];

/// Runs what the command line asks for.
pub fn run(command_line: &str) {
    for word in command_line.split_ascii_whitespace() {
        let Some(operations) = word.strip_prefix("smp=") else { continue };
        let Ok(operations) = operations.parse() else {
            println!("{word}: not a number");
            continue;
        };
        OPERATIONS.store(operations, Relaxed);
        println!("smp: {} CPUs", smp::running());
        cpu::set_task(thread::new_task("cpu0"));
        if command_line.split_ascii_whitespace().any(|word| word == "lag") {
            smp::on_all(lag::begin);
        }
        smp::on_all(stress);
        PLACE.iter().for_each(|place| drop_object(place.swap(0, Relaxed)));
        println!("smp: {} allocations, {} frees", ALLOCATIONS.load(Relaxed), FREES.load(Relaxed));
        if let Some(block) = page::alloc(RACE_ORDER) {
            OBJECT.store(block, Relaxed);
            smp::on_all(race);
            page::free(block);
        }
        for turn in 0..PLANTED * PLANTED {
            let [a, b] = [turn / PLANTED, turn % PLANTED];
            if a != b && a.max(b) < smp::running() {
                TURN.store(turn, Relaxed);
                STEP.store(0, Release);
                smp::on_all(plant);
                if lag::is_on() {
                    STEP.store(0, Release);
                    smp::on_all(plant_in_page);
                }
            }
        }
        let [early, late] = [&MISSED_EARLY, &MISSED].map(|count| count.load(Relaxed));
        println!("smp: {early} bugs missed before a tick, {late} after it");
        println!("smp: done");
    }
}

/// Operations of a CPU between two ticks.
const TICK: u64 = 256;

/// The events that the stress made.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static FREES: AtomicU64 = AtomicU64::new(0);

/// Bytes of an object's head: its size, and a mark made of its size and address.
const HEAD: u64 = 16;
const MAGIC: u64 = 0x5bd1_e995_9e37_79b9;

/// Allocates an object, and writes its head and its last byte. 0 if there is no memory.
fn new_object(size: u64) -> u64 {
    let Some(at) = kmalloc(size) else { return 0 };
    ALLOCATIONS.fetch_add(1, Relaxed);
    fill(at, size);
    at
}

fn fill(at: u64, size: u64) {
    // SAFETY: an allocation of `size` bytes, more than the head's.
    unsafe {
        (at as *mut u64).write_volatile(size);
        ((at + 8) as *mut u64).write_volatile(at ^ size ^ MAGIC);
        ((at + size - 1) as *mut u8).write_volatile(size as u8);
    }
}

/// Uses an object at its edges, and checks that no other CPU has written to it. Returns its
/// size.
fn check_object(at: u64) -> u64 {
    // SAFETY: `new_object` made it, and only the holder of its address uses it.
    unsafe {
        let size = (at as *const u64).read_volatile();
        let head = ((at + 8) as *const u64).read_volatile();
        let last = ((at + size - 1) as *const u8).read_volatile();
        assert!(
            head == at ^ size ^ MAGIC && last == size as u8,
            "object {at:#x} of {size} bytes was overwritten"
        );
        size
    }
}

fn drop_object(at: u64) {
    if at != 0 {
        check_object(at);
        FREES.fetch_add(1, Relaxed);
        kfree(at);
    }
}

fn stress(number: usize) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1) << 32);
    let mut own = [0u64; OWN];
    for turn in 0..OPERATIONS.load(Relaxed) {
        if turn % TICK == 0 {
            umbra_guest::tick();
        }
        let r = random.next();
        let mine = &mut own[(r % OWN as u64) as usize];
        match r >> 8 & 15 {
            // Pages are used as wholes and as slabs by turns, so their shadow is promoted and
            // demoted.
            0 => {
                if let Some(at) = page::alloc((r >> 12 & 1) as usize) {
                    ALLOCATIONS.fetch_add(1, Relaxed);
                    FREES.fetch_add(1, Relaxed);
                    // SAFETY: the page belongs to this CPU.
                    unsafe { ((at + 4095) as *mut u8).write_volatile(1) };
                    page::free(at);
                }
            }
            1 if *mine != 0 => {
                let old = check_object(*mine);
                let new = HEAD + 1 + (r >> 32) % 300;
                if let Some(at) = krealloc(*mine, old, new) {
                    // In place it is one event: Umbra sees a new object.
                    ALLOCATIONS.fetch_add(1, Relaxed);
                    FREES.fetch_add(u64::from(at != *mine), Relaxed);
                    fill(at, new);
                    *mine = at;
                }
            }
            2..=8 => {
                let place = &PLACE[(r >> 16) as usize % PLACES];
                *mine = place.swap(*mine, AcqRel);
                if *mine != 0 {
                    check_object(*mine);
                }
            }
            _ if *mine != 0 => drop_object(core::mem::take(mine)),
            // Few sizes, so that CPUs share slabs; now and then large ones.
            r => {
                let size = match r {
                    15 => 4097 + (random.0 >> 40) % 4000,
                    _ => HEAD + 1 + (random.0 >> 40) % 112,
                };
                *mine = new_object(size);
            }
        }
    }
    own.into_iter().for_each(drop_object);
}

/// Arrivals of all CPUs at [`barrier`].
static ARRIVED: AtomicUsize = AtomicUsize::new(0);

/// Waits until all CPUs have come here for the `time`th time.
fn barrier(time: usize) {
    ARRIVED.fetch_add(1, AcqRel);
    while ARRIVED.load(Acquire) < time * smp::running() {
        core::hint::spin_loop();
    }
}

/// Pages of the race, as a power of two.
const RACE_ORDER: usize = 5;

/// All CPUs go through the same pages, which are poisoned as wholes at first, and make their parts
/// of each accessible. The first CPU promotes a page while the others catch up. A lost part makes a
/// false finding.
fn race(number: usize) {
    const ROUNDS: usize = 4;
    const SLOT: u64 = 128;
    let block = OBJECT.load(Relaxed);
    let mine = || (0..1 << RACE_ORDER).map(|page| block + page * PAGE_SIZE + number as u64 * SLOT);
    for round in 0..ROUNDS {
        if number == 0 {
            umbra_guest::poison(block, PAGE_SIZE << RACE_ORDER, SLAB_REDZONE);
        }
        barrier(2 * round + 1);
        mine().for_each(|at| umbra_guest::unpoison(at, 44));
        for at in mine() {
            // SAFETY: that part of the page is this CPU's.
            unsafe {
                (at as *mut u64).write_volatile(1);
                ((at + 40) as *mut u32).write_volatile(1);
            }
        }
        barrier(2 * round + 2);
    }
    if number == 0 {
        umbra_guest::unpoison(block, PAGE_SIZE << RACE_ORDER);
    }
}

/// The number of the planted bug: the CPU that frees, times [`PLANTED`], plus the CPU that uses.
static TURN: AtomicUsize = AtomicUsize::new(0);
/// The steps of it that are done.
static STEP: AtomicUsize = AtomicUsize::new(0);
static OBJECT: AtomicU64 = AtomicU64::new(0);

/// Waits until the others have reached `step`.
fn wait_for(step: usize) {
    while STEP.load(Acquire) < step {
        core::hint::spin_loop();
    }
}

/// A third CPU allocates, if there is one; the first frees; the second uses the object all the
/// time, from before the free until after it, so that the first bad use comes at once.
fn plant(number: usize) {
    let turn = TURN.load(Relaxed);
    let (a, b) = (turn / PLANTED, turn % PLANTED);
    let first = (0..smp::running()).rev().find(|cpu| *cpu != a && *cpu != b).unwrap_or(a);
    if number == first {
        OBJECT.store(new_object(64), Relaxed);
        STEP.store(1, Release);
    }
    if number == a {
        wait_for(1);
        kfree(OBJECT.load(Relaxed));
        STEP.store(2, Release);
    }
    if number == b {
        wait_for(1);
        loop {
            let freed = STEP.load(Acquire) > 1;
            USES[turn](OBJECT.load(Relaxed));
            if freed {
                break;
            }
        }
    }
}

/// Planted bugs that were missed before the CPU's tick, and after it.
static MISSED_EARLY: AtomicU64 = AtomicU64::new(0);
static MISSED: AtomicU64 = AtomicU64::new(0);

/// Pages that share a page of shadow, as a power of two.
const GROUP_ORDER: usize = 3;

/// The first CPU frees pages that the second has used, which then uses them again, before and after
/// a tick. No other page shares their shadow: it is a pattern.
fn plant_in_page(number: usize) {
    let turn = TURN.load(Relaxed);
    let (a, b) = (turn / PLANTED, turn % PLANTED);
    if number == a {
        OBJECT.store(page::alloc(GROUP_ORDER).unwrap_or(0), Relaxed);
        STEP.store(1, Release);
        wait_for(2);
        page::free(OBJECT.load(Relaxed));
        STEP.store(3, Release);
    }
    if number == b {
        let found = || {
            let before = umbra_guest::violations();
            USES[turn](OBJECT.load(Relaxed));
            umbra_guest::violations() != before
        };
        wait_for(1);
        assert!(!found());
        STEP.store(2, Release);
        wait_for(3);
        MISSED_EARLY.fetch_add((!found()).into(), Relaxed);
        umbra_guest::tick();
        MISSED.fetch_add((!found()).into(), Relaxed);
    }
}

/// Reads one byte of an object. Each bug has a byte of its own, so that its finding is a new one.
#[inline(never)]
fn use_after_free<const TURN: u64>(at: u64) {
    // SAFETY: mapped memory; being caught is what this is for.
    unsafe { (core::hint::black_box(at + TURN) as *const u8).read_volatile() };
}

static USES: [fn(u64); PLANTED * PLANTED] = [
    use_after_free::<0>,
    use_after_free::<1>,
    use_after_free::<2>,
    use_after_free::<3>,
    use_after_free::<4>,
    use_after_free::<5>,
    use_after_free::<6>,
    use_after_free::<7>,
    use_after_free::<8>,
    use_after_free::<9>,
    use_after_free::<10>,
    use_after_free::<11>,
    use_after_free::<12>,
    use_after_free::<13>,
    use_after_free::<14>,
    use_after_free::<15>,
];
