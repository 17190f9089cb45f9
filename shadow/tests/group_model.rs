//! Orders in which CPUs, and an NMI on one of them, can take their steps in changes of the same
//! group of pages (loom): all with up to three preemptions. Whatever the order, the group's entry
//! fits its pages in the end.

use std::cell::Cell;

use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering::*};
use loom::thread;
use umbra_shadow::codes::*;
use umbra_shadow::group::{self, Entry, GroupTable};
use umbra_shadow::{Shadow, ShadowMemory, TwoLevel};

/// Pages that the model follows. The other ones of the group stay accessible.
const PAGES: usize = 3;
/// The value of a page's first granule, if only that is poisoned.
const PART: u8 = SLAB_REDZONE;
/// Preemptions of a thread in an order. The faults that were found needed two.
const PREEMPTIONS: usize = 3;

/// The shadow of one group. Of each page's byte shadow it has the first granule's, and one byte for
/// all others.
struct Machine {
    classes: AtomicU64,
    bytes: [[AtomicU8; 2]; PAGES],
    entry: AtomicU64,
}

/// What a CPU does to one page.
#[derive(Clone, Copy, Debug)]
enum Change {
    Poison,
    Unpoison,
    /// Poisons the first granule.
    Part,
}

const CHANGES: [Change; 3] = [Change::Poison, Change::Unpoison, Change::Part];

/// A CPU's view of the shadow.
#[derive(Clone)]
struct Cpu {
    machine: Arc<Machine>,
    /// Steps until an NMI comes, which changes page 2.
    nmi: Cell<Option<(usize, Change)>>,
}

impl Cpu {
    fn new(machine: &Arc<Machine>) -> Self {
        Self { machine: machine.clone(), nmi: Cell::new(None) }
    }

    fn change(&self, page: usize, change: Change) {
        let at = page as u64 * PAGE_SIZE;
        let mut shadow = TwoLevel::new(self.clone());
        let done = match change {
            Change::Poison => shadow.poison(at, PAGE_SIZE, FREE_PAGE),
            Change::Unpoison => shadow.unpoison(at, PAGE_SIZE),
            Change::Part => shadow.poison(at, GRANULE, PART),
        };
        done.expect("inside");
        self.nmi.set(shadow.into_inner().nmi.get());
    }

    /// A step of this CPU, before which its NMI may come.
    fn step(&self) {
        match self.nmi.take() {
            Some((0, change)) => self.change(2, change),
            Some((more, change)) => self.nmi.set(Some((more - 1, change))),
            None => {}
        }
    }
}

impl ShadowMemory for Cpu {
    fn base(&self) -> u64 {
        0
    }

    fn limit(&self) -> u64 {
        8 * PAGE_SIZE
    }

    fn page(&self, addr: u64) -> u8 {
        self.step();
        self.machine.classes.load(Acquire).to_le_bytes()[(addr / PAGE_SIZE) as usize]
    }

    fn set_pages(&mut self, addr: u64, _pages: u64, value: u8) {
        self.step();
        let shift = addr / PAGE_SIZE * 8;
        let store = |old| Some(old & !(0xff << shift) | u64::from(value) << shift);
        // A store of one byte. It orders no more than the store would.
        self.machine.classes.fetch_update(Release, Relaxed, store).expect("always");
    }

    fn claim_page(&mut self, addr: u64, from: u8) -> bool {
        self.step();
        let shift = addr / PAGE_SIZE * 8;
        let claim = |old: u64| {
            ((old >> shift) as u8 == from)
                .then_some(old & !(0xff << shift) | u64::from(PAGE_BUSY) << shift)
        };
        self.machine.classes.fetch_update(AcqRel, Acquire, claim).is_ok()
    }

    fn byte(&self, _addr: u64) -> u8 {
        unreachable!("nothing is checked");
    }

    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        let page = (addr / PAGE_SIZE) as usize;
        if granules == 1 {
            self.step();
            self.machine.bytes[page][0].store(value, Release);
        } else {
            self.fill(0, page as u32, value);
        }
    }

    fn open_group(&mut self, _addr: u64) {
        group::open(self, 0);
    }

    fn settle_groups(&mut self, addr: u64, pages: u64, value: u8) {
        group::settle_pages(self, addr / PAGE_SIZE, pages, value);
    }
}

impl GroupTable for Cpu {
    // A change that waits at all hides orders in which it does not.
    const PATIENCE: u32 = 0;

    fn patterns(&self) -> u64 {
        0
    }

    fn byte_window(&self) -> u64 {
        0x4000_0000
    }

    fn classes(&self, _group: u64) -> u64 {
        self.step();
        self.machine.classes.load(Acquire)
    }

    fn fill(&self, _group: u64, page: u32, value: u8) {
        for byte in self.machine.bytes.get(page as usize).into_iter().flatten() {
            self.step();
            byte.store(value, Release);
        }
    }

    fn entry(&self, _group: u64) -> Entry {
        self.step();
        Entry::from_bits(self.machine.entry.load(Acquire))
    }

    fn exchange(&self, _group: u64, from: Entry, to: Entry) -> bool {
        self.step();
        let [from, to] = [from, to].map(Entry::bits);
        self.machine.entry.compare_exchange(from, to, SeqCst, Acquire).is_ok()
    }

    fn forget(&self, _group: u64) {}

    fn pause(&self) {
        self.step();
        thread::yield_now();
    }
}

impl Machine {
    /// A group with these changes made.
    fn new(changes: &[(usize, Change)]) -> Arc<Self> {
        let machine = Arc::new(Self {
            classes: AtomicU64::new(0),
            bytes: [[0xa5; 2]; PAGES].map(|both| both.map(AtomicU8::new)),
            entry: AtomicU64::new(Entry::pattern(0, 0).bits()),
        });
        let cpu = Cpu::new(&machine);
        changes.iter().for_each(|(page, change)| cpu.change(*page, *change));
        machine
    }

    /// Panics unless entry and byte shadow fit the page shadow, and that fits what was done: the
    /// changes of each page in their order.
    fn is_in_line(&self, done: &[(usize, Change)]) {
        let entry = Entry::from_bits(self.entry.load(Acquire));
        let classes = self.classes.load(Acquire).to_le_bytes();
        assert!(!entry.is_busy() && !entry.is_again(), "{done:?}");
        assert_eq!(entry.is_real(), classes.contains(&PAGE_BYTES), "{done:?} {classes:x?}");
        for (page, bytes) in self.bytes.iter().enumerate() {
            let changes = done.iter().filter(|(changed, _)| *changed == page);
            let (first, rest) = changes.fold((0, 0), |(_, rest), (_, change)| match change {
                Change::Poison => (FREE_PAGE, FREE_PAGE),
                Change::Unpoison => (PAGE_VALID, PAGE_VALID),
                Change::Part => (PART, rest),
            });
            let class = if first == PART { PAGE_BYTES } else { first };
            assert_eq!(classes[page], class, "{done:?}: page {page}");
            let bytes = [&bytes[0], &bytes[1]].map(|byte| byte.load(Acquire));
            if entry.is_real() {
                assert_eq!(bytes, [first, rest], "{done:?}: page {page}");
            } else {
                assert_eq!(entry.poisoned() >> page & 1 != 0, class == FREE_PAGE, "{done:?}");
            }
        }
    }
}

/// Groups to begin with: patterns and real ones.
const BEFORE: [&[(usize, Change)]; 4] = [
    &[],
    &[(0, Change::Poison), (1, Change::Poison)],
    &[(0, Change::Part)],
    &[(1, Change::Poison), (2, Change::Part)],
];

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

/// Whether a change leaves something to do: a part of a page that holds it all is none.
fn is_one(before: &[(usize, Change)], page: usize, change: Change) -> bool {
    let old = before.iter().rfind(|(other, _)| *other == page).map(|(_, change)| change);
    !(matches!(change, Change::Part) && matches!(old, Some(Change::Part)))
}

#[test]
fn two_cpus_change_two_pages() {
    for before in BEFORE {
        for (a, b) in CHANGES.iter().flat_map(|a| CHANGES.map(|b| (*a, b))) {
            if !is_one(before, 0, a) || !is_one(before, 1, b) {
                continue;
            }
            explore(move || {
                let machine = Machine::new(before);
                let (one, other) = (Cpu::new(&machine), Cpu::new(&machine));
                let other = thread::spawn(move || other.change(1, b));
                one.change(0, a);
                other.join().unwrap();
                machine.is_in_line(&[before, &[(0, a), (1, b)]].concat());
            });
        }
    }
}

/// A CPU changes its page twice while another one changes another page.
#[test]
fn a_cpu_changes_a_page_twice_meanwhile() {
    let twice = || CHANGES.iter().flat_map(|b| CHANGES.map(|c| (*b, c)));
    for before in BEFORE {
        for (a, (b, c)) in CHANGES.iter().flat_map(|a| twice().map(|both| (*a, both))) {
            if !is_one(before, 0, a) || !is_one(before, 1, b) || !is_one(&[(1, b)], 1, c) {
                continue;
            }
            explore(move || {
                let machine = Machine::new(before);
                let (one, other) = (Cpu::new(&machine), Cpu::new(&machine));
                let other = thread::spawn(move || {
                    other.change(1, b);
                    other.change(1, c);
                });
                one.change(0, a);
                other.join().unwrap();
                machine.is_in_line(&[before, &[(0, a), (1, b), (1, c)]].concat());
            });
        }
    }
}

/// An NMI at each step of a change poisons or unpoisons another page, while a second CPU changes a
/// third one.
#[test]
fn an_nmi_does_not_wait() {
    const STEPS: usize = 24;
    for before in [BEFORE[0], BEFORE[2]] {
        for (nmi, b) in [(Change::Poison, Change::Part), (Change::Unpoison, Change::Poison)] {
            for (a, at) in CHANGES.iter().flat_map(|a| (0..STEPS).map(|at| (*a, at))) {
                if !is_one(before, 0, a) {
                    continue;
                }
                explore(move || {
                    let machine = Machine::new(before);
                    let (one, other) = (Cpu::new(&machine), Cpu::new(&machine));
                    one.nmi.set(Some((at, nmi)));
                    let other = thread::spawn(move || other.change(1, b));
                    one.change(0, a);
                    other.join().unwrap();
                    if one.nmi.get().is_none() {
                        machine.is_in_line(&[before, &[(0, a), (1, b), (2, nmi)]].concat());
                    }
                });
            }
        }
    }
}
