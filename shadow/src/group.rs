//! Groups of eight pages, whose shadow is one page of the *check shadow*: what inline checks read.
//!
//! An inline check loads the byte of its address from the check shadow and goes on if that is 0.
//! The guest's page tables map the check shadow, page by page, and so they are the first level:
//!
//! - Where no page of a group is byte-checked, the group's [`Entry`] points to one of 256 *pattern
//!   pages* that all groups share. Each of its eighths is 00 or 80, for a page that is accessible
//!   or poisoned as a whole.
//! - Else the entry points to the group's own page in the byte-shadow window, the *real* one. There
//!   the part of a page that is not byte-checked holds its page shadow, 512 times.
//!
//! **The page shadow stays the truth.** A CPU may hold an entry in its TLB that has changed since.
//! So a bad verdict of an inline check is confirmed by [`TwoLevel`](crate::TwoLevel) before it is
//! reported: nothing here can make a false finding. A CPU forgets its own translation when it
//! poisons ([`GroupTable::forget`]), or promotes a page. Other CPUs find what it poisoned, and what
//! they poison themselves in a page that it promoted, when they have forgotten theirs: after a
//! tick.
//!
//! **Changes need no lock.** The page shadow is stored first, then the entry is brought into line:
//!
//! 1. [`settle`], after whole pages have changed, loads the entry, then the page shadow of all
//!    eight, and exchanges the entry for the one that fits. Every change exchanges the entry, also
//!    for the same one in its next version. So an exchange that succeeds knew of all changes before
//!    it, and a change that was not known makes its own exchange later. If the group is real, the
//!    pages' own parts are filled before.
//! 2. [`open`], in a promotion, makes the group real. It marks the entry busy, fills the parts of
//!    the other pages, and exchanges it for the real one. The page is [`PAGE_BUSY`] meanwhile, so
//!    that no other CPU takes the group for one without byte-checked pages. Its own part is as
//!    accessible as in the pattern, and gets its code afterwards, when nobody fills parts of others
//!    any more.
//! 3. A change of whole pages that leaves no byte-checked one makes the group a pattern again. The
//!    host memory of its real page can go when no CPU has a translation to it any more.
//!
//! A CPU that meets a busy entry waits, since an opening takes some hundred instructions. An NMI
//! that has interrupted the opening must not: a change that has waited for long enough leaves the
//! mark that the opener has to fill [again](Entry::is_again), and goes on. Until then the entry is
//! the old one: a busy group is as accessible as it was.

use crate::codes::{PAGE_BUSY, PAGE_BYTES, PAGE_SHIFT, PAGE_SIZE, PAGE_VALID, UNKNOWN};

/// Pages of a group.
pub const PAGES: u32 = 8;
/// Bytes of checked memory of a group, as a power of two.
pub const GROUP_SHIFT: u32 = PAGE_SHIFT + PAGES.ilog2();
/// Bytes of all pattern pages. They begin at a multiple of this.
pub const PATTERN_BYTES: u64 = PAGE_SIZE << PAGES;

/// A last-level page-table entry of the check shadow (Intel SDM volume 3, table 4-20). It is
/// present and global, never executable, and its accessed and dirty bits are set, so that the
/// processor does not write to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    const PRESENT: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const GLOBAL: u64 = 1 << 8;
    const NO_EXECUTE: u64 = 1 << 63;
    const ALL: u64 = Self::PRESENT | Self::ACCESSED | Self::DIRTY | Self::GLOBAL | Self::NO_EXECUTE;

    /// Bits that the processor ignores.
    const BUSY: u64 = 1 << 9;
    const AGAIN: u64 = 1 << 10;
    const REAL: u64 = 1 << 11;
    /// The version: eleven more, if there are no protection keys for supervisor pages. A CPU would
    /// have to stand still between its two looks for that many changes of a group, less one.
    const VERSION: u64 = 0x7ff << Self::VERSION_SHIFT;
    const VERSION_SHIFT: u32 = 52;

    /// The entry of a group without byte-checked pages: bit i of `poisoned` is set if page i is.
    /// `patterns` is the guest-physical address of the pattern pages.
    #[inline]
    pub const fn pattern(patterns: u64, poisoned: u8) -> Self {
        Self(Self::ALL | (patterns + ((poisoned as u64) << PAGE_SHIFT)))
    }

    /// The entry of a group with byte-checked pages, whose own shadow is at guest-physical `gpa`.
    /// Compilers store to it.
    #[inline]
    pub const fn real(gpa: u64) -> Self {
        Self(Self::ALL | Self::WRITE | Self::REAL | gpa)
    }

    /// The entry that fits a group's page shadow (byte i is page i's), while no CPU changes it.
    /// `real` is the guest-physical address of the group's own shadow.
    pub const fn of(classes: u64, patterns: u64, real: u64) -> Self {
        if in_bytes(classes) == 0 {
            Self::pattern(patterns, poisoned(classes))
        } else {
            Self::real(real)
        }
    }

    /// The entry with these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Its bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether it points to the group's own shadow.
    #[inline]
    pub const fn is_real(self) -> bool {
        self.0 & Self::REAL != 0
    }

    /// Whether a CPU opens the group.
    #[inline]
    pub const fn is_busy(self) -> bool {
        self.0 & Self::BUSY != 0
    }

    /// Whether a page of the group was changed since the opening began.
    #[inline]
    pub const fn is_again(self) -> bool {
        self.0 & Self::AGAIN != 0
    }

    /// Which pages of a pattern are poisoned.
    #[inline]
    pub const fn poisoned(self) -> u8 {
        (self.0 >> PAGE_SHIFT) as u8
    }

    /// The guest-physical address of the shadow that it points to.
    pub const fn gpa(self) -> u64 {
        self.0 & ((1 << Self::VERSION_SHIFT) - 1) & !(PAGE_SIZE - 1)
    }

    /// This entry, in the version behind that of `before`.
    #[inline]
    const fn after(self, before: Self) -> Self {
        let next = before.0.wrapping_add(1 << Self::VERSION_SHIFT) & Self::VERSION;
        Self(self.0 & !Self::VERSION | next)
    }

    const fn busy(self) -> Self {
        Self(self.0 | Self::BUSY)
    }

    const fn again(self) -> Self {
        Self(self.0 | Self::AGAIN)
    }

    const fn not_again(self) -> Self {
        Self(self.0 & !Self::AGAIN)
    }
}

/// The entries of all groups, and what they have to fit. All CPUs use it at once.
///
/// A group's number is that of its first page by [`PAGES`]. The requirements of
/// [`ShadowMemory`](crate::ShadowMemory) hold: two changes of the same page do not run at once.
pub trait GroupTable {
    /// How often a change looks at a busy entry before it leaves the rest to the one that opens.
    const PATIENCE: u32;

    /// The guest-physical address of the pattern pages.
    fn patterns(&self) -> u64;

    /// The guest-physical address of the byte shadow of group 0.
    fn byte_window(&self) -> u64;

    /// The page shadow of all pages of a group, in one load: byte i is page i's.
    fn classes(&self, group: u64) -> u64;

    /// Fills the byte shadow of page `page` of a group, from 0 on, with `value`.
    fn fill(&self, group: u64, page: u32, value: u8);

    /// A group's entry. Earlier stores are not delayed beyond the exchange that follows.
    fn entry(&self, group: u64) -> Entry;

    /// Exchanges a group's entry, if it is still `from`: one atomic instruction, which orders all
    /// loads and stores before and after it.
    fn exchange(&self, group: u64, from: Entry, to: Entry) -> bool;

    /// This CPU drops its translation of a group's shadow. The others have to, soon.
    fn forget(&self, group: u64);

    /// Passes a moment of waiting.
    fn pause(&self);
}

/// One bit for each byte of `bytes` whose highest bit is set.
#[inline]
const fn highest_bits(bytes: u64) -> u8 {
    // Bit 8 i + 7 goes to bit 56 + i.
    ((bytes & HIGHEST).wrapping_mul(0x0002_0408_1020_4081) >> 56) as u8
}

/// The highest bit of each byte.
const HIGHEST: u64 = 0x8080_8080_8080_8080;

/// Which pages are poisoned as a whole.
#[inline]
const fn poisoned(classes: u64) -> u8 {
    highest_bits(classes)
}

/// Which pages are byte-checked, or are being promoted.
#[inline]
const fn in_bytes(classes: u64) -> u8 {
    // No carry leaves a byte whose highest bit is clear.
    highest_bits(((classes & !HIGHEST) + !HIGHEST) & !classes)
}

/// Brings a group into line after the page shadow of `pages` (bit i is page i) has become `value`.
/// A poisoned page is found by this CPU's checks afterwards; if this did not wait for an opening
/// that is under way, when that has ended.
#[inline]
pub fn settle<T: GroupTable>(table: &T, group: u64, pages: u8, value: u8) {
    let from = table.entry(group);
    let classes = table.classes(group);
    if !from.is_real() && !from.is_busy() && in_bytes(classes) == 0 {
        let to = Entry::pattern(table.patterns(), poisoned(classes));
        if table.exchange(group, from, to.after(from)) {
            if value != PAGE_VALID {
                table.forget(group);
            }
            return;
        }
    }
    settle_slowly(table, group, pages, value);
}

/// [`settle`] in all cases: also a group that is real, or that another CPU changes.
#[cold]
#[inline(never)]
fn settle_slowly<T: GroupTable>(table: &T, group: u64, pages: u8, value: u8) {
    let was_real = loop {
        let from = table.entry(group);
        if from.is_busy() {
            if leaves_it(table, group) {
                break false;
            }
            continue;
        }
        let to = settled(table, group, from, pages, value);
        if table.exchange(group, from, to.after(from)) {
            break from.is_real() && !to.is_real();
        }
    };
    if value != PAGE_VALID || was_real {
        table.forget(group);
    }
}

/// Waits while a CPU opens the group. If that takes long, leaves what has changed to it, and
/// returns true.
#[cold]
#[inline(never)]
fn leaves_it<T: GroupTable>(table: &T, group: u64) -> bool {
    for _ in 0..T::PATIENCE {
        if !table.entry(group).is_busy() {
            return false;
        }
        table.pause();
    }
    let entry = table.entry(group);
    entry.is_busy() && table.exchange(group, entry, entry.again())
}

/// The entry that a group has to get, whose entry is `from`.
#[inline]
fn settled<T: GroupTable>(table: &T, group: u64, from: Entry, pages: u8, value: u8) -> Entry {
    let classes = table.classes(group);
    let keep = in_bytes(classes);
    if keep == 0 {
        return Entry::pattern(table.patterns(), poisoned(classes));
    }
    if from.is_real() {
        fill_pages(table, group, pages, value);
        return from;
    }
    // A promotion will open the group. Until then its page is what it was.
    Entry::pattern(table.patterns(), poisoned(classes) | from.poisoned() & keep)
}

/// Out of line, since most groups are patterns.
#[inline(never)]
fn fill_pages<T: GroupTable>(table: &T, group: u64, pages: u8, value: u8) {
    for page in (0..PAGES).filter(|page| pages >> page & 1 != 0) {
        table.fill(group, page, value);
    }
}

/// Makes a group real, for a page of it that is [`PAGE_BUSY`]. Afterwards it stays so as long as
/// that page is busy or byte-checked. It waits for another opening of the same group, so it must
/// not be called in an NMI that may have interrupted one.
pub fn open<T: GroupTable>(table: &T, group: u64) {
    let real = Entry::real(table.byte_window() + group * PAGE_SIZE);
    loop {
        let from = table.entry(group);
        if from.is_busy() {
            table.pause();
        } else if from.is_real() {
            // Whoever has not seen the busy page yet fails to make it a pattern.
            if table.exchange(group, from, from.after(from)) {
                return table.forget(group);
            }
        } else if table.exchange(group, from, from.busy()) {
            let mut busy = from.busy();
            loop {
                fill_all_pages(table, group, from.poisoned());
                if table.exchange(group, busy, real.after(from)) {
                    return table.forget(group);
                }
                // A change was left here.
                while !table.exchange(group, busy.again(), busy.not_again()) {
                    table.pause();
                }
                busy = busy.not_again();
            }
        }
    }
}

/// Fills the parts of all pages. Those that are being promoted, which are not known any more, are
/// as in the pattern: poisoned or not.
fn fill_all_pages<T: GroupTable>(table: &T, group: u64, pattern: u8) {
    let classes = table.classes(group).to_le_bytes();
    for (page, class) in (0..PAGES).zip(classes) {
        let value = match class {
            PAGE_BUSY | PAGE_BYTES => (pattern >> page & 1) * UNKNOWN,
            class => class,
        };
        table.fill(group, page, value);
    }
}

/// [`settle`] for all groups of `pages` pages from page number `first` on.
#[inline]
pub fn settle_pages<T: GroupTable>(table: &T, first: u64, pages: u64, value: u8) {
    let group_pages = u64::from(PAGES);
    if pages == 1 {
        return settle(table, first / group_pages, 1 << (first % group_pages), value);
    }
    let (mut page, end) = (first, first + pages);
    while page < end {
        let group = page / group_pages;
        let next = ((group + 1) * group_pages).min(end);
        let (from, bits) = (page % group_pages, next - page);
        settle(table, group, (0xff >> (group_pages - bits) << from) as u8, value);
        page = next;
    }
}
