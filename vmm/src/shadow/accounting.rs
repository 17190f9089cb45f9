//! What shadow memory costs, by the kernel's figures rather than by book-keeping of our own.
//!
//! Resident memory only grows between two releases, so a sample right before each release and one at the
//! end give the exact peak.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    ops::Range,
};

use super::memory::HostShadow;

/// Bytes of private memory that the kernel holds for the addresses `range` of this process, swapped-out
/// pages included. The shared page of zeroes, which reads of untouched memory get, is not counted.
///
/// Only mappings that lie inside `range` as a whole count. It costs a walk over the page tables of this
/// process up to the range: about a millisecond for each resident GiB.
pub fn resident_bytes(range: &Range<u64>) -> io::Result<u64> {
    parse_smaps(BufReader::with_capacity(64 << 10, File::open("/proc/self/smaps")?), range)
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
        } else if inside && let Some(bytes) = field(&text, "Anonymous").or_else(|| field(&text, "Swap")) {
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

/// What this process holds in memory, shadow and guest memory included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident bytes now.
    pub resident: u64,
    /// The most that `resident` has been.
    pub resident_peak: u64,
}

impl ProcessMemory {
    /// Asks the kernel.
    pub fn read() -> io::Result<Self> {
        let mut status = String::new();
        File::open("/proc/self/status")?.read_to_string(&mut status)?;
        Self::parse(&status).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "/proc/self/status without VmRSS and VmHWM")
        })
    }

    fn parse(status: &str) -> Option<Self> {
        let find = |name| status.lines().find_map(|line| field(line, name));
        let resident = find("VmRSS")?;
        // The kernel updates the peak lazily.
        Some(Self { resident, resident_peak: find("VmHWM")?.max(resident) })
    }
}

/// Counts what cannot be asked for later.
#[derive(Debug)]
pub struct Accounting {
    range: Range<u64>,
    page_bytes: u64,
    faults: u64,
    released_bytes: u64,
    peak_resident: u64,
    peak_used: u64,
}

/// What the shadow costs. All sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Figures {
    /// Page shadow, resident from the start.
    pub page_bytes: u64,
    /// Byte shadow mapped now, whole chunks: what could become resident without a further exit.
    pub byte_mapped_bytes: u64,
    /// The most that was mapped.
    pub byte_mapped_peak_bytes: u64,
    /// Byte shadow resident now.
    pub byte_resident_bytes: u64,
    /// The most that was resident. Exact.
    pub byte_peak_resident_bytes: u64,
    /// Byte shadow of byte-checked pages now.
    pub byte_used_bytes: u64,
    /// The most that byte-checked pages used. Exact in `sync` mode, else the largest sample.
    pub byte_used_peak_bytes: u64,
    /// Byte shadow that is resident now and that no byte-checked page uses: one shadow page serves eight pages.
    pub byte_unused_bytes: u64,
    /// Chunks that were mapped because the guest touched them.
    pub faults: u64,
    /// Resident byte shadow that was given back.
    pub released_bytes: u64,
}

impl Figures {
    /// The share of the resident byte shadow that no byte-checked page uses, 0 to 1.
    pub fn unused_share(&self) -> f64 {
        if self.byte_resident_bytes == 0 {
            return 0.0;
        }
        self.byte_unused_bytes as f64 / self.byte_resident_bytes as f64
    }
}

impl Accounting {
    /// Accounts for the byte shadow at the addresses `range` of this process, beside `page_bytes` of page shadow.
    pub(super) fn new(range: Range<u64>, page_bytes: u64) -> Self {
        Self { range, page_bytes, faults: 0, released_bytes: 0, peak_resident: 0, peak_used: 0 }
    }

    pub(super) fn count_fault(&mut self) {
        self.faults = self.faults.saturating_add(1);
    }

    /// Takes a sample; to be called before any host memory is given back. Returns the resident bytes.
    pub(super) fn sample(&mut self, shadow: &HostShadow) -> io::Result<u64> {
        let resident = resident_bytes(&self.range)?;
        self.peak_resident = self.peak_resident.max(resident);
        self.sample_used(shadow);
        Ok(resident)
    }

    /// Notes how much byte-checked pages use now; far cheaper than [`Self::sample`].
    pub(super) fn sample_used(&mut self, shadow: &HostShadow) -> u64 {
        let used = shadow.used_bytes();
        self.peak_used = self.peak_used.max(used).max(shadow.tracked_peak_bytes());
        used
    }

    /// Counts what went since `before`, a result of [`Self::sample`]. Returns it.
    pub(super) fn released(&mut self, before: u64) -> io::Result<u64> {
        let released = before.saturating_sub(resident_bytes(&self.range)?);
        self.released_bytes = self.released_bytes.saturating_add(released);
        Ok(released)
    }

    /// All figures, as of now.
    pub(super) fn figures(&mut self, shadow: &HostShadow) -> io::Result<Figures> {
        let resident = self.sample(shadow)?;
        let used = shadow.used_bytes();
        Ok(Figures {
            page_bytes: self.page_bytes,
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
    use crate::shadow::mapping::{HOST_PAGE, Mapping};

    #[test]
    fn smaps_counts_only_private_memory_of_the_range() {
        let smaps = b"1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nAnonymous:      4 kB\n\
            2000-4000 rw-p 00000000 00:00 0 \nRss: 96 kB\nAnonymous:      8 kB\nAnonHugePages: 64 kB\nSwap:   4 kB\n\
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
    fn resident_is_what_was_written() {
        // Neighbours in the address space must not be counted with it.
        let mut mappings: Vec<_> = (0..3).map(|_| Mapping::new(64 * HOST_PAGE).unwrap()).collect();
        let resident = |mapping: &Mapping| resident_bytes(&mapping.range()).unwrap();
        assert_eq!(resident(&mappings[1]), 0);
        for page in [0, 5, 63] {
            mappings[1].fill(page * HOST_PAGE, 1, 1).unwrap();
        }
        for page in 0..64 {
            mappings[0].load(page * HOST_PAGE);
        }
        assert_eq!(mappings.iter().map(resident).collect::<Vec<_>>(), [0, 3 * HOST_PAGE, 0]);
        mappings[1].discard(0, 64 * HOST_PAGE).unwrap();
        assert_eq!(resident(&mappings[1]), 0);
    }

    #[test]
    fn process_memory() {
        let parsed = ProcessMemory::parse("Name:\tx\nVmHWM:\t    1624 kB\nVmRSS:\t     800 kB\n");
        assert_eq!(parsed, Some(ProcessMemory { resident: 800 << 10, resident_peak: 1624 << 10 }));
        assert_eq!(ProcessMemory::parse("VmRSS: x kB"), None);
        let now = ProcessMemory::read().unwrap();
        assert!(now.resident > 100 << 10 && now.resident_peak >= now.resident, "{now:?}");
    }
}
