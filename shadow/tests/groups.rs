//! The check shadow against an oracle, with several CPUs whose TLBs hold stale entries.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use proptest::prelude::*;
use umbra_shadow::codes::*;
use umbra_shadow::group::{self, Entry, GROUP_SHIFT, GroupTable, PAGES, PATTERN_BYTES};
use umbra_shadow::{Shadow, ShadowMemory, TwoLevel};

const GROUPS: u64 = 3;
const SIZE: u64 = GROUPS << GROUP_SHIFT;
const CPUS: usize = 3;
const PATTERNS: u64 = 3 * PATTERN_BYTES;
const BYTE_WINDOW: u64 = 0x4000_0000;

/// Shadow of [`SIZE`] bytes from 0 on, and the TLBs of CPUs.
struct Machine {
    pages: RefCell<Vec<u8>>,
    bytes: RefCell<Vec<u8>>,
    entries: RefCell<Vec<Entry>>,
    tlbs: RefCell<[HashMap<u64, Entry>; CPUS]>,
    /// The CPU that runs.
    cpu: Cell<usize>,
    /// Translations that were dropped because they were stale.
    stale: Cell<usize>,
    /// Who made a group real last, and when.
    now: Cell<usize>,
    opened: RefCell<Vec<(usize, usize)>>,
}

#[derive(Clone)]
struct Memory(Rc<Machine>);

impl Memory {
    fn new() -> Self {
        Self(Rc::new(Machine {
            pages: vec![0; (SIZE >> PAGE_SHIFT) as usize].into(),
            // What lies in the byte shadow of a pattern does not matter.
            bytes: vec![0xa5; (SIZE >> GRANULE_SHIFT) as usize].into(),
            entries: vec![Entry::pattern(PATTERNS, 0); GROUPS as usize].into(),
            tlbs: RefCell::default(),
            cpu: Cell::new(0),
            stale: Cell::new(0),
            now: Cell::new(0),
            opened: vec![(0, 0); GROUPS as usize].into(),
        }))
    }

    /// What the CPU reads in the check shadow, by its TLB.
    fn check_shadow(&self, addr: u64) -> u8 {
        let group = addr >> GROUP_SHIFT;
        let mut tlbs = self.0.tlbs.borrow_mut();
        let entry = *tlbs[self.0.cpu.get()].entry(group).or_insert_with(|| self.entry(group));
        match entry.is_real() {
            false => match entry.poisoned() >> (addr >> PAGE_SHIFT & u64::from(PAGES - 1)) & 1 {
                0 => 0,
                _ => 0xff,
            },
            true => {
                assert_eq!(entry.gpa(), BYTE_WINDOW + group * PAGE_SIZE);
                self.byte(addr)
            }
        }
    }

    /// An access of 1 to 8 bytes in a granule, as a compiler checks it. Returns whether it is
    /// reported.
    fn is_reported(&self, addr: u64, len: u64) -> bool {
        let shadow = self.check_shadow(addr);
        let is_good = shadow == 0 || (shadow < 8 && (addr & 7) + len <= shadow.into());
        if is_good {
            return false;
        }
        if TwoLevel::new(self.clone()).check(addr, len).is_err() {
            return true;
        }
        self.0.stale.set(self.0.stale.get() + 1);
        self.forget(addr >> GROUP_SHIFT);
        false
    }

    /// Panics unless the entries fit the page shadow, and the parts of real ones.
    fn is_in_line(&self) {
        for group in 0..GROUPS {
            let (entry, classes) = (self.entry(group), self.classes(group).to_le_bytes());
            assert!(!entry.is_busy() && !entry.is_again());
            assert_eq!(entry.is_real(), classes.contains(&PAGE_BYTES), "{group}: {classes:x?}");
            for (page, class) in (0..u64::from(PAGES)).zip(classes) {
                if !entry.is_real() {
                    assert_eq!(entry.poisoned() >> page & 1 != 0, class >= POISON_MIN);
                    assert_eq!(entry.gpa(), PATTERNS + u64::from(entry.poisoned()) * PAGE_SIZE);
                } else if class != PAGE_BYTES {
                    let first = ((group << 3 | page) * SHADOW_PER_PAGE) as usize;
                    let part = &self.0.bytes.borrow()[first..first + SHADOW_PER_PAGE as usize];
                    assert!(part.iter().all(|byte| *byte == class), "{group} {page}: {class:x}");
                }
            }
        }
    }
}

impl ShadowMemory for Memory {
    fn base(&self) -> u64 {
        0
    }

    fn limit(&self) -> u64 {
        SIZE
    }

    fn page(&self, addr: u64) -> u8 {
        self.0.pages.borrow()[(addr >> PAGE_SHIFT) as usize]
    }

    fn set_pages(&mut self, addr: u64, pages: u64, value: u8) {
        let first = (addr >> PAGE_SHIFT) as usize;
        self.0.pages.borrow_mut()[first..first + pages as usize].fill(value);
    }

    fn byte(&self, addr: u64) -> u8 {
        self.0.bytes.borrow()[(addr >> GRANULE_SHIFT) as usize]
    }

    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        let first = (addr >> GRANULE_SHIFT) as usize;
        self.0.bytes.borrow_mut()[first..first + granules as usize].fill(value);
    }

    fn open_group(&mut self, addr: u64) {
        group::open(self, addr >> GROUP_SHIFT);
    }

    fn settle_groups(&mut self, addr: u64, pages: u64, value: u8) {
        group::settle_pages(self, addr >> PAGE_SHIFT, pages, value);
    }
}

impl GroupTable for Memory {
    const PATIENCE: u32 = 0;

    fn patterns(&self) -> u64 {
        PATTERNS
    }

    fn byte_window(&self) -> u64 {
        BYTE_WINDOW
    }

    fn classes(&self, group: u64) -> u64 {
        let pages = self.0.pages.borrow();
        u64::from_le_bytes(pages[group as usize * 8..][..8].try_into().expect("eight"))
    }

    fn fill(&self, group: u64, page: u32, value: u8) {
        self.clone().set_bytes(
            (group << GROUP_SHIFT) + u64::from(page) * PAGE_SIZE,
            SHADOW_PER_PAGE,
            value,
        );
    }

    fn entry(&self, group: u64) -> Entry {
        self.0.entries.borrow()[group as usize]
    }

    fn exchange(&self, group: u64, from: Entry, to: Entry) -> bool {
        let entry = &mut self.0.entries.borrow_mut()[group as usize];
        let is_it = *entry == from;
        if is_it {
            if to.is_real() && !entry.is_real() {
                self.0.opened.borrow_mut()[group as usize] = (self.0.cpu.get(), self.0.now.get());
            }
            *entry = to;
        }
        is_it
    }

    fn forget(&self, group: u64) {
        self.0.tlbs.borrow_mut()[self.0.cpu.get()].remove(&group);
    }

    fn pause(&self) {
        unreachable!("one CPU after the other");
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// First granule, granules, code or 0.
    Set(u64, u64, u8),
    Promote(u64),
    /// Address, log2 of the length.
    Access(u64, u32),
    /// The CPU drops what is stale.
    Tick,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    const GRANULES: u64 = SIZE / GRANULE;
    let code = || prop_oneof![Just(0), Just(FREE_PAGE), Just(SLAB_REDZONE), Just(SLAB_FREE)];
    // Whole pages are the usual change.
    let pages = (0..SIZE / PAGE_SIZE, 1..10u64, code()).prop_map(|(first, pages, code)| {
        let pages = pages.min(SIZE / PAGE_SIZE - first);
        Step::Set(first * SHADOW_PER_PAGE, pages * SHADOW_PER_PAGE, code)
    });
    let part = (0..GRANULES, 1..1500u64, code())
        .prop_map(|(first, n, code)| Step::Set(first, n.min(GRANULES - first), code));
    let step = prop_oneof![
        6 => pages,
        2 => part,
        1 => (0..SIZE).prop_map(Step::Promote),
        30 => (0..SIZE, 0..4u32).prop_map(|(addr, log)| Step::Access(addr >> log << log, log)),
        2 => Just(Step::Tick),
    ];
    proptest::collection::vec((0..CPUS, step), 1..400)
}

/// Who made a granule inaccessible, and when; or None.
type Truth = Vec<Option<(usize, usize)>>;

proptest! {
    /// No finding is false. A CPU misses only what another one poisoned since its last tick, or
    /// what is poisoned in a group that another one made real since then.
    #[test]
    fn stale_translations_miss_for_a_tick_at_most(steps in steps()) {
        let memory = Memory::new();
        let mut shadow = TwoLevel::new(memory.clone());
        let mut truth: Truth = vec![None; (SIZE / GRANULE) as usize];
        let mut ticks = [0; CPUS];
        for (now, (cpu, step)) in steps.into_iter().enumerate() {
            memory.0.cpu.set(cpu);
            memory.0.now.set(now);
            match step {
                Step::Set(first, granules, code) => {
                    let (addr, len) = (first * GRANULE, granules * GRANULE);
                    let by = match code {
                        0 => { shadow.unpoison(addr, len).unwrap(); None }
                        _ => { shadow.poison(addr, len, code).unwrap(); Some((cpu, now)) }
                    };
                    // What was poisoned is not poisoned again.
                    let range = &mut truth[first as usize..][..granules as usize];
                    range.iter_mut().for_each(|old| *old = by.map(|by| old.unwrap_or(by)));
                }
                Step::Promote(addr) => shadow.promote(addr, 1).unwrap(),
                Step::Tick => {
                    memory.0.tlbs.borrow_mut()[cpu].clear();
                    ticks[cpu] = now;
                }
                Step::Access(addr, log) => {
                    let found = memory.is_reported(addr, 1 << log);
                    match truth[(addr / GRANULE) as usize] {
                        None => prop_assert!(!found, "a false finding at {addr:#x}"),
                        Some(poisoned) => {
                            let opened = memory.0.opened.borrow()[(addr >> GROUP_SHIFT) as usize];
                            let is_new = |(by, when)| by != cpu && when > ticks[cpu];
                            prop_assert!(
                                found || is_new(poisoned) || is_new(opened),
                                "missed {addr:#x} on CPU {cpu}: {poisoned:?} {opened:?}"
                            );
                        }
                    }
                }
            }
            memory.is_in_line();
        }
    }
}

#[test]
fn a_free_on_another_cpu_is_seen_after_a_tick() {
    let memory = Memory::new();
    let mut shadow = TwoLevel::new(memory.clone());
    let on = |cpu, addr| {
        memory.0.cpu.set(cpu);
        memory.is_reported(addr, 8)
    };
    assert!(!on(1, 0x2000));
    memory.0.cpu.set(0);
    shadow.poison(0x2000, PAGE_SIZE, FREE_PAGE).unwrap();
    assert!(on(0, 0x2000), "at once where it was freed");
    assert!(!on(1, 0x2000), "stale");
    assert!(on(2, 0x2000), "never looked before");
    memory.0.tlbs.borrow_mut()[1].clear();
    assert!(on(1, 0x2000));
    // The other way round a stale translation costs time and no more.
    memory.0.cpu.set(0);
    shadow.unpoison(0x2000, PAGE_SIZE).unwrap();
    for cpu in 0..CPUS {
        assert!(!on(cpu, 0x2000) && !on(cpu, 0x2000));
    }
    assert_eq!(memory.0.stale.get(), CPUS, "each of them once");
}

#[test]
fn a_group_is_real_as_long_as_it_must_be() {
    let memory = Memory::new();
    let mut shadow = TwoLevel::new(memory.clone());
    let is_real = || memory.entry(1).is_real();
    let at = (1 << GROUP_SHIFT) + 3 * PAGE_SIZE;
    shadow.poison(at - PAGE_SIZE, PAGE_SIZE, FREE_PAGE).unwrap();
    shadow.poison(at + 64, 32, SLAB_REDZONE).unwrap();
    assert!(is_real() && memory.is_reported(at + 64, 8) && memory.is_reported(at - 8, 8));
    assert!(!memory.is_reported(at + 56, 8) && !memory.is_reported(at + PAGE_SIZE, 8));
    shadow.promote(at + PAGE_SIZE, 1).unwrap();
    shadow.unpoison(at, PAGE_SIZE).unwrap();
    assert!(is_real(), "another page is byte-checked");
    shadow.poison(at + PAGE_SIZE, PAGE_SIZE, FREE_PAGE).unwrap();
    assert!(!is_real() && memory.entry(1).poisoned() == 0b1_0100);
    assert!(!memory.entry(0).is_real() && memory.entry(0).poisoned() == 0);
    memory.is_in_line();
}

#[test]
fn entries_are_those_of_the_processor() {
    let pattern = Entry::pattern(PATTERNS, 0x81).bits();
    assert_eq!(
        pattern,
        1 << 63 | (PATTERNS + 0x8_1000) | 0x161,
        "global, dirty, accessed, present"
    );
    assert_eq!(Entry::real(0x1234_5000).bits(), 1 << 63 | 0x1234_5963, "writable");
}
