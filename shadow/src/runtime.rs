//! Types in the C interface between the guest runtime and the kernel that links it. The runtime and
//! its Rust binding share them; `guest/c/umbra.h` declares the same.

use core::ffi::c_void;

use crate::abi::Features;
use crate::codes::{GRANULE_SHIFT, PAGE_SHIFT, PAGE_SIZE};

/// What the VMM offers, for the kernel to map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Offer {
    /// [`Features`] bits; 0 without Umbra, or if it keeps no shadow.
    pub features: u32,
    /// ABI version of the VMM; 0 without Umbra.
    pub version: u32,
    /// Guest-physical start of the page-shadow window.
    pub page_window: u64,
    /// Its bytes; 0 if there is none.
    pub page_window_bytes: u64,
    /// Guest-physical start of the byte-shadow window.
    pub byte_window: u64,
    /// Its bytes; 0 if there is none.
    pub byte_window_bytes: u64,
    /// Bytes of virtual memory that can get shadow.
    pub virtual_bytes: u64,
}

/// Memory that a kernel maps one to one: `bytes` of guest-physical memory from `gpa` on, at
/// `start`. Or virtual memory that got shadow.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Virtual start, a multiple of 4096 in the upper half.
    pub start: u64,
    /// Bytes, a multiple of 4096.
    pub bytes: u64,
    /// Guest-physical start, a multiple of 4096. For virtual memory, its key.
    pub gpa: u64,
}

/// A piece of a shadow window that the kernel must map, in whole pages.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Virtual address.
    pub start: u64,
    /// Guest-physical address inside a window.
    pub gpa: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Called when a CPU forgets its translation of the check shadow of an address, or for `u64::MAX`
/// of all.
pub type ForgetFn = extern "C" fn(address: u64);

impl Offer {
    /// Whether Umbra keeps shadow in this run.
    pub fn checks(&self) -> bool {
        Features::from_bits(self.features).has(Features::SHADOW)
    }

    /// Whether Umbra wants events in rings.
    pub fn rings(&self) -> bool {
        Features::from_bits(self.features).has(Features::RING)
    }

    /// The mappings, read-write and cached, that the checks need for `region`: of its page shadow
    /// and of its byte shadow. A piece of a window that does not exist in this mode has 0 bytes.
    pub fn mappings(&self, region: &Region) -> [Mapping; 2] {
        let piece = |shift: u32, window: u64, window_bytes: u64| {
            let first = region.gpa >> shift & !(PAGE_SIZE - 1);
            let end = ((region.gpa + region.bytes) >> shift)
                .next_multiple_of(PAGE_SIZE)
                .min(window_bytes);
            Mapping {
                start: (region.start.cast_signed() >> shift).cast_unsigned() & !(PAGE_SIZE - 1),
                gpa: window + first,
                bytes: end.saturating_sub(first),
            }
        };
        [
            piece(PAGE_SHIFT, self.page_window, self.page_window_bytes),
            piece(GRANULE_SHIFT, self.byte_window, self.byte_window_bytes),
        ]
    }
}

/// The registers that `umbra_page_fault` reads and changes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Trap {
    /// First argument of the interrupted function, if it was a check.
    pub rdi: u64,
    /// Second argument.
    pub rsi: u64,
    /// Frame pointer.
    pub rbp: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
}

/// Returns the CPU (bits 16..32) and the task (bits 32..64) that run now.
pub type CurrentFn = extern "C" fn() -> u64;

/// Returns memory from the quarantine to its allocator: start of the object, bytes of the slot, the
/// note of its free, and the allocator's context.
pub type ReleaseFn = extern "C" fn(u64, u64, u8, *mut c_void);
