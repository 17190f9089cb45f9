//! The table of objects: what starts where. No two overlap.

use std::collections::BTreeMap;

use umbra_shadow::codes::{PAGE_SHIFT, PAGE_SIZE};

use super::origins::Origin;
use super::page::{NOTHING, Pages};
use super::record::{Record, When};
use crate::heap;
use crate::pool::Pool;

/// Pages before an address in which an object may start that matters there and is no span.
const PAGES_BEFORE: u64 = 3;
/// Host memory of a span, and of the first node of the tree of them: nodes hold 5 to 11.
const SPAN_NODE: usize = heap::taken(11 * (size_of::<u64>() + size_of::<u32>()) + 16);
const SPAN_BYTES: usize = SPAN_NODE / 5 + 2 * SPAN_NODE / 30 + 1;

/// A remembered object: its number, and its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub id: u32,
    pub start: u64,
}

impl Found {
    fn page(self) -> u64 {
        self.start >> PAGE_SHIFT
    }
}

/// All objects that are remembered.
#[derive(Debug, Default)]
pub struct Table {
    records: Pool<Record>,
    pages: Pages,
    /// Those that may reach beyond the page behind their own, by start.
    spans: BTreeMap<u64, u32>,
    freed: usize,
}

/// Page number and offset of an address.
fn split(key: u64) -> (u64, u16) {
    (key >> PAGE_SHIFT, (key % PAGE_SIZE) as u16)
}

impl Table {
    /// The last address at which an object may start. Behind each fits what a record says of it.
    pub const LAST_START: u64 = u64::MAX >> 16;

    /// Objects.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Freed ones of them.
    pub fn freed(&self) -> usize {
        self.freed
    }

    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.records.bytes()
            + self.pages.bytes()
            + usize::from(!self.spans.is_empty()) * SPAN_NODE
            + self.spans.len() * SPAN_BYTES
    }

    /// What is kept of an object.
    pub fn get(&self, found: Found) -> Option<&Record> {
        self.records.get(found.id)
    }

    /// An object of the page with this number.
    fn found(&self, id: u32, number: u64) -> Option<Found> {
        let start = (number << PAGE_SHIFT) + u64::from(self.records.get(id)?.offset);
        Some(Found { id, start })
    }

    /// The first address behind an object.
    pub fn end(&self, found: Found) -> u64 {
        self.get(found).map_or(found.start, |record| found.start + record.bytes())
    }

    /// The object that starts at `key`.
    #[inline(always)]
    pub fn at(&self, key: u64) -> Option<Found> {
        let (number, offset) = split(key);
        let id = self.pages.page(number)?.at(offset);
        let record = self.records.get(id)?;
        (record.offset == offset).then_some(Found { id, start: key })
    }

    /// The last object that starts at `key` or before, if it may reach within a page of it.
    pub fn up_to(&self, key: u64) -> Option<Found> {
        self.last_from((key >> PAGE_SHIFT).saturating_sub(PAGES_BEFORE), key)
    }

    /// The last object that starts before `end` and reaches over `start`, which is less.
    pub fn last_over(&self, start: u64, end: u64) -> Option<Found> {
        // What starts before that and is no span does not reach into the page of `start`.
        let first = (start >> PAGE_SHIFT).saturating_sub(1);
        self.last_from(first, end - 1).filter(|found| self.end(*found) > start)
    }

    /// The last object that starts at `key` or before, if it starts in the page `first` or behind,
    /// or is a span.
    fn last_from(&self, first: u64, key: u64) -> Option<Found> {
        // A span is in its page, too: one behind what is found there would have been found.
        self.last_of_pages(first, key).or_else(|| {
            let (start, id) = self.spans.range(..=key).next_back()?;
            Some(Found { id: *id, start: *start })
        })
    }

    fn last_of_pages(&self, first: u64, key: u64) -> Option<Found> {
        let (mut number, mut offset) = split(key);
        loop {
            let page = self.pages.page(number);
            for id in page.into_iter().flat_map(|page| page.up_to(offset)) {
                // In the first cell looked at, it may start behind.
                if self.records.get(id)?.offset <= offset {
                    return self.found(id, number);
                }
            }
            offset = (PAGE_SIZE - 1) as u16;
            number = match number.checked_sub(first)? {
                0 => return None,
                // To look is cheaper than to ask where to look.
                1..=PAGES_BEFORE => number - 1,
                _ => self.pages.last_between(first, number)?,
            };
        }
    }

    /// The first object that starts at `key` or behind, in its page or the next.
    pub fn from(&self, key: u64) -> Option<Found> {
        let (number, offset) = split(key);
        for (number, offset) in [(number, offset), (number + 1, 0)] {
            let Some(page) = self.pages.page(number) else { continue };
            for id in page.from(offset) {
                if self.records.get(id)?.offset >= offset {
                    return self.found(id, number);
                }
            }
        }
        None
    }

    /// Whether an object at `key` that takes `bytes` bytes fits if all may take `most` bytes of
    /// host memory. An eighth is kept for what finds the objects.
    pub fn fits(&self, key: u64, bytes: u64, most: usize) -> bool {
        let Some(records) = self.records.growth() else { return false };
        if records > 0 && self.records.bytes() + records > most / 8 * 7 {
            return false;
        }
        let Some(rest) = self.growth_beside(key, bytes) else { return false };
        // The usual case is a page that is known, and a place that was used before.
        records + rest == 0 || self.bytes() + records + rest <= most
    }

    /// Bytes that such an object adds beside its record; none if there are no more pages.
    fn growth_beside(&self, key: u64, bytes: u64) -> Option<usize> {
        let (number, offset) = split(key);
        let page = match self.pages.find(number) {
            None => self.pages.growth(number, bytes)?,
            Some(at) => match self.pages.get(at).map(|page| page.at(offset)) {
                Some(other) if other != NOTHING => {
                    self.pages.refined(at, offset, self.records.get(other)?.offset)
                }
                _ => 0,
            },
        };
        let span = usize::from(self.spans.is_empty()) * SPAN_NODE + SPAN_BYTES;
        Some(page + usize::from(is_span(key, bytes)) * span)
    }

    /// Puts an object at `key`, which takes `bytes` bytes. Nothing overlaps it.
    pub fn insert(&mut self, key: u64, bytes: u64, mut record: Record) {
        let (number, offset) = split(key);
        let at = self.pages.find(number).unwrap_or_else(|| self.pages.add(number, bytes));
        let other = self.pages.get(at).map_or(NOTHING, |page| page.at(offset));
        if let Some(Record { offset: there, .. }) = self.records.get(other).copied() {
            let records = &self.records;
            let offset_of = |id| records.get(id).map_or(0, |record| record.offset);
            self.pages.refine(at, offset, there, offset_of);
        }
        (record.offset, record.is_span) = (offset, is_span(key, bytes));
        self.freed += usize::from(record.is_freed());
        let id = self.records.insert(record);
        self.pages.put(at, offset, id, record.is_freed());
        if record.is_span {
            self.spans.insert(key, id);
        }
    }

    /// The object that starts at `key`, if one of `bytes` bytes that takes `slot` bytes may come in
    /// its place by [`Table::replace`], and it is certain that it would overlap no other.
    #[inline(always)]
    pub fn replaceable(&self, key: u64, bytes: u64, slot: u64) -> Option<Found> {
        let (number, offset) = split(key);
        let page = self.pages.page(number)?;
        let id = page.at(offset);
        let there = self.records.get(id)?;
        let is_there = there.offset == offset && there.is_span == is_span(key, slot);
        let fits =
            bytes <= there.bytes() || page.is_empty_behind(offset, u64::from(offset) + bytes);
        (is_there && fits).then_some(Found { id, start: key })
    }

    /// Whether an object that takes `slot` bytes may come in the place of another by
    /// [`Table::replace`].
    pub fn can_replace(&self, old: Found, slot: u64) -> bool {
        self.get(old).is_some_and(|record| record.is_span == is_span(old.start, slot))
    }

    /// Puts a live object in the place of one that starts there. It overlaps no other. Returns the
    /// redzone of the old one, and the origins that nothing refers to any more.
    #[inline(always)]
    pub fn replace(&mut self, old: Found, mut record: Record) -> Option<(u8, [Origin; 4])> {
        let there = self.records.get_mut(old.id)?;
        let dropped = record.follows(there, 0);
        (record.offset, record.is_span) = (there.offset, there.is_span);
        let before = std::mem::replace(there, record);
        if before.is_freed()
            && let Some(page) = self.pages.find(old.page())
        {
            self.freed -= 1;
            self.pages.live(page);
        }
        Some((before.redzone, dropped))
    }

    /// A live object was freed.
    pub fn free(&mut self, found: Found, by: Origin, at: When) {
        let Some(record) = self.records.get_mut(found.id) else { return };
        (record.freed, record.freed_at, record.redzone) = (by, at, 0);
        self.freed += 1;
        if let Some(page) = self.pages.find(found.page()) {
            self.pages.freed(page);
        }
    }

    /// Takes an object out.
    pub fn remove(&mut self, found: Found) -> Option<Record> {
        let record = self.records.remove(found.id)?;
        self.freed -= usize::from(record.is_freed());
        if let Some(page) = self.pages.find(found.page()) {
            self.pages.take(page, record.offset, record.is_freed());
        }
        if record.is_span {
            self.spans.remove(&found.start);
        }
        Some(record)
    }

    /// The freed objects of the page whose last free is the longest ago.
    pub fn oldest(&self) -> Vec<Found> {
        let Some(page) = self.pages.oldest() else { return Vec::new() };
        let freed = |id: &u32| self.records.get(*id).is_some_and(Record::is_freed);
        page.from(0).filter(freed).filter_map(|id| self.found(id, page.number())).collect()
    }
}

/// Whether an object of so many bytes may matter beyond the page behind its own.
fn is_span(key: u64, bytes: u64) -> bool {
    (key % PAGE_SIZE).saturating_add(bytes) > 2 * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Table {
        /// Panics unless its parts agree.
        pub fn checked(&self) {
            let found = |(id, number)| self.found(id, number);
            let all: Vec<Found> = self.pages.ids().filter_map(found).collect();
            assert_eq!(all.len(), self.len());
            let freed = |found: &&Found| self.get(**found).is_some_and(Record::is_freed);
            assert_eq!(all.iter().filter(freed).count(), self.freed());
            assert!(all.is_sorted_by(|a, b| self.end(*a) <= b.start), "{all:x?}");
            let spans = all.iter().filter(|found| self.get(**found).is_some_and(|r| r.is_span));
            assert!(spans.map(|found| (found.start, found.id)).eq(self.spans.clone()));
            for found in all {
                assert_eq!(self.at(found.start), Some(found));
            }
            self.pages.checked(|id| self.records.get(id).is_some_and(Record::is_freed));
        }
    }
}
