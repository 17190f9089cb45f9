//! The place of the shadow windows in guest-physical memory: above RAM, the page window first, and
//! last what a check shadow needs (`check_tables.rs`). And the range of the keys (`keys.rs`): those
//! of RAM, then those of virtual memory.

use umbra_shadow::{
    abi::VIRTUAL_UNIT,
    codes::{GRANULE_SHIFT, PAGE_SHIFT, PAGE_SIZE},
    group::{GROUP_SHIFT, PATTERN_BYTES},
};

/// Bytes of byte shadow that are mapped at once: 64 shadow pages, for 2 MiB of guest memory. One
/// exit then serves a large page of the guest, and a 4 GiB guest needs at most 2,048 memslots.
pub const CHUNK_BYTES: u64 = 256 << 10;
/// Bytes of guest memory whose byte shadow is one chunk.
pub const CHUNK_COVERS: u64 = CHUNK_BYTES << GRANULE_SHIFT;

/// Both windows start at multiples of this, so that a guest can map them with its largest pages.
const WINDOW_ALIGN: u64 = 1 << 30;
/// Bytes of a guest's large page.
pub const LARGE_PAGE: u64 = 2 << 20;
/// Tables of a check shadow, beside those that memory needs by its size: for 64 regions.
const TABLES: u64 = 256;
/// No window below this address, where devices and the interrupt controllers are.
const LOWEST_WINDOW: u64 = 4 << 30;
/// The end of the largest accepted guest memory. It keeps tables small for any command line.
const MAX_RAM_END: u64 = 4 << 40;
/// Least bytes of keys for virtual memory; otherwise there are as many as RAM has. A key costs
/// nothing until the guest gets it.
const MIN_VIRTUAL: u64 = 4 << 30;
/// Least byte shadow for virtual memory by default; otherwise as much as RAM has.
const MIN_VIRTUAL_SHADOW: u64 = 32 << 20;

/// A guest-physical range that shows shadow memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Guest-physical start.
    pub gpa: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Window {
    /// The first guest-physical address behind it.
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(self.bytes)
    }

    /// The offset of `[gpa, gpa + len)` in the window, if all of it lies inside.
    pub fn offset(&self, gpa: u64, len: u64) -> Option<u64> {
        let offset = gpa.checked_sub(self.gpa)?;
        (offset.checked_add(len)? <= self.bytes).then_some(offset)
    }
}

/// Guest memory for which there are no windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "guest memory that ends at {ram_end:#x} is not a multiple of 4 KiB between 4 KiB and 4 TiB"
)]
pub struct LayoutError {
    /// The requested end of guest memory.
    pub ram_end: u64,
}

/// The place of all windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The first address behind guest memory; everything below it has shadow.
    pub ram_end: u64,
    /// The first key of virtual memory, a multiple of [`VIRTUAL_UNIT`].
    pub virtual_start: u64,
    /// The first address behind all keys, a multiple of [`VIRTUAL_UNIT`].
    pub keys_end: u64,
    /// One byte for each page, at index `key >> 12`. Whole 4 KiB pages.
    pub page: Window,
    /// One byte for each 8 bytes, at index `key >> 3`. Whole chunks.
    pub byte: Window,
    /// The pattern pages of a check shadow.
    pub patterns: Window,
    /// The page tables of a check shadow, but for those of the last level.
    pub tables: Window,
    /// The page tables of the last level: one entry of 8 bytes for each group, at index
    /// `key >> 15`. The window begins and ends at multiples of [`LARGE_PAGE`].
    pub entries: Window,
}

impl Layout {
    /// Lays out the windows for guest memory that ends at `ram_end`.
    ///
    /// # Errors
    /// The end is 0, not a multiple of 4096, or too high.
    pub fn new(ram_end: u64) -> Result<Self, LayoutError> {
        if ram_end == 0 || !ram_end.is_multiple_of(PAGE_SIZE) || ram_end > MAX_RAM_END {
            return Err(LayoutError { ram_end });
        }
        let virtual_start = ram_end.next_multiple_of(VIRTUAL_UNIT);
        let keys_end = virtual_start + virtual_start.max(MIN_VIRTUAL);
        let page = Window {
            gpa: ram_end.max(LOWEST_WINDOW).next_multiple_of(WINDOW_ALIGN),
            bytes: keys_end >> PAGE_SHIFT,
        };
        let byte = Window {
            gpa: page.end().next_multiple_of(WINDOW_ALIGN),
            bytes: keys_end >> GRANULE_SHIFT,
        };
        let after = byte.end().next_multiple_of(WINDOW_ALIGN);
        let patterns = Window { gpa: after, bytes: PATTERN_BYTES };
        // Those of the byte window have large pages: one table a GiB. Those of regions have less
        // than one a GiB of memory.
        let tables = TABLES + 2 * byte.bytes.div_ceil(1 << 30) + (keys_end >> 30);
        let tables = Window { gpa: patterns.end(), bytes: tables * PAGE_SIZE };
        let entries = Window {
            gpa: tables.end().next_multiple_of(LARGE_PAGE),
            bytes: (keys_end >> GROUP_SHIFT << 3).next_multiple_of(LARGE_PAGE),
        };
        Ok(Self { ram_end, virtual_start, keys_end, page, byte, patterns, tables, entries })
    }

    /// Bytes of keys for virtual memory.
    pub fn virtual_bytes(&self) -> u64 {
        self.keys_end - self.virtual_start
    }

    /// Bytes of the page window that are for RAM, whole pages.
    pub fn ram_page_bytes(&self) -> u64 {
        (self.ram_end >> PAGE_SHIFT).next_multiple_of(PAGE_SIZE)
    }

    /// Chunks of the byte window that are for RAM.
    pub fn ram_chunks(&self) -> usize {
        self.ram_end.div_ceil(CHUNK_COVERS) as usize
    }

    /// The first chunk of the byte window that is for virtual memory.
    pub fn first_virtual_chunk(&self) -> usize {
        (self.virtual_start / CHUNK_COVERS) as usize
    }

    /// The most byte shadow that may be mapped by default, in bytes. RAM bounds its own shadow;
    /// without this limit, a small guest could take any amount for virtual memory.
    pub fn default_limit(&self) -> u64 {
        let ram = self.ram_chunks() as u64 * CHUNK_BYTES;
        ram + ram.max(MIN_VIRTUAL_SHADOW)
    }

    /// The end of all windows. The guest's physical addresses must reach it.
    pub fn end(&self) -> u64 {
        self.entries.end()
    }

    /// Chunks of the byte window.
    pub fn chunks(&self) -> usize {
        // At most 2^22, by MAX_RAM_END.
        (self.byte.bytes / CHUNK_BYTES) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_above_ram_and_cover_it() {
        for ram_end in [
            4096,
            5 << 20,
            128 << 20,
            256 << 20,
            3 << 30,
            4 << 30,
            (5 << 30) + 4096,
            1 << 40,
            MAX_RAM_END,
        ] {
            let layout = Layout::new(ram_end).unwrap();
            assert!(layout.page.gpa >= ram_end && layout.page.gpa >= LOWEST_WINDOW, "{layout:x?}");
            assert_eq!(
                layout.byte.gpa,
                layout.page.end().next_multiple_of(WINDOW_ALIGN),
                "{layout:x?}"
            );
            assert!(layout.ram_page_bytes() >= ram_end / 4096);
            assert!(layout.ram_page_bytes() < ram_end / 4096 + 4096);
            assert!(layout.ram_chunks() as u64 * CHUNK_COVERS >= ram_end);
            assert!(
                layout.virtual_start >= ram_end && layout.virtual_start < ram_end + VIRTUAL_UNIT
            );
            assert!(layout.virtual_bytes() >= MIN_VIRTUAL && layout.virtual_bytes() >= ram_end);
            assert!(layout.keys_end.is_multiple_of(VIRTUAL_UNIT));
            assert_eq!(layout.page.bytes, layout.keys_end / 4096);
            assert_eq!(layout.byte.bytes, layout.keys_end / 8);
            assert!(layout.entries.bytes >= layout.keys_end / 4096);
            // The page shadow of every chunk, the last one included, lies in the page window.
            assert!(layout.chunks() as u64 * (CHUNK_COVERS >> PAGE_SHIFT) <= layout.page.bytes);
        }
        let layout = Layout::new(256 << 20).unwrap();
        assert_eq!(
            layout,
            Layout {
                ram_end: 256 << 20,
                virtual_start: 256 << 20,
                keys_end: (256 << 20) + (4 << 30),
                page: Window { gpa: 4 << 30, bytes: (64 << 10) + (1 << 20) },
                byte: Window { gpa: 5 << 30, bytes: (32 << 20) + (512 << 20) },
                patterns: Window { gpa: 6 << 30, bytes: 1 << 20 },
                tables: Window { gpa: (6 << 30) + (1 << 20), bytes: 262 << 12 },
                entries: Window { gpa: (6 << 30) + (4 << 20), bytes: 2 << 20 },
            }
        );
        assert_eq!(layout.default_limit(), 64 << 20);
    }

    #[test]
    fn absurd_memory_is_refused() {
        for ram_end in [0, 1, 4095, 4097, MAX_RAM_END + 4096, u64::MAX, 1 << 63] {
            assert_eq!(Layout::new(ram_end), Err(LayoutError { ram_end }));
        }
    }

    #[test]
    fn offsets_stay_inside() {
        let window = Window { gpa: 0x1000, bytes: 0x100 };
        assert_eq!(window.offset(0x1000, 0x100), Some(0));
        assert_eq!(window.offset(0x10ff, 1), Some(0xff));
        for (gpa, len) in [
            (0xfff, 1),
            (0x1000, 0x101),
            (0x10ff, 2),
            (0x1100, 1),
            (u64::MAX, 8),
            (0x1001, u64::MAX),
        ] {
            assert_eq!(window.offset(gpa, len), None, "{gpa:#x}+{len:#x}");
        }
    }
}
