//! The memslots that KVM would have.

use std::collections::BTreeMap;

use umbra::shadow::{Layout, MemslotError, Memslots};

/// Most memslots, as on hosts that allow few.
const MOST: usize = 500;

/// Memslots, which may only be in the windows of the shadow.
pub struct Windows {
    layout: Layout,
    /// Start and end of each, by number.
    slots: BTreeMap<u32, (u64, u64)>,
    next: u32,
}

impl Windows {
    /// None yet.
    pub fn new(layout: Layout) -> Self {
        Self { layout, slots: BTreeMap::new(), next: 0 }
    }
}

impl Memslots for Windows {
    fn map(&mut self, gpa: u64, host: *mut u8, len: u64, _: bool) -> Result<u32, MemslotError> {
        let Layout { page, byte, patterns, tables, entries, .. } = self.layout;
        let inside = [page, byte, patterns, tables, entries]
            .iter()
            .any(|window| len > 0 && window.offset(gpa, len).is_some());
        assert!(inside, "{len:#x} bytes at {gpa:#x} are no part of a window");
        assert!((gpa | len | host as u64).is_multiple_of(4096), "{gpa:#x}, {len:#x}, {host:?}");
        let overlap = self.slots.values().find(|(start, end)| gpa < *end && *start < gpa + len);
        assert!(overlap.is_none(), "{gpa:#x} is mapped already: {overlap:x?}");
        if self.slots.len() >= MOST {
            return Err(MemslotError::Exhausted(MOST as u32));
        }
        self.next += 1;
        self.slots.insert(self.next, (gpa, gpa + len));
        Ok(self.next)
    }

    fn unmap(&mut self, memslot: u32) -> Result<(), MemslotError> {
        assert!(self.slots.remove(&memslot).is_some(), "memslot {memslot} is not there");
        Ok(())
    }
}
