//! The runtime's C functions; `guest/runtime/src/api.rs` documents them.

use core::ffi::c_void;

use umbra_shadow::abi::RingHeader;

/// What the VMM offers, for the kernel to map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Offer {
    /// Bits of [`umbra_shadow::abi::features`]; 0 without shadow.
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
    /// Bytes of virtual memory that [`crate::add_virtual`] has shadow for.
    pub virtual_bytes: u64,
}

/// The registers that [`crate::page_fault`] reads and changes.
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

/// Tells CPU (bits 16..32) and task (bits 32..64) that run now.
pub type CurrentFn = extern "C" fn() -> u64;

/// Gives memory that has left the quarantine back to its allocator: start of the object, bytes of
/// the slot, the note of its free, and the allocator's context.
pub type ReleaseFn = extern "C" fn(u64, u64, u8, *mut c_void);

unsafe extern "C" {
    pub fn umbra_discover(offer: &mut Offer) -> u32;
    pub fn umbra_region_add(start: u64, bytes: u64, gpa: u64) -> bool;
    pub fn umbra_virtual_add(start: u64, bytes: u64) -> u64;
    pub fn umbra_ring_setup(cpu: u64, memory: *mut RingHeader, bytes: u64, text_start: u64)
    -> bool;
    pub fn umbra_activate(features: u32, text_end: u64, current: Option<CurrentFn>);
    pub fn umbra_poison(address: u64, bytes: u64, code: u8);
    pub fn umbra_unpoison(address: u64, bytes: u64);
    pub fn umbra_check(address: u64, bytes: u64, write: bool) -> bool;
    pub fn umbra_is_poisoned(address: u64) -> bool;
    pub fn umbra_alloc(address: u64, bytes: u64, slot: u64, redzone: u8, cache: u16);
    pub fn umbra_free(address: u64, start: u64, slot: u64, code: u8) -> bool;
    pub fn umbra_free_later(
        address: u64,
        start: u64,
        slot: u64,
        code: u8,
        allocator: u8,
        note: u8,
    ) -> bool;
    pub fn umbra_quarantine_add(release: ReleaseFn, context: *mut c_void) -> u8;
    pub fn umbra_quarantine_drain() -> u64;
    pub fn umbra_redzone(object: u64) -> u64;
    pub fn umbra_aux_stack(address: u64);
    pub fn umbra_invalid_free(address: u64);
    pub fn umbra_stack_alloc(start: u64, bytes: u64);
    pub fn umbra_stack_free(start: u64, bytes: u64);
    pub fn umbra_name_cache(id: u16, name: *const u8, len: u64, object: u64);
    pub fn umbra_name_task(id: u32, name: *const u8, len: u64);
    pub fn umbra_suppress_begin();
    pub fn umbra_suppress_end();
    pub fn umbra_violations() -> u64;
    pub fn umbra_report(address: u64, bytes: u64, write: bool, trap: &Trap);
    pub fn umbra_page_fault(trap: &mut Trap) -> bool;
    pub fn umbra_exit(code: u64) -> !;
    pub fn umbra_exit_panic() -> !;
    pub fn umbra_exit_fault(vector: u32, error: u32, rip: u64, address: u64) -> !;
}
