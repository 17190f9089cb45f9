//! What a check costs without a guest, in nanoseconds: the models of `umbra-shadow`, and KASAN's own check beside them.
//!
//! Each check is a call, as instrumented code makes it, for 8 bytes of memory that is valid. What is checked does not exist, only
//! its shadow does. Working sets are walked through, or addresses in them picked at random, so that a large set's shadow is met in the
//! cache that it fits. Times are a CPU's, because they are also right on a host that has other work.

pub mod kasan;
pub mod memory;
mod report;

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use criterion::{Criterion, SamplingMode};
use serde_json::Value;
use umbra_shadow::codes::{GRANULE, GRANULE_SHIFT, PAGE_BYTES, PAGE_SHIFT, PAGE_VALID};
use umbra_shadow::{Full, Shadow, TwoLevel};

use self::kasan::Kasan;
use self::memory::{HostMemory, Map};
use crate::clock::{CpuTime, thread_cpu};
pub use report::{measure, size};

/// Working sets, in bytes of checked memory.
pub const SETS: [u64; 8] = [32 << 10, 256 << 10, 2 << 20, 16 << 20, 128 << 20, 1 << 30, 4 << 30, 16 << 30];
/// The set that is also measured with large pages behind the shadow.
pub const LARGE: u64 = 4 << 30;
/// Checks in one iteration.
const CHECKS: u64 = 4096;
const GROUP: &str = "checks";
/// Pairs of turns, and runs of [`CHECKS`] in a turn: for sets that the caches hold, and for others, which have to be in them again
/// after the other's turn.
const TURNS: (usize, usize) = (401, 16);
const FAR_TURNS: (usize, usize) = (51, 512);

/// How a working set is gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Each granule after the one before.
    Sequential,
    /// Any granule, independent of the one before.
    Random,
}

/// What checks.
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

    /// As tables and plots have it.
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
    /// What checked.
    pub check: Check,
    /// How.
    pub pattern: Pattern,
    /// The working set, in bytes.
    pub set: u64,
    /// Whether large pages were asked for behind the shadow.
    pub huge: bool,
    /// Nanoseconds of one check, the median.
    pub ns: f64,
}

#[inline(never)]
fn nothing(addr: u64) -> bool {
    black_box(addr) != u64::MAX
}

#[inline(never)]
fn two_level(model: &TwoLevel<HostMemory<'_>>, addr: u64) -> bool {
    model.check(addr, 8).is_ok()
}

#[inline(never)]
fn full(model: &Full<HostMemory<'_>>, addr: u64) -> bool {
    model.check(addr, 8).is_ok()
}

#[inline(never)]
fn kasan(shadow: &Kasan<'_>, addr: u64) -> bool {
    // SAFETY: `run` makes addresses inside the working set, which has shadow.
    unsafe { shadow.load::<8>(addr) }
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

/// Checks `CHECKS` addresses from the `next`th on; how many passed.
#[inline(always)]
fn run(next: &mut u64, set: u64, pattern: Pattern, check: impl Fn(u64) -> bool) -> u64 {
    let mask = (set - 1) & !(GRANULE - 1);
    let first = *next;
    *next = first.wrapping_add(CHECKS);
    let numbers = first..first + CHECKS;
    match pattern {
        Pattern::Sequential => numbers.filter(|i| check((i << GRANULE_SHIFT) & mask)).count() as u64,
        Pattern::Random => numbers.filter(|i| check(scatter(*i) & mask)).count() as u64,
    }
}

/// A number that looks random, and does not wait for the one before it (the end of SplitMix64's way to make one).
#[inline(always)]
fn scatter(i: u64) -> u64 {
    let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

/// The checks over one working set.
struct Checks<'a> {
    untyped: TwoLevel<HostMemory<'a>>,
    bytes: TwoLevel<HostMemory<'a>>,
    full: Full<HostMemory<'a>>,
    kasan: Kasan<'a>,
    set: u64,
    next: u64,
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
            next: 0,
        }
    }

    /// [`CHECKS`] of them.
    #[inline(always)]
    fn run(&mut self, check: Check, pattern: Pattern) -> u64 {
        let Self { untyped, bytes, full: whole, kasan: linux, set, next } = self;
        match check {
            Check::Nothing => run(next, *set, pattern, nothing),
            Check::Untyped => run(next, *set, pattern, |at| two_level(untyped, at)),
            Check::Bytes => run(next, *set, pattern, |at| two_level(bytes, at)),
            Check::Full => run(next, *set, pattern, |at| full(whole, at)),
            Check::Kasan => run(next, *set, pattern, |at| kasan(linux, at)),
        }
    }
}

/// The time of `check` to that of a full shadow, at random over `set`: the median of many pairs of short turns, because other work on
/// the host then slows both alike.
///
/// # Errors
/// The host does not give the memory.
pub fn ratio(check: Check, set: u64) -> Result<f64> {
    let shadows = Shadows::new(set, false)?;
    let mut checks = Checks::new(&shadows, set);
    let (pairs, times) = if set <= SETS[1] { TURNS } else { FAR_TURNS };
    let mut turn = |check| {
        let begin = thread_cpu();
        for _ in 0..times {
            black_box(checks.run(check, Pattern::Random));
        }
        (thread_cpu() - begin).as_nanos() as f64
    };
    let mut ratios: Vec<_> = (0..pairs).map(|_| turn(check) / turn(Check::Full)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(pairs / 2).copied().context("no pairs")
}

/// Measures all sets for which `available` bytes of host memory are enough. Criterion's files go to `folder`.
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
                let name = format!("{check:?}-{pattern:?}-{}K{}", set >> 10, if huge { "-huge" } else { "" });
                let mut checks = Checks::new(&shadows, set);
                group.bench_function(&name, |b| b.iter(|| checks.run(check, pattern)));
                let ns = median(&folder.join(GROUP).join(&name))? / CHECKS as f64;
                times.push(Time { check, pattern, set, huge, ns });
            }
        }
    }
    group.finish();
    Ok(times)
}

/// The median of a benchmark, in nanoseconds, as criterion has written it.
fn median(folder: &Path) -> Result<f64> {
    let file = folder.join("new/estimates.json");
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let value: Value = serde_json::from_slice(&text).context("criterion's estimates are not JSON")?;
    value["median"]["point_estimate"].as_f64().context("criterion's estimates have no median")
}
