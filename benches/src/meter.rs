//! Counts what one round of a `bench=` word of the test kernel costs.

use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use umbra::kernel::irqchip;
use umbra::machine::Kvm;
use umbra::machine::stats::{Counters, emulates_ring0};
use umbra::provenance::{Objects, QuarantineSize};
use umbra::report::{Finding, Findings};
use umbra::sandbox::{self, Config, Distinct, Observer, Outcome, ShadowMode};
use umbra::shadow::Notify;

/// Time limit of a guest.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Each word runs with both numbers of rounds; the cost is the difference.
const ROUNDS: [u64; 2] = [100, 300];
/// Rounds where time is measured, on a CPU that executes the guest itself.
const CLOCK_ROUNDS: u64 = 2_000_000;
/// Tries where time is measured.
const CLOCK_TRIES: usize = 3;
/// Most words in one command line.
const BATCH: usize = 16;

/// How the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Which shadow.
    pub shadow: ShadowMode,
    /// Who writes it.
    pub notify: Notify,
    /// Size of the quarantine.
    pub quarantine: QuarantineSize,
}

impl Mode {
    /// Two-level shadow, written by the guest.
    pub const RING: Self = Self::new(ShadowMode::PerPage, Notify::Ring);
    /// Two-level shadow, written by the VMM.
    pub const SYNC: Self = Self::new(ShadowMode::PerPage, Notify::Sync);
    /// Full shadow.
    pub const FULL: Self = Self::new(ShadowMode::Full, Notify::Ring);
    /// Full shadow, written by the VMM.
    pub const FULL_SYNC: Self = Self::new(ShadowMode::Full, Notify::Sync);
    /// No shadow.
    pub const OFF: Self = Self::new(ShadowMode::Off, Notify::Ring);

    const fn new(shadow: ShadowMode, notify: Notify) -> Self {
        Self { shadow, notify, quarantine: QuarantineSize::Auto }
    }
}

/// A `bench=` word without its number of rounds.
#[derive(Clone, Debug)]
pub struct Word {
    what: &'static str,
    arguments: String,
}

impl Word {
    /// `bench=WHAT:(rounds):ARGUMENTS`.
    pub fn new(what: &'static str, arguments: impl Into<String>) -> Self {
        Self { what, arguments: arguments.into() }
    }

    fn with(&self, rounds: u64) -> String {
        format!("bench={}:{rounds}:{}", self.what, self.arguments)
    }
}

/// The result of a run.
pub struct Run {
    /// Its figures.
    pub stats: sandbox::stats::Stats,
    /// Its findings.
    pub findings: Findings,
    /// The cost between each pair of lines `bench begin` and `bench end`.
    pub between: Vec<Between>,
    /// The table of the guest's objects at the end.
    pub objects: Objects,
}

/// The cost between two lines.
#[derive(Clone, Copy, Debug)]
pub struct Between {
    /// Time.
    pub time: Duration,
    /// Instructions; 0 where they are not counted.
    pub instructions: u64,
}

/// Reads the clock and the counter when the lines around a benchmark arrive. Every other line of
/// the test kernel is a complaint.
struct Marks {
    line: Vec<u8>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    counters: Option<Arc<Counters>>,
    begin: Option<(Instant, u64)>,
    between: Vec<Between>,
    complaints: String,
}

/// Keeps the counters.
struct Starts(Arc<Mutex<Seen>>);

impl Observer for Starts {
    fn finding(&mut self, _: &Finding) {}

    fn starts(&mut self, counters: Option<Arc<Counters>>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).counters = counters;
    }
}

impl Seen {
    fn line(&mut self, line: &[u8], now: Instant) {
        let count = self.counters.as_ref().and_then(|c| c.instructions_emulated()).unwrap_or(0);
        match line {
            b"bench begin" => self.begin = Some((now, count)),
            b"bench end" => {
                if let Some((begin, before)) = self.begin.take() {
                    let instructions = count.saturating_sub(before);
                    self.between.push(Between { time: now - begin, instructions });
                }
            }
            line if line.starts_with(b"ran ") => {}
            line => {
                self.complaints.push_str(&String::from_utf8_lossy(line));
                self.complaints.push('\n');
            }
        }
    }
}

impl Write for Marks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        for &byte in bytes {
            if byte == b'\n' {
                self.seen
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .line(self.line.trim_ascii(), now);
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Boots the test kernel and counts.
pub struct Meter {
    kernel: Arc<[u8]>,
    counts: bool,
    clock_rounds: u64,
    tick: Box<dyn Fn(&str)>,
}

impl Meter {
    /// A meter for `kernel`. It calls `tick` before each guest. With `clock`, it measures as on a
    /// host that does not count instructions, in that many rounds.
    ///
    /// # Errors
    /// There is no KVM, or it does not run a probe guest.
    pub fn new(kernel: Arc<[u8]>, clock: Option<u64>, tick: Box<dyn Fn(&str)>) -> Result<Self> {
        let kvm = Kvm::open()?;
        let counts =
            clock.is_none() && emulates_ring0(&kvm).context("the probe guest did not run")?;
        Ok(Self { kernel, counts, clock_rounds: clock.unwrap_or(CLOCK_ROUNDS), tick })
    }

    /// Whether guest instructions are counted. If not, costs are in nanoseconds.
    pub fn counts(&self) -> bool {
        self.counts
    }

    /// The unit of [`Meter::cost`].
    pub fn unit(&self) -> &'static str {
        if self.counts { "instructions" } else { "ns" }
    }

    /// Runs the test kernel to its regular end, in 256 MiB.
    ///
    /// # Errors
    /// The run did not begin, or ended in another way, or the kernel complained.
    pub fn run(&self, mode: Mode, cmdline: &str) -> Result<Run> {
        self.run_with(mode, cmdline, None)
    }

    /// [`Meter::run`] with a file for the kernel.
    ///
    /// # Errors
    /// As [`Meter::run`].
    pub fn run_with(&self, mode: Mode, cmdline: &str, initrd: Option<Arc<[u8]>>) -> Result<Run> {
        (self.tick)(cmdline);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let marks = Marks { line: Vec::new(), seen: seen.clone() };
        let config = Config {
            kernel: self.kernel.clone().into(),
            irqchip: irqchip(1),
            initrd: initrd.map(Into::into),
            cmdline: cmdline.to_owned(),
            memory: 256 << 20,
            shadow: mode.shadow,
            notify: mode.notify,
            quarantine: mode.quarantine,
            timeout: Some(TIMEOUT),
            // As many as the scenarios expect.
            distinct: Distinct::Places,
            count_instructions: self.counts,
            ..Config::default()
        };
        let report = sandbox::run(
            &config,
            Box::new(marks),
            Box::new(Starts(seen.clone())),
            &AtomicBool::new(false),
        )?;
        let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        ensure!(
            matches!(report.outcome, Outcome::Done) && seen.complaints.is_empty(),
            "the test kernel did not do `{cmdline}`: {} {}",
            report.outcome,
            seen.complaints.trim_end(),
        );
        Ok(Run {
            stats: report.stats,
            findings: report.findings,
            between: seen.between,
            objects: report.objects,
        })
    }

    /// [`Meter::run`] with benchmarks and no scenario. A finding is an error.
    fn bench(&self, mode: Mode, words: &[String]) -> Result<Run> {
        let run = self.run(mode, &format!("scenarios=- {}", words.join(" ")))?;
        ensure!(run.findings.is_empty(), "there were findings in {}", words.join(" "));
        Ok(run)
    }

    /// The cost of one round of each word, with the loop and the call: exact instructions, or else
    /// nanoseconds of wall-clock time.
    ///
    /// # Errors
    /// As [`Meter::run`].
    pub fn cost(&self, mode: Mode, words: &[Word]) -> Result<Vec<f64>> {
        if !self.counts {
            return words.iter().map(|word| self.clock(mode, word, self.clock_rounds)).collect();
        }
        let [low, high] = ROUNDS;
        let mut costs = Vec::with_capacity(words.len());
        for batch in words.chunks(BATCH) {
            let line: Vec<_> =
                batch.iter().flat_map(|word| ROUNDS.map(|rounds| word.with(rounds))).collect();
            let between = self.bench(mode, &line)?.between;
            ensure!(between.len() == line.len(), "some of these did not run: {}", line.join(" "));
            costs.extend(between.chunks(2).map(|pair| {
                (pair[1].instructions as f64 - pair[0].instructions as f64) / (high - low) as f64
            }));
        }
        Ok(costs)
    }

    /// [`Meter::cost`] of a word whose first rounds cost something else: the difference of two
    /// numbers of rounds, each in a fresh guest.
    ///
    /// # Errors
    /// As [`Meter::run`].
    pub fn later_cost(&self, mode: Mode, word: &Word, [low, high]: [u64; 2]) -> Result<f64> {
        if !self.counts {
            return self.clock(mode, word, self.clock_rounds);
        }
        let instructions = |rounds| {
            let run = self.bench(mode, &[word.with(rounds)])?;
            Ok::<_, anyhow::Error>(
                run.between.first().context("the benchmark did not run")?.instructions as f64,
            )
        };
        Ok((instructions(high)? - instructions(low)?) / (high - low) as f64)
    }

    /// Nanoseconds of wall-clock time for one round: the least of several tries.
    ///
    /// # Errors
    /// As [`Meter::run`].
    pub fn clock(&self, mode: Mode, word: &Word, rounds: u64) -> Result<f64> {
        let mut least = Duration::MAX;
        for _ in 0..CLOCK_TRIES {
            let run = self.bench(mode, &[word.with(rounds)])?;
            least = least.min(run.between.first().context("the benchmark did not run")?.time);
        }
        Ok(least.as_nanos() as f64 / rounds as f64)
    }

    /// Exits of each round of a word, hypercalls and others: the difference of two runs.
    ///
    /// # Errors
    /// As [`Meter::run`].
    pub fn exits(&self, mode: Mode, word: &Word) -> Result<f64> {
        let [low, high] = ROUNDS;
        let exits = |rounds| {
            Ok::<_, anyhow::Error>(self.bench(mode, &[word.with(rounds)])?.stats.exits.total)
        };
        Ok((exits(high)? as f64 - exits(low)? as f64) / (high - low) as f64)
    }
}
