//! The cost of shadow memory, by the kernel's figures.
//!
//! Resident memory only grows until some is reclaimed. So a sample right before each reclaim and
//! one at the end give the exact peak. Byte shadow of which anything may be reclaimed is a file in
//! memory: a sample is one question to the kernel, whatever its size, and `/proc/self/smaps` tells
//! the same of the mapping `memfd:umbra-shadow`, for anybody who wants to check.

use std::{
    io::{self, BufRead, BufReader, Read},
    ops::Range,
};

use umbra_shadow::codes::SHADOW_PER_PAGE;

use super::{
    memory::ShadowBacking,
    proc::{FromStart, files},
};

/// Bytes of `/proc/self/smaps` that are read at once.
const SMAPS_BLOCK: usize = 64 << 10;

/// Bytes of private memory that the kernel holds for the addresses `range` of this process,
/// swapped-out pages included. The shared page of zeroes, which reads of untouched memory get, is
/// not counted.
///
/// Only mappings that lie inside `range` as a whole count.
///
/// # Errors
/// The file in `/proc` cannot be read.
pub fn resident_bytes(range: &Range<u64>) -> io::Result<u64> {
    parse_smaps(BufReader::with_capacity(SMAPS_BLOCK, FromStart::new(&files()?.smaps)), range)
}

fn parse_smaps(mut smaps: impl BufRead, range: &Range<u64>) -> io::Result<u64> {
    let mut total = 0u64;
    let mut inside = false;
    let mut line = Vec::new();
    loop {
        line.clear();
        if smaps.read_until(b'\n', &mut line)? == 0 {
            return Ok(total);
        }
        // The name of a mapped file need not be UTF-8; all that is used is.
        let text = String::from_utf8_lossy(&line);
        if let Some(mapping) = header(&text) {
            if mapping.start >= range.end {
                return Ok(total); // They come in order.
            }
            inside = mapping.start >= range.start && mapping.end <= range.end;
        } else if inside
            && let Some(bytes) = field(&text, "Anonymous").or_else(|| field(&text, "Swap"))
        {
            total = total.saturating_add(bytes);
        }
    }
}

/// The addresses at the start of a mapping's first line.
fn header(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// The bytes of a line `name:   123 kB`.
fn field(line: &str, name: &str) -> Option<u64> {
    let value = line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB")?;
    value.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory of this process, shadow and guest memory included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident bytes now.
    pub resident: u64,
    /// The most that `resident` has been.
    pub resident_peak: u64,
    /// Address space in use now, in bytes.
    pub address_space: u64,
}

impl ProcessMemory {
    /// Asks the kernel.
    ///
    /// # Errors
    /// The file in `/proc` cannot be read.
    pub fn read() -> io::Result<Self> {
        let mut status = String::new();
        FromStart::new(&files()?.status).read_to_string(&mut status)?;
        Self::parse(&status).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "/proc/self/status without VmRSS and VmHWM")
        })
    }

    fn parse(status: &str) -> Option<Self> {
        let find = |name| status.lines().find_map(|line| field(line, name));
        let resident = find("VmRSS")?;
        // The kernel updates the peak lazily.
        let resident_peak = find("VmHWM")?.max(resident);
        Some(Self { resident, resident_peak, address_space: find("VmSize").unwrap_or(0) })
    }
}

/// Counts what the kernel does not keep.
#[derive(Debug)]
pub(super) struct Accounting {
    page_bytes: u64,
    faults: u64,
    released_bytes: u64,
    peak_resident: u64,
    /// Byte-checked pages of each chunk when it was last looked at, and all of them together.
    used: Vec<u16>,
    used_pages: u64,
    peak_used: u64,
}

/// Costs of the shadow. All sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Figures {
    /// Page shadow, in whole pages: that of RAM, resident from the start, and that of virtual
    /// memory, resident since the guest got its key.
    pub page_bytes: u64,
    /// Pattern pages and page tables of the check shadow; 0 if the kernel does not check inline.
    pub check_bytes: u64,
    /// Byte shadow mapped now, whole chunks: what could become resident without a further exit.
    pub byte_mapped_bytes: u64,
    /// The most that was mapped.
    pub byte_mapped_peak_bytes: u64,
    /// Byte shadow resident now.
    pub byte_resident_bytes: u64,
    /// The most that was resident. Exact, unless the limit made the VMM unmap chunks of a guest
    /// with several CPUs: stores of the others in those microseconds may be missing.
    pub byte_peak_resident_bytes: u64,
    /// Byte shadow of byte-checked pages now.
    pub byte_used_bytes: u64,
    /// The most that byte-checked pages used. Exact in `sync` mode. Else the largest sum of what
    /// each chunk used when it was last looked at.
    pub byte_used_peak_bytes: u64,
    /// Byte shadow that is resident now and that no byte-checked page uses: one shadow page serves
    /// eight pages.
    pub byte_unused_bytes: u64,
    /// Chunks that were mapped because the guest touched them.
    pub faults: u64,
    /// Resident byte shadow that was reclaimed.
    pub released_bytes: u64,
}

impl Figures {
    /// All shadow at its peak, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.page_bytes + self.check_bytes + self.byte_peak_resident_bytes
    }

    /// The share of the resident byte shadow that no byte-checked page uses, 0 to 1.
    pub fn unused_share(&self) -> f64 {
        if self.byte_resident_bytes == 0 {
            return 0.0;
        }
        self.byte_unused_bytes as f64 / self.byte_resident_bytes as f64
    }
}

impl Accounting {
    /// Accounts for the byte shadow of so many chunks, beside `page_bytes` of page shadow.
    pub(super) fn new(chunks: usize, page_bytes: u64) -> Self {
        Self {
            page_bytes,
            faults: 0,
            released_bytes: 0,
            peak_resident: 0,
            used: vec![0; chunks],
            used_pages: 0,
            peak_used: 0,
        }
    }

    /// Bytes of page shadow.
    pub(super) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Counts page shadow that is resident from now on.
    pub(super) fn count_page_bytes(&mut self, bytes: u64) {
        self.page_bytes = self.page_bytes.saturating_add(bytes);
    }

    pub(super) fn count_fault(&mut self) {
        self.faults = self.faults.saturating_add(1);
    }

    /// Asks the kernel for the resident bytes; to be called before any host memory is reclaimed.
    pub(super) fn sample(&mut self, shadow: &ShadowBacking) -> io::Result<u64> {
        let resident = shadow.byte.resident_bytes()?;
        self.peak_resident = self.peak_resident.max(resident);
        Ok(resident)
    }

    /// Looks how many pages of `chunk` are byte-checked now.
    pub(super) fn sample_used(&mut self, shadow: &ShadowBacking, chunk: usize) {
        let pages = shadow.used_pages(chunk) as u16;
        if let Some(used) = self.used.get_mut(chunk) {
            self.used_pages = self.used_pages + u64::from(pages) - u64::from(*used);
            *used = pages;
        }
        self.note_used(shadow, self.used_pages * SHADOW_PER_PAGE);
    }

    fn note_used(&mut self, shadow: &ShadowBacking, used: u64) {
        self.peak_used = self.peak_used.max(used).max(shadow.tracked_peak_bytes());
    }

    /// Counts resident bytes that were reclaimed.
    pub(super) fn count_reclaimed(&mut self, bytes: u64) {
        self.released_bytes = self.released_bytes.saturating_add(bytes);
    }

    /// All figures, as of now. The check shadow has `check_bytes`.
    pub(super) fn figures(
        &mut self,
        shadow: &ShadowBacking,
        check_bytes: u64,
    ) -> io::Result<Figures> {
        let resident = self.sample(shadow)?;
        let used = shadow.used_bytes();
        self.note_used(shadow, used);
        Ok(Figures {
            page_bytes: self.page_bytes,
            check_bytes,
            byte_mapped_bytes: shadow.mapped_bytes(),
            byte_mapped_peak_bytes: shadow.mapped_peak_bytes(),
            byte_resident_bytes: resident,
            byte_peak_resident_bytes: self.peak_resident,
            byte_used_bytes: used,
            byte_used_peak_bytes: self.peak_used,
            byte_unused_bytes: resident.saturating_sub(used),
            faults: self.faults,
            released_bytes: self.released_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_counts_only_private_memory_of_the_range() {
        let smaps = b"1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nAnonymous:      4 kB\n\
            2000-4000 rw-p 00000000 00:00 0 \nRss: 96 kB\n\
             Anonymous:      8 kB\nAnonHugePages: 64 kB\nSwap:   4 kB\n\
            SwapPss: 4 kB\n\
            4000-6000 rw-p 00000000 00:00 0 /tmp/a-b \xff\nAnonymous:   16 kB\n\
            6000-9000 rw-p 0 00:00 0\nAnonymous: 32 kB\n" as &[u8];
        let count = |range| parse_smaps(smaps, &range).unwrap();
        assert_eq!(count(0x2000..0x4000), 12 << 10);
        assert_eq!(count(0x2000..0x6000), 28 << 10);
        assert_eq!(count(0x1000..0x1001), 0);
        assert_eq!(count(0x6000..0x8fff), 0, "only a part of the mapping is asked for");
        assert_eq!(count(0..u64::MAX), 64 << 10);
    }

    #[test]
    fn process_memory() {
        let parsed = ProcessMemory::parse(
            "VmSize:\t 9 kB\nName:\tx\nVmHWM:\t    1624 kB\nVmRSS:\t     800 kB\n",
        );
        let (resident, resident_peak) = (800 << 10, 1624 << 10);
        let wanted = ProcessMemory { resident, resident_peak, address_space: 9 << 10 };
        assert_eq!(parsed, Some(wanted));
        assert_eq!(ProcessMemory::parse("VmRSS: x kB"), None);
        let now = ProcessMemory::read().unwrap();
        assert!(now.resident > 100 << 10 && now.resident_peak >= now.resident, "{now:?}");
    }
}
