//! Both models against an oracle that keeps one flag for each byte of memory.

mod common;

use common::TestMemory;
use proptest::prelude::*;
use umbra_shadow::abi::Access;
use umbra_shadow::codes::{GRANULE, PAGE_SIZE};
use umbra_shadow::{BugKind, Cause, Full, RangeError, Shadow, TwoLevel, classify};

const PAGES: u64 = 6;
const SIZE: u64 = PAGES * PAGE_SIZE;
/// Three pages below a boundary between chunks of byte shadow (2 MiB of memory each).
const BASE: u64 = 0xffff_8000_0060_0000 - 3 * PAGE_SIZE;
const LIMIT: u64 = BASE + SIZE;

/// The true state of the memory, byte by byte.
struct Oracle {
    valid: Vec<bool>,
    /// Why a granule is poisoned, for granules without a valid byte.
    code: Vec<u8>,
}

impl Oracle {
    fn new() -> Self {
        Self { valid: vec![true; SIZE as usize], code: vec![0; (SIZE / GRANULE) as usize] }
    }

    /// The bytes of a range as indices, or how many of them come before the first one without
    /// shadow.
    fn range(addr: u64, len: u64) -> Result<std::ops::Range<usize>, u64> {
        match (0..len).find(|i| !(BASE..LIMIT).contains(&(addr + i))) {
            Some(inside) => Err(inside),
            None if len == 0 => Ok(0..0),
            None => Ok((addr - BASE) as usize..(addr - BASE + len) as usize),
        }
    }

    fn change(&mut self, op: Op) -> Result<(), RangeError> {
        let range = Self::range(op.addr, op.len)
            .map_err(|inside| RangeError::Outside { addr: op.addr + inside })?;
        for granule in 0..self.code.len() {
            let bytes = granule * 8..granule * 8 + 8;
            let part = bytes.start.max(range.start)..bytes.end.min(range.end);
            if part.is_empty() {
                continue;
            }
            let Some(code) = op.code else {
                // All bytes up to the end of the part become valid.
                self.valid[bytes.start..part.end].fill(true);
                continue;
            };
            // The part becomes invalid if no valid byte of the granule lies behind it.
            if self.valid[part.end..bytes.end].contains(&true) {
                continue;
            }
            self.valid[part.clone()].fill(false);
            if part.start == bytes.start {
                self.code[granule] = code;
            }
        }
        Ok(())
    }

    fn state(&self, addr: u64) -> u8 {
        let granule = ((addr - BASE) / GRANULE) as usize;
        match self.valid[granule * 8..granule * 8 + 8].iter().filter(|valid| **valid).count() {
            0 => self.code[granule],
            8 => 0,
            some => some as u8,
        }
    }

    fn first_bad(&self, addr: u64, len: u64) -> Option<(u64, Cause)> {
        match Self::range(addr, len) {
            Err(inside) => Some((addr + inside, Cause::Outside)),
            Ok(range) => {
                let bad = range.clone().find(|&i| !self.valid[i])?;
                Some((BASE + bad as u64, Cause::Poisoned))
            }
        }
    }

    fn kind(&self, bad: u64, cause: Cause) -> &'static str {
        if cause == Cause::Outside {
            return "wild-memory-access";
        }
        let state = match self.state(bad) {
            1..=7 if bad + GRANULE >= LIMIT => 0,
            1..=7 => self.state(bad + GRANULE),
            code => code,
        };
        match state {
            0..=7 => "out-of-bounds",
            0xFC | 0xFE => "slab-out-of-bounds",
            0xFB => "slab-use-after-free",
            0xFF => "use-after-free",
            0xF2 => "stack-out-of-bounds",
            _ => "unknown-crash",
        }
    }
}

/// Poison with `code`, or unpoison.
#[derive(Clone, Copy, Debug)]
struct Op {
    addr: u64,
    len: u64,
    code: Option<u8>,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => BASE..LIMIT,
        4 => (0..=PAGES, 0..24u64).prop_map(|(page, near)| BASE + page * PAGE_SIZE + near - 12),
        2 => (0..PAGES).prop_map(|page| BASE + page * PAGE_SIZE),
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..40u64,
        2 => 0..SIZE,
        2 => (0..=PAGES).prop_map(|pages| pages * PAGE_SIZE),
        2 => (1..=PAGES, 0..24u64).prop_map(|(pages, near)| pages * PAGE_SIZE + near - 12),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let code = prop_oneof![
        2 => Just(None),
        3 => prop::sample::select(vec![0xFCu8, 0xFB, 0xFF, 0xFE, 0xF2, 0x93]).prop_map(Some),
    ];
    (address(), length(), code).prop_map(|(addr, len, code)| Op { addr, len, code })
}

fn apply(shadow: &mut impl Shadow, op: Op) -> Result<(), RangeError> {
    match op.code {
        Some(code) => shadow.poison(op.addr, op.len, code),
        None => shadow.unpoison(op.addr, op.len),
    }
}

fn agree(oracle: &Oracle, shadow: &impl Shadow, addr: u64, len: u64) -> Result<(), TestCaseError> {
    let expected = oracle.first_bad(addr, len);
    let found = shadow.check(addr, len);
    prop_assert_eq!(found.err().map(|v| (v.address, v.cause)), expected);
    prop_assert_eq!(shadow.first_bad(addr, len), expected.map(|(bad, _)| bad));
    if let (Err(violation), Some((bad, cause))) = (found, expected) {
        prop_assert_eq!(violation.code, shadow.state(bad));
        let kind: BugKind = classify(shadow, &violation, addr, len, Access::Read);
        prop_assert_eq!(kind.as_str(), oracle.kind(bad, cause));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn models_agree_with_the_oracle(
        ops in prop::collection::vec((op(), address(), length()), 1..24),
        promoted in (address(), length()),
        accesses in prop::collection::vec((address(), 1..40u64), 32),
    ) {
        let mut oracle = Oracle::new();
        // The byte shadow of a page before its promotion must not matter.
        let mut two = TwoLevel::new(TestMemory::new(BASE, PAGES, 0xA5));
        let mut full = Full::new(TestMemory::new(BASE, PAGES, 0));
        let half = ops.len() / 2;
        for (i, (op, addr, len)) in ops.into_iter().enumerate() {
            let expected = oracle.change(op);
            prop_assert_eq!(apply(&mut two, op), expected);
            prop_assert_eq!(apply(&mut full, op), expected);
            if i == half {
                let (addr, len) = promoted;
                prop_assert_eq!(two.promote(addr, len), full.promote(addr, len));
            }
            agree(&oracle, &two, addr, len)?;
            agree(&oracle, &full, addr, len)?;
        }
        for addr in (BASE..LIMIT).step_by(GRANULE as usize) {
            prop_assert_eq!(two.state(addr), oracle.state(addr), "state of {:#x}, two-level", addr);
            prop_assert_eq!(full.state(addr), oracle.state(addr), "state of {:#x}, full", addr);
        }
        for (addr, len) in accesses {
            agree(&oracle, &two, addr, len)?;
            agree(&oracle, &full, addr, len)?;
        }
    }
}
