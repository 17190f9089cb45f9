//! The memory a shadow model works on.

/// Where shadow bytes live.
///
/// Every method takes *addresses of checked memory*, not of shadow: the implementation turns them into
/// positions. A guest's implementation adds window offsets to virtual addresses, the VMM's and the tests'
/// index host memory by guest-physical address. Callers (the models of this crate) only pass addresses
/// below [`ShadowMemory::limit`], and ranges that end at or below it.
pub trait ShadowMemory {
    /// The lowest address that is checked.
    fn base(&self) -> u64;
    /// The first address beyond what is checked, or `u64::MAX` if the last byte of the address space is.
    fn limit(&self) -> u64;

    /// The page shadow of the page that holds `addr`.
    fn page(&self, addr: u64) -> u8;
    /// Sets the page shadow of `pages` pages, from the one that holds `addr` on.
    fn set_pages(&mut self, addr: u64, pages: u64, value: u8);

    /// The byte shadow of the granule that holds `addr`. On the VMM's side memory that was never mapped
    /// reads as zero.
    fn byte(&self, addr: u64) -> u8;
    /// Sets the byte shadow of `granules` granules, from the one that holds `addr` on.
    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8);
}
