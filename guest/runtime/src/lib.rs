//! Umbra's guest runtime: what runs inside the guest kernel, behind a C ABI.
//!
//! It holds the `__asan_*` entry points that compilers emit for `-fsanitize=kernel-address`
//! (outline), the checked memory functions, the calls by which allocators say what they do, and the
//! way to the VMM. There is one implementation for kernels in any language: `guest/rust` and
//! `guest/c` are faces of it.
//!
//! The whole of it is compiled *without* the sanitizer, with a `core` of its own, and linked into
//! one relocatable object in which only the C entry points stay global. Otherwise a check would
//! call instrumented helpers, and recurse.
//!
//! Until [`api::umbra_activate`] every check is a single `ret`, so instrumented code may run before
//! the shadow windows are mapped, and on a machine without Umbra underneath for as long as it
//! likes.
#![no_std]

pub mod api;
pub mod asan;
pub mod checks;
pub mod cpu;
pub mod host;
pub mod memfn;
pub mod object;
pub mod quarantine;
pub mod released;
pub mod ring;
pub mod settings;
pub mod shadow;
pub mod stack;
pub mod state;

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // The runtime has no way to print. Nothing in it is meant to panic; if it does, the guest ends
    // visibly.
    host::exit(umbra_shadow::abi::ExitReason::Panic, 0, 0, 0)
}
