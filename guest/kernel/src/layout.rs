//! The kernel's mappings of memory.

/// All of physical memory.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// Physical memory a second time, for the kernel image.
pub const IMAGE_MAP: u64 = 0xffff_ffff_8000_0000;
