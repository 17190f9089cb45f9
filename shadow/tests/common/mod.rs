//! Shadow memory in plain vectors, with a list of the stores to it.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::cell::Cell;

use umbra_shadow::ShadowMemory;
use umbra_shadow::codes::{GRANULE, PAGE_SIZE};

/// A store to the shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `set_pages`: address, pages, value.
    Pages(u64, u64, u8),
    /// `set_bytes`: address, granules, value.
    Bytes(u64, u64, u8),
}

/// The shadow of some pages. It panics at an address or a range beyond them.
pub struct TestMemory {
    base: u64,
    limit: u64,
    pages: Vec<u8>,
    bytes: Vec<u8>,
    /// All stores, oldest first.
    pub stores: Vec<Store>,
    /// The number of bytes of byte shadow that were read.
    pub bytes_read: Cell<u64>,
}

impl TestMemory {
    /// Memory of some pages, all valid; `bytes` is the first value of all byte shadow.
    pub fn new(base: u64, pages: u64, bytes: u8) -> Self {
        let size = pages * PAGE_SIZE;
        let limit = base.saturating_add(size);
        Self {
            base,
            limit,
            pages: vec![0; pages as usize],
            bytes: vec![bytes; (size / GRANULE) as usize],
            stores: Vec::new(),
            bytes_read: Cell::new(0),
        }
    }

    /// Sets the page shadow of one page, which does not count as a store.
    pub fn plant_page(&mut self, addr: u64, value: u8) {
        let at = self.page_index(addr);
        self.pages[at] = value;
    }

    /// Sets the byte shadow of one granule, which does not count as a store.
    pub fn plant_byte(&mut self, addr: u64, value: u8) {
        let at = self.byte_index(addr);
        self.bytes[at] = value;
    }

    /// The stores since the last call.
    pub fn take_stores(&mut self) -> Vec<Store> {
        std::mem::take(&mut self.stores)
    }

    fn page_index(&self, addr: u64) -> usize {
        assert!(addr >= self.base, "{addr:#x} is below the checked memory");
        ((addr - self.base) / PAGE_SIZE) as usize
    }

    fn byte_index(&self, addr: u64) -> usize {
        assert!(addr >= self.base, "{addr:#x} is below the checked memory");
        ((addr - self.base) / GRANULE) as usize
    }
}

impl ShadowMemory for TestMemory {
    fn base(&self) -> u64 {
        self.base
    }

    fn limit(&self) -> u64 {
        self.limit
    }

    fn page(&self, addr: u64) -> u8 {
        self.pages[self.page_index(addr)]
    }

    fn set_pages(&mut self, addr: u64, pages: u64, value: u8) {
        self.stores.push(Store::Pages(addr, pages, value));
        let at = self.page_index(addr);
        self.pages[at..at + pages as usize].fill(value);
    }

    fn byte(&self, addr: u64) -> u8 {
        self.bytes_read.set(self.bytes_read.get() + 1);
        self.bytes[self.byte_index(addr)]
    }

    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        self.stores.push(Store::Bytes(addr, granules, value));
        let at = self.byte_index(addr);
        self.bytes[at..at + granules as usize].fill(value);
    }
}
