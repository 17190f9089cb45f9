//! Host memory that guest and VMM share: the one place with raw pointers, behind bounds-checked
//! offsets.
//!
//! A guest's vCPUs read and write this memory at any time. So no reference into it is ever made,
//! every access is volatile, and a value is read once and then used.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    ptr::{self, NonNull},
};

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use rustix::process::{Resource, getrlimit};

use super::accounting::resident_bytes;

/// Size of a host page. Umbra runs on x86_64 only.
pub const HOST_PAGE: u64 = 4096;

/// Why there is no file for it.
const FILE_LIMIT: &str = "the limit on the size of files (`ulimit -f`) is lower, and is one on \
                          files in memory, too";

/// Address space of this process, with an inaccessible page before and behind the part that is
/// used.
///
/// The guard pages keep the kernel from merging the part with a neighbour, so that it has lines of
/// its own in `/proc/self/smaps`; and they turn a stray access into a fault.
#[derive(Debug)]
struct Reservation {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it only owns address space; access goes through `Mapping`.
unsafe impl Send for Reservation {}
// SAFETY: as above; there is no access through a shared `Reservation`.
unsafe impl Sync for Reservation {}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is exactly what `mmap` gave `Mapping::new`, and nothing points into it
        // any more: the `Mapping` that owns this value is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Zeroed memory that is resident only where it was written.
#[derive(Debug)]
pub struct Mapping {
    /// Unmaps it all when it is dropped.
    _reservation: Reservation,
    /// A file in memory behind it. The kernel knows at any time how much of a file is resident; of
    /// anonymous memory, which is cheaper, it has to be asked page by page.
    file: Option<OwnedFd>,
    start: NonNull<u8>,
    bytes: u64,
}

// SAFETY: a `Mapping` is the only one in this process that accesses its memory, and writes need
// `&mut`.
unsafe impl Send for Mapping {}
// SAFETY: `&self` only reads, with volatile accesses.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes of anonymous memory, rounded up to whole pages.
    pub fn new(bytes: u64) -> io::Result<Self> {
        Self::map(bytes, false)
    }

    /// Maps `bytes` bytes, rounded up to whole pages, of a new file in memory: parts of it can be
    /// given back. A page that is only read is resident, too.
    pub fn of_file(bytes: u64) -> io::Result<Self> {
        Self::map(bytes, true)
    }

    fn map(bytes: u64, of_file: bool) -> io::Result<Self> {
        let bytes = bytes.checked_next_multiple_of(HOST_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let total = bytes
            .checked_add(2 * HOST_PAGE)
            .and_then(|total| usize::try_from(total).ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing
        // memory.
        let raw = unsafe {
            libc::mmap(
                ptr::null_mut(),
                total,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(raw.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let reservation = Reservation { start: base, bytes: total };
        // SAFETY: one page into a mapping of at least two pages.
        let start = unsafe { base.add(HOST_PAGE as usize) };
        let file = if of_file { Some(memory_file(bytes)?) } else { None };
        let (kind, fd) = match &file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: start and length lie inside the mapping made above, which nobody else uses yet.
        let mapped = unsafe {
            libc::mmap(
                start.as_ptr().cast(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_NORESERVE | libc::MAP_FIXED,
                fd,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Where huge pages are always on, one written byte would cost 2 MiB. A kernel built without
        // them refuses the advice, and then there is nothing to refuse. SAFETY: as above; the
        // advice changes no contents.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes as usize, libc::MADV_NOHUGEPAGE) };
        Ok(Self { _reservation: reservation, file, start, bytes })
    }

    /// Bytes that the kernel holds for it, swapped-out pages included.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        /// Bytes of a block in a file's status, whatever its file system.
        const BLOCK: u64 = 512;
        let Some(file) = &self.file else {
            let start = self.start.as_ptr() as u64;
            return resident_bytes(&(start..start + self.bytes));
        };
        Ok(u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or(0) * BLOCK)
    }

    fn file(&self) -> io::Result<&OwnedFd> {
        self.file.as_ref().ok_or(io::ErrorKind::Unsupported.into())
    }

    /// Whether any page of `range` is resident. It has a file.
    pub fn is_resident(&self, range: &Range<u64>) -> io::Result<bool> {
        match rustix::fs::seek(self.file()?, SeekFrom::Data(range.start)) {
            Ok(data) => Ok(data < range.end),
            // Nothing from there on.
            Err(rustix::io::Errno::NXIO) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The host address of `[at, at + len)`, if it lies inside.
    pub fn pointer(&self, at: u64, len: u64) -> Option<*mut u8> {
        if at.checked_add(len)? > self.bytes {
            return None;
        }
        // SAFETY: `at` is at most `bytes`, so the result points into the mapping or to its trailing
        // guard page.
        Some(unsafe { self.start.as_ptr().add(at as usize) })
    }

    /// Reads one byte.
    pub fn load(&self, at: u64) -> Option<u8> {
        let pointer = self.pointer(at, 1)?;
        // SAFETY: one readable byte inside the mapping; volatile because a guest may write it
        // meanwhile.
        Some(unsafe { pointer.read_volatile() })
    }

    /// Reads 8 bytes, little endian. `at` is a multiple of 8.
    pub fn load_u64(&self, at: u64) -> Option<u64> {
        if !at.is_multiple_of(8) {
            return None;
        }
        let pointer = self.pointer(at, 8)?.cast::<u64>();
        // SAFETY: eight readable bytes inside the mapping, aligned because its start is
        // page-aligned and `at` is a multiple of 8; volatile because a guest may write them
        // meanwhile.
        Some(unsafe { pointer.read_volatile() })
    }

    /// How many of `len` bytes are `value`. `None` if they do not all lie inside.
    pub fn count(&self, at: u64, len: u64, value: u8) -> Option<u64> {
        self.pointer(at, len)?;
        let words = at.next_multiple_of(8).min(at + len)..(at + len) & !7;
        let ends = (at..words.start).chain(words.end.max(words.start)..at + len);
        let single = ends.filter(|at| self.load(*at) == Some(value)).count() as u64;
        let equal = |word: u64| word.to_ne_bytes().iter().filter(|byte| **byte == value).count();
        let words = words.step_by(8).filter_map(|at| self.load_u64(at));
        Some(single + words.map(|word| equal(word) as u64).sum::<u64>())
    }

    /// Reads `to.len()` bytes. `None` if they do not all lie inside; `to` is unchanged then.
    pub fn read(&self, at: u64, to: &mut [u8]) -> Option<()> {
        let pointer = self.pointer(at, to.len() as u64)?;
        for (i, byte) in to.iter_mut().enumerate() {
            // SAFETY: `i` is below the length that was checked; volatile because a guest may write
            // meanwhile.
            *byte = unsafe { pointer.add(i).read_volatile() };
        }
        Some(())
    }

    /// Writes `from`. `None`, and nothing written, if it does not all fit.
    pub fn write(&mut self, at: u64, from: &[u8]) -> Option<()> {
        let pointer = self.pointer(at, from.len() as u64)?;
        for (i, byte) in from.iter().enumerate() {
            // SAFETY: `i` is below the length that was checked; volatile because a guest may access
            // it meanwhile.
            unsafe { pointer.add(i).write_volatile(*byte) };
        }
        Some(())
    }

    /// Sets `len` bytes. `None`, and nothing written, if they do not all lie inside.
    pub fn fill(&mut self, at: u64, len: u64, value: u8) -> Option<()> {
        let pointer = self.pointer(at, len)?;
        let head = (at.next_multiple_of(8) - at).min(len);
        let words = (len - head) / 8;
        let word = u64::from_ne_bytes([value; 8]);
        for i in (0..head).chain(head + words * 8..len) {
            // SAFETY: `i` is below `len`, which was checked; volatile because a guest may access it
            // meanwhile.
            unsafe { pointer.add(i as usize).write_volatile(value) };
        }
        for i in 0..words {
            // SAFETY: `head + 8 * words` is at most `len`; behind the head the address is a
            // multiple of 8.
            unsafe { pointer.add((head + 8 * i) as usize).cast::<u64>().write_volatile(word) };
        }
        Some(())
    }

    /// Makes `[at, at + len)` resident, without changing it.
    pub fn touch(&mut self, at: u64, len: u64) -> Option<()> {
        let pointer = self.pointer(at, len)?;
        let mut offset = 0;
        while offset < len {
            // SAFETY: `offset` is below `len`, which was checked. No guest runs on memory that is
            // made resident (it is done before the memory gets a memslot), so that reading and
            // writing back loses no store.
            unsafe {
                let byte = pointer.add(offset as usize);
                byte.write_volatile(byte.read_volatile());
            }
            offset += HOST_PAGE;
        }
        Some(())
    }

    /// Gives the host memory of `[at, at + len)` back; it reads as zero from then on. Both are
    /// multiples of 4096. It has a file.
    pub fn discard(&mut self, at: u64, len: u64) -> io::Result<()> {
        if !at.is_multiple_of(HOST_PAGE) || !len.is_multiple_of(HOST_PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.pointer(at, len).ok_or(io::ErrorKind::InvalidInput)?;
        // A guest that has it in a memslot is kept coherent by KVM.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self.file()?, hole, at, len)?)
    }
}

/// A new file in memory, of so many bytes.
fn memory_file(bytes: u64) -> io::Result<OwnedFd> {
    // A file that is too large would end the process with a signal.
    if getrlimit(Resource::Fsize).current.is_some_and(|limit| limit < bytes) {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, FILE_LIMIT));
    }
    let file = rustix::fs::memfd_create(c"umbra-shadow", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_writes_exactly_its_range() {
        let mut mapping = Mapping::new(HOST_PAGE).unwrap();
        for at in 0..20u64 {
            for len in 0..40u64 {
                mapping.fill(0, 128, 0).unwrap();
                mapping.fill(at, len, 0xfc).unwrap();
                for i in 0..128 {
                    let expected = if (at..at + len).contains(&i) { 0xfc } else { 0 };
                    assert_eq!(mapping.load(i), Some(expected), "{at}+{len}: {i}");
                }
                for start in 0..24 {
                    let inside = (start..start + 33).filter(|i| (at..at + len).contains(i));
                    let count = inside.count() as u64;
                    assert_eq!(mapping.count(start, 33, 0xfc), Some(count), "{at}+{len}: {start}");
                }
            }
        }
    }

    #[test]
    fn nothing_reaches_outside() {
        let mut mapping = Mapping::of_file(1).unwrap();
        assert!(mapping.pointer(0, HOST_PAGE).is_some() && mapping.pointer(1, HOST_PAGE).is_none());
        mapping.fill(HOST_PAGE - 8, 8, 0xfe).unwrap();
        assert_eq!(mapping.load(HOST_PAGE), None);
        assert_eq!(mapping.load_u64(HOST_PAGE - 8), Some(u64::from_ne_bytes([0xfe; 8])));
        assert_eq!(mapping.load_u64(HOST_PAGE - 7), None);
        assert_eq!(mapping.load_u64(u64::MAX - 7), None);
        assert_eq!(mapping.fill(HOST_PAGE - 1, 2, 0), None);
        assert_eq!(mapping.count(HOST_PAGE - 1, 2, 0), None);
        assert_eq!(mapping.count(1, u64::MAX, 0), None);
        assert_eq!(
            [0, 1, 5].map(|len| mapping.count(HOST_PAGE - 5, len, 0xfe)),
            [0, 1, 5].map(Some)
        );
        assert_eq!(mapping.fill(1, u64::MAX, 0), None);
        assert_eq!(mapping.write(HOST_PAGE - 1, &[0; 2]), None);
        assert_eq!(mapping.read(HOST_PAGE - 1, &mut [0; 2]), None);
        assert_eq!(mapping.load(HOST_PAGE - 1), Some(0xfe));
        assert!(mapping.discard(0, 2 * HOST_PAGE).is_err());
        assert!(mapping.discard(1, HOST_PAGE).is_err());
        assert!(Mapping::new(u64::MAX).is_err());
        assert!(Mapping::new(1 << 62).is_err());
    }

    #[test]
    fn discard_gives_back_only_its_pages() {
        assert!(Mapping::new(HOST_PAGE).unwrap().discard(0, HOST_PAGE).is_err());
        let mut mapping = Mapping::of_file(4 * HOST_PAGE).unwrap();
        mapping.fill(0, 3 * HOST_PAGE, 7).unwrap();
        mapping.discard(HOST_PAGE, HOST_PAGE).unwrap();
        assert_eq!(
            [0, 1, 2].map(|page| mapping.load(page * HOST_PAGE)),
            [Some(7), Some(0), Some(7)]
        );
    }

    #[test]
    fn resident_is_what_was_written() {
        // Neighbours in the address space must not be counted with it.
        let mut anonymous: Vec<_> = (0..3).map(|_| Mapping::new(64 * HOST_PAGE).unwrap()).collect();
        for page in [0, 5, 63] {
            anonymous[1].fill(page * HOST_PAGE, 1, 1).unwrap();
        }
        for page in 0..64 {
            anonymous[0].load(page * HOST_PAGE);
        }
        let resident: Vec<_> = anonymous.iter().map(|m| m.resident_bytes().unwrap()).collect();
        assert_eq!(resident, [0, 3 * HOST_PAGE, 0]);

        let mut mapping = Mapping::of_file(64 * HOST_PAGE).unwrap();
        assert_eq!(mapping.resident_bytes().unwrap(), 0);
        assert!(!mapping.is_resident(&(0..64 * HOST_PAGE)).unwrap());
        for page in [0, 5, 63] {
            mapping.fill(page * HOST_PAGE, 1, 1).unwrap();
        }
        assert_eq!(mapping.resident_bytes().unwrap(), 3 * HOST_PAGE);
        let resident = |range: Range<u64>| {
            mapping.is_resident(&(range.start * HOST_PAGE..range.end * HOST_PAGE)).unwrap()
        };
        let ranges = [0..1, 1..5, 1..6, 6..63, 6..64, 63..64];
        assert_eq!(ranges.map(resident), [true, false, true, false, true, true]);
        mapping.discard(0, 64 * HOST_PAGE).unwrap();
        assert_eq!(mapping.resident_bytes().unwrap(), 0);
    }
}
