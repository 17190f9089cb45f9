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
pub mod inputs;
pub mod loader;
mod memslots;
pub mod symbols;

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

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
/// Whether the time of requests is taken, which costs more than some of them.
static MEASURED: AtomicBool = AtomicBool::new(false);
/// The most CPU time of one request, in nanoseconds.
static SLOWEST: AtomicU64 = AtomicU64::new(0);

/// Prints what the bytes of an input mean, if the environment has `UMBRA_FUZZ_SHOW`.
pub(crate) fn show(part: &dyn std::fmt::Debug) {
    static SHOWN: LazyLock<bool> = LazyLock::new(|| std::env::var_os("UMBRA_FUZZ_SHOW").is_some());
    if *SHOWN {
        eprintln!("{part:x?}");
    }
}

/// Carries out a request, and counts it.
pub(crate) fn request<T>(work: impl FnOnce() -> T) -> T {
    REQUESTS.fetch_add(1, Relaxed);
    if !MEASURED.load(Relaxed) {
        return work();
    }
    let begin = cpu_time();
    let result = work();
    let time = cpu_time().saturating_sub(begin);
    SLOWEST.fetch_max(time, Relaxed);
    show(&format_args!("{time} ns"));
    result
}

/// Requests of all inputs so far.
pub fn requests() -> u64 {
    REQUESTS.load(Relaxed)
}

/// The CPU time of the most expensive request while a target takes an input, in nanoseconds.
pub fn slowest(target: fn(&[u8]), data: &[u8]) -> u64 {
    MEASURED.store(true, Relaxed);
    SLOWEST.store(0, Relaxed);
    target(data);
    SLOWEST.load(Relaxed)
}

/// The CPU time of this thread, in nanoseconds.
fn cpu_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}

/// Makes a fuzzer print at its end how many requests there were.
pub fn count_requests() {
    extern "C" fn print() {
        eprintln!("requests: {}", REQUESTS.load(Relaxed));
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
