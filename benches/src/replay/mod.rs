//! Replays a recorded trace through the VMM's own shadow windows, without a guest.
//!
//! The windows are in `sync` mode: the VMM writes the shadow, as it does on a guest's hypercalls.
//! They reclaim host memory as often as with a guest: when a ring of [`RING_RECORDS`] records would
//! be full. The kernel reports what is resident.

pub mod guest;
pub mod kasan;
pub mod report;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use umbra::shadow::{
    Figures, MemslotError, Memslots, Mode, Notify, ShadowError, Windows, WindowsConfig, page_map,
};
use umbra_shadow::codes::PAGE_SIZE;

use self::kasan::Kasan;
use crate::clock::{Moment, Spent};
use crate::trace::{Trace, TraceError};

/// Records in the ring of the test kernels: the VMM reclaims shadow when it is full.
pub const RING_RECORDS: u64 = 8191;
/// Number of samples of the shadow.
const SAMPLES: u64 = 200;
/// Interval between two calls of `tick`, in events.
const TICK: u64 = 1 << 16;
/// Pages of memory per page of shadow, if a byte of shadow covers 32 bytes.
const PAGES_AT_32: u64 = 32;

/// A sample of the shadow, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Events until then.
    pub event: u64,
    /// Page shadow.
    pub page: u64,
    /// Byte shadow that may become resident: whole chunks.
    pub mapped: u64,
    /// Byte shadow that is resident.
    pub resident: u64,
    /// Byte shadow of byte-checked pages.
    pub used: u64,
    /// Byte shadow that would be resident (whole 4 KiB pages) if a byte of it covered 32 bytes
    /// instead of 8.
    pub resident_at_32: u64,
    /// Slots of live objects.
    pub slots: u64,
    /// KASAN's redzones behind them, which the recorded kernel did not have.
    pub redzones: u64,
    /// Growth of the slots if each began at a multiple of 32 bytes.
    pub aligned_to_32: u64,
}

/// The result of a replay.
pub struct Replay {
    /// Samples, in order.
    pub samples: Vec<Sample>,
    /// Its figures at the end, with the exact peaks.
    pub figures: Figures,
    /// Events.
    pub events: u64,
    /// Time to read the trace, and to change and reclaim the shadow; without [`Self::samples`].
    pub time: Spent,
    /// Time to make the windows.
    pub start: Spent,
}

/// No machine: no guest has the windows.
struct NoGuest;

impl Memslots for NoGuest {
    fn map(&mut self, _: u64, _: *mut u8, _: u64, _: bool) -> Result<u32, MemslotError> {
        Ok(0)
    }

    fn unmap(&mut self, _: u32) -> Result<(), MemslotError> {
        Ok(())
    }
}

/// An event that cannot be replayed.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("the shadow cannot be changed")]
    Shadow(#[from] ShadowError),
}

/// Replays the trace at `path` in a machine with `memory` bytes. `tick` gets the number of replayed
/// events, and of all.
///
/// # Errors
/// The trace is bad, or has addresses beyond the memory, or the host does not give the shadow.
pub fn replay(
    path: &Path,
    memory: u64,
    mode: Mode,
    mut tick: impl FnMut(u64, u64),
) -> Result<Replay> {
    ensure!(
        memory > 0 && memory.is_multiple_of(PAGE_SIZE),
        "{memory} bytes of memory are no whole pages"
    );
    let mut trace = Trace::open(path)?;
    let events = trace.events();
    let begin = Moment::now();
    let ram = 0..memory;
    let config = WindowsConfig { ram: vec![ram], mode, notify: Notify::Sync, limit: None };
    let mut windows =
        Windows::new(&config, &mut NoGuest).context("no shadow for so much memory")?;
    let start = begin.elapsed();
    let mut rules = Kasan::new(memory);
    let mut samples = Vec::new();
    let (mut sampling, mut highest) = (Spent::default(), PAGE_SIZE);
    let step = (events / SAMPLES).max(1);
    let begin = Moment::now();
    let mut done = 0;
    while let Some(event) = trace.next().transpose()? {
        highest = highest.max(event.end());
        if event.end() > memory {
            Err(trace.wrong(format!(
                "is at {:#x}, beyond the {} MiB of memory of the replay",
                event.end(),
                memory >> 20
            )))?;
        }
        rules
            .event(event, |(addr, len, code)| match code {
                Some(code) => windows.poison(addr, len, code, &mut NoGuest),
                None => windows.unpoison(addr, len, &mut NoGuest),
            })
            .map_err(Problem::from)?;
        done += 1;
        if done % RING_RECORDS == 0 && mode == Mode::PerPage {
            let unused = windows.find_unused()?;
            windows.reclaim(unused)?;
        }
        if done % TICK == 0 {
            tick(done, events);
        }
        if done % step == 0 {
            let before = Moment::now();
            samples.push(sample(done, &mut windows, &rules, highest)?);
            sampling = sampling + before.elapsed();
        }
    }
    let time = begin.elapsed() - sampling;
    Ok(Replay { samples, figures: windows.figures()?, events: done, time, start })
}

fn sample(event: u64, windows: &mut Windows, rules: &Kasan, highest: u64) -> Result<Sample> {
    let [page, mapped, resident, used] = windows.sample_all()?;
    let live = rules.live();
    let resident_at_32 = match windows.mode() {
        Mode::Full => 0,
        Mode::PerPage => {
            let cells = highest.div_ceil(PAGES_AT_32 * PAGE_SIZE);
            let ram = 0..cells * PAGES_AT_32 * PAGE_SIZE;
            let map = page_map(windows, &[ram], cells as usize);
            debug_assert_eq!(map.pages_per_cell, PAGES_AT_32);
            map.cells.iter().filter(|cell| cell.bytes > 0).count() as u64 * PAGE_SIZE
        }
    };
    Ok(Sample {
        event,
        page,
        mapped,
        resident,
        used,
        resident_at_32,
        slots: live.slots,
        redzones: live.redzones,
        aligned_to_32: live.aligned_to_32,
    })
}
