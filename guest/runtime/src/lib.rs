//! Umbra's guest runtime: the part inside the guest kernel, behind a C ABI.
//!
//! It has the `__asan_*` entry points of `-fsanitize=kernel-address` (outline), the checked memory
//! functions, the functions for allocators, and the calls to the VMM. Kernels in any language use
//! this one implementation: `guest/rust` and `guest/c` have the bindings.
//!
//! All of it is compiled *without* the sanitizer, with its own `core`, and linked into one
//! relocatable object in which only the C entry points stay global. Otherwise a check would call
//! instrumented helpers, and recurse.
//!
//! Until [`api::umbra_activate`] every check is a single `ret`. So instrumented code may run before
//! the shadow windows are mapped, and on machines without Umbra.
#![no_std]

pub mod api;
pub mod asan;
pub mod checks;
pub mod cpu;
pub mod entries;
mod groups;
pub mod host;
pub mod memfn;
pub mod object;
pub mod quarantine;
pub mod released;
pub mod ring;
pub mod settings;
pub mod shadow;
pub mod stack;
mod stamp;
pub mod state;
pub mod tables;

/// Whether this is the runtime of kernels whose compiler checks inline.
pub const INLINE: bool = cfg!(feature = "inline");

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // The runtime cannot print. Nothing in it should panic; if it does, the guest ends visibly.
    host::exit(umbra_shadow::abi::ExitReason::Panic, 0, 0, 0)
}
