use std::cell::RefCell;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Mutex, mpsc};
use std::thread;

use super::*;
use umbra_shadow::abi::{RECORD_FRAMES, RecordBody};

/// Address and cache of an allocation.
fn allocation(record: &RingRecord) -> (u64, u16) {
    match record.decode().map(|record| record.body) {
        Ok(RecordBody::Allocated { address, cache, .. }) => (address, cache),
        other => panic!("no allocation: {other:?}"),
    }
}

/// 4 MiB of guest memory.
pub(crate) struct Ram(RefCell<Vec<u8>>);

impl Ram {
    pub(crate) fn new() -> Self {
        Self(RefCell::new(vec![0; 4 << 20]))
    }
}

impl RingMemory for Ram {
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let ram = self.0.borrow();
        let from = ram.get(gpa as usize..gpa as usize + to.len());
        from.map(|from| to.copy_from_slice(from)).is_some()
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let mut ram = self.0.borrow_mut();
        let to = ram.get_mut(gpa as usize..gpa as usize + from.len());
        to.map(|to| to.copy_from_slice(from)).is_some()
    }

    fn load(&self, gpa: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }
}

fn ram_with_ring(count: u64) -> (Ram, Rings) {
    let ram = Ram::new();
    let mut rings = Rings::default();
    rings.set_up(1, 0x10_0000, 4, 0xffff_ffff_0000_0000).expect("CPU 1 may have a ring");
    assert!(ram.write(0x10_0000, &count.to_le_bytes()));
    for i in 0..4u8 {
        let mut bytes = [0; 64];
        bytes[0] = RecordKind::Allocated.into();
        bytes[1] = 255;
        bytes[8] = i + 1;
        bytes[28..32].copy_from_slice(&0x8010_0000u32.to_le_bytes());
        assert!(ram.write(0x10_0040 + 64 * u64::from(i), &bytes));
    }
    (ram, rings)
}

#[test]
fn a_drain_takes_what_the_count_says_once() {
    let (ram, mut rings) = ram_with_ring(2);
    let header = 0x10_0000;
    let mut addresses = |by, count: Option<u64>| {
        if let Some(count) = count {
            assert!(ram.write(header, &count.to_le_bytes()));
        }
        let mut addresses = Vec::new();
        rings.drain(by, &ram, |event| {
            assert_eq!(event.frames().len(), RECORD_FRAMES);
            assert_eq!(event.frames()[..2], [[0, 0, 0x10, 0x80], [0; 4]]);
            addresses.push(allocation(event).0);
        });
        (addresses, ram.load(header).expect("inside RAM"))
    };
    // Its CPU may be about to write the third record: the count stays as it is.
    assert_eq!(addresses(DrainBy::Vmm, None), (vec![1, 2], 2));
    assert_eq!(addresses(DrainBy::Cpu(0), None), (vec![], 2), "another CPU asks");
    assert_eq!(addresses(DrainBy::Collector, Some(3)), (vec![3], 3));
    // Its own CPU starts anew.
    assert_eq!(addresses(DrainBy::Cpu(1), Some(4)), (vec![4], 0));
    assert_eq!(addresses(DrainBy::Vmm, Some(1)), (vec![1], 1));
    assert_eq!(addresses(DrainBy::Cpu(1), None), (vec![], 0));
    // Nonsense.
    assert_eq!(addresses(DrainBy::Vmm, Some(3)).0, [1, 2, 3]);
    assert!(addresses(DrainBy::Vmm, Some(1)).0.is_empty());
    assert_eq!(addresses(DrainBy::Vmm, Some(2)).0, [2]);
}

#[test]
fn pages_without_records_are_found() {
    let ram = Ram::new();
    let mut rings = Rings::default();
    // Three pages and a half, and one that fills less than a page.
    rings.set_up(0, 0x10_0000, 223, 0).expect("a ring");
    rings.set_up(1, 0x20_0000, 62, 0).expect("a ring");
    for (count, pages) in [
        (0, Some(0x10_1000..0x10_3000)),
        // The header, 58 records, and the five that may be half written.
        (58, Some(0x10_1000..0x10_3000)),
        (59, Some(0x10_2000..0x10_3000)),
        (122, Some(0x10_2000..0x10_3000)),
        (123, None),
        (u64::MAX, None),
    ] {
        assert!(ram.write(0x10_0000, &u64::to_le_bytes(count)));
        assert_eq!(rings.unused_pages(&ram).next(), pages, "{count}");
    }
}

#[test]
fn a_wild_count_is_bounded_by_the_ring() {
    for count in [5, u64::MAX / 64, u64::MAX] {
        let (ram, mut rings) = ram_with_ring(count);
        let mut taken = 0;
        for _ in 0..2 {
            assert!(!rings.drain(DrainBy::Collector, &ram, |_| taken += 1).more);
        }
        assert_eq!(taken, 4, "count {count:#x}");
    }
    assert!(Rings::default().set_up(64, 0, 1, 0).is_err());
}

/// Writes records with these stamps; each is identified by CPU and stamp.
fn fill(ram: &Ram, cpu: u16, gpa: u64, stamps: &[u64]) {
    for (i, stamp) in stamps.iter().enumerate() {
        let mut bytes = [0; 64];
        bytes[0] = RecordKind::Allocated.into();
        bytes[2..4].copy_from_slice(&cpu.to_le_bytes());
        bytes[20..28].copy_from_slice(&stamp.to_le_bytes());
        assert!(ram.write(gpa + 64 * (1 + i as u64), &bytes));
    }
    assert!(ram.write(gpa, &(stamps.len() as u64).to_le_bytes()));
}

#[test]
fn events_of_all_cpus_come_in_the_order_of_their_stamps() {
    let ram = Ram::new();
    // A time is a stamp.
    let mut rings = Rings::new(Clock::tsc(1000, u64::MAX));
    let ring = |cpu: u16| 0x10_0000 + u64::from(cpu) * 0x4_0000;
    for cpu in 0..3 {
        rings.set_up(cpu, ring(cpu), 1000, 0).expect("a ring for each");
    }
    let mut drain = |stamps: [&[u64]; 3]| {
        for (cpu, stamps) in (0u16..).zip(stamps) {
            fill(&ram, cpu, ring(cpu), stamps);
        }
        let mut taken = Vec::new();
        for by in [DrainBy::Vmm, DrainBy::Cpu(0), DrainBy::Cpu(1), DrainBy::Cpu(2)] {
            rings.drain(by, &ram, |event| {
                taken.push((allocation(event).1, event.at.micros.unwrap_or_default()));
            });
        }
        taken
    };
    assert_eq!(drain([&[1, 4], &[], &[2, 3, 5]]), [(0, 1), (2, 2), (2, 3), (0, 4), (2, 5)]);
    // More than are read at a time; one that was written late comes first.
    let [even, odd] = [0, 1].map(|from| (from + 6..500).step_by(2).collect::<Vec<u64>>());
    let taken = drain([&even, &[4], &odd]);
    assert_eq!(taken[0], (1, 4));
    assert!(taken[1..].iter().map(|t| t.1).eq(6..500));
    // Stamps that make no sense cost nobody a record.
    assert_eq!(drain([&[9, 9, 1 << 63, 0], &[7, u64::MAX, 7], &[0; 70]]).len(), 77);
}

#[test]
fn a_free_comes_before_an_allocation_with_its_stamp() {
    let ram = Ram::new();
    let mut rings = Rings::new(Clock::tsc(2_000_000, 1 << 40));
    for (cpu, kind) in [(0, RecordKind::Allocated), (1, RecordKind::Freed)] {
        let gpa = 0x10_0000 + 0x1000 * u64::from(cpu);
        rings.set_up(cpu, gpa, 4, 0).expect("a ring");
        fill(&ram, cpu, gpa, &[3_000_000_000]);
        assert!(ram.write(gpa + 64, &[kind.into()]));
    }
    let mut taken = Vec::new();
    rings.drain(DrainBy::Vmm, &ram, |event| taken.push(event.at));
    assert_eq!(taken, [1, 0].map(|cpu| Moment { cpu, micros: Some(1_500_000) }));
}

#[test]
fn stamps_are_times_if_they_are_time_stamp_counters() {
    for (khz, stamp, micros) in [
        (1_000_000, 0, Some(0)),
        (1_000_000, 1_234_567_890, Some(1_234_567)),
        (3_700_000, 3_700_000_000_000, Some(1_000_000_000)),
        (u32::MAX, u64::MAX, Some(4_294_967_296_999)),
        (1, u64::MAX, Some(u64::MAX)),
        (0, 5, None),
    ] {
        assert_eq!(Clock::tsc(khz, u64::MAX).micros(stamp.min(u64::MAX - 1)), micros);
    }
    // The host's own, which began before the run.
    let clock = Clock::tsc(1_000, 5_000);
    assert_eq!([6_000, 4_000, 7_500].map(|stamp| clock.micros(stamp)), [1000, 0, 2500].map(Some));
    // The guest's own, which outlives what the host's was then.
    let clock = Clock::tsc(1_000, 5_000);
    assert_eq!([4_000, 6_000].map(|stamp| clock.micros(stamp)), [4000, 6000].map(Some));
}

#[test]
fn rings_do_not_overlap_and_hold_so_much_in_all() {
    let mut rings = Rings::default();
    assert!(rings.set_up(0, 0x10_0000, 3, 0).is_ok());
    assert!(rings.set_up(1, 0x10_00c0, 3, 0).is_err(), "its header is the other's last record");
    assert!(rings.set_up(1, 0x10_0100, 3, 0).is_ok());
    assert!(rings.set_up(1, 0x10_0140, 3, 0).is_ok(), "the CPU's own, in another place");
    for cpu in 2..5 {
        let gpa = u64::from(cpu) * 0x100_0000;
        assert!(rings.set_up(cpu, gpa, RING_MAX_RECORDS, 0).is_ok());
    }
    assert!(rings.set_up(5, 0x500_0000, RING_MAX_RECORDS, 0).is_err());
    assert!(rings.set_up(5, 0x500_0000, RING_MAX_RECORDS - 6, 0).is_ok());
    assert!(rings.has(5) && !rings.has(6));
}

#[test]
fn the_collector_takes_so_many_at_a_time() {
    const EACH: u64 = COLLECTED + 88;
    let ram = Ram::new();
    let mut rings = Rings::new(Clock::tsc(1000, u64::MAX));
    for cpu in 0..2u16 {
        let gpa = 0x10_0000 + 0x2_0000 * u64::from(cpu);
        rings.set_up(cpu, gpa, 2 * COLLECTED, 0).expect("a ring");
        let stamps: Vec<u64> = (0..EACH).map(|i| 2 * i + u64::from(cpu)).collect();
        fill(&ram, cpu, gpa, &stamps);
    }
    let mut taken = Vec::new();
    let mut steps = vec![0];
    let mut step = |by| {
        let part = rings.drain(by, &ram, |event| taken.push(event.at.micros.unwrap()));
        steps.push(taken.len() as u64);
        assert_eq!(part.records, steps[steps.len() - 1] - steps[steps.len() - 2]);
        part.more
    };
    assert!(step(DrainBy::Collector) && step(DrainBy::Collector));
    // A CPU takes what is left, whoever else has taken some.
    assert!(!step(DrainBy::Cpu(1)) && !step(DrainBy::Collector));
    assert_eq!(steps, [0, COLLECTED, 2 * COLLECTED, 2 * EACH, 2 * EACH]);
    assert_eq!(taken, (0..2 * EACH).collect::<Vec<_>>());
}

/// Guest memory that several CPUs write while it is read.
struct SharedRam(Vec<AtomicU64>);

impl RingMemory for SharedRam {
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let words = self.0.iter().skip(gpa as usize / 8);
        let (to, _) = to.as_chunks_mut::<8>();
        to.iter_mut().zip(words).for_each(|(to, word)| *to = word.load(Relaxed).to_le_bytes());
        // Between two looks the CPUs go on.
        thread::yield_now();
        true
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let words = self.0.iter().skip(gpa as usize / 8);
        let (from, _) = from.as_chunks();
        words.zip(from).for_each(|(word, from)| word.store(u64::from_le_bytes(*from), Relaxed));
        true
    }

    fn load(&self, gpa: u64) -> Option<u64> {
        self.0.get(gpa as usize / 8).map(|word| word.load(Acquire))
    }
}

/// CPUs that run while rings are drained.
struct Running {
    ram: SharedRam,
    /// The rings, and for each object what its last event was and when.
    drained: Mutex<(Rings, Vec<(RecordKind, u64)>)>,
    stamps: AtomicU64,
}

impl Running {
    /// Room in a ring.
    const RECORDS: u64 = 8;

    fn ring(cpu: u16) -> u64 {
        0x1000 * u64::from(cpu)
    }

    fn new(cpus: u16, objects: usize) -> Self {
        // A time is a stamp.
        let mut rings = Rings::new(Clock::tsc(1000, u64::MAX));
        for cpu in 0..cpus {
            rings.set_up(cpu, Self::ring(cpu), Self::RECORDS, 0).expect("a ring for each");
        }
        let words = Self::ring(cpus) / 8;
        Self {
            ram: SharedRam((0..words).map(|_| AtomicU64::new(0)).collect()),
            drained: Mutex::new((rings, vec![(RecordKind::Freed, 0); objects])),
            stamps: AtomicU64::new(1),
        }
    }

    /// A CPU's event, as a guest records it: the stamp, the record, then the count.
    fn event(&self, cpu: u16, kind: RecordKind, object: u64) {
        let count = &self.ram.0[Self::ring(cpu) as usize / 8];
        if count.load(Relaxed) == Self::RECORDS {
            self.drain(DrainBy::Cpu(cpu));
        }
        let stamp = self.stamps.fetch_add(1, SeqCst);
        let mut bytes = [0; RECORD_BYTES as usize];
        bytes[0] = kind.into();
        bytes[8..16].copy_from_slice(&object.to_le_bytes());
        bytes[20..28].copy_from_slice(&stamp.to_le_bytes());
        let record = count.load(Relaxed);
        assert!(self.ram.write(Self::ring(cpu) + (1 + record) * RECORD_BYTES, &bytes));
        count.store(record + 1, Release);
    }

    /// Each object's events come in their order, whoever made them.
    fn drain(&self, by: DrainBy) {
        let mut drained = self.drained.lock().unwrap();
        let (rings, objects) = &mut *drained;
        rings.drain(by, &self.ram, |event| {
            let (kind, object) = match event.decode().map(|record| record.body) {
                Ok(RecordBody::Allocated { address, .. }) => (RecordKind::Allocated, address),
                Ok(RecordBody::Freed { address, .. }) => (RecordKind::Freed, address),
                other => panic!("no event of an allocator: {other:?}"),
            };
            let now = (kind, event.at.micros.expect("a stamp"));
            let before = std::mem::replace(&mut objects[object as usize], now);
            assert!(before.0 != now.0 && before.1 < now.1, "{before:?}, {now:?}");
        });
    }
}

#[test]
fn events_keep_their_order_while_cpus_run() {
    const CPUS: u16 = 3;
    const OBJECTS: u64 = 16;
    let running = Running::new(CPUS + 1, OBJECTS as usize);
    let turns = if cfg!(debug_assertions) { 3_000 } else { 30_000 };
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..CPUS).map(|_| mpsc::channel()).unzip();
    (0..OBJECTS).for_each(|object| senders[object as usize % 3].send(object).unwrap());
    let left = AtomicU64::new(CPUS.into());
    thread::scope(|scope| {
        for (cpu, receiver) in (0u16..).zip(receivers) {
            // What one CPU frees the next one allocates.
            let to = senders[usize::from(cpu + 1) % 3].clone();
            let (running, left) = (&running, &left);
            scope.spawn(move || {
                for _ in 0..turns {
                    let Ok(object) = receiver.recv() else { break };
                    running.event(cpu, RecordKind::Allocated, object);
                    running.event(cpu, RecordKind::Freed, object);
                    // The next one may have had its turns.
                    let _ = to.send(object);
                }
                left.fetch_sub(1, SeqCst);
            });
        }
        drop(senders);
        // One that only asks, and the collector.
        while left.load(SeqCst) > 0 {
            for by in [DrainBy::Cpu(CPUS), DrainBy::Collector] {
                running.drain(by);
                thread::yield_now();
            }
        }
    });
    running.drain(DrainBy::Vmm);
    let drained = running.drained.into_inner().unwrap();
    assert!(drained.1.iter().all(|(kind, at)| *kind == RecordKind::Freed && *at > 0));
}

#[test]
fn a_drain_for_one_cpu_leaves_later_records_of_others() {
    /// Memory in which another CPU writes a record once its ring was looked at.
    struct Late(Ram);

    impl RingMemory for Late {
        fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
            self.0.read(gpa, to)
        }

        fn load(&self, gpa: u64) -> Option<u64> {
            let count = self.0.load(gpa);
            if gpa == 0x10_1000 && count == Some(1) {
                fill(&self.0, 1, gpa, &[10, 12]);
            }
            count
        }

        fn write(&self, gpa: u64, from: &[u8]) -> bool {
            self.0.write(gpa, from)
        }
    }

    let ram = Late(Ram::new());
    let mut rings = Rings::new(Clock::tsc(1000, u64::MAX));
    for cpu in 0..2 {
        rings.set_up(cpu, 0x10_0000 + 0x1000 * u64::from(cpu), 8, 0).expect("a ring");
    }
    fill(&ram.0, 0, 0x10_0000, &[9, 11]);
    fill(&ram.0, 1, 0x10_1000, &[10]);
    let mut drain = |by| {
        let mut taken = Vec::new();
        rings.drain(by, &ram, |event| taken.push(event.at.micros.unwrap()));
        taken
    };
    // The second record of CPU 1 is later than all that were there.
    assert_eq!(drain(DrainBy::Cpu(0)), [9, 10, 11]);
    assert_eq!(drain(DrainBy::Cpu(0)), [12]);
    assert_eq!(drain(DrainBy::Cpu(1)), []);
    assert_eq!(ram.load(0x10_1000), Some(0));
}
