//! Random allocator operations with accesses at every edge: `random=OPERATIONS:SEED:REPORTED` on
//! the command line.
//!
//! The kernel accesses and checks both ends of the memory that an operation makes valid, by several
//! widths. None of that may be a violation. Then it plants bugs: accesses that reach over an edge,
//! uses after free, frees of freed memory and of addresses inside. Each must be a violation. Most
//! are only counted (`umbra_violations`), with reports off. One in `REPORTED` is reported; the host
//! must see as many findings of each kind as the kernel prints. The kernel counts and prints wrong
//! results, and goes on.

use umbra_guest::{suppressed, violations};

use crate::scenarios::churn::Random;
use crate::slab::{kfree, kmalloc, krealloc};
use crate::{bench, page, println, thread};

/// Most allocations at a time.
const LIVE: usize = 512;
/// Bytes of the smallest redzone.
const REDZONE: u64 = 16;
const PAGE: u64 = 4096;

/// The kinds of allocations.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Nothing,
    /// By `kmalloc`; with pages of its own if it has more than 4096 bytes.
    Object,
    /// Whole pages.
    Pages,
}

#[derive(Clone, Copy)]
struct Allocation {
    kind: Kind,
    at: u64,
    bytes: u64,
}

/// A kind of planted bug.
#[derive(Clone, Copy)]
enum Bug {
    OutOfBounds,
    UseAfterFree,
    DoubleFree,
    InvalidFree,
}

type Check = extern "C" fn(u64, u64);

/// The checks: their names, and the bytes of an access.
const CHECKS: [(&str, u64); 12] = [
    ("load1", 1),
    ("store1", 1),
    ("load2", 2),
    ("store2", 2),
    ("load4", 4),
    ("store4", 4),
    ("load8", 8),
    ("store8", 8),
    ("load16", 16),
    ("store16", 16),
    ("loadN", 13),
    ("storeN", 29),
];

struct Run {
    random: Random,
    checks: [(Check, u64); CHECKS.len()],
    report_each: u64,
    good: u64,
    planted: u64,
    reported: [u64; 4],
    missed: u64,
    wrong: u64,
    corrupt: u64,
}

static mut ALLOCATIONS: [Allocation; LIVE] =
    [Allocation { kind: Kind::Nothing, at: 0, bytes: 0 }; LIVE];

/// Runs the operations that the command line asks for.
pub fn run(command_line: &str) {
    for word in command_line.split_ascii_whitespace() {
        let Some(numbers) = word.strip_prefix("random=") else { continue };
        let mut numbers = numbers.split(':').map(|number| number.parse().ok());
        let mut next = |default| numbers.next().flatten().unwrap_or(default);
        let (operations, seed, report_each) = (next(1000), next(1), next(100));
        thread::run_named_task("random", || random(operations, seed.max(1), report_each.max(1)));
    }
}

fn random(operations: u64, seed: u64, report_each: u64) {
    let checks = CHECKS.map(|(name, bytes)| {
        let Some(check) = bench::entry(name) else { panic!("there is no check {name}") };
        // SAFETY: all checks are C functions of an address and, some, a length. They read shadow
        // only.
        (unsafe { core::mem::transmute::<bench::Function, Check>(check) }, bytes)
    });
    let mut run = Run {
        random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
        checks,
        report_each,
        good: 0,
        planted: 0,
        reported: [0; 4],
        missed: 0,
        wrong: 0,
        corrupt: 0,
    };
    // SAFETY: this function runs once at a time, and no other knows them.
    let allocations = unsafe { &mut *(&raw mut ALLOCATIONS) };
    for _ in 0..operations {
        let r = run.random.next();
        run.operation(&mut allocations[(r % LIVE as u64) as usize], r >> 16);
    }
    for allocation in allocations {
        if allocation.kind != Kind::Nothing {
            run.free(allocation, 0);
        }
    }
    let Run {
        good, planted, reported: [oob, uaf, double, invalid], missed, wrong, corrupt, ..
    } = run;
    println!("random: {operations} operations, {good} good accesses, {planted} planted bugs");
    println!(
        "random: reported {oob} out of bounds, {uaf} after free, {double} double free, \
         {invalid} invalid free"
    );
    println!("random: {missed} missed, {wrong} false, {corrupt} corrupt");
}

/// A random size; most are small, as in kernels.
fn size(r: u64) -> u64 {
    match r & 63 {
        0 => 4097 + (r >> 8) % 12000,
        1..=6 => 257 + (r >> 8) % 3840,
        _ => 1 + (r >> 8) % 256,
    }
}

/// The contents of the first and the last byte of an allocation.
fn tag(at: u64, bytes: u64) -> u8 {
    (at >> 3 ^ bytes) as u8 | 1
}

impl Run {
    fn operation(&mut self, allocation: &mut Allocation, r: u64) {
        match (allocation.kind, r & 7) {
            (Kind::Nothing, 0) => {
                let order = (r >> 8 & 3) as usize;
                if let Some(at) = page::alloc(order) {
                    self.came(
                        allocation,
                        Allocation { kind: Kind::Pages, at, bytes: PAGE << order },
                        r,
                    );
                }
            }
            (Kind::Nothing, _) => {
                let bytes = size(r >> 8);
                if let Some(at) = kmalloc(bytes) {
                    self.came(allocation, Allocation { kind: Kind::Object, at, bytes }, r);
                }
            }
            (Kind::Object, 0 | 1) => {
                let bytes = size(r >> 8);
                let Allocation { at: from, bytes: old, .. } = *allocation;
                self.tags_are_there(allocation);
                let Some(at) = krealloc(from, old, bytes) else { return };
                // SAFETY: the first byte of an allocation.
                if unsafe { (at as *const u8).read_volatile() } != tag(from, old) {
                    self.corrupt += 1;
                }
                if at != from {
                    self.plant(Bug::UseAfterFree, from, old.min(REDZONE), r, true);
                }
                self.came(allocation, Allocation { kind: Kind::Object, at, bytes }, r);
            }
            _ => self.free(allocation, r),
        }
    }

    /// Notes a new allocation, in a place that was empty or held another.
    fn came(&mut self, place: &mut Allocation, new: Allocation, r: u64) {
        *place = new;
        let Allocation { kind, at, bytes } = new;
        let before = violations();
        let value = tag(at, bytes);
        // SAFETY: the first and the last byte of the allocation.
        unsafe {
            (at as *mut u8).write_volatile(value);
            ((at + bytes - 1) as *mut u8).write_volatile(value);
        }
        // Three of the twelve widths, others each time.
        let first = (r >> 13) as usize % CHECKS.len();
        for i in [first, (first + 3) % CHECKS.len(), (first + 8) % CHECKS.len()] {
            let (check, n) = self.checks[i];
            if n <= bytes {
                check(at, n);
                check(at + bytes - n, n);
                self.good += 2;
            }
        }
        self.good += 2;
        self.wrong += violations() - before;
        if kind != Kind::Object {
            return;
        }
        // A slab object always has its redzone. A larger one has the rest of its pages as redzone,
        // if there is a rest.
        let room = if bytes > PAGE {
            bytes.div_ceil(PAGE).next_power_of_two() * PAGE - bytes
        } else {
            REDZONE
        };
        if room > 0 {
            self.plant(Bug::OutOfBounds, at + bytes, room.min(REDZONE), r, true);
            self.plant_across(at + bytes, r >> 5);
        }
        // The redzone of its neighbour is before an object, unless it is the first of a slab.
        if bytes <= PAGE && !at.is_multiple_of(PAGE) {
            self.plant(Bug::OutOfBounds, at - REDZONE, REDZONE, r >> 9, false);
        }
    }

    fn tags_are_there(&mut self, allocation: &Allocation) {
        let Allocation { at, bytes, .. } = *allocation;
        let before = violations();
        // SAFETY: the first and the last byte of an allocation.
        let tags = unsafe {
            [(at as *const u8).read_volatile(), ((at + bytes - 1) as *const u8).read_volatile()]
        };
        self.good += 2;
        self.wrong += violations() - before;
        self.corrupt += u64::from(tags != [tag(at, bytes); 2]);
    }

    fn free(&mut self, allocation: &mut Allocation, r: u64) {
        self.tags_are_there(allocation);
        let Allocation { kind, at, bytes } = *allocation;
        let free = if kind == Kind::Pages { page::free } else { kfree };
        self.expect(Bug::InvalidFree, true, || free(at + 1 + r % 15));
        free(at);
        allocation.kind = Kind::Nothing;
        self.plant(Bug::UseAfterFree, at, bytes.min(REDZONE), r >> 3, true);
        self.plant(Bug::UseAfterFree, at + bytes - 1, 1, r >> 9, true);
        self.expect(Bug::DoubleFree, true, || free(at));
    }

    /// Accesses one of the `bytes` from `at` on, all of which are invalid, and maybe bytes behind.
    fn plant(&mut self, bug: Bug, at: u64, bytes: u64, r: u64, may_report: bool) {
        let (check, n) = self.checks[(r % CHECKS.len() as u64) as usize];
        self.expect(bug, may_report, || check(at + r / 16 % bytes, n));
    }

    /// Makes an access that begins before `end`, where the valid bytes end, and reaches beyond it.
    fn plant_across(&mut self, end: u64, r: u64) {
        let (check, n) = self.checks[2 + (r % (CHECKS.len() as u64 - 2)) as usize];
        self.expect(Bug::OutOfBounds, false, || check(end - 1 - r / 16 % (n - 1), n));
    }

    fn expect(&mut self, bug: Bug, may_report: bool, plant: impl Fn()) {
        self.planted += 1;
        let before = violations();
        if may_report && self.planted.is_multiple_of(self.report_each) {
            self.reported[bug as usize] += 1;
            plant();
        } else {
            suppressed(plant);
        }
        match violations() - before {
            0 => self.missed += 1,
            n => self.wrong += n - 1,
        }
    }
}
