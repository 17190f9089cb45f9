//! Wall-clock time and CPU time. Other work on the host does not lengthen CPU time.

use std::ops::{Add, Sub};
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};

/// CPU time of this thread.
pub fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a value of this type. This clock always exists on Linux; if not,
    // the time stays 0.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Time that something took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Wall-clock time.
    pub clock: Duration,
    /// CPU time of this thread.
    pub cpu: Duration,
}

impl Add for Spent {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { clock: self.clock + other.clock, cpu: self.cpu + other.cpu }
    }
}

impl Sub for Spent {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            clock: self.clock.saturating_sub(other.clock),
            cpu: self.cpu.saturating_sub(other.cpu),
        }
    }
}

/// When something began.
pub struct Moment {
    clock: Instant,
    cpu: Duration,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self { clock: Instant::now(), cpu: thread_cpu() }
    }

    /// Time since then.
    pub fn elapsed(&self) -> Spent {
        Spent { clock: self.clock.elapsed(), cpu: thread_cpu().saturating_sub(self.cpu) }
    }
}

/// Makes criterion measure CPU time.
pub struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        thread_cpu()
    }

    fn end(&self, start: Duration) -> Duration {
        thread_cpu().saturating_sub(start)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        const WALL: &WallTime = &WallTime;
        WALL.formatter()
    }
}
