//! Fuzzers of what a hostile guest, or a hostile file, can reach.
//!
//! Each target is a function of bytes: it makes something of them, passes it to the same entry
//! point that Umbra uses, and checks what has to hold whatever the bytes are. libFuzzer looks for
//! bytes that reach new code (`cargo xtask fuzz`); ordinary tests (`tests/seeds.rs`) run the same
//! functions on the seeds and on what was found before. docs/fuzzing.md tells more.

pub mod answers;
pub mod completion;
mod cpu;
pub mod exits;
mod guest;
mod host_cpu;
pub mod hypercalls;
pub mod loader;
mod memslots;
pub mod symbols;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[cfg(feature = "libfuzzer")]
#[doc(hidden)]
pub use libfuzzer_sys;

/// A target: the name of its fuzzer, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 6] = [
    ("hypercalls", hypercalls::run),
    ("exits", exits::run),
    ("completion", completion::run),
    ("loader", loader::run),
    ("symbols", symbols::run),
    ("answers", answers::run),
];

/// Requests so far: calls, exits, instructions, files or lookups, by the target.
static REQUESTS: AtomicU64 = AtomicU64::new(0);
/// The most CPU time of one request, in nanoseconds.
static SLOWEST: AtomicU64 = AtomicU64::new(0);

/// Carries out a request, and counts it.
pub(crate) fn request<T>(work: impl FnOnce() -> T) -> T {
    let begin = cpu_time();
    let result = work();
    SLOWEST.fetch_max(cpu_time().saturating_sub(begin), Relaxed);
    REQUESTS.fetch_add(1, Relaxed);
    result
}

/// The CPU time of this thread, in nanoseconds.
fn cpu_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}

/// Makes a fuzzer print at its end how many requests there were.
pub fn count_requests() {
    extern "C" fn print() {
        let (requests, slowest) = (REQUESTS.load(Relaxed), SLOWEST.load(Relaxed) / 1000);
        eprintln!("requests: {requests}, slowest: {slowest} us of CPU time");
    }
    // SAFETY: the function may be called at any time. Without room for it nothing is printed.
    unsafe { libc::atexit(print) };
}

/// The `main` of a target's fuzzer.
#[macro_export]
macro_rules! fuzzer {
    ($target:ident) => {
        $crate::libfuzzer_sys::fuzz_target!(
            init: $crate::count_requests(),
            |data: &[u8]| $crate::$target::run(data)
        );
    };
}
