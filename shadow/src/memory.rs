//! The memory a shadow model works on.

use crate::codes::PAGE_BUSY;

/// Storage for shadow bytes.
///
/// Every method takes *addresses of checked memory*, not of shadow: the implementation translates
/// them. A guest's implementation adds window offsets to virtual addresses; those of the VMM and
/// the tests index host memory by guest-physical address. Callers (the models of this crate) only
/// pass addresses from [`ShadowMemory::base`] to below [`ShadowMemory::limit`], and ranges that end
/// at or below it. Both are multiples of the page size (but see `limit`), so a page is checked as a
/// whole or not at all.
///
/// **Memory that several CPUs use at once**, such as a guest's windows, has more requirements:
///
/// - Stores must reach memory in program order: volatile or atomic stores, also in the setters of
///   ranges.
/// - [`claim_page`](ShadowMemory::claim_page) must be one atomic compare-and-exchange. Two objects
///   may share a page and belong to two CPUs; if both promoted it, the second fill would undo what
///   the first wrote.
/// - [`wait_page`](ShadowMemory::wait_page) must wait as long as the page is [`PAGE_BUSY`]. So
///   checked code must not interrupt a change of the shadow: changes run with interrupts off.
///
/// Two changes of the same granule, or of a whole page and a part of it, must not run at once.
/// Allocators give neither to two owners.
pub trait ShadowMemory {
    /// The lowest checked address.
    fn base(&self) -> u64;
    /// The first address behind the checked ones, or `u64::MAX` if the last byte of the address
    /// space is checked.
    fn limit(&self) -> u64;

    /// The page shadow of the page that holds `addr`.
    fn page(&self, addr: u64) -> u8;
    /// Sets the page shadow of `pages` pages, from the one that holds `addr` on.
    fn set_pages(&mut self, addr: u64, pages: u64, value: u8);

    /// The byte shadow of the granule that holds `addr`. On the VMM's side memory that was never
    /// mapped reads as zero.
    fn byte(&self, addr: u64) -> u8;
    /// Sets the byte shadow of `granules` granules, from the one that holds `addr` on.
    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8);

    /// Changes the page shadow of the page that holds `addr` from `from` to [`PAGE_BUSY`]. Returns
    /// false, and changes nothing, if it is not `from` any more.
    ///
    /// The default is for memory that one CPU uses at a time.
    fn claim_page(&mut self, addr: u64, from: u8) -> bool {
        let unchanged = self.page(addr) == from;
        if unchanged {
            self.set_pages(addr, 1, PAGE_BUSY);
        }
        unchanged
    }

    /// The page of `addr` was claimed. Its byte shadow is used from now on. Memory with a check
    /// shadow makes its group real here ([`group::open`](crate::group::open)).
    #[inline]
    fn open_group(&mut self, _addr: u64) {}

    /// The page shadow of `pages` pages, from the one that holds `addr` on, has become `value`, and
    /// none of them is byte-checked. Memory with a check shadow follows here
    /// ([`group::settle_pages`](crate::group::settle_pages)).
    #[inline]
    fn settle_groups(&mut self, _addr: u64, _pages: u64, _value: u8) {}

    /// Waits for the end of a promotion. Returns the page shadow of the page that holds `addr`,
    /// which was [`PAGE_BUSY`] a moment ago. If it still is, the models read the byte shadow.
    ///
    /// The default is for memory that one CPU uses at a time, and for the VMM, which never waits
    /// for a guest.
    #[cold]
    fn wait_page(&self, addr: u64) -> u8 {
        self.page(addr)
    }
}
