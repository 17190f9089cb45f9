//! The edges of checks and changes, and the stores of the two-level model for each change.

mod common;

use std::cell::Cell;

use common::{Store, TestMemory};
use umbra_shadow::abi::Access;
use umbra_shadow::codes::*;
use umbra_shadow::{
    BugKind, Cause, Full, RangeError, Shadow, ShadowMemory, TwoLevel, Violation, classify,
};

const PAGES: u64 = 4;
/// A boundary between chunks of byte shadow (2 MiB of memory each), in the middle of the memory.
const CHUNK: u64 = 0xffff_8000_0040_0000;
const BASE: u64 = CHUNK - 2 * PAGE_SIZE;
const LIMIT: u64 = CHUNK + 2 * PAGE_SIZE;

fn two_level() -> TwoLevel<TestMemory> {
    TwoLevel::new(TestMemory::new(BASE, PAGES, 0xA5))
}

/// Runs the same test on both models.
fn both(base: u64, test: impl Fn(&mut dyn FnMut(Op) -> Answer)) {
    let mut two = TwoLevel::new(TestMemory::new(base, PAGES, 0xA5));
    let mut full = Full::new(TestMemory::new(base, PAGES, 0));
    test(&mut |op| op.on(&mut two));
    test(&mut |op| op.on(&mut full));
}

#[derive(Clone, Copy)]
enum Op {
    Poison(u64, u64, u8),
    Unpoison(u64, u64),
    Promote(u64, u64),
    Check(u64, u64),
    State(u64),
}
use Op::*;

#[derive(Debug, PartialEq)]
enum Answer {
    Done,
    Refused(RangeError),
    Bad(Violation),
    Value(u8),
}

impl Op {
    fn on(self, shadow: &mut impl Shadow) -> Answer {
        let changed = match self {
            Poison(addr, len, code) => shadow.poison(addr, len, code),
            Unpoison(addr, len) => shadow.unpoison(addr, len),
            Promote(addr, len) => shadow.promote(addr, len),
            Check(addr, len) => {
                return shadow.check(addr, len).map_or_else(Answer::Bad, |()| Answer::Done);
            }
            State(addr) => return Answer::Value(shadow.state(addr)),
        };
        changed.map_or_else(Answer::Refused, |()| Answer::Done)
    }
}

fn bad(address: u64, code: u8) -> Answer {
    Answer::Bad(Violation { address, code, cause: Cause::Poisoned })
}

fn outside(address: u64) -> Answer {
    Answer::Bad(Violation { address, code: UNKNOWN, cause: Cause::Outside })
}

#[test]
fn end_of_an_object_with_a_partial_granule() {
    both(BASE, |run| {
        // 13 bytes in the middle of a redzone: the end is inside a granule.
        let object = BASE + 0x100;
        run(Poison(BASE, PAGE_SIZE, SLAB_REDZONE));
        run(Unpoison(object, 13));
        assert_eq!(run(State(object + 8)), Answer::Value(5));
        assert_eq!(run(Check(object + 12, 1)), Answer::Done, "end - 1");
        assert_eq!(run(Check(object + 13, 1)), bad(object + 13, 5), "end");
        assert_eq!(run(Check(object + 14, 1)), bad(object + 14, 5), "end + 1");
        assert_eq!(run(Check(object + 16, 1)), bad(object + 16, SLAB_REDZONE), "next granule");
        assert_eq!(run(Check(object, 13)), Answer::Done);
        assert_eq!(
            run(Check(object, 14)),
            bad(object + 13, 5),
            "the first byte behind, not the first touched"
        );
        assert_eq!(run(Check(object - 1, 2)), bad(object - 1, SLAB_REDZONE));
    });
}

#[test]
fn most_accesses_pass_at_once() {
    fn quick(shadow: &mut impl Shadow, in_pages: bool) {
        shadow.poison(CHUNK + 8, 3, SLAB_REDZONE).unwrap();
        shadow.poison(CHUNK + 5, 11, SLAB_REDZONE).unwrap();
        shadow.poison(CHUNK + PAGE_SIZE, PAGE_SIZE, FREE_PAGE).unwrap();
        for (addr, len, passes) in [
            (BASE, 8, true),
            (BASE + 7, 1, true),
            (BASE + 4, 8, in_pages),
            (BASE, PAGE_SIZE, in_pages),
            (BASE, PAGE_SIZE + 1, false),
            (CHUNK - 1, 2, false),
            (CHUNK, 0, false),
            (CHUNK + 4, 1, true),
            (CHUNK + 4, 2, false),
            (CHUNK + 5, 1, false),
            (CHUNK + 8, 1, false),
            (CHUNK + 16, 8, true),
            (CHUNK + 16, 9, false),
            (CHUNK + PAGE_SIZE, 1, false),
            (BASE - 1, 1, false),
            (LIMIT, 1, false),
        ] {
            assert_eq!(shadow.passes_at_once(addr, len), passes, "{len} bytes from {addr:#x}");
        }
    }
    quick(&mut two_level(), true);
    quick(&mut Full::new(TestMemory::new(BASE, PAGES, 0)), false);
}

#[test]
fn accesses_across_pages_and_chunks() {
    both(BASE, |run| {
        run(Poison(CHUNK, 1, FREE_PAGE));
        assert_eq!(
            run(Check(CHUNK - 8, 8)),
            Answer::Done,
            "a byte before valid bytes cannot be poisoned"
        );
        run(Poison(CHUNK, 8, STACK_MID));
        assert_eq!(run(Check(CHUNK - 8, 8)), Answer::Done);
        assert_eq!(run(Check(CHUNK - 8, 9)), bad(CHUNK, STACK_MID), "next page, by its bytes");
        run(Poison(CHUNK, PAGE_SIZE, FREE_PAGE));
        assert_eq!(run(Check(CHUNK - 1, 2)), bad(CHUNK, FREE_PAGE), "next page, as a whole");
        assert_eq!(run(Check(CHUNK + PAGE_SIZE - 1, 2)), bad(CHUNK + PAGE_SIZE - 1, FREE_PAGE));
        assert_eq!(run(Check(CHUNK + PAGE_SIZE, 1)), Answer::Done);
        // A change across the boundary, partial at both ends.
        run(Unpoison(BASE, LIMIT - BASE));
        run(Poison(CHUNK - 12, 32, SLAB_FREE));
        assert_eq!(run(Check(CHUNK - 20, 8)), Answer::Done);
        assert_eq!(run(Check(CHUNK - 20, 9)), bad(CHUNK - 12, 4));
        assert_eq!(run(Check(CHUNK - 1, 1)), bad(CHUNK - 1, SLAB_FREE));
        assert_eq!(run(Check(CHUNK + 15, 1)), bad(CHUNK + 15, SLAB_FREE));
        assert_eq!(
            run(Check(CHUNK + 16, 8)),
            Answer::Done,
            "the last four bytes have valid ones behind them"
        );
        // Whole pages in the middle of an access.
        run(Unpoison(BASE, LIMIT - BASE));
        run(Poison(CHUNK + PAGE_SIZE, PAGE_SIZE, FREE_PAGE));
        assert_eq!(run(Check(BASE, LIMIT - BASE)), bad(CHUNK + PAGE_SIZE, FREE_PAGE));
        assert_eq!(run(Check(BASE, 3 * PAGE_SIZE)), Answer::Done);
    });
}

#[test]
fn codes_of_partly_covered_granules() {
    both(BASE, |run| {
        run(Poison(BASE, 8, SLAB_REDZONE));
        run(Poison(BASE + 4, 4, SLAB_FREE));
        assert_eq!(
            run(State(BASE)),
            Answer::Value(SLAB_REDZONE),
            "not from the first byte: keeps its code"
        );
        run(Poison(BASE, 4, SLAB_FREE));
        assert_eq!(
            run(State(BASE)),
            Answer::Value(SLAB_FREE),
            "from the first byte: takes the new code"
        );
        run(Unpoison(BASE, 5));
        run(Poison(BASE + 2, 2, SLAB_FREE));
        assert_eq!(run(State(BASE)), Answer::Value(5), "a valid byte lies behind");
        run(Poison(BASE + 2, 3, SLAB_FREE));
        assert_eq!(run(State(BASE)), Answer::Value(2));
        run(Poison(BASE, 2, SLAB_FREE_TRACK));
        assert_eq!(run(State(BASE)), Answer::Value(SLAB_FREE_TRACK));
        run(Unpoison(BASE + 3, 2));
        assert_eq!(run(State(BASE)), Answer::Value(5), "bytes before the part become valid too");
    });
}

#[test]
fn nothing_is_always_in_range() {
    both(BASE, |run| {
        run(Poison(BASE, LIMIT - BASE, FREE_PAGE));
        for addr in [0, BASE - 1, BASE, BASE + 3, LIMIT, u64::MAX] {
            for op in
                [Poison(addr, 0, SLAB_FREE), Unpoison(addr, 0), Promote(addr, 0), Check(addr, 0)]
            {
                assert_eq!(run(op), Answer::Done);
            }
        }
        assert_eq!(run(State(BASE)), Answer::Value(FREE_PAGE));
    });
}

#[test]
fn ranges_outside_the_checked_memory() {
    both(BASE, |run| {
        for (addr, len, first) in [
            (BASE - 1, 1, BASE - 1),
            (BASE - 1, 2, BASE - 1),
            (BASE - 8, LIMIT - BASE + 16, BASE - 8),
            (LIMIT - 4, 5, LIMIT),
            (LIMIT, 1, LIMIT),
            (u64::MAX, 1, u64::MAX),
            (BASE, u64::MAX - BASE + 1, LIMIT),
        ] {
            let refused = || Answer::Refused(RangeError::Outside { addr: first });
            assert_eq!(run(Check(addr, len)), outside(first));
            assert_eq!(run(Poison(addr, len, FREE_PAGE)), refused());
            assert_eq!(run(Unpoison(addr, len)), refused());
            assert_eq!(run(Promote(addr, len)), refused());
        }
        assert_eq!(run(Check(BASE, LIMIT - BASE)), Answer::Done, "nothing was changed");
        assert_eq!(run(State(BASE - 1)), Answer::Value(UNKNOWN));
        assert_eq!(run(State(LIMIT)), Answer::Value(UNKNOWN));
        run(Poison(LIMIT - 1, 1, FREE_PAGE));
        assert_eq!(run(Check(LIMIT - 2, 2)), bad(LIMIT - 1, 7));
    });
}

#[test]
fn ranges_that_wrap() {
    let top = (PAGES * PAGE_SIZE).wrapping_neg();
    for base in [BASE, top] {
        both(base, |run| {
            for (addr, len) in
                [(base, base.wrapping_neg() + 1), (base + 3, u64::MAX), (u64::MAX, 2)]
            {
                let wrapped = || Answer::Refused(RangeError::Wrapped { addr, len });
                let violation = Violation { address: addr, code: UNKNOWN, cause: Cause::Wrapped };
                assert_eq!(run(Check(addr, len)), Answer::Bad(violation));
                assert_eq!(run(Poison(addr, len, FREE_PAGE)), wrapped());
                assert_eq!(run(Unpoison(addr, len)), wrapped());
                assert_eq!(run(Promote(addr, len)), wrapped());
            }
        });
    }
}

#[test]
fn memory_up_to_the_last_byte_of_the_address_space() {
    let size = PAGES * PAGE_SIZE;
    let base = size.wrapping_neg();
    both(base, |run| {
        assert_eq!(run(Promote(u64::MAX, 1)), Answer::Done);
        assert_eq!(run(Poison(base, size, FREE_PAGE)), Answer::Done);
        assert_eq!(run(Check(u64::MAX, 1)), bad(u64::MAX, FREE_PAGE));
        assert_eq!(run(Unpoison(base, size)), Answer::Done);
        assert_eq!(run(Check(base, size)), Answer::Done);
        assert_eq!(run(Poison(u64::MAX - 4, 5, SLAB_FREE)), Answer::Done);
        assert_eq!(run(Check(u64::MAX - 5, 1)), Answer::Done);
        assert_eq!(run(Check(u64::MAX - 5, 6)), bad(u64::MAX - 4, 3));
        assert_eq!(run(State(u64::MAX)), Answer::Value(3));
        assert_eq!(run(Check(base - 1, 2)), outside(base - 1));
        assert_eq!(run(Promote(base, size)), Answer::Done);
        assert_eq!(run(Check(base, size)), bad(u64::MAX - 4, 3));
    });
    let mut full = Full::new(TestMemory::new(base, PAGES, 0));
    assert_eq!(full.memory().limit(), u64::MAX);
    full.poison(u64::MAX - 4, 5, SLAB_FREE).unwrap();
    let violation = full.check(u64::MAX, 1).unwrap_err();
    // There is no granule behind the last one.
    assert_eq!(classify(&full, &violation, u64::MAX, 1, Access::Read), BugKind::OutOfBounds);
}

#[test]
fn only_poison_codes_poison() {
    both(BASE, |run| {
        for code in [0, 1, 7, 0x7F] {
            assert_eq!(run(Poison(BASE, 8, code)), Answer::Refused(RangeError::NotPoison { code }));
        }
        assert_eq!(run(Check(BASE, 8)), Answer::Done);
        assert_eq!(run(Poison(BASE, 8, 0x80)), Answer::Done);
    });
}

#[test]
fn errors_name_the_wrong_value() {
    let shown = |error: RangeError| error.to_string();
    assert_eq!(shown(RangeError::Outside { addr: 0x1000 }), "address 0x1000 has no shadow");
    assert_eq!(shown(RangeError::NotPoison { code: 7 }), "0x07 is not a poison code");
    let wrapped = shown(RangeError::Wrapped { addr: 0x1000, len: 0x20 });
    assert_eq!(wrapped, "0x20 bytes from address 0x1000 go past the end of the address space");
}

#[test]
fn whole_pages_are_one_store() {
    let mut two = two_level();
    two.poison(BASE, 3 * PAGE_SIZE, FREE_PAGE).unwrap();
    two.unpoison(BASE + PAGE_SIZE, PAGE_SIZE).unwrap();
    let stores = [Store::Pages(BASE, 3, FREE_PAGE), Store::Pages(BASE + PAGE_SIZE, 1, PAGE_VALID)];
    assert_eq!(two.memory_mut().take_stores(), stores);
    two.check(BASE + PAGE_SIZE, PAGE_SIZE).unwrap();
    two.check(BASE, 1).unwrap_err();
    assert_eq!(two.memory().bytes_read.get(), 0, "no page is byte-checked");
}

#[test]
fn promotion_is_marked_busy_before_the_fill() {
    let mut two = two_level();
    let page = BASE + PAGE_SIZE;
    two.poison(page + 16, 24, SLAB_FREE).unwrap();
    let stores = [
        Store::Pages(page, 1, PAGE_BUSY),
        Store::Bytes(page, SHADOW_PER_PAGE, 0),
        Store::Pages(page, 1, PAGE_BYTES),
        Store::Bytes(page + 16, 3, SLAB_FREE),
    ];
    assert_eq!(two.memory_mut().take_stores(), stores);
    // It is byte-checked now: a further part is one store.
    two.unpoison(page + 16, 8).unwrap();
    assert_eq!(two.memory_mut().take_stores(), [Store::Bytes(page + 16, 1, 0)]);
    // The fill of a poisoned page is its code.
    two.poison(BASE, PAGE_SIZE, SLAB_REDZONE).unwrap();
    two.unpoison(BASE, 8).unwrap();
    assert_eq!(
        two.memory_mut().take_stores()[2],
        Store::Bytes(BASE, SHADOW_PER_PAGE, SLAB_REDZONE)
    );
}

#[test]
fn a_range_promotes_its_partial_pages_only() {
    let mut two = two_level();
    two.poison(BASE + PAGE_SIZE - 8, 2 * PAGE_SIZE + 16, SLAB_FREE).unwrap();
    let pages: Vec<u8> = (0..PAGES).map(|i| two.memory().page(BASE + i * PAGE_SIZE)).collect();
    assert_eq!(pages, [PAGE_BYTES, SLAB_FREE, SLAB_FREE, PAGE_BYTES]);
    let fills = two.memory_mut().take_stores();
    let fills =
        fills.iter().filter(|store| matches!(store, Store::Bytes(_, SHADOW_PER_PAGE, _))).count();
    assert_eq!(fills, 2);
}

#[test]
fn demotion_forgets_the_byte_shadow() {
    let mut two = two_level();
    two.poison(BASE, 8, SLAB_FREE).unwrap();
    two.memory_mut().take_stores();
    two.unpoison(BASE, PAGE_SIZE).unwrap();
    assert_eq!(two.memory_mut().take_stores(), [Store::Pages(BASE, 1, PAGE_VALID)]);
    assert_eq!(two.memory().byte(BASE), SLAB_FREE, "left behind");
    assert_eq!(two.state(BASE), 0);
    two.check(BASE, 8).unwrap();
    two.poison(BASE + 64, 8, SLAB_FREE).unwrap();
    two.check(BASE, 8).unwrap();
}

#[test]
fn parts_that_change_nothing_do_not_promote() {
    let mut two = two_level();
    two.poison(CHUNK, PAGE_SIZE, SLAB_FREE).unwrap();
    two.memory_mut().take_stores();
    two.unpoison(BASE + 8, 100).unwrap();
    two.poison(CHUNK + 8, 100, SLAB_FREE).unwrap();
    assert_eq!(two.memory_mut().take_stores(), []);
    two.poison(CHUNK + 8, 96, SLAB_REDZONE).unwrap();
    assert_eq!(two.memory().page(CHUNK), PAGE_BYTES, "another code does");
    assert_eq!((two.state(CHUNK), two.state(CHUNK + 8)), (SLAB_FREE, SLAB_REDZONE));
}

#[test]
fn promotion_on_request_keeps_what_is_valid() {
    let mut two = two_level();
    two.poison(CHUNK, PAGE_SIZE, FREE_PAGE).unwrap();
    two.promote(CHUNK - 1, 2).unwrap();
    let pages: Vec<u8> = (0..PAGES).map(|i| two.memory().page(BASE + i * PAGE_SIZE)).collect();
    assert_eq!(pages, [PAGE_VALID, PAGE_BYTES, PAGE_BYTES, PAGE_VALID]);
    two.check(CHUNK - PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(two.first_bad(CHUNK - 8, 16), Some(CHUNK));
    two.memory_mut().take_stores();
    two.promote(CHUNK - 1, 2).unwrap();
    assert_eq!(two.memory_mut().take_stores(), [], "they are byte-checked already");
}

#[test]
fn values_that_nobody_writes_count_as_poisoned() {
    for value in [0x03, 0x07, 0x7F] {
        let mut two = two_level();
        two.memory_mut().plant_page(BASE, value);
        let violation = two.check(BASE + 1, 1).unwrap_err();
        assert_eq!(
            violation,
            Violation { address: BASE + 1, code: UNKNOWN, cause: Cause::Poisoned }
        );
        assert_eq!(classify(&two, &violation, BASE + 1, 1, Access::Read), BugKind::Unknown);
        // They do not become "the first three bytes" in the byte shadow.
        two.unpoison(BASE + 8, 8).unwrap();
        assert_eq!((two.first_bad(BASE, 1), two.first_bad(BASE + 8, 8)), (Some(BASE), None));
    }
    for value in [0x08, 0x7F] {
        let mut full = Full::new(TestMemory::new(BASE, PAGES, 0));
        full.memory_mut().plant_byte(BASE, value);
        let violation = full.check(BASE, 8).unwrap_err();
        assert_eq!(violation, Violation { address: BASE, code: value, cause: Cause::Poisoned });
        assert_eq!(classify(&full, &violation, BASE, 8, Access::Read), BugKind::Unknown);
    }
}

#[test]
fn a_promotion_that_never_ends_is_read_by_bytes() {
    let mut two = two_level();
    two.memory_mut().plant_page(BASE, PAGE_BUSY);
    two.memory_mut().plant_byte(BASE, 0);
    two.memory_mut().plant_byte(BASE + 8, SLAB_FREE);
    assert_eq!((two.first_bad(BASE, 9), two.state(BASE + 8)), (Some(BASE + 8), SLAB_FREE));
    two.unpoison(BASE + 8, 8).unwrap();
    assert_eq!(two.memory_mut().take_stores(), [Store::Bytes(BASE + 8, 1, 0)]);
}

/// Memory where another CPU is always a little faster.
struct Contended {
    inner: TestMemory,
    claims: u32,
    waits: Cell<u32>,
}

impl ShadowMemory for Contended {
    fn base(&self) -> u64 {
        self.inner.base()
    }
    fn limit(&self) -> u64 {
        self.inner.limit()
    }
    fn page(&self, addr: u64) -> u8 {
        self.inner.page(addr)
    }
    fn set_pages(&mut self, addr: u64, pages: u64, value: u8) {
        self.inner.set_pages(addr, pages, value);
    }
    fn byte(&self, addr: u64) -> u8 {
        self.inner.byte(addr)
    }
    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        self.inner.set_bytes(addr, granules, value);
    }
    fn claim_page(&mut self, addr: u64, _from: u8) -> bool {
        self.claims += 1;
        self.inner.set_bytes(addr, SHADOW_PER_PAGE, 0);
        self.inner.set_bytes(addr, 1, STACK_LEFT);
        self.inner.set_pages(addr, 1, PAGE_BUSY);
        false
    }
    fn wait_page(&self, addr: u64) -> u8 {
        assert_eq!(self.page(addr), PAGE_BUSY);
        self.waits.set(self.waits.get() + 1);
        PAGE_BYTES
    }
}

#[test]
fn a_lost_race_to_promote_keeps_the_other_part() {
    let inner = TestMemory::new(BASE, PAGES, 0xA5);
    let mut two = TwoLevel::new(Contended { inner, claims: 0, waits: Cell::new(0) });
    two.poison(BASE + 8, 8, SLAB_FREE).unwrap();
    assert_eq!((two.memory().claims, two.memory().waits.get()), (1, 1));
    // The other CPU never finishes, so every look at the page waits for it.
    assert_eq!(
        (two.state(BASE), two.state(BASE + 8), two.state(BASE + 16)),
        (STACK_LEFT, SLAB_FREE, 0)
    );
    assert_eq!(two.memory().waits.get(), 4);
    assert_eq!((two.first_bad(BASE + 16, 8), two.first_bad(BASE + 8, 1)), (None, Some(BASE + 8)));
    assert_eq!(two.memory().waits.get(), 6);
}

#[test]
fn kinds_by_code() {
    for (code, name) in [
        (FREE_PAGE, "use-after-free"),
        (LARGE_REDZONE, "slab-out-of-bounds"),
        (SLAB_REDZONE, "slab-out-of-bounds"),
        (SLAB_FREE, "slab-use-after-free"),
        (SLAB_FREE_TRACK, "slab-use-after-free"),
        (GLOBAL_REDZONE, "global-out-of-bounds"),
        (USE_AFTER_SCOPE, "use-after-scope"),
        (STACK_LEFT, "stack-out-of-bounds"),
        (STACK_MID, "stack-out-of-bounds"),
        (STACK_RIGHT, "stack-out-of-bounds"),
        (STACK_PARTIAL, "stack-out-of-bounds"),
        (ALLOCA_LEFT, "alloca-out-of-bounds"),
        (ALLOCA_RIGHT, "alloca-out-of-bounds"),
        (UNKNOWN, "unknown-crash"),
    ] {
        let mut two = two_level();
        // As a whole page, and from the partial granule before it.
        two.poison(CHUNK - 3, PAGE_SIZE + 3, code).unwrap();
        for addr in [CHUNK, CHUNK - 3] {
            let violation = two.check(addr, 1).unwrap_err();
            assert_eq!(
                classify(&two, &violation, addr, 1, Access::Write).to_string(),
                name,
                "{code:#x} at {addr:#x}"
            );
        }
    }
}

#[test]
fn kinds_that_the_shadow_does_not_decide() {
    let mut two = two_level();
    let kind = |two: &TwoLevel<TestMemory>, addr, len, access| {
        classify(two, &two.check(addr, len).unwrap_err(), addr, len, access).as_str()
    };
    for (addr, name) in [
        (0, "null-ptr-deref"),
        (PAGE_SIZE - 1, "null-ptr-deref"),
        (PAGE_SIZE, "user-memory-access"),
        ((1 << 47) - 1, "user-memory-access"),
        (1 << 47, "wild-memory-access"),
        (BASE - 1, "wild-memory-access"),
        (LIMIT, "wild-memory-access"),
    ] {
        assert_eq!(kind(&two, addr, 1, Access::Read), name, "{addr:#x}");
    }
    assert_eq!(kind(&two, BASE, u64::MAX, Access::Read), "out-of-bounds", "wraps");
    two.poison(BASE, 8, SLAB_FREE).unwrap();
    assert_eq!(kind(&two, BASE, 8, Access::DoubleFree), "double-free");
    assert_eq!(kind(&two, 0, 1, Access::InvalidFree), "invalid-free");
    // A partial granule with a valid one behind it has no code.
    two.poison(BASE + 16, 8, SLAB_FREE).unwrap();
    two.unpoison(BASE + 16, 3).unwrap();
    assert_eq!(kind(&two, BASE + 16, 4, Access::Read), "out-of-bounds");
    // A negative size need not wrap where addresses are small.
    let low = TwoLevel::new(TestMemory::new(0, PAGES, 0));
    assert_eq!(kind(&low, 0x1000, 8u64.wrapping_neg() - 0x1000, Access::Read), "out-of-bounds");
}
