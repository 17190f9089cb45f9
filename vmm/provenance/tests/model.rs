//! The protocol of rings and doorbell, in every order of its steps and of its memory accesses that
//! C11 allows (`loom`). The reading side is the VMM's own code. The writing side is as
//! `guest/runtime/src/ring.rs`, whose volatile accesses are to real guest memory.

use loom::cell::UnsafeCell;
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicBool, AtomicU64};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use umbra_provenance::rings::{Clock, DrainBy, RingMemory, Rings};
use umbra_shadow::abi::{RECORD_BYTES, RecordKind};

/// Room in a ring, and what of it is for NMIs in the middle of a record.
const RECORDS: u64 = 5;
const SPARE: u64 = 3;
/// A CPU rings the doorbell when there are so many records.
const BELL: u64 = 1;

/// Where an NMI may come while a CPU writes a record: before so many steps.
const STEPS: usize = 8;

/// More than all stamps of a run.
const STAMPS: usize = 16;

/// A ring in guest memory. Of a record it has the stamp, 0 before it is written.
struct Ring {
    count: AtomicU64,
    claimed: AtomicU64,
    stamps: [AtomicU64; RECORDS as usize],
}

struct Memory(Vec<Ring>);

/// Where the ring of a CPU begins.
fn ring(cpu: usize) -> u64 {
    0x1000 * cpu as u64
}

impl Memory {
    fn ring(&self, gpa: u64) -> (&Ring, u64) {
        (&self.0[(gpa / 0x1000) as usize], gpa % 0x1000)
    }
}

impl RingMemory for Memory {
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let (ring, offset) = self.ring(gpa);
        let first = (offset / RECORD_BYTES - 1) as usize;
        let records = to.chunks_mut(RECORD_BYTES as usize);
        for (stamp, to) in ring.stamps.iter().skip(first).zip(records) {
            to[0] = RecordKind::Freed.into();
            to[20..28].copy_from_slice(&stamp.load(Relaxed).to_le_bytes());
        }
        true
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        assert_eq!(from, [0; 16], "a ring is emptied");
        let ring = self.ring(gpa).0;
        ring.claimed.store(0, Release);
        ring.count.store(0, Release);
        true
    }

    fn load(&self, gpa: u64) -> Option<u64> {
        Some(self.ring(gpa).0.count.load(Acquire))
    }
}

/// The doorbell, as an eventfd: how many records it told of, and whether the run ends.
#[derive(Default)]
struct Doorbell {
    told: Mutex<(Option<usize>, bool)>,
    changed: Condvar,
}

impl Doorbell {
    fn ring(&self, records: usize) {
        self.told.lock().unwrap().0 = Some(records);
        self.changed.notify_one();
    }

    fn end(&self) {
        self.told.lock().unwrap().1 = true;
        self.changed.notify_one();
    }

    /// Waits for a ring, and returns what it told of, or for the end.
    fn wait(&self) -> Option<usize> {
        let mut told = self.told.lock().unwrap();
        loop {
            match (told.0.take(), told.1) {
                (Some(records), _) => return Some(records),
                (None, true) => return None,
                (None, false) => told = self.changed.wait(told).unwrap(),
            }
        }
    }
}

/// What all threads share.
struct Run {
    memory: Memory,
    /// The rings, and the stamps that were taken.
    state: Mutex<(Rings, Vec<u64>)>,
    doorbell: Doorbell,
    stamps: AtomicU64,
    /// Whether the memory is poisoned whose free has this stamp.
    poisoned: [UnsafeCell<bool>; STAMPS],
}

impl Run {
    fn new(cpus: usize) -> Arc<Self> {
        // A time is a stamp.
        let mut rings = Rings::new(Clock::tsc(1000, u64::MAX));
        for cpu in 0..cpus {
            rings.set_up(cpu as u16, ring(cpu), RECORDS, 0).expect("a ring for each");
        }
        let zero = || AtomicU64::new(0);
        let memory = (0..cpus).map(|_| Ring {
            count: zero(),
            claimed: zero(),
            stamps: [(); RECORDS as usize].map(|()| zero()),
        });
        Arc::new(Self {
            memory: Memory(memory.collect()),
            state: Mutex::new((rings, Vec::new())),
            doorbell: Doorbell::default(),
            stamps: AtomicU64::new(1),
            poisoned: [(); STAMPS].map(|()| UnsafeCell::new(false)),
        })
    }

    /// A CPU's next record.
    fn push(&self, cpu: usize) {
        self.push_with_nmis(cpu, [None, None]);
    }

    /// The same, by the steps of `put` in `guest/runtime/src/ring.rs`. Before two of them come NMIs
    /// that write a record each.
    fn push_with_nmis(&self, cpu: usize, mut nmis: [Option<usize>; 2]) {
        let Ring { count, claimed, stamps } = &self.memory.0[cpu];
        let mut steps = 0..;
        let mut step = || {
            let now = steps.next();
            for nmi in &mut nmis {
                if nmi.take_if(|at| Some(*at) == now).is_some() {
                    self.push(cpu);
                }
            }
        };
        step();
        let n = claimed.load(Relaxed);
        step();
        if count.load(Relaxed) != claimed.load(Relaxed) {
            assert!(n < RECORDS, "both fit");
        } else if n + SPARE >= RECORDS {
            step();
            self.drain(DrainBy::Cpu(cpu as u16));
        } else if n == BELL {
            self.doorbell.ring(n as usize);
        }
        step();
        let n = claimed.fetch_add(1, Relaxed);
        step();
        let stamp = self.stamps.fetch_add(1, SeqCst);
        // SAFETY: whoever reads this has read the record.
        self.poisoned[stamp as usize].with_mut(|poisoned| unsafe { *poisoned = true });
        stamps[n as usize].store(stamp, Relaxed);
        step();
        if count.load(Relaxed) != n {
            return;
        }
        step();
        // One instruction.
        count.store(claimed.load(Relaxed), Release);
        step();
    }

    /// Returns how many records have been taken.
    fn drain(&self, by: DrainBy) -> usize {
        let mut state = self.state.lock().unwrap();
        let (rings, taken) = &mut *state;
        rings.drain(by, &self.memory, |record| {
            let stamp = record.at.micros.expect("a stamp");
            // SAFETY: it was written before the record was visible.
            let poisoned = self.poisoned[stamp as usize].with(|poisoned| unsafe { *poisoned });
            assert!(poisoned, "the memory may leave the quarantine");
            taken.push(stamp);
        });
        taken.len()
    }

    /// The collector's thread.
    fn collect(&self) {
        while let Some(told) = self.doorbell.wait() {
            assert!(self.drain(DrainBy::Collector) >= told, "the doorbell told of {told} records");
        }
    }
}

/// One CPU writes more records than its ring holds before it is drained. Each is taken once, whole,
/// and in its order, and no later than the collector was told of it.
#[test]
fn a_ring_is_read_while_it_is_written() {
    const PUSHED: u64 = RECORDS - SPARE + 2;
    loom::model(|| {
        let run = Run::new(1);
        let collector = {
            let run = run.clone();
            thread::spawn(move || run.collect())
        };
        (0..PUSHED).for_each(|_| run.push(0));
        run.doorbell.end();
        collector.join().unwrap();
        run.drain(DrainBy::Vmm);
        assert_eq!(run.state.lock().unwrap().1, (1..=PUSHED).collect::<Vec<_>>());
    });
}

/// NMIs at any two steps of a record, before and after a drain. Each record is taken once, and
/// whole.
#[test]
fn nmis_may_write_records() {
    let steps = || (0..STEPS).flat_map(|at| (at..STEPS).map(move |then| [at, then].map(Some)));
    for (before, nmis) in (0..3).flat_map(|before| steps().map(move |nmis| (before, nmis))) {
        loom::model(move || {
            let run = Run::new(1);
            let collector = {
                let run = run.clone();
                thread::spawn(move || {
                    run.drain(DrainBy::Collector);
                    run.drain(DrainBy::Collector);
                })
            };
            (0..before).for_each(|_| run.push(0));
            run.push_with_nmis(0, nmis);
            collector.join().unwrap();
            run.push(0);
            run.drain(DrainBy::Vmm);
            let taken = &mut run.state.lock().unwrap().1;
            taken.sort_unstable();
            let all: Vec<_> = (1..run.stamps.load(SeqCst)).collect();
            assert_eq!(*taken, all, "{before} {nmis:?}");
        });
    }
}

/// What one CPU frees another allocates. Their records come in that order, whenever the collector
/// looks.
#[test]
fn events_of_two_cpus_keep_their_order() {
    loom::model(|| {
        let run = Run::new(2);
        let freed = Arc::new(AtomicBool::new(false));
        let other = {
            let (run, freed) = (run.clone(), freed.clone());
            thread::spawn(move || {
                if freed.load(Acquire) {
                    run.push(1);
                }
            })
        };
        let collector = {
            let run = run.clone();
            thread::spawn(move || run.drain(DrainBy::Collector))
        };
        run.push(0);
        freed.store(true, Release);
        other.join().unwrap();
        collector.join().unwrap();
        run.drain(DrainBy::Vmm);
        let taken = &run.state.lock().unwrap().1;
        assert!(taken.is_sorted() && taken.first() == Some(&1), "{taken:?}");
    });
}
