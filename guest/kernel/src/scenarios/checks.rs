//! The checks themselves, against a rule that knows nothing of shadow: one flag per byte.

use umbra_guest::codes::{PAGE_SIZE, SLAB_REDZONE};
use umbra_guest::{poison, suppressed, unpoison, violations};

use super::{opaque, scenarios};
use crate::{bench, page};

/// The block that the checks run on has `1 << ORDER` pages.
const ORDER: usize = 3;
const BYTES: usize = (PAGE_SIZE as usize) << ORDER;
/// Byte-checked pages hold pieces of this size. The first bytes of each are valid, and each has one
/// more than the piece before.
const PIECE: u64 = 16;

/// The checks: name, and bytes to check.
const CHECKS: [(&str, u64); 11] = [
    ("load1", 1),
    ("store2", 2),
    ("load4", 4),
    ("load8", 8),
    ("store8", 8),
    ("load16", 16),
    ("loadN", 3),
    ("storeN", 7),
    ("loadN", 8),
    ("loadN", 13),
    ("loadN", 40),
];

/// The state of a page of the block.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Untyped,
    Poisoned,
    ByteChecked,
}

/// The kind of each page, and the valid bytes of its first piece. Pages of the other kinds were
/// byte-checked before, and their stale byte shadow must not matter. Pages whose first piece is
/// wholly valid end with such a piece, too.
const PAGES: [(Kind, u64); 1 << ORDER] = [
    (Kind::Untyped, 0),
    (Kind::ByteChecked, PIECE),
    (Kind::Poisoned, PIECE),
    (Kind::ByteChecked, PIECE),
    (Kind::Untyped, 0),
    (Kind::ByteChecked, PIECE),
    (Kind::Poisoned, 5),
    (Kind::ByteChecked, 5),
];

static mut VALID: [bool; BYTES] = [false; BYTES];

fn lay_out(block: u64) {
    // SAFETY: one scenario runs at a time, and no other code knows the array.
    let valid = unsafe { &mut *(&raw mut VALID) };
    for (i, (kind, first)) in PAGES.into_iter().enumerate() {
        let start = i * PAGE_SIZE as usize;
        let at = block + start as u64;
        for piece in 0..PAGE_SIZE / PIECE {
            let good = (first + piece) % (PIECE + 1);
            let from = start + (piece * PIECE) as usize;
            valid[from..from + good as usize].fill(true);
            unpoison(at + piece * PIECE, PIECE);
            poison(at + piece * PIECE + good, PIECE - good, SLAB_REDZONE);
        }
        match kind {
            Kind::ByteChecked => continue,
            Kind::Untyped => unpoison(at, PAGE_SIZE),
            Kind::Poisoned => poison(at, PAGE_SIZE, SLAB_REDZONE),
        }
        valid[start..start + PAGE_SIZE as usize].fill(kind == Kind::Untyped);
    }
}

/// Tries all checks at `offsets` of the block.
fn try_all(block: u64, offsets: core::ops::Range<u64>) {
    // SAFETY: as in `lay_out`, which is done with it.
    let valid = unsafe { &*(&raw const VALID) };
    for (name, bytes) in CHECKS {
        let Some(check) = bench::entry(name) else { panic!("there is no check {name}") };
        // SAFETY: all checks are C functions of an address and, some, a length. They read shadow
        // only.
        let check: extern "C" fn(u64, u64) = unsafe { core::mem::transmute(check) };
        for offset in offsets.clone() {
            let good = valid[offset as usize..(offset + bytes) as usize].iter().all(|&byte| byte);
            let before = violations();
            check(block + offset, bytes);
            let seen = violations() != before;
            assert!(
                seen != good,
                "{name} of {bytes} bytes at {offset:#x}: reported {seen}, valid {good}"
            );
        }
    }
}

scenarios! {
    checks_agree_with_flags, "silent",
    "all checks, at every offset around every edge, against one flag per byte", {
        let Some(block) = page::alloc(ORDER) else { return };
        lay_out(block);
        suppressed(|| {
            let before = violations();
            umbra_guest::check(opaque(block + 2 * PAGE_SIZE), 1, false);
            // Without Umbra, or with `--shadow off`, there is nothing to compare.
            if violations() == before {
                return;
            }
            // Pieces and their last granules with every number of valid bytes.
            try_all(block, PAGE_SIZE - 20..PAGE_SIZE + (PIECE + 1) * PIECE);
            for edge in 2..PAGES.len() as u64 {
                try_all(block, edge * PAGE_SIZE - 44..edge * PAGE_SIZE + 44);
            }
        });
        unpoison(block, BYTES as u64);
        page::free(block);
    }
}
