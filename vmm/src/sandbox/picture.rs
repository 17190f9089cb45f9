//! Collects data for the page about a run: the shadow's memory over time, and the end of the
//! console. Only on request, and in bounded memory.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use umbra_report::Sample;

use crate::shadow::Windows;

/// Most cells of the page map.
pub(super) const CELLS: usize = 8192;
/// Most samples that are kept.
const SAMPLES: usize = 512;
/// Time between two samples at first.
const FIRST_GAP: Duration = Duration::from_micros(100);
/// Pause after a sample, as a multiple of the time it took: sampling costs a hundredth at most.
const REST: u32 = 100;
/// Bytes of the console that are kept.
const CONSOLE: usize = 32 << 10;

/// Samples of a run of any length: whenever there are too many, every other one is dropped.
#[derive(Debug)]
pub(super) struct Timeline {
    samples: Vec<Sample>,
    start: Option<Instant>,
    next: Option<Instant>,
    gap: Duration,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { samples: Vec::new(), start: None, next: None, gap: FIRST_GAP }
    }
}

impl Timeline {
    /// Takes a sample, if the last one was long enough ago.
    pub fn sample(&mut self, windows: &mut Windows) {
        let now = Instant::now();
        if self.next.is_none_or(|next| next <= now) {
            self.take(windows, now);
        }
    }

    /// Takes a last sample and returns all of them.
    pub fn finish(mut self, windows: Option<&mut Windows>) -> Vec<Sample> {
        if let Some(windows) = windows {
            self.take(windows, Instant::now());
        }
        self.samples
    }

    fn take(&mut self, windows: &mut Windows, now: Instant) {
        let start = *self.start.get_or_insert(now);
        match windows.sample_all() {
            Ok([page, mapped, resident, used]) => {
                let at = now.saturating_duration_since(start);
                self.add(Sample { at, page, mapped, resident, used });
            }
            // The figures at the end will fail as well, with a warning.
            Err(error) => log::debug!("a sample of the shadow is missing: {error}"),
        }
        let end = Instant::now();
        self.next = end
            .checked_add(self.gap.max(end.saturating_duration_since(now).saturating_mul(REST)))
            .or(self.next);
    }

    fn add(&mut self, sample: Sample) {
        if self.samples.len() >= SAMPLES {
            // Keep the higher one of two samples, so that no peak is lost, and the first one.
            let rest = self.samples.split_off(1);
            let higher = |pair: &[Sample]| {
                pair.iter().copied().max_by_key(|sample| (sample.resident, sample.mapped))
            };
            self.samples.extend(rest.chunks(2).filter_map(higher));
            self.gap = self.gap.saturating_mul(2);
        }
        self.samples.push(sample);
    }
}

/// Keeps the end of what is written.
#[derive(Clone, Default)]
pub(super) struct Tail(Arc<Mutex<VecDeque<u8>>>);

/// Passes on what is written, and keeps its end.
struct Tee {
    to: Box<dyn Write + Send>,
    tail: Tail,
}

impl Tail {
    /// A writer that passes on to `to` and keeps the end if that is `wanted`.
    pub fn tee(to: Box<dyn Write + Send>, wanted: bool) -> (Box<dyn Write + Send>, Self) {
        let tail = Self::default();
        let to = if wanted { Box::new(Tee { to, tail: tail.clone() }) } else { to };
        (to, tail)
    }

    /// The kept end of the output.
    pub fn take(self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.tail.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&bytes[bytes.len().saturating_sub(CONSOLE)..]);
        let over = kept.len().saturating_sub(CONSOLE);
        drop(kept.drain(..over));
        drop(kept);
        self.to.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_bound_the_order_and_the_peak() {
        let mut timeline = Timeline::default();
        for i in 0..100_000u64 {
            let resident = if i == 77_777 { 9 << 20 } else { i % 7 };
            timeline.add(Sample { at: Duration::from_micros(i), resident, ..Sample::default() });
            assert!(timeline.samples.len() <= SAMPLES);
        }
        let samples = &timeline.samples;
        assert!(samples.len() > SAMPLES / 2);
        assert!(samples.is_sorted_by(|a, b| a.at < b.at));
        assert_eq!(samples[0].at, Duration::ZERO);
        assert_eq!(samples.iter().map(|s| s.resident).max(), Some(9 << 20));
        assert!(timeline.gap > FIRST_GAP);
    }

    #[test]
    fn only_the_end_of_the_console_is_kept() {
        let (mut out, tail) = Tail::tee(Box::new(io::sink()), true);
        for i in 0..CONSOLE {
            writeln!(out, "line {i}").expect("a sink takes everything");
        }
        out.write_all(&[b'x'; 2 * CONSOLE]).expect("a sink takes everything");
        out.write_all(b"end").expect("a sink takes everything");
        let kept = tail.take();
        assert_eq!(kept.len(), CONSOLE);
        assert!(kept.ends_with(b"xxend"));
        let (mut out, tail) = Tail::tee(Box::new(io::sink()), false);
        out.write_all(b"not wanted").expect("a sink takes everything");
        assert!(tail.take().is_empty());
    }
}
