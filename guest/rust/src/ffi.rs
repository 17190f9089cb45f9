//! The runtime's C functions; `guest/runtime/src/api.rs` documents them.

use core::ffi::c_void;

use umbra_shadow::abi::RingHeader;
use umbra_shadow::runtime::{CurrentFn, ForgetFn, Offer, ReleaseFn, Trap};

unsafe extern "C" {
    pub fn umbra_discover(offer: &mut Offer) -> u32;
    pub fn umbra_region_add(start: u64, bytes: u64, gpa: u64) -> bool;
    pub fn umbra_virtual_add(start: u64, bytes: u64) -> u64;
    pub fn umbra_ring_setup(cpu: u64, memory: *mut RingHeader, bytes: u64, text_start: u64)
    -> bool;
    pub fn umbra_activate(features: u32, text_end: u64, current: Option<CurrentFn>) -> bool;
    pub fn umbra_tick();
    pub fn umbra_on_forget(call: ForgetFn);
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
    pub fn umbra_page_fault_entry();
    pub fn umbra_double_fault_entry();
    pub fn umbra_exit(code: u64) -> !;
    pub fn umbra_exit_panic() -> !;
    pub fn umbra_exit_fault(vector: u32, error: u32, rip: u64, address: u64) -> !;
}
