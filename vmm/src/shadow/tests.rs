//! Windows, release and accounting together, with a guest made of a table of memslots.

// Guest memory is a list of ranges, of one or, on purpose, a wrong one.
#![allow(clippy::single_range_in_vec_init, clippy::reversed_empty_ranges)]

use proptest::prelude::*;
use umbra_shadow::{
    Full, Shadow, ShadowMemory, TwoLevel,
    codes::{FREE_PAGE, PAGE_BUSY, PAGE_BYTES, SLAB_FREE, SLAB_REDZONE},
};

use super::{layout::CHUNK_COVERS, *};

mod check_tables;
mod keys;
mod reclaim;

const MIB: u64 = 1 << 20;

struct Memslot {
    gpa: u64,
    host: *mut u8,
    len: u64,
    readonly: bool,
}

/// The memslots that KVM would have, and what it would refuse.
#[derive(Default)]
struct FakeMemslots {
    memslots: Vec<Option<Memslot>>,
    /// Page-shadow stores that a vCPU makes right before it loses a memslot.
    late_stores: Vec<(*mut u8, u8)>,
    refuse: bool,
}

impl Memslots for FakeMemslots {
    fn map(
        &mut self,
        gpa: u64,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<u32, MemslotError> {
        if self.refuse {
            return Err(MemslotError::Exhausted(self.memslots.len() as u32));
        }
        let overlaps =
            |memslot: &Memslot| memslot.gpa < gpa + len && gpa < memslot.gpa + memslot.len;
        assert!(!self.memslots.iter().flatten().any(overlaps), "KVM refuses memslots that overlap");
        assert!(
            gpa.is_multiple_of(4096)
                && (host as u64).is_multiple_of(4096)
                && len.is_multiple_of(4096)
        );
        self.memslots.push(Some(Memslot { gpa, host, len, readonly }));
        Ok(self.memslots.len() as u32 - 1)
    }

    fn unmap(&mut self, memslot: u32) -> Result<(), MemslotError> {
        for (host, value) in self.late_stores.drain(..) {
            // SAFETY: a pointer into a memslot that `pointer` gave; the windows still exist.
            unsafe { host.write_volatile(value) };
        }
        assert!(
            self.memslots[memslot as usize].take().is_some(),
            "memslot {memslot} was not there"
        );
        Ok(())
    }
}

impl FakeMemslots {
    fn live(&self) -> usize {
        self.memslots.iter().flatten().count()
    }

    fn pointer(&self, gpa: u64, write: bool) -> Option<*mut u8> {
        let memslot = self
            .memslots
            .iter()
            .flatten()
            .find(|memslot| (memslot.gpa..memslot.gpa + memslot.len).contains(&gpa))?;
        // SAFETY: inside the memslot, which lies inside a window's mapping.
        (!write || !memslot.readonly)
            .then(|| unsafe { memslot.host.add((gpa - memslot.gpa) as usize) })
    }
}

/// A guest that accesses its windows as a vCPU does: through a memslot, or else by an exit.
struct Guest {
    windows: Windows,
    memslots: FakeMemslots,
    error: Option<ShadowError>,
}

impl Guest {
    fn new(ram: u64, mode: Mode, notify: Notify, limit: Option<u64>) -> Self {
        let mut memslots = FakeMemslots::default();
        let config = WindowsConfig { ram: vec![0..ram], mode, notify, limit };
        let windows = Windows::new(&config, &mut memslots).unwrap();
        Self { windows, memslots, error: None }
    }

    fn store(&mut self, gpa: u64, value: u8) -> Result<FaultOutcome, ShadowError> {
        if let Some(host) = self.memslots.pointer(gpa, true) {
            // SAFETY: a pointer into a memslot, as a vCPU's store would use it.
            unsafe { host.write_volatile(value) };
            return Ok(FaultOutcome::AlreadyMapped);
        }
        let outcome = self.windows.fault(gpa, 1, true, &mut self.memslots)?;
        if outcome != FaultOutcome::Tampering {
            self.windows.apply_write(gpa, &[value])?;
        }
        Ok(outcome)
    }

    fn load(&mut self, gpa: u64) -> Result<u8, ShadowError> {
        if self.memslots.pointer(gpa, false).is_none() {
            self.windows.fault(gpa, 1, false, &mut self.memslots)?;
        }
        let mut value = [0];
        self.windows.read(gpa, &mut value)?;
        Ok(value[0])
    }

    fn page_gpa(&self, addr: u64) -> u64 {
        self.windows.page_window().unwrap().gpa + (addr >> 12)
    }

    fn byte_gpa(&self, addr: u64) -> u64 {
        self.windows.byte_window().gpa + (addr >> 3)
    }

    fn try_store(&mut self, gpa: u64, value: u8) {
        if let Err(error) = self.store(gpa, value) {
            self.error.get_or_insert(error);
        }
    }
}

impl ShadowMemory for Guest {
    fn base(&self) -> u64 {
        0
    }
    fn limit(&self) -> u64 {
        self.windows.model().memory().limit()
    }
    fn page(&self, addr: u64) -> u8 {
        self.windows.model().memory().page(addr)
    }
    fn set_pages(&mut self, addr: u64, pages: u64, value: u8) {
        (0..pages).for_each(|page| self.try_store(self.page_gpa(addr) + page, value));
    }
    fn byte(&self, addr: u64) -> u8 {
        self.windows.model().memory().byte(addr)
    }
    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        (0..granules).for_each(|granule| self.try_store(self.byte_gpa(addr) + granule, value));
    }
}

/// Shadow in a vector, to compare with.
struct Plain(Vec<u8>);

impl ShadowMemory for Plain {
    fn base(&self) -> u64 {
        0
    }
    fn limit(&self) -> u64 {
        self.0.len() as u64 * 8
    }
    fn page(&self, _: u64) -> u8 {
        PAGE_BYTES
    }
    fn set_pages(&mut self, _: u64, _: u64, _: u8) {}
    fn byte(&self, addr: u64) -> u8 {
        self.0[(addr >> 3) as usize]
    }
    fn set_bytes(&mut self, addr: u64, granules: u64, value: u8) {
        let first = (addr >> 3) as usize;
        self.0[first..first + granules as usize].fill(value);
    }
}

/// Reclaims all that is unused, step by step. Returns the bytes.
fn reclaim_all(windows: &mut Windows) -> u64 {
    let mut bytes = 0;
    loop {
        let unused = windows.find_unused().unwrap();
        let end = unused.end_of_pass.is_some();
        bytes += windows.reclaim(unused).unwrap();
        if end {
            return bytes;
        }
    }
}

#[test]
fn chunks_are_mapped_at_the_first_touch() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, None);
    assert_eq!(guest.memslots.live(), 1, "only the page window");
    let gpa = guest.byte_gpa(3 * MIB);
    assert_eq!(guest.store(gpa, SLAB_REDZONE).unwrap(), FaultOutcome::Mapped);
    assert_eq!(guest.store(gpa + 1, SLAB_FREE).unwrap(), FaultOutcome::AlreadyMapped);
    assert_eq!([0, 1, 2].map(|at| guest.load(gpa + at).unwrap()), [SLAB_REDZONE, SLAB_FREE, 0]);
    assert_eq!(guest.memslots.live(), 2);

    // Another vCPU had the same exit.
    assert_eq!(
        guest.windows.fault(gpa, 8, true, &mut guest.memslots).unwrap(),
        FaultOutcome::AlreadyMapped
    );
    // A store across two chunks.
    let edge = guest.byte_gpa(6 * MIB) - 3;
    assert_eq!(
        guest.windows.fault(edge, 8, true, &mut guest.memslots).unwrap(),
        FaultOutcome::Mapped
    );
    guest.windows.apply_write(edge, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let mut back = [0; 8];
    guest.windows.read(edge, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4, 5, 6, 7, 8]);

    let figures = guest.windows.figures().unwrap();
    assert_eq!((figures.faults, figures.byte_mapped_bytes), (3, 3 * CHUNK_BYTES));
    assert_eq!((figures.page_bytes, figures.byte_used_bytes), (4096, 0));
    assert_eq!(figures.byte_resident_bytes, 3 * 4096);
    assert_eq!(figures.unused_share(), 1.0);
}

#[test]
fn accesses_outside_change_nothing() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, None);
    let (page, byte) = (guest.windows.page_window().unwrap(), guest.windows.byte_window());
    for (gpa, len) in [
        (0, 1),
        (page.gpa - 1, 2),
        (page.end() - 1, 2),
        (page.end(), 1),
        (byte.gpa - 1, 2),
        (byte.end() - 4, 8),
        (byte.end(), 1),
        (byte.gpa, byte.bytes + 1),
        (byte.gpa, u64::MAX),
        (u64::MAX, 8),
        (byte.gpa, 0),
    ] {
        let result = guest.windows.fault(gpa, len, true, &mut guest.memslots);
        assert!(
            matches!(result, Err(ShadowError::OutsideWindow { .. })),
            "{gpa:#x}+{len}: {result:?}"
        );
    }
    assert!(guest.windows.apply_write(byte.end() - 4, &[0; 8]).is_err());
    assert!(guest.windows.read(page.end() - 4, &mut [0; 8]).is_err());
    let unmapped = guest.windows.apply_write(byte.gpa + 5, &[0; 8]);
    assert!(
        matches!(unmapped, Err(ShadowError::Unmapped { gpa }) if gpa == byte.gpa + 5),
        "{unmapped:?}"
    );
    assert_eq!(guest.memslots.live(), 1);
    assert_eq!(guest.windows.figures().unwrap().byte_resident_bytes, 0);
    assert!(guest.windows.contains(byte.gpa) && !guest.windows.contains(byte.end()));
}

#[test]
fn a_refused_memslot_is_an_error() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, None);
    guest.memslots.refuse = true;
    let gpa = guest.byte_gpa(0);
    assert!(matches!(guest.store(gpa, 1), Err(ShadowError::Memslot { gpa: at, .. }) if at == gpa));
    assert_eq!(guest.windows.figures().unwrap().byte_mapped_bytes, 0);
    guest.memslots.refuse = false;
    assert_eq!(guest.store(gpa, 1).unwrap(), FaultOutcome::Mapped);
}

#[test]
fn memory_ranges_are_checked() {
    let make = |ram| {
        let config = WindowsConfig { ram, mode: Mode::PerPage, notify: Notify::Ring, limit: None };
        Windows::new(&config, &mut FakeMemslots::default()).map(drop)
    };
    make(vec![0..MIB, 2 * MIB..3 * MIB]).unwrap();
    for ram in [vec![0..0], vec![1..4096], vec![0..MIB, 0..2 * MIB], vec![MIB..0]] {
        assert!(matches!(make(ram), Err(ShadowError::Ram { .. })));
    }
    for ram in [vec![], vec![0..5000], vec![0..u64::MAX]] {
        assert!(matches!(make(ram), Err(ShadowError::Layout(_))));
    }
}

#[test]
fn sync_windows_are_read_only() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Sync, None);
    let (page, byte) = (guest.page_gpa(0x5000), guest.byte_gpa(0x5000));
    for gpa in [page, byte] {
        assert_eq!(guest.store(gpa, PAGE_BYTES).unwrap(), FaultOutcome::Tampering);
        assert!(matches!(guest.windows.apply_write(gpa, &[1]), Err(ShadowError::ReadOnly { .. })));
    }
    guest.windows.poison(0x5010, 0x18, SLAB_REDZONE, &mut guest.memslots).unwrap();
    assert_eq!(guest.memslots.live(), 1, "the guest did not look at it yet");
    assert_eq!(guest.load(page).unwrap(), PAGE_BYTES);
    assert_eq!(
        [1, 2, 4, 5].map(|granule| guest.load(byte + granule).unwrap()),
        [0, SLAB_REDZONE, SLAB_REDZONE, 0]
    );
    assert_eq!(guest.memslots.live(), 2);
    assert_eq!(guest.store(byte, 0).unwrap(), FaultOutcome::Tampering);
    assert_eq!(guest.load(byte + 2).unwrap(), SLAB_REDZONE);

    guest.windows.unpoison(0x5000, 0x1000, &mut guest.memslots).unwrap();
    let figures = guest.windows.figures().unwrap();
    assert_eq!(
        (figures.byte_used_bytes, figures.byte_used_peak_bytes),
        (0, 512),
        "never sampled between"
    );
    assert_eq!((figures.byte_resident_bytes, figures.faults), (4096, 1));
    assert_eq!(reclaim_all(&mut guest.windows), 4096);
}

#[test]
fn compilers_may_store_the_shadow_of_stacks() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Sync, None);
    let (page, byte) = (guest.page_gpa(0x5000), guest.byte_gpa(0x5000));
    let frame = [0xf1, 0xf1, 0, 2, 0xf2, 0xf3, 0xf8, 0];
    let store = |guest: &mut Guest, gpa, data: &[u8]| {
        guest.windows.stack_store(gpa, data, &mut guest.memslots).unwrap()
    };
    assert!(!store(&mut guest, byte, &frame), "no stack yet");
    guest.windows.mark_stack(0x5000, 0x2000, true);
    assert!(store(&mut guest, byte + 508, &frame), "across two pages of the stack");
    assert_eq!(guest.windows.model().first_bad(0x5000 + 510 * 8, 16), Some(0x5000 + 511 * 8 + 2));
    assert!(!store(&mut guest, byte - 4, &frame), "half of it is something else's shadow");
    assert!(!store(&mut guest, byte + 1020, &frame));
    assert!(!store(&mut guest, byte, &[SLAB_REDZONE]) && !store(&mut guest, byte, &[8]));
    assert!(!store(&mut guest, page, &[0]), "page shadow");
    // A large variable made the page untyped; the next frame makes it byte-checked again.
    guest.windows.unpoison(0x5000, 0x1000, &mut guest.memslots).unwrap();
    assert!(store(&mut guest, byte + 3, &[0xf1]));
    assert_eq!(guest.windows.model().first_bad(0x5000, 0x1000), Some(0x5018));
    guest.windows.poison(0x5000, 0x1000, 0xff, &mut guest.memslots).unwrap();
    assert!(!store(&mut guest, byte, &frame), "freed");
    guest.windows.mark_stack(0x5000, 0x2000, false);
    assert!(!store(&mut guest, byte + 512, &frame), "given back");
}

#[test]
fn full_shadow_is_resident_from_the_start() {
    let mut memslots = FakeMemslots::default();
    // With a hole: no memory, no shadow.
    let ram = vec![0..4 * MIB, 12 * MIB..16 * MIB];
    let config = WindowsConfig { ram, mode: Mode::Full, notify: Notify::Ring, limit: None };
    let mut windows = Windows::new(&config, &mut memslots).unwrap();
    assert_eq!((windows.mode(), windows.page_window(), memslots.live()), (Mode::Full, None, 1));
    let byte = windows.byte_window();
    assert!(
        memslots.pointer(byte.gpa, true).is_some()
            && memslots.pointer(byte.gpa + 2 * MIB - 1, true).is_some()
    );
    let figures = windows.figures().unwrap();
    assert_eq!((figures.byte_resident_bytes, figures.page_bytes), (MIB, 0));
    assert_eq!(
        windows.fault(byte.gpa, 8, true, &mut memslots).unwrap(),
        FaultOutcome::AlreadyMapped
    );
    windows.poison(12 * MIB + 5, 27, SLAB_FREE, &mut memslots).unwrap();
    assert_eq!(windows.model().first_bad(12 * MIB, 64), Some(12 * MIB + 5));
    assert_eq!(reclaim_all(&mut windows), 0);
    assert_eq!(windows.model().first_bad(12 * MIB, 64), Some(12 * MIB + 5));

    let config = WindowsConfig { limit: Some(2 * MIB - 1), ..config };
    let over = Windows::new(&config, &mut FakeMemslots::default());
    assert!(matches!(over, Err(ShadowError::Limit { needed, .. }) if needed == 2 * MIB));
}

#[test]
fn the_limit_holds_and_unused_chunks_make_room() {
    let mut guest = Guest::new(16 * MIB, Mode::PerPage, Notify::Ring, Some(2 * CHUNK_BYTES + 4095));
    let chunk = |n: u64| n * CHUNK_COVERS;
    guest.set_pages(chunk(0), 1, PAGE_BYTES);
    guest.set_bytes(chunk(0), 512, SLAB_FREE);
    guest.set_bytes(chunk(1), 512, SLAB_FREE);
    // Chunk 1 is not in use and goes.
    guest.set_pages(chunk(2) + 4096, 1, PAGE_BUSY);
    guest.set_bytes(chunk(2), 1024, SLAB_REDZONE);
    assert!(guest.error.is_none(), "{:?}", guest.error);
    let figures = guest.windows.figures().unwrap();
    assert_eq!(
        (figures.byte_mapped_bytes, figures.byte_mapped_peak_bytes),
        (2 * CHUNK_BYTES, 2 * CHUNK_BYTES)
    );
    assert_eq!((figures.released_bytes, figures.byte_peak_resident_bytes), (4096, 2 * 4096));
    assert_eq!(guest.byte(chunk(0)), SLAB_FREE);
    assert_eq!(guest.byte(chunk(1)), 0);

    // Now both are in use.
    let (third, limit) = (guest.byte_gpa(chunk(3)), 2 * CHUNK_BYTES + 4095);
    for _ in 0..2 {
        let over = guest.windows.fault(third, 8, true, &mut guest.memslots);
        assert!(matches!(
            over,
            Err(ShadowError::Limit { limit: l, needed })
                if l == limit && needed == 3 * CHUNK_BYTES
        ));
    }
    assert_eq!((guest.byte(chunk(0)), guest.byte(chunk(2) + 4096)), (SLAB_FREE, SLAB_REDZONE));
    assert_eq!(guest.memslots.live(), 3);
    guest.set_pages(chunk(0), 1, FREE_PAGE);
    assert_eq!(guest.store(third, 1).unwrap(), FaultOutcome::Mapped);
}

#[test]
fn an_access_does_not_unmap_its_own_first_half() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, Some(CHUNK_BYTES));
    let edge = guest.byte_gpa(CHUNK_COVERS) - 4;
    let result = guest.windows.fault(edge, 8, true, &mut guest.memslots);
    assert!(matches!(result, Err(ShadowError::Limit { .. })), "{result:?}");
    assert!(guest.windows.apply_write(edge, &[0; 8]).is_err());
}

#[test]
fn a_promotion_that_starts_while_a_chunk_is_unmapped_is_not_lost() {
    let mut guest = Guest::new(8 * MIB, Mode::PerPage, Notify::Ring, Some(CHUNK_BYTES));
    guest.set_bytes(0x3000, 512, SLAB_FREE);
    // Another vCPU marks the page after it was looked at, and stores while it has the memslot.
    let page = guest.memslots.pointer(guest.page_gpa(0x3000), true).unwrap();
    let byte = guest.memslots.pointer(guest.byte_gpa(0x3000), true).unwrap();
    guest.memslots.late_stores = vec![(page, PAGE_BUSY), (byte, SLAB_REDZONE)];
    let other = guest.byte_gpa(CHUNK_COVERS);
    let result = guest.windows.fault(other, 1, true, &mut guest.memslots);
    assert!(matches!(result, Err(ShadowError::Limit { .. })), "{result:?}");
    assert_eq!((guest.byte(0x3000), guest.byte(0x3008)), (SLAB_REDZONE, SLAB_FREE));
    assert!(guest.memslots.pointer(guest.byte_gpa(0x3000), true).is_some(), "it is mapped again");
}

#[test]
fn the_limit_binds_the_vmm_too() {
    let mut guest = Guest::new(16 * MIB, Mode::PerPage, Notify::Sync, Some(CHUNK_BYTES));
    let (windows, memslots) = (&mut guest.windows, &mut guest.memslots);
    // Whole pages need no byte shadow, and neither does what is accessible or poisoned alike
    // already.
    windows.poison(0, 16 * MIB, FREE_PAGE, memslots).unwrap();
    windows.poison(0x3000, 0x1000, SLAB_FREE, memslots).unwrap();
    windows.poison(0x3000, 0x1000, FREE_PAGE, memslots).unwrap();
    windows.poison(0x123, 0x5000, FREE_PAGE, memslots).unwrap();
    windows.unpoison(8 * MIB, MIB, memslots).unwrap();
    windows.unpoison(8 * MIB + 5, 77, memslots).unwrap();
    assert_eq!(windows.model().memory().mapped_bytes(), 0);
    windows.unpoison(0x1000, 8, memslots).unwrap();
    assert_eq!(windows.model().memory().mapped_bytes(), CHUNK_BYTES);

    // Both ends need another chunk: nothing is changed.
    let result = windows.unpoison(3 * MIB + 8, 2 * MIB, memslots);
    assert!(matches!(result, Err(ShadowError::Limit { .. })), "{result:?}");
    assert_eq!(windows.model().first_bad(3 * MIB + 4096, 1), Some(3 * MIB + 4096));
    // Room is made once the first page is a whole one again.
    windows.unpoison(0, 0x2000, memslots).unwrap();
    windows.unpoison(3 * MIB + 8, 8, memslots).unwrap();
    assert_eq!(windows.model().first_bad(3 * MIB + 8, 9), Some(3 * MIB + 16));
    assert_eq!(windows.figures().unwrap().byte_mapped_peak_bytes, CHUNK_BYTES);

    for (gpa, len) in [(16 * MIB, 1), (16 * MIB - 1, 2), (u64::MAX, 2), (0, u64::MAX)] {
        assert!(matches!(
            windows.poison(gpa, len, FREE_PAGE, memslots),
            Err(ShadowError::Range(_))
        ));
    }
    assert!(matches!(windows.poison(8, 8, 7, memslots), Err(ShadowError::Range(_))));
    windows.poison(u64::MAX, 0, FREE_PAGE, memslots).unwrap();
}

/// One thing that happens to the shadow.
#[derive(Clone, Debug)]
enum Step {
    Poison(u64, u64, u8),
    Unpoison(u64, u64),
    Release,
}

const RAM: u64 = 8 * MIB;

/// Ranges that often share pages, cover pages as a whole, or lie at the edge of a chunk or of
/// memory.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let start = prop_oneof![
        (0..4u64, 0..0x6000u64).prop_map(|(chunk, at)| chunk * CHUNK_COVERS + at),
        (1..=4u64, 0..0x6000u64).prop_map(|(chunk, at)| chunk * CHUNK_COVERS - at),
    ];
    let start = (start, any::<bool>()).prop_map(|(at, page)| if page { at & !0xfff } else { at });
    let len = prop_oneof![0..300u64, (0..12u64).prop_map(|pages| pages * 4096), 0..0x5000u64];
    let range = (start, len).prop_map(|(start, len)| (start, len.min(RAM - start)));
    let step = prop_oneof![
        3 => (range.clone(), 0x80..=0xffu8)
            .prop_map(|((start, len), code)| Step::Poison(start, len, code)),
        3 => range.prop_map(|(start, len)| Step::Unpoison(start, len)),
        1 => Just(Step::Release),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// With any reclaim and any writer, the shadow agrees with a plain one, the limit holds, and no
    /// more is resident than is mapped.
    #[test]
    fn nothing_live_is_ever_taken(steps in steps(), sync: bool, chunks in 1..=4u64) {
        let notify = if sync { Notify::Sync } else { Notify::Ring };
        let limit = chunks * CHUNK_BYTES;
        let mut guest = TwoLevel::new(Guest::new(RAM, Mode::PerPage, notify, Some(limit)));
        let mut plain = Full::new(Plain(vec![0; (RAM / 8) as usize]));
        let mut last_peak = 0;
        for step in steps {
            let result = match step {
                Step::Release => {
                    reclaim_all(&mut guest.memory_mut().windows);
                    let figures = guest.memory_mut().windows.figures().unwrap();
                    let used_pages = figures.byte_used_bytes / 512;
                    prop_assert!(figures.byte_resident_bytes <= used_pages * 4096, "{figures:?}");
                    prop_assert!(figures.byte_peak_resident_bytes >= last_peak);
                    last_peak = figures.byte_peak_resident_bytes;
                    Ok(())
                }
                Step::Poison(gpa, len, code) if sync => {
                    let Guest { windows, memslots, .. } = guest.memory_mut();
                    windows.poison(gpa, len, code, memslots)
                }
                Step::Unpoison(gpa, len) if sync => {
                    let Guest { windows, memslots, .. } = guest.memory_mut();
                    windows.unpoison(gpa, len, memslots)
                }
                Step::Poison(gpa, len, code) => {
                    guest.poison(gpa, len, code).unwrap();
                    guest.memory_mut().error.take().map_or(Ok(()), Err)
                }
                Step::Unpoison(gpa, len) => {
                    guest.unpoison(gpa, len).unwrap();
                    guest.memory_mut().error.take().map_or(Ok(()), Err)
                }
            };
            prop_assert!(guest.memory().windows.model().memory().mapped_bytes() <= limit);
            match result {
                Err(ShadowError::Limit { .. }) if sync => continue, // Unchanged.
                // The guest is stopped in the middle.
                Err(ShadowError::Limit { .. }) => return Ok(()),
                other => prop_assert!(other.is_ok(), "{other:?}"),
            }
            match step {
                Step::Poison(gpa, len, code) => plain.poison(gpa, len, code).unwrap(),
                Step::Unpoison(gpa, len) => plain.unpoison(gpa, len).unwrap(),
                Step::Release => {}
            }
        }
        let model = guest.memory().windows.model();
        // No step reaches further from the edge of a chunk.
        let near = |addr: &u64| !(0x13000..CHUNK_COVERS - 0x7000).contains(&(addr % CHUNK_COVERS));
        for addr in (0..RAM).step_by(8).filter(near) {
            prop_assert_eq!(model.state(addr), plain.state(addr), "at {:#x}", addr);
        }
    }
}
