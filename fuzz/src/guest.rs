//! A guest that does not exist: its memory, its CPU, and the steps that it takes.

use std::fmt::Write as _;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use arbitrary::{Arbitrary, Result, Unstructured};
use umbra::machine::memory::Ram;
use umbra::machine::vcpu::{Data, VmExit};
use umbra::report::Finding;
use umbra::report::symbols::Symbols;
use umbra::sandbox::{Detached, Dispatcher, ExitContext, Observer, OtherVcpus, Outcome};
use umbra::shadow::{CHUNK_BYTES, Layout, Mode, Notify};
use umbra_shadow::abi::{CallNumber, DOORBELL_PORT, PORT, RECORD_BYTES};
use vm_memory::GuestAddress;

use crate::cpu::{Cpu, State};
use crate::memslots::Windows;
use crate::symbols::check;
use crate::{request, show};

/// Bytes of guest memory: 4 MiB, or the MiB that `UMBRA_FUZZ_MIB` says.
static RAM: LazyLock<u64> = LazyLock::new(|| {
    let wished = std::env::var("UMBRA_FUZZ_MIB").ok().and_then(|mib| mib.parse::<u64>().ok());
    wished.unwrap_or(4).clamp(4, 1 << 16) << 20
});
/// The start of a region that is all of RAM.
const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// Code of the guest's file.
const TEXT: u64 = 0x10_0000;
/// That file, if it has one: as compilers made it, or a hostile one.
const FILES: [&[u8]; 5] = [
    include_bytes!("../seeds/symbols/dwarf5.elf"),
    include_bytes!("../seeds/symbols/dwarf4.elf"),
    include_bytes!("../seeds/symbols/compressed.elf"),
    include_bytes!("../seeds/symbols/overlapping.elf"),
    include_bytes!("../seeds/symbols/bomb.elf"),
];
/// Virtual memory of the guest.
const VMALLOC: u64 = 0xffff_c900_0000_0000;
/// Where rings are, one after the other, as physical addresses.
const RINGS: u64 = 0x30_0000;
/// Bytes for each of them.
const RING_BYTES: u64 = 64 << 10;
/// Budget for provenance.
const PROVENANCE: u64 = 256 << 10;

/// A number, often one that means something to the guest or the VMM.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Number {
    Any(u64),
    Small(u8),
    Edge(u8, i8),
    Ram(u32),
    Direct(u32),
    Virtual(u32),
    Shadow(u32),
    Call(u8, i8),
    Sizes(u32, u16),
}

impl Number {
    fn value(self, world: &World) -> u64 {
        let layout = &world.layout;
        match self {
            Self::Any(value) => value,
            Self::Small(value) => value.into(),
            Self::Edge(0xf0.., more) => TEXT.wrapping_add_signed(more.into()),
            Self::Edge(which, more) => {
                let edges = [
                    0,
                    *RAM,
                    layout.page.gpa,
                    layout.page.end(),
                    layout.byte.gpa,
                    layout.byte.end(),
                    layout.virtual_start,
                    layout.keys_end,
                    1 << 47,
                    1 << 63,
                    DIRECT_MAP,
                    DIRECT_MAP + *RAM,
                    VMALLOC,
                    u64::MAX,
                    RINGS,
                    0x1000,
                ];
                edges[usize::from(which) % edges.len()].wrapping_add_signed(more.into())
            }
            Self::Ram(at) => u64::from(at) % (*RAM + 64),
            Self::Direct(at) => DIRECT_MAP + u64::from(at) % (*RAM + 64),
            Self::Virtual(at) => VMALLOC + u64::from(at),
            Self::Shadow(at) => {
                // Mostly of RAM and the first virtual memory.
                let window = if at & 1 == 0 { layout.page } else { layout.byte };
                window.gpa + u64::from(at >> 1) % (8 << 20)
            }
            Self::Call(which, more) => {
                let result = world.results[usize::from(which) % world.results.len()];
                result.wrapping_add_signed(i64::from(more) * 8)
            }
            Self::Sizes(high, low) => u64::from(high) << 32 | u64::from(low),
        }
    }
}

/// Up to 64 bytes.
#[derive(Clone, Debug)]
pub struct Bytes(Vec<u8>);

impl Bytes {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl<'a> Arbitrary<'a> for Bytes {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let len = usize::from(u8::arbitrary(u)? % 65).min(u.len());
        Ok(Self(u.bytes(len)?.to_vec()))
    }
}

/// What the guest does next.
#[derive(Clone, Debug, Arbitrary)]
pub enum Step {
    /// It makes a call.
    Call { number: u8, arguments: [Number; 4], frame: Number },
    /// The same with most things right: the guest's memory is in the place named first.
    Event { number: u8, at: Number, size: u16, low: u16, task: u8, slot: u16, code: u8 },
    /// It sets up the ring of a CPU.
    Ring { cpu: u8, records: u16 },
    /// It writes a record into its ring.
    Record { cpu: u8, kind: u8, depth: u8, low: u16, task: u8, at: Number, sizes: u32, stamp: u16 },
    /// It sets the count of its ring.
    Count { cpu: u8, count: Number },
    /// It asks for a drain.
    Drain { cpu: u8, to: Number, entries: u8 },
    /// It writes memory.
    Write { at: Number, bytes: Bytes },
    /// It writes numbers.
    Words { at: Number, words: [Number; 4] },
    /// It touches shadow.
    Load { at: Number, len: u8 },
    /// It stores to shadow.
    Store { at: Number, bytes: [u8; 8], len: u8 },
    /// It changes the state of its CPU.
    Cpu { state: State, frame: Number, rip: Number, sp: Number },
}

/// How the run is set up.
#[derive(Clone, Copy, Debug, Arbitrary)]
struct Setup {
    mode: u8,
    sync: bool,
    /// Which limit of shadow, and which file with symbols.
    limit: u8,
    quarantine: bool,
    linux: bool,
    regions: bool,
    stop_at: u8,
}

/// Counts findings, and checks each.
#[derive(Clone, Default)]
struct Found(Arc<Mutex<usize>>);

impl Observer for Found {
    fn finding(&mut self, finding: &Finding) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        check(finding);
    }
}

struct NoOthers;

impl OtherVcpus for NoOthers {
    fn pause(&mut self) -> std::result::Result<(), Outcome> {
        Ok(())
    }
}

/// The guest, and Umbra's state of its run.
pub struct World {
    dispatcher: Dispatcher,
    pub cpu: Cpu,
    pub ram: Ram,
    memslots: Windows,
    layout: Layout,
    found: Found,
    settings: Detached,
    /// Results of calls.
    results: [u64; 8],
    next_result: usize,
    /// Records that fit into all rings that were ever set up.
    ring_records: u64,
    exits: u64,
}

impl World {
    /// A guest that has not begun.
    pub fn new(u: &mut Unstructured) -> Result<Self> {
        let setup = Setup::arbitrary(u)?;
        // A full shadow costs most of the time, and is but for comparisons.
        let mode = match setup.mode % 16 {
            0 | 1 => None,
            15 => Some(Mode::Full),
            _ => Some(Mode::PerPage),
        };
        let limit = [None, None, Some(0), Some(2 * CHUNK_BYTES)][usize::from(setup.limit) % 4];
        let settings = Detached {
            memory: *RAM,
            mode,
            notify: if setup.sync { Notify::Sync } else { Notify::Ring },
            shadow_limit: limit.filter(|_| mode == Some(Mode::PerPage)),
            provenance: PROVENANCE,
            quarantine: if setup.quarantine { 64 << 10 } else { 0 },
            cpus: 2,
            linux: setup.linux,
            stop_at: (setup.stop_at > 200).then_some(1),
        };
        show(&settings);
        let layout = Layout::new(*RAM).expect("a size that is allowed");
        let (mut memslots, found) = (Windows::new(layout), Found::default());
        let file = FILES.get(usize::from(setup.limit / 4 % 16)).copied().unwrap_or_default();
        let symbols = Symbols::from_elf(file.to_vec());
        let observer = Box::new(found.clone());
        let dispatcher = Dispatcher::detached(&settings, symbols, &mut memslots, observer);
        let mut world = Self {
            dispatcher: dispatcher.expect("there is host memory for its shadow"),
            cpu: Cpu::default(),
            ram: Ram::new(*RAM).expect("there is host memory"),
            memslots,
            layout,
            found,
            settings,
            results: [0; 8],
            next_result: 0,
            ring_records: 0,
            exits: 0,
        };
        if setup.regions {
            for start in [0, DIRECT_MAP] {
                let _ = world.call(CallNumber::RegionAdd as u32, [start, *RAM, 0, 0]);
            }
        }
        Ok(world)
    }

    /// Takes a step. False if the run ended.
    pub fn step(&mut self, step: &Step) -> bool {
        let ring = |cpu: u8| RINGS + u64::from(cpu % 4) * RING_BYTES;
        match step {
            Step::Call { number, arguments, frame } => {
                self.cpu.regs.rbp = frame.value(self);
                let arguments = arguments.map(|one| one.value(self));
                self.call(u32::from(*number) % 20, arguments)
            }
            Step::Event { number, at, size, low, task, slot, code } => {
                let numbers = [5, 6, 7, 8, 9, 10, 12, 13, 15, 17];
                let number = numbers[usize::from(*number) % numbers.len()];
                let actor = u64::from(*low) | 1 << 16 | u64::from(*task) << 32;
                let (at, slot) = (at.value(self), u64::from(*slot) | u64::from(*code) << 56);
                self.call(number, [at, u64::from(*size) + 1, actor, slot])
            }
            Step::Ring { cpu, records } => {
                let bytes = (u64::from(*records) % (RING_BYTES / RECORD_BYTES) + 1) * RECORD_BYTES;
                self.call(CallNumber::RingSetup as u32, [ring(*cpu), bytes, u64::from(cpu % 4), 0])
            }
            Step::Record { cpu, kind, depth, low, task, at, sizes, stamp } => {
                let ring = GuestAddress(ring(*cpu));
                let count = self.ram.read_u64(ring).unwrap_or(0);
                let place = count % (RING_BYTES / RECORD_BYTES - 1) + 1;
                let mut record = vec![kind % 8, depth % 11];
                record.extend(low.to_le_bytes());
                record.extend(u32::from(*task).to_le_bytes());
                record.extend(at.value(self).to_le_bytes());
                record.extend(sizes.to_le_bytes());
                record.extend(u64::from(*stamp).to_le_bytes());
                self.write(ring.0 + place * RECORD_BYTES, &record);
                self.write(ring.0, &count.wrapping_add(1).to_le_bytes());
                true
            }
            Step::Count { cpu, count } => {
                self.write(ring(*cpu), &count.value(self).to_le_bytes());
                true
            }
            Step::Drain { cpu: 192.., .. } => {
                self.exit(VmExit::IoOut { port: DOORBELL_PORT, data: Data::new(&[0]) })
            }
            Step::Drain { cpu, to, entries } => {
                let (cpu, to) = (u64::from(cpu % 4), to.value(self));
                self.call(CallNumber::RingDrain as u32, [cpu, to, u64::from(*entries), 0])
            }
            Step::Write { at, bytes } => {
                self.write(at.value(self), &bytes.0);
                true
            }
            Step::Words { at, words } => {
                let bytes = words.map(|word| word.value(self).to_le_bytes());
                self.write(at.value(self), bytes.as_flattened());
                true
            }
            Step::Load { at, len } => {
                let gpa = GuestAddress(at.value(self));
                self.exit(VmExit::MmioRead { gpa, len: len % 8 + 1 })
            }
            Step::Store { at, bytes, len } => {
                let data = Data::new(&bytes[..usize::from(len % 8) + 1]);
                self.exit(VmExit::MmioWrite { gpa: GuestAddress(at.value(self)), data })
            }
            Step::Cpu { state, frame, rip, sp } => {
                self.cpu.set(state);
                self.cpu.regs.rip = rip.value(self);
                (self.cpu.regs.rbp, self.cpu.regs.rsp) = (frame.value(self), sp.value(self));
                true
            }
        }
    }

    /// Guest memory, or what the direct map shows of it. Elsewhere nothing happens.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.ram.write(GuestAddress(at.checked_sub(DIRECT_MAP).unwrap_or(at)), bytes);
    }

    /// The value of a number in this guest.
    pub fn value(&self, number: Number) -> u64 {
        number.value(self)
    }

    /// Makes a call. False if the run ended.
    fn call(&mut self, number: u32, [rdi, rsi, rcx, r8]: [u64; 4]) -> bool {
        (self.cpu.regs.rdi, self.cpu.regs.rsi) = (rdi, rsi);
        (self.cpu.regs.rcx, self.cpu.regs.r8) = (rcx, r8);
        let data = Data::new(&number.to_le_bytes());
        let goes_on = self.exit(VmExit::IoOut { port: PORT, data });
        if number == CallNumber::RingSetup as u32 && self.cpu.regs.rax == 0 {
            self.ring_records += rsi / RECORD_BYTES;
        }
        self.results[self.next_result % self.results.len()] = self.cpu.regs.rax;
        self.next_result += 1;
        goes_on
    }

    /// Makes an exit, and checks what it leaves behind. False if the run ended.
    pub fn exit(&mut self, exit: VmExit) -> bool {
        let before = self.events();
        let mut context = ExitContext {
            id: 1,
            cpu: &mut self.cpu,
            ram: &self.ram,
            memslots: &mut self.memslots,
            others: &mut NoOthers,
        };
        let handled = request(|| self.dispatcher.dispatch(exit, &mut context));
        self.exits += 1;
        let taken = self.events().saturating_sub(before);
        assert!(taken <= self.ring_records + 2, "{taken} events of {} records", self.ring_records);
        self.check();
        match handled {
            Ok(()) => true,
            Err(outcome) => {
                let mut text = String::new();
                write!(text, "{outcome}").expect("it is written to memory");
                assert!(!text.chars().any(char::is_control), "{text:?}");
                assert!(text.len() <= 4096, "an outcome of {} bytes", text.len());
                false
            }
        }
    }

    /// Events that were counted.
    fn events(&self) -> u64 {
        let events = self.dispatcher.counts().1;
        events.allocations.saturating_add(events.frees).saturating_add(events.refused)
    }

    /// What always holds.
    fn check(&self) {
        if let Some(limit) = self.settings.shadow_limit {
            let mapped = self.dispatcher.shadow_mapped();
            assert!(mapped <= limit, "{mapped} bytes of shadow are over the limit");
        }
        let provenance = self.dispatcher.provenance();
        let figures = provenance.objects().figures(PROVENANCE);
        assert!(figures.bytes <= PROVENANCE, "provenance takes {} bytes", figures.bytes);
        let quarantine = provenance.quarantine().figures();
        let waits = quarantine.objects <= umbra::provenance::quarantine::MAX_OBJECTS as u64;
        assert!(waits, "{quarantine:?}");
    }

    /// The run ends.
    pub fn finish(mut self) {
        let findings = self.dispatcher.finish(&self.ram);
        self.check();
        assert_eq!(self.dispatcher.counts().0.total, self.exits);
        let found = *self.found.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(findings) = findings {
            assert_eq!(findings.distinct(), found, "each finding was passed on once");
        }
    }
}
