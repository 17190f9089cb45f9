//! Guest RAM: host memory that is reserved at once and becomes resident page by page on use.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileMemory,
};

use super::layout;

/// Why there cannot be RAM of this size.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MemoryError {
    #[error(
        "guest memory of {bytes} bytes is too small: at least {} MiB are needed",
        layout::MIN_MEMORY >> 20
    )]
    TooSmall { bytes: u64 },
    #[error(
        "guest memory of {bytes} bytes is too large: at most {} GiB are possible",
        layout::MAX_MEMORY >> 30
    )]
    TooLarge { bytes: u64 },
    #[error("guest memory of {bytes} bytes is not a multiple of {}", layout::PAGE)]
    Unaligned { bytes: u64 },
    #[error("cannot reserve {bytes} bytes of host memory for the guest: {reason}")]
    Map { bytes: u64, reason: String },
}

/// A guest-physical range that is not all RAM.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("guest-physical {len} bytes at {:#x} are not all RAM", .gpa.0)]
pub struct NotRam {
    /// Start of the range.
    pub gpa: GuestAddress,
    /// Its bytes.
    pub len: usize,
}

/// Guest RAM. A clone is another handle to the same memory.
#[derive(Clone, Debug)]
pub struct Ram {
    mem: GuestMemoryMmap<()>,
    bytes: u64,
}

impl Ram {
    /// Whether a machine may have `bytes` of RAM.
    ///
    /// # Errors
    /// It is too small, too large, or no multiple of a page.
    pub fn check(bytes: u64) -> Result<(), MemoryError> {
        if bytes < layout::MIN_MEMORY {
            return Err(MemoryError::TooSmall { bytes });
        }
        if bytes > layout::MAX_MEMORY {
            return Err(MemoryError::TooLarge { bytes });
        }
        if !bytes.is_multiple_of(layout::PAGE) {
            return Err(MemoryError::Unaligned { bytes });
        }
        Ok(())
    }

    /// Reserves `bytes` of RAM, all zero, in the ranges of [`layout::ram_ranges`].
    ///
    /// # Errors
    /// The size is not allowed, or the host has no such memory.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        Self::check(bytes)?;
        // vm-memory maps private anonymous memory with MAP_NORESERVE.
        let ranges: Vec<_> =
            layout::ram_ranges(bytes).into_iter().map(|(gpa, len)| (gpa, len as usize)).collect();
        let mem = GuestMemoryMmap::from_ranges(&ranges)
            .map_err(|e| MemoryError::Map { bytes, reason: e.to_string() })?;
        Ok(Self { mem, bytes })
    }

    /// Bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first guest-physical address above all RAM.
    pub fn end(&self) -> u64 {
        layout::ram_end(self.bytes)
    }

    /// The memory itself, for vm-memory's own interfaces.
    pub fn inner(&self) -> &GuestMemoryMmap<()> {
        &self.mem
    }

    /// Whether all `len` bytes from `gpa` on are RAM (`len` 0: always).
    pub fn contains(&self, gpa: GuestAddress, len: u64) -> bool {
        match usize::try_from(len) {
            Ok(0) => true,
            Ok(len) => self.mem.check_range(gpa, len),
            Err(_) => false,
        }
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn read(&self, gpa: GuestAddress, to: &mut [u8]) -> Result<(), NotRam> {
        self.mem.read_slice(to, gpa).map_err(|_| NotRam { gpa, len: to.len() })
    }

    /// Copies into guest memory. When not all of it is RAM, nothing is written.
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn write(&self, gpa: GuestAddress, from: &[u8]) -> Result<(), NotRam> {
        if !self.contains(gpa, from.len() as u64) {
            return Err(NotRam { gpa, len: from.len() });
        }
        self.mem.write_slice(from, gpa).map_err(|_| NotRam { gpa, len: from.len() })
    }

    /// Reads up to `bytes` bytes at `at` of `file` into guest memory, straight from the file.
    /// Returns how many they were: 0 at its end.
    ///
    /// # Errors
    /// Not all of the place is RAM, or the file cannot be read.
    pub fn read_file(
        &self,
        gpa: GuestAddress,
        file: &File,
        at: u64,
        bytes: u64,
    ) -> io::Result<u64> {
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        let slice = self.mem.get_slice(gpa, len).map_err(io::Error::other)?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: `len` bytes of guest memory from there on, to which there is no reference.
        let got = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), len, offset) };
        u64::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// The little-endian number at `gpa`.
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn read_u64(&self, gpa: GuestAddress) -> Result<u64, NotRam> {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Loads the little-endian number at `gpa`, a multiple of 8, as one: what a vCPU wrote before
    /// it stored the number, later reads see (acquire).
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn load(&self, gpa: GuestAddress) -> Result<u64, NotRam> {
        let number = self.mem.load(gpa, Ordering::Acquire);
        number.map(u64::from_le).map_err(|_| NotRam { gpa, len: 8 })
    }

    /// Sets bits of the little-endian number at `gpa`, a multiple of 8, atomically for vCPUs. Does
    /// nothing outside of RAM.
    pub fn set_bits(&self, gpa: GuestAddress, bits: u64) {
        if let Ok(slice) = self.mem.get_slice(gpa, 8)
            && let Ok(number) = slice.get_atomic_ref::<AtomicU64>(0)
        {
            number.fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// Discards `pages` (guest-physical, multiples of 4096) as far as they are RAM and resident:
    /// their host memory is reclaimed, and they read as zero from then on. Returns the bytes. No
    /// vCPU runs meanwhile.
    ///
    /// # Errors
    /// The host refuses.
    pub fn discard(&self, pages: &Range<u64>) -> io::Result<u64> {
        let mut went = 0;
        for (_, at, bytes) in self.parts(pages) {
            let resident = resident(at, bytes)?;
            let (Some(first), Some(last)) =
                (resident.iter().position(held), resident.iter().rposition(held))
            else {
                continue;
            };
            // All in one call, since pages that are not resident cost nothing.
            let page = layout::PAGE as usize;
            // SAFETY: both pages lie in the range above.
            let from = unsafe { at.add(first * page) };
            // SAFETY: a part of the range above. No references into guest memory exist, and KVM
            // keeps vCPUs coherent.
            if unsafe { libc::madvise(from.cast(), (last + 1 - first) * page, libc::MADV_DONTNEED) }
                != 0
            {
                return Err(io::Error::last_os_error());
            }
            went += (resident.iter().filter(|page| held(page)).count() * page) as u64;
        }
        Ok(went)
    }

    /// The runs of resident pages between two guest-physical addresses, multiples of 4096.
    ///
    /// # Errors
    /// The host refuses.
    pub fn resident(&self, pages: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (start, at, bytes) in self.parts(pages) {
            let resident = resident(at, bytes)?;
            let addresses = (start..).step_by(layout::PAGE as usize);
            for (at, _) in addresses.zip(resident).filter(|(_, page)| held(page)) {
                match runs.last_mut() {
                    Some(last) if last.end == at => last.end += layout::PAGE,
                    _ => runs.push(at..at + layout::PAGE),
                }
            }
        }
        Ok(runs)
    }

    /// The parts of RAM between two guest-physical addresses: guest-physical start, host address,
    /// bytes.
    fn parts(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, *mut u8, usize)> {
        self.regions().filter_map(|(gpa, host, len)| {
            let start = range.start.max(gpa.0);
            let bytes = range.end.min(gpa.0 + len).saturating_sub(start) as usize;
            // SAFETY: if there are any, `start` is `bytes` or more before the end of the region,
            // whose mapping lives as long as `self`.
            (bytes > 0).then(|| (start, unsafe { host.add((start - gpa.0) as usize) }, bytes))
        })
    }

    /// The host mappings behind RAM: guest-physical start, host address, bytes.
    pub fn regions(&self) -> impl Iterator<Item = (GuestAddress, *mut u8, u64)> {
        self.mem.iter().map(|r| (r.start_addr(), r.as_ptr(), r.len()))
    }
}

/// For each page of `bytes` bytes at `at`, a mapping of guest memory, whether it is resident.
fn resident(at: *mut u8, bytes: usize) -> io::Result<Vec<u8>> {
    let mut resident = vec![0u8; bytes.div_ceil(layout::PAGE as usize)];
    // SAFETY: it writes a byte for each page of the range, and there is room for so many.
    match unsafe { libc::mincore(at.cast(), bytes, resident.as_mut_ptr()) } {
        0 => Ok(resident),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a byte of `mincore` says that a page is resident.
fn held(page: &u8) -> bool {
    page & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        assert!(matches!(Ram::new(0), Err(MemoryError::TooSmall { bytes: 0 })));
        assert!(matches!(Ram::new(layout::MIN_MEMORY - 4096), Err(MemoryError::TooSmall { .. })));
        assert!(matches!(Ram::new(u64::MAX), Err(MemoryError::TooLarge { .. })));
        assert!(matches!(Ram::new(layout::MAX_MEMORY + 4096), Err(MemoryError::TooLarge { .. })));
        assert!(matches!(Ram::new(layout::MIN_MEMORY + 1), Err(MemoryError::Unaligned { .. })));
        assert_eq!(Ram::new(layout::MIN_MEMORY).unwrap().bytes(), layout::MIN_MEMORY);
    }

    #[test]
    fn what_is_given_back_reads_as_zero() {
        // Across the hole below 4 GiB.
        let ram = Ram::new(layout::HOLE_START + (1 << 20)).unwrap();
        let high = ram.end() - (1 << 20);
        let pages = [0x1000, 0x2000, 0x4000, layout::HOLE_START - 0x1000, high, high + 0x1000];
        let value = |at: u64| ram.read_u64(GuestAddress(at)).unwrap();
        for at in pages {
            ram.write(GuestAddress(at), &7u64.to_le_bytes()).unwrap();
        }
        // The other page was never touched, but may be part of a huge page.
        assert!([0x1000, 0x2000].contains(&ram.discard(&(0x2000..0x4000)).unwrap()));
        assert_eq!(pages.map(value), [7, 0, 7, 7, 7, 7]);
        assert!(ram.discard(&(layout::HOLE_START - 0x1000..high + 0x1000)).unwrap() >= 0x2000);
        assert_eq!(pages.map(value), [7, 0, 7, 0, 0, 7]);
        assert_eq!(ram.discard(&(ram.end()..u64::MAX)).unwrap(), 0);
    }

    #[test]
    fn copies_stop_at_the_edges() {
        let ram = Ram::new(layout::HOLE_START + (1 << 20)).unwrap();
        let edge = layout::HOLE_START - 4;
        assert_eq!(ram.write(GuestAddress(edge), &[7; 4]), Ok(()));
        assert!(ram.write(GuestAddress(edge), &[9; 5]).is_err());
        let mut four = [0; 4];
        ram.read(GuestAddress(edge), &mut four).unwrap();
        assert_eq!(four, [7; 4], "a refused write changes nothing");
        assert!(ram.read_u64(GuestAddress(edge)).is_err());
        assert!(ram.read_u64(GuestAddress(ram.end() - 8)).is_ok());
        assert!(ram.read_u64(GuestAddress(ram.end() - 7)).is_err());
        assert!(ram.read_u64(GuestAddress(u64::MAX)).is_err());
        assert!(!ram.contains(GuestAddress(1), u64::MAX));
    }
}
