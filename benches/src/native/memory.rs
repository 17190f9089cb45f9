//! Shadow in this process's memory, for checks without a guest.

use std::io;
use std::ptr::{self, NonNull};

use umbra_shadow::ShadowMemory;
use umbra_shadow::codes::{GRANULE_SHIFT, PAGE_SHIFT};

const HOST_PAGE: usize = 4096;

/// Anonymous memory, all of it resident.
pub struct Map {
    start: NonNull<u8>,
    bytes: usize,
}

impl Map {
    /// Maps `bytes` bytes of `value`. `huge` asks for pages of 2 MiB, which the kernel may refuse.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(bytes: u64, value: u8, huge: bool) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?.max(HOST_PAGE);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing
        // memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let map = Self { start, bytes };
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the advice is for the mapping made above, and changes no contents.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes, advice) };
        // A store to each byte makes all pages resident: none stays the kernel's shared page of
        // zeroes. SAFETY: as many bytes were mapped, and nobody else knows of them.
        unsafe { start.as_ptr().write_bytes(value, bytes) };
        Ok(map)
    }

    /// Sets one byte.
    ///
    /// # Panics
    /// `at` is out of bounds.
    pub fn set(&mut self, at: usize, value: u8) {
        assert!(at < self.bytes, "byte {at} of {}", self.bytes);
        // SAFETY: inside the mapping, which nobody else has a reference to.
        unsafe { self.start.as_ptr().add(at).write(value) };
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped readable for as long as this value lives, and written through `&mut` only.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: exactly what `mmap` gave; references into it borrow this value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Read-only shadow, for checks.
#[derive(Clone, Copy)]
pub struct HostMemory<'a> {
    page: &'a [u8],
    byte: &'a [u8],
    limit: u64,
}

impl<'a> HostMemory<'a> {
    /// For addresses from 0 to `limit`, a multiple of the page size.
    ///
    /// # Panics
    /// One of the shadows is too short for that.
    pub fn new(page: &'a [u8], byte: &'a [u8], limit: u64) -> Self {
        assert!(
            page.len() as u64 >= limit >> PAGE_SHIFT && byte.len() as u64 >= limit >> GRANULE_SHIFT
        );
        Self { page, byte, limit }
    }
}

impl ShadowMemory for HostMemory<'_> {
    fn base(&self) -> u64 {
        0
    }

    fn limit(&self) -> u64 {
        self.limit
    }

    #[inline(always)]
    fn page(&self, addr: u64) -> u8 {
        debug_assert!(addr < self.limit);
        // SAFETY: the models ask only for addresses below the limit, and there is page shadow for
        // all of them. Without the check that a guest's look-up does not have either.
        unsafe { *self.page.get_unchecked((addr >> PAGE_SHIFT) as usize) }
    }

    #[inline(always)]
    fn byte(&self, addr: u64) -> u8 {
        debug_assert!(addr < self.limit);
        // SAFETY: as above, for the byte shadow.
        unsafe { *self.byte.get_unchecked((addr >> GRANULE_SHIFT) as usize) }
    }

    // Nothing here changes shadow.
    fn set_pages(&mut self, _: u64, _: u64, _: u8) {}

    fn set_bytes(&mut self, _: u64, _: u64, _: u8) {}
}
