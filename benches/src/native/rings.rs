//! What a record costs a CPU while another CPU writes records to a ring of its own, by the code
//! that guests run. Nothing that both write may be in one cache line.
//!
//! Producers empty their rings themselves before these are full, so that neither a drain nor the
//! collector has a part in this. Both CPUs may be of one core, which then shows.

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use umbra_runtime::host::Host;
use umbra_runtime::{ring, settings, stack};
use umbra_shadow::abi::{Features, PackedRecord, RECORD_BYTES, Redzone, RingHeader};

use crate::clock::thread_cpu;
use crate::figure::Figure;

/// Records in a ring, in a turn before it is emptied, and turns of a measurement.
const RECORDS: u64 = 8191;
const TURN: u64 = 4096;
const _: () = assert!(size_of::<RingHeader>() as u64 == RECORD_BYTES && TURN < RECORDS);
const TURNS: u64 = 64;
/// Pairs of measurements; the median counts.
const PAIRS: usize = 31;
/// Frames of the stack that is recorded.
const FRAMES: usize = 6;
/// Most that another producer may add.
const LIMIT: f64 = 1.1;

/// A producer's ring, and the stack that its records have: frame pointers and return addresses.
struct Producer {
    cpu: usize,
    /// A header, and as many bytes for each record.
    ring: Vec<RingHeader>,
    frames: [[u64; 2]; FRAMES],
}

impl Producer {
    fn new(cpu: usize) -> Self {
        const TEXT: u64 = 0x10_0000;
        stack::set_text_start(TEXT);
        stack::set_text_end(2 * TEXT);
        let frames = std::array::from_fn(|frame| [0, TEXT + 16 * frame as u64]);
        Self { cpu, ring: vec![RingHeader::default(); 1 + RECORDS as usize], frames }
    }

    fn actor(&self) -> u64 {
        (self.cpu as u64) << 16
    }

    /// Writes records, [`TURNS`] times [`TURN`], beside the others that come to `start`. Returns
    /// this thread's CPU time.
    fn run(&mut self, start: &Barrier) -> Duration {
        pin(self.cpu);
        for frame in 1..FRAMES {
            self.frames[frame - 1][0] = (&raw const self.frames[frame]) as u64;
        }
        let header = self.ring.as_mut_ptr();
        let ring = ring::of(self.actor());
        ring.place(header, RECORDS);
        let fp = (&raw const self.frames) as u64;
        start.wait();
        let begin = thread_cpu();
        for _ in 0..TURNS {
            // SAFETY: the header of this thread's ring, which has room for a turn's records. The
            // frames are a chain as a compiler makes it.
            unsafe {
                header.write(RingHeader::default());
                for n in 0..TURN / 2 {
                    let address = black_box(0x1000 * n);
                    let allocated = PackedRecord::allocated_in_slot(1, 64, 96);
                    ring.write(self.actor(), allocated, address, fp);
                    ring.write(self.actor(), PackedRecord::freed(), address, fp);
                }
            }
        }
        thread_cpu() - begin
    }
}

/// Keeps this thread on one of the CPUs that it may use.
fn pin(number: usize) {
    // SAFETY: the set is as large as the calls are told, and a CPU's number is below its bits.
    unsafe {
        let mut all: libc::cpu_set_t = std::mem::zeroed();
        let bytes = size_of_val(&all);
        libc::sched_getaffinity(0, bytes, &raw mut all);
        let mut cpus = (0..8 * bytes).filter(|cpu| libc::CPU_ISSET(*cpu, &all));
        if let Some(cpu) = cpus.nth(number) {
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut one);
            libc::sched_setaffinity(0, bytes, &raw const one);
        }
    }
}

/// Nanoseconds of a record, the slowest producer's.
fn turn(producers: &mut [Producer]) -> f64 {
    let start = Barrier::new(producers.len());
    let times = thread::scope(|scope| {
        let all: Vec<_> = producers.iter_mut().map(|p| scope.spawn(|| p.run(&start))).collect();
        all.into_iter().filter_map(|one| one.join().ok()).max().unwrap_or_default()
    });
    times.as_nanos() as f64 / (TURNS * TURN) as f64
}

/// Measures on two CPUs: the time of a record with two producers, relative to one.
pub fn measure() -> Vec<Figure> {
    const GROUP: &str = "records of two CPUs at once, time of a record to that of one CPU alone";
    let mut producers = [0, 1].map(Producer::new);
    let mut figures = Vec::new();
    for (name, stamps, limit) in [
        ("stamps of time stamp counters", Features::STAMPS_TSC, Some(LIMIT)),
        ("stamps of a counter that both write, for comparison", Features::default(), None),
    ] {
        settings::set(Some(&Host {
            features: Features::PER_PAGE | Features::RING | stamps,
            version: 0,
            page_window: (0, 0),
            byte_window: (0, 0),
            virtual_bytes: 0,
            quarantine_batch: 0,
            redzone: Redzone::Off,
            patterns: 0,
        }));
        let mut pairs: Vec<_> =
            (0..PAIRS).map(|_| (turn(&mut producers[..1]), turn(&mut producers))).collect();
        pairs.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
        let (one, two) = pairs[PAIRS / 2];
        let figure = Figure::new(GROUP, name, two / one, "ratio")
            .note(format!("{one:.1} ns and {two:.1} ns, the median of {PAIRS} pairs"));
        figures.push(limit.into_iter().fold(figure, Figure::limit));
    }
    figures
}
