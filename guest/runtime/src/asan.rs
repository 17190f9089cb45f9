//! The other entry points for `-fsanitize=kernel-address`: globals, stack frames, `alloca`, scopes.
//!
//! Names and meaning are LLVM's and gcc's
//! (`llvm/lib/Transforms/Instrumentation/AddressSanitizer.cpp`); the redzones of `alloca` are those
//! of `mm/kasan/generic.c`.

use umbra_shadow::abi::check_shadow::CHECK_OFFSET;
use umbra_shadow::abi::{CallNumber, Features, Global};
use umbra_shadow::codes;
use umbra_shadow::memory::ShadowMemory;

use crate::stack::frame_pointer;
use crate::{INLINE, host, shadow, state};

/// Poisons the redzones behind globals.
///
/// # Safety
/// `globals` points to `n` descriptors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __asan_register_globals(globals: *const Global, n: u64) {
    if state::mode() != Features::default() {
        host::hypercall(CallNumber::Globals, globals as u64, n, 0, 0);
    }
    for i in 0..n as usize {
        // SAFETY: the caller's promise; the compiler's constructors make the call.
        let global = unsafe { &*globals.add(i) };
        let (start, size) = (global.start, global.size);
        shadow::poison(
            start + size,
            global.size_with_redzone.saturating_sub(size),
            codes::GLOBAL_REDZONE,
        );
    }
}

/// Unpoisons the redzones of globals (a module is unloaded).
///
/// # Safety
/// As [`__asan_register_globals`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __asan_unregister_globals(globals: *const Global, n: u64) {
    for i in 0..n as usize {
        // SAFETY: the caller's promise.
        let global = unsafe { &*globals.add(i) };
        shadow::unpoison(global.start, global.size_with_redzone);
    }
}

/// Most frames that are unpoisoned at once, and most bytes of stack.
const LEFT_FRAMES: usize = 256;
const LEFT_BYTES: u64 = 1 << 20;

/// Called before a function that does not return. The frames on the stack may never return, and
/// other code may use their memory without knowing of their redzones. So this unpoisons all frames
/// that the chain of frame pointers leads to. (In Linux, the code that frees the stack does this.)
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn __asan_handle_no_return() {
    if state::mode() == Features::default() {
        return;
    }
    let start = frame_pointer();
    let mut top = start;
    for _ in 0..LEFT_FRAMES {
        // SAFETY: the first is this function's own frame, all others are in regions, which are
        // mapped; any value will do.
        let next = unsafe { (top as *const u64).read_volatile() };
        let rises = next > top && next - start < LEFT_BYTES && next.is_multiple_of(8);
        if !rises || state::place(next, next.wrapping_add(15)).is_none() {
            break;
        }
        top = next;
    }
    shadow::set_on_stack(start, (top - start) / codes::GRANULE, 0);
}

/// The constructors of a C++ file's globals begin. Their order is not checked.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_before_dynamic_init(_module: *const u8) {}

/// The constructors of a C++ file's globals have ended.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_after_dynamic_init() {}

/// Marks a variable whose scope has ended.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_poison_stack_memory(address: u64, size: u64) {
    shadow::set_on_stack(address, size.div_ceil(codes::GRANULE), codes::USE_AFTER_SCOPE);
}

/// Marks a variable whose scope begins.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_unpoison_stack_memory(address: u64, size: u64) {
    unpoison_on_stack(address, size);
}

/// Makes `size` bytes of a stack valid, and the bytes behind them in their last granule invalid.
fn unpoison_on_stack(address: u64, size: u64) {
    let (granules, rest) = (size / codes::GRANULE, size % codes::GRANULE);
    shadow::set_on_stack(address, granules, 0);
    if rest != 0 {
        shadow::set_on_stack(address + granules * codes::GRANULE, 1, rest as u8);
    }
}

const ALLOCA_REDZONE: u64 = 32;

/// Poisons the redzones around an `alloca` region.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_alloca_poison(address: u64, size: u64) {
    let granules = size.div_ceil(codes::GRANULE);
    let right =
        size.div_ceil(ALLOCA_REDZONE) * ALLOCA_REDZONE + ALLOCA_REDZONE - granules * codes::GRANULE;
    unpoison_on_stack(address, size);
    let left = address.wrapping_sub(ALLOCA_REDZONE);
    shadow::set_on_stack(left, ALLOCA_REDZONE / codes::GRANULE, codes::ALLOCA_LEFT);
    let end = address.wrapping_add(granules * codes::GRANULE);
    shadow::set_on_stack(end, right / codes::GRANULE, codes::ALLOCA_RIGHT);
}

/// Unpoisons all `alloca` regions between two stack addresses.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_allocas_unpoison(top: u64, bottom: u64) {
    if top != 0 && top <= bottom {
        shadow::set_on_stack(top, (bottom - top).div_ceil(codes::GRANULE), 0);
    }
}

/// Stores stack shadow for the compiler: `n` bytes of shadow at `at` become `value`.
#[inline(always)]
fn set_shadow(at: u64, n: u64, value: u8) {
    if n == 0 || state::mode() == Features::default() {
        return;
    }
    let offset = if INLINE { CHECK_OFFSET } else { 0 };
    let address = at.wrapping_sub(offset) << codes::GRANULE_SHIFT;
    if state::mode().has(Features::RING) {
        // Stacks are byte-checked from their creation, so this is real shadow.
        if let Some(place) = state::place(address, address + n * codes::GRANULE - 1) {
            shadow::Windows.set_bytes(place, n, value);
        }
    } else {
        shadow::set_on_stack(address, n, value);
    }
}

macro_rules! set_shadow {
    ($($name:ident = $value:literal),* $(,)?) => {$(
        #[doc = concat!("Sets `n` bytes of stack shadow to ", stringify!($value), ".")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(at: u64, n: u64) {
            set_shadow(at, n, $value);
        }
    )*};
}

set_shadow! {
    __asan_set_shadow_00 = 0x00,
    __asan_set_shadow_01 = 0x01,
    __asan_set_shadow_02 = 0x02,
    __asan_set_shadow_03 = 0x03,
    __asan_set_shadow_04 = 0x04,
    __asan_set_shadow_05 = 0x05,
    __asan_set_shadow_06 = 0x06,
    __asan_set_shadow_07 = 0x07,
    __asan_set_shadow_f1 = 0xf1,
    __asan_set_shadow_f2 = 0xf2,
    __asan_set_shadow_f3 = 0xf3,
    __asan_set_shadow_f5 = 0xf5,
    __asan_set_shadow_f8 = 0xf8,
}
