//! The cost of a check without a guest, in nanoseconds: the models of `umbra-shadow`, and KASAN's
//! own check.
//!
//! Each check is a call for 8 valid bytes, as instrumented code makes it. The checked memory does
//! not exist, only its shadow. Addresses of a working set come in order or at random, so the shadow
//! of a large set comes from the cache that holds it. Times are CPU time, which is also right on a
//! host with other work.

pub mod instrumented;
pub mod kasan;
pub mod memory;
mod report;
pub mod rings;

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use criterion::{Criterion, SamplingMode};
use serde_json::Value;
use umbra_shadow::codes::{GRANULE, GRANULE_SHIFT, PAGE_BYTES, PAGE_SHIFT, PAGE_VALID};
use umbra_shadow::{Full, Shadow, TwoLevel};

use self::kasan::Kasan;
use self::memory::{HostMemory, Map};
use crate::clock::{CpuTime, thread_cpu};
pub use report::{measure, size};

/// Working sets, in bytes of checked memory.
pub const SETS: [u64; 8] =
    [32 << 10, 256 << 10, 2 << 20, 16 << 20, 128 << 20, 1 << 30, 4 << 30, 16 << 30];
/// The set that is also measured with the shadow in large pages.
pub const LARGE: u64 = 4 << 30;
/// Checks in one iteration.
const CHECKS: u64 = 4096;
const GROUP: &str = "checks";
/// Pairs of turns, and runs of [`CHECKS`] in a turn: for sets that fit the caches, and for others,
/// which must be loaded again after the other's turn.
const TURNS: (usize, usize) = (401, 16);
const FAR_TURNS: (usize, usize) = (51, 512);

/// Order of the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Each granule after the one before.
    Sequential,
    /// Any granule, independent of the one before.
    Random,
}

/// The check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// A call that only returns.
    Nothing,
    /// Two-level shadow, where pages are accessible as a whole.
    Untyped,
    /// Two-level shadow, where all pages are byte-checked.
    Bytes,
    /// Full shadow, by the same crate.
    Full,
    /// KASAN's.
    Kasan,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Nothing, Self::Untyped, Self::Bytes, Self::Full, Self::Kasan];

    /// Name in tables and plots.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "empty call",
            Self::Untyped => "two-level, untyped",
            Self::Bytes => "two-level, byte-checked",
            Self::Full => "full",
            Self::Kasan => "KASAN's check",
        }
    }
}

/// One measured value.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// The check.
    pub check: Check,
    /// The order of the addresses.
    pub pattern: Pattern,
    /// The working set, in bytes.
    pub set: u64,
    /// Whether the shadow is in large pages, if the kernel has them.
    pub huge: bool,
    /// Nanoseconds of one check, the median.
    pub ns: f64,
}

// Each check begins at a cache line, as in the guest runtime. Otherwise the alignment of such a
// short function would cost as much as an instruction.
std::arch::global_asm!(
    ".irp name, nothing, untyped, bytes, full, kasan",
    ".section .text.checks.\\name, \"ax\", @progbits",
    ".balign 64",
    ".endr",
    ".text",
);

/// The slow path, out of line as in a kernel: all of [`Shadow::check`].
#[cold]
#[inline(never)]
fn slow(model: &impl Shadow, addr: u64) -> bool {
    model.check(addr, 8).is_ok()
}

#[unsafe(link_section = ".text.checks.nothing")]
extern "C-unwind" fn nothing(_: &Checks, addr: u64) -> bool {
    black_box(addr) != u64::MAX
}

#[unsafe(link_section = ".text.checks.untyped")]
extern "C-unwind" fn untyped(checks: &Checks, addr: u64) -> bool {
    checks.untyped.passes_at_once(addr, 8) || slow(&checks.untyped, addr)
}

#[unsafe(link_section = ".text.checks.bytes")]
extern "C-unwind" fn bytes(checks: &Checks, addr: u64) -> bool {
    checks.bytes.passes_at_once(addr, 8) || slow(&checks.bytes, addr)
}

#[unsafe(link_section = ".text.checks.full")]
extern "C-unwind" fn full(checks: &Checks, addr: u64) -> bool {
    checks.full.passes_at_once(addr, 8) || slow(&checks.full, addr)
}

#[unsafe(link_section = ".text.checks.kasan")]
extern "C-unwind" fn kasan(checks: &Checks, addr: u64) -> bool {
    // SAFETY: `run` makes addresses inside the working set, which has shadow.
    unsafe { checks.kasan.load::<8>(addr) }
}

/// The shadow of a working set.
struct Shadows {
    valid: Map,
    bytes: Map,
    byte: Map,
}

impl Shadows {
    fn new(set: u64, huge: bool) -> Result<Self> {
        let map = |bytes, value| Map::new(bytes, value, huge).context("no host memory for shadow");
        Ok(Self {
            valid: map(set >> PAGE_SHIFT, PAGE_VALID)?,
            bytes: map(set >> PAGE_SHIFT, PAGE_BYTES)?,
            byte: map(set >> GRANULE_SHIFT, 0)?,
        })
    }
}

/// Host memory that a set's shadow needs, in bytes.
fn needed(set: u64) -> u64 {
    (set >> GRANULE_SHIFT) + 2 * (set >> PAGE_SHIFT)
}

/// Factors for pseudo-random addresses that do not depend on each other: multiples of the first,
/// folded and multiplied by the second (constants of SplitMix64).
pub const SCATTER: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9];
/// Factors for addresses in order.
pub const IN_ORDER: [u64; 2] = [GRANULE, 1];

/// Calls a function for [`CHECKS`] addresses. The loop is in assembly and begins at a cache line,
/// so it is the same for all checks. They are so short that a compiler's choices in the loop would
/// show.
macro_rules! calls {
    ($function:ident, $checks:expr, $next:expr, $step:expr) => {{
        let (checks, [step, factor]): (&Checks, [u64; 2]) = ($checks, $step);
        let fixed = [std::ptr::from_ref(checks).addr() as u64, step, factor];
        let mut left = CHECKS;
        // SAFETY: a C function with the arguments that it takes; what it may change is declared.
        unsafe {
            std::arch::asm!(
                ".p2align 6",
                "2:",
                "add r12, [r14 + 8]",
                "mov rsi, r12",
                "shr rsi, 32",
                "xor rsi, r12",
                "imul rsi, [r14 + 16]",
                "and rsi, r15",
                "mov rdi, [r14]",
                "call {}",
                "test al, al",
                "je 3f",
                "dec r13",
                "jnz 2b",
                "3:",
                sym $function,
                inout("r12") *$next,
                inout("r13") left,
                in("r14") &fixed,
                in("r15") (checks.set - 1) & !(GRANULE - 1),
                clobber_abi("C"),
            );
        }
        CHECKS - left
    }};
}

/// The checks over one working set.
struct Checks<'a> {
    untyped: TwoLevel<HostMemory<'a>>,
    bytes: TwoLevel<HostMemory<'a>>,
    full: Full<HostMemory<'a>>,
    kasan: Kasan<'a>,
    set: u64,
}

impl<'a> Checks<'a> {
    fn new(shadows: &'a Shadows, set: u64) -> Self {
        let byte = shadows.byte.bytes();
        Self {
            untyped: TwoLevel::new(HostMemory::new(shadows.valid.bytes(), byte, set)),
            bytes: TwoLevel::new(HostMemory::new(shadows.bytes.bytes(), byte, set)),
            full: Full::new(HostMemory::new(shadows.valid.bytes(), byte, set)),
            kasan: Kasan::new(byte),
            set,
        }
    }

    /// Checks [`CHECKS`] addresses from `next` on. Returns how many passed before one did not.
    #[inline(never)]
    fn run(&self, next: &mut u64, check: Check, pattern: Pattern) -> u64 {
        let step = match pattern {
            Pattern::Sequential => IN_ORDER,
            Pattern::Random => SCATTER,
        };
        match check {
            Check::Nothing => calls!(nothing, self, next, step),
            Check::Untyped => calls!(untyped, self, next, step),
            Check::Bytes => calls!(bytes, self, next, step),
            Check::Full => calls!(full, self, next, step),
            Check::Kasan => calls!(kasan, self, next, step),
        }
    }
}

/// The time of `check` divided by a full shadow's, at random over `set`: the median of many pairs
/// of short turns, since other work on the host slows both alike.
///
/// # Errors
/// The host does not give the memory.
pub fn ratio(check: Check, set: u64) -> Result<f64> {
    let shadows = Shadows::new(set, false)?;
    let (checks, mut next) = (Checks::new(&shadows, set), 0);
    let (pairs, times) = if set <= SETS[1] { TURNS } else { FAR_TURNS };
    let mut passed = 0;
    let mut turn = |check| {
        let begin = thread_cpu();
        for _ in 0..times {
            passed += checks.run(&mut next, check, Pattern::Random);
        }
        (thread_cpu() - begin).as_nanos() as f64
    };
    let mut ratios: Vec<_> = (0..pairs).map(|_| turn(check) / turn(Check::Full)).collect();
    // A check that fails takes the slow path.
    ensure!(passed == 2 * (pairs * times) as u64 * CHECKS, "some checks did not pass");
    ratios.sort_by(f64::total_cmp);
    ratios.get(pairs / 2).copied().context("no pairs")
}

/// Measures all sets that fit into `available` bytes of host memory. Criterion writes to `folder`.
///
/// # Errors
/// The host does not give the memory, or criterion's result cannot be read.
pub fn times(available: u64, folder: &Path) -> Result<Vec<Time>> {
    let folder = folder.join("criterion");
    let mut criterion = Criterion::default()
        .with_measurement(CpuTime)
        .without_plots()
        .output_directory(&folder)
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    let mut group = criterion.benchmark_group(GROUP);
    group.sampling_mode(SamplingMode::Flat);
    let mut times = Vec::new();
    let sets = SETS.iter().map(|set| (*set, false)).chain([(LARGE, true)]);
    for (set, huge) in sets.filter(|(set, _)| needed(*set) < available) {
        let shadows = Shadows::new(set, huge)?;
        for pattern in [Pattern::Random, Pattern::Sequential] {
            for check in Check::ALL {
                let name = format!(
                    "{check:?}-{pattern:?}-{}K{}",
                    set >> 10,
                    if huge { "-huge" } else { "" }
                );
                let (checks, mut next) = (Checks::new(&shadows, set), 0);
                group.bench_function(&name, |b| b.iter(|| checks.run(&mut next, check, pattern)));
                let ns = median(&folder.join(GROUP).join(&name))? / CHECKS as f64;
                times.push(Time { check, pattern, set, huge, ns });
            }
        }
    }
    group.finish();
    Ok(times)
}

/// The median of a benchmark, in nanoseconds, from the files of criterion.
fn median(folder: &Path) -> Result<f64> {
    let file = folder.join("new/estimates.json");
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let value: Value =
        serde_json::from_slice(&text).context("criterion's estimates are not JSON")?;
    value["median"]["point_estimate"].as_f64().context("criterion's estimates have no median")
}
