//! The windows through which a guest sees its shadow, and the policy of what backs them.

use std::io;
use std::ops::Range;

use umbra_shadow::{
    Shadow, ShadowMemory,
    codes::{self, GRANULE_SHIFT, PAGE_SHIFT, PAGE_SIZE, PAGE_VALID, POISON_MIN},
    group::Entry,
};

use super::{
    accounting::{Accounting, Figures},
    check_tables::{CheckTables, CheckedRegion, TableError},
    error::ShadowError,
    layout::{CHUNK_BYTES, CHUNK_COVERS, Layout, Window},
    mapping::Mapping,
    memory::ShadowBacking,
    memslots::Memslots,
    model::Model,
    reclaim::ByteReclaim,
    stack_pages::StackPages,
};

/// Which shadow a guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One byte for each page, and byte shadow only where a page needs it.
    PerPage,
    /// Byte shadow for all memory, resident from the start: KASAN's own layout, for comparison.
    Full,
}

/// Who writes the shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// The guest.
    Ring,
    /// The VMM; the windows are read-only for the guest.
    Sync,
}

/// Configuration of the windows.
#[derive(Clone, Debug)]
pub struct WindowsConfig {
    /// The guest-physical ranges that are RAM, in order, page-aligned.
    pub ram: Vec<Range<u64>>,
    /// Which shadow.
    pub mode: Mode,
    /// Who writes it.
    pub notify: Notify,
    /// The most byte shadow that may be mapped at a time, in bytes. Less than a chunk allows none.
    /// The default is [`Layout::default_limit`], which only virtual memory can reach.
    pub limit: Option<u64>,
}

/// Result of a guest's access to a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Shadow was mapped there; the access can be completed.
    Mapped,
    /// It was mapped before, by another vCPU that came first; the access can be completed.
    AlreadyMapped,
    /// A store to a window that is read-only for the guest. Nothing was changed.
    Tampering,
}

/// A place in one of the windows.
pub(super) enum WindowOffset {
    Page(u64),
    Byte(u64),
}

/// Chunks that are looked at for what they use, when another one is mapped.
const SAMPLED: u32 = 16;
/// Pages of byte shadow in a chunk.
const CHUNK_PAGES: u64 = CHUNK_BYTES / PAGE_SIZE;
/// Most chunks that are unmapped at once to make room: each takes the host a while.
const UNMAPPED: usize = 16;
/// What fails if the kernel does not tell how much of a file is resident.
const RESIDENT: &str = "ask how much shadow is resident";

/// All shadow memory of a guest.
///
/// One thread at a time changes it; the guest's vCPUs access the memory behind it meanwhile.
#[derive(Debug)]
pub struct Windows {
    pub(super) model: Model,
    pub(super) accounting: Accounting,
    pub(super) reclaim: ByteReclaim,
    pub(super) stack_pages: StackPages,
    /// Those of a check shadow, once the guest has asked for them.
    check: Option<CheckTables>,
    pub(super) notify: Notify,
    /// The next key for virtual memory.
    pub(super) next_key: u64,
    limit: u64,
    /// The memslot of each chunk that the guest can see.
    memslots: Vec<Option<u32>>,
    /// The chunk at which the next sample of what is used begins.
    next_sample: usize,
}

impl Windows {
    /// Reserves the shadow and maps what is there from the start: the page window, or the whole of
    /// a full shadow, which is made resident too.
    ///
    /// # Errors
    /// The configuration is not possible, or the host refuses memory or a memslot.
    pub fn new(config: &WindowsConfig, memslots: &mut dyn Memslots) -> Result<Self, ShadowError> {
        let mut ram_end = 0;
        for Range { start, end } in &config.ram {
            if *start < ram_end || start >= end || !start.is_multiple_of(PAGE_SIZE) {
                return Err(ShadowError::Ram { start: *start, end: *end });
            }
            ram_end = *end;
        }
        let layout = Layout::new(ram_end)?;
        let reserve = |bytes, map: fn(u64) -> io::Result<Mapping>| {
            map(bytes).map_err(|source| ShadowError::Reserve { bytes, source })
        };
        let limit = config.limit.unwrap_or(layout.default_limit());
        let readonly = config.notify == Notify::Sync;
        // Nothing of a full shadow is ever given back.
        let mut byte = match config.mode {
            Mode::PerPage => reserve(layout.byte.bytes, Mapping::of_file)?,
            Mode::Full => reserve(layout.byte.bytes, Mapping::new)?,
        };
        let memslot_error = |gpa| move |source| ShadowError::Memslot { gpa, source };
        let outside = |gpa, len| move || ShadowError::OutsideWindow { gpa, len };

        let page = match config.mode {
            Mode::PerPage => {
                let mut page = reserve(layout.page.bytes, Mapping::new)?;
                let bytes = layout.ram_page_bytes();
                page.touch(0, bytes);
                let host = page.pointer(0, bytes).ok_or_else(outside(layout.page.gpa, bytes))?;
                memslots
                    .map(layout.page.gpa, host, bytes, readonly)
                    .map_err(memslot_error(layout.page.gpa))?;
                Some(page)
            }
            Mode::Full => {
                let bytes = layout.ram_chunks() as u64 * CHUNK_BYTES;
                if bytes > limit {
                    return Err(ShadowError::Limit { limit, needed: bytes });
                }
                for Range { start, end } in &config.ram {
                    byte.touch(start / 8, (end - start) / 8);
                }
                let host = byte.pointer(0, bytes).ok_or_else(outside(layout.byte.gpa, bytes))?;
                memslots
                    .map(layout.byte.gpa, host, bytes, readonly)
                    .map_err(memslot_error(layout.byte.gpa))?;
                None
            }
        };

        let page_bytes = if page.is_some() { layout.ram_page_bytes() } else { 0 };
        let accounting = Accounting::new(layout.chunks(), page_bytes);
        let mut shadow = ShadowBacking::new(layout, page, byte);
        if config.mode == Mode::Full {
            for chunk in 0..layout.ram_chunks() {
                shadow.set_mapped(chunk, true);
            }
        }
        Ok(Self {
            next_key: layout.virtual_start,
            model: Model::new(shadow),
            accounting,
            reclaim: ByteReclaim::default(),
            stack_pages: StackPages::default(),
            check: None,
            notify: config.notify,
            limit,
            memslots: vec![None; layout.chunks()],
            next_sample: 0,
        })
    }

    /// Which shadow it is.
    pub fn mode(&self) -> Mode {
        match self.model {
            Model::PerPage(_) => Mode::PerPage,
            Model::Full(_) => Mode::Full,
        }
    }

    /// Who writes it.
    pub fn notify(&self) -> Notify {
        self.notify
    }

    /// Where the windows lie.
    pub fn layout(&self) -> &Layout {
        self.model.memory().layout()
    }

    /// The page window; a full shadow has none.
    pub fn page_window(&self) -> Option<Window> {
        (self.mode() == Mode::PerPage).then_some(self.model.memory().layout().page)
    }

    /// The byte window.
    pub fn byte_window(&self) -> Window {
        self.model.memory().layout().byte
    }

    /// Whether `gpa` lies in one of the windows.
    pub fn contains(&self, gpa: u64) -> bool {
        self.place(gpa, 1).is_ok()
    }

    /// Whether `gpa` lies in or between the windows, where a look-up for an address beyond memory
    /// lands.
    pub fn is_reserved(&self, gpa: u64) -> bool {
        let layout = self.model.memory().layout();
        (layout.page.gpa..layout.end()).contains(&gpa)
    }

    /// The shadow, for checks and reports, by key. Safe while vCPUs run, but in ring mode they
    /// may change it between two reads.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Poisons guest memory on the guest's behalf, in sync mode. Do not call it in ring mode, where
    /// guests write the shadow themselves and may be in a promotion.
    ///
    /// # Errors
    /// The range or the code is wrong, or the limit is reached: the shadow is unchanged then.
    pub fn poison(
        &mut self,
        gpa: u64,
        len: u64,
        code: u8,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        self.make_room_for_change(gpa, len, code, memslots)?;
        self.model.poison(gpa, len, code)?;
        if !codes::on_stack(code) {
            self.stack_pages.set(gpa, len, false);
        }
        Ok(())
    }

    /// Unpoisons guest memory on the guest's behalf; see [`Self::poison`].
    ///
    /// # Errors
    /// The range is wrong, or the limit is reached: the shadow is unchanged then.
    pub fn unpoison(
        &mut self,
        gpa: u64,
        len: u64,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        self.make_room_for_change(gpa, len, PAGE_VALID, memslots)?;
        Ok(self.model.unpoison(gpa, len)?)
    }

    /// A guest touched `len` bytes of a window at `gpa` and had no memslot there, or no right to
    /// write. Maps all chunks of the access. Safe while other vCPUs run.
    ///
    /// # Errors
    /// The access is not inside a window, the limit is reached, or the host refuses.
    pub fn fault(
        &mut self,
        gpa: u64,
        len: u64,
        write: bool,
        memslots: &mut dyn Memslots,
    ) -> Result<FaultOutcome, ShadowError> {
        let place = self.place(gpa, len)?;
        if write && self.notify == Notify::Sync {
            return Ok(FaultOutcome::Tampering);
        }
        let WindowOffset::Byte(at) = place else { return Ok(FaultOutcome::AlreadyMapped) };
        let chunks = chunks_of(at, len);
        let mut outcome = FaultOutcome::AlreadyMapped;
        for chunk in chunks.clone() {
            if self.on_demand(chunk)
                && self.memslots.get(chunk).is_some_and(|memslot| memslot.is_none())
            {
                self.make_room(chunk, &chunks, memslots)?;
                self.map_chunk(chunk, memslots)?;
                self.accounting.count_fault();
                self.sample_some_used();
                outcome = FaultOutcome::Mapped;
            }
        }
        Ok(outcome)
    }

    /// Completes a guest's store of `data` to a window at `gpa`, which [`Self::fault`] was called
    /// for. Nothing else may have been done to the windows between the two: it could have unmapped
    /// the chunk.
    ///
    /// # Errors
    /// The store is not inside a window, or the windows are read-only.
    pub fn apply_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), ShadowError> {
        if self.notify == Notify::Sync {
            return Err(ShadowError::ReadOnly { gpa });
        }
        let outside = ShadowError::OutsideWindow { gpa, len: data.len() as u64 };
        match self.mapped_place(gpa, data.len() as u64)? {
            WindowOffset::Page(at) => {
                self.model.memory_mut().page.as_mut().and_then(|page| page.write(at, data))
            }
            WindowOffset::Byte(at) => self.model.memory_mut().byte.write(at, data),
        }
        .ok_or(outside)
    }

    /// Completes a guest's load of `data` from a window at `gpa`, which [`Self::fault`] was called
    /// for.
    ///
    /// # Errors
    /// The load is not inside a window.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), ShadowError> {
        let outside = ShadowError::OutsideWindow { gpa, len: data.len() as u64 };
        match self.mapped_place(gpa, data.len() as u64)? {
            WindowOffset::Page(at) => {
                self.model.memory().page.as_ref().and_then(|page| page.read(at, data))
            }
            WindowOffset::Byte(at) => self.model.memory().byte.read(at, data),
        }
        .ok_or(outside)
    }

    /// The guest's entry for a slot of its top-level table, or 0 if the check shadow does not need
    /// that slot. The first time this makes the check shadow's tables, with `regions` in them.
    ///
    /// # Errors
    /// A region does not fit, or the host refuses memory or a memslot.
    pub fn top_level(
        &mut self,
        slot: u16,
        regions: impl Iterator<Item = CheckedRegion>,
        memslots: &mut dyn Memslots,
    ) -> Result<u64, ShadowError> {
        if let Some(tables) = &self.check {
            return Ok(tables.top_level(slot));
        }
        let has_page = self.page_window().is_some();
        let mut tables = CheckTables::new(self.layout(), has_page, memslots)?;
        for region in regions {
            if let Err(error) = self.add_to_tables(&mut tables, region) {
                tables.remove(memslots)?;
                return Err(error.into());
            }
        }
        Ok(self.check.insert(tables).top_level(slot))
    }

    /// Whether there is a check shadow.
    pub fn has_check_shadow(&self) -> bool {
        self.check.is_some()
    }

    /// Adds a region to the check shadow's tables, if there are any. Every vCPU stands still.
    ///
    /// # Errors
    /// It does not fit, or the host refuses a memslot.
    pub fn add_checked(
        &mut self,
        region: CheckedRegion,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        let Some(mut tables) = self.check.take() else { return Ok(()) };
        let added = self.add_to_tables(&mut tables, region);
        let renewed = tables.renew(memslots);
        self.check = Some(tables);
        renewed?;
        Ok(added?)
    }

    fn add_to_tables(
        &self,
        tables: &mut CheckTables,
        region: CheckedRegion,
    ) -> Result<(), TableError> {
        let shadow = self.model.memory();
        let (patterns, byte) = (tables.patterns(), shadow.layout().byte.gpa);
        let entry_of = |group: u64| {
            let real = byte + group * PAGE_SIZE;
            match &shadow.page {
                Some(page) => Entry::of(page.load_u64(group * 8).unwrap_or(0), patterns, real),
                None => Entry::real(real),
            }
        };
        tables.add(region, entry_of)
    }

    /// Asks the kernel how much byte shadow is resident, in bytes, and keeps the peak.
    ///
    /// # Errors
    /// It does not answer.
    pub fn sample(&mut self) -> Result<u64, ShadowError> {
        self.accounting.sample(self.model.memory()).map_err(ShadowError::host(RESIDENT))
    }

    /// Looks what the next few chunks use. In `ring` mode the VMM does not see changes.
    fn sample_some_used(&mut self) {
        for _ in 0..SAMPLED {
            let Some(chunk) = self.model.memory().next_mapped(self.next_sample) else {
                self.next_sample = 0;
                return;
            };
            self.next_sample = chunk + 1;
            self.accounting.sample_used(self.model.memory(), chunk);
        }
    }

    /// Host memory of the shadow at this moment: page shadow, byte shadow that is mapped, resident,
    /// and used by byte-checked pages, in bytes.
    ///
    /// # Errors
    /// As for [`Self::sample`].
    pub fn sample_all(&mut self) -> Result<[u64; 4], ShadowError> {
        let resident = self.sample()?;
        let shadow = self.model.memory();
        Ok([self.accounting.page_bytes(), shadow.mapped_bytes(), resident, shadow.used_bytes()])
    }

    /// The costs of the shadow now.
    ///
    /// # Errors
    /// As for [`Self::sample`].
    pub fn figures(&mut self) -> Result<Figures, ShadowError> {
        let check = self.check.as_ref().map_or(Ok(0), CheckTables::resident_bytes);
        check
            .and_then(|check| self.accounting.figures(self.model.memory(), check))
            .map_err(ShadowError::host(RESIDENT))
    }

    /// The place of `len` bytes at `gpa`, if all of it is shadow of RAM, or of virtual memory that
    /// has a key.
    pub(super) fn place(&self, gpa: u64, len: u64) -> Result<WindowOffset, ShadowError> {
        let layout = self.model.memory().layout();
        let shadow = |at: &u64, ram: u64, shift: u32| {
            at + len <= ram
                || *at >= layout.virtual_start >> shift && at + len <= self.next_key >> shift
        };
        let page = self.page_window().and_then(|window| window.offset(gpa, len));
        let page = page
            .filter(|at| shadow(at, layout.ram_page_bytes(), PAGE_SHIFT))
            .map(WindowOffset::Page);
        let byte = || {
            let ram = layout.ram_chunks() as u64 * CHUNK_BYTES;
            let at = self.byte_window().offset(gpa, len)?;
            shadow(&at, ram, GRANULE_SHIFT).then_some(WindowOffset::Byte(at))
        };
        page.or_else(byte).filter(|_| len > 0).ok_or(ShadowError::OutsideWindow { gpa, len })
    }

    /// Whether `chunk` is mapped on its first touch. In a full shadow, those for RAM are mapped
    /// from the start.
    fn on_demand(&self, chunk: usize) -> bool {
        self.mode() == Mode::PerPage || chunk >= self.model.memory().layout().first_virtual_chunk()
    }

    fn mapped_place(&self, gpa: u64, len: u64) -> Result<WindowOffset, ShadowError> {
        let place = self.place(gpa, len)?;
        if let WindowOffset::Byte(at) = place
            && let Some(chunk) =
                chunks_of(at, len).find(|chunk| !self.model.memory().is_mapped(*chunk))
        {
            let first = self.byte_window().gpa + chunk as u64 * CHUNK_BYTES;
            return Err(ShadowError::Unmapped { gpa: first.max(gpa) });
        }
        Ok(place)
    }

    fn map_chunk(&mut self, chunk: usize, memslots: &mut dyn Memslots) -> Result<(), ShadowError> {
        let at = chunk as u64 * CHUNK_BYTES;
        let gpa = self.byte_window().gpa + at;
        let outside = ShadowError::OutsideWindow { gpa, len: CHUNK_BYTES };
        let host = self.model.memory().byte.pointer(at, CHUNK_BYTES).ok_or(outside)?;
        // Before the memslot: a new chunk may have to be filled before the guest sees it.
        let before = self.model.memory().is_mapped(chunk);
        self.model.memory_mut().set_mapped(chunk, true);
        match memslots.map(gpa, host, CHUNK_BYTES, self.notify == Notify::Sync) {
            Ok(memslot) => {
                if let Some(entry) = self.memslots.get_mut(chunk) {
                    *entry = Some(memslot);
                }
                Ok(())
            }
            Err(source) => {
                self.model.memory_mut().set_mapped(chunk, before);
                Err(ShadowError::Memslot { gpa, source })
            }
        }
    }

    /// Counts those chunks as mapped that setting `len` bytes at `gpa` to `value` will write. Only
    /// pages that the range covers in part get byte shadow, so there are at most two; in a full
    /// shadow all pages do.
    fn make_room_for_change(
        &mut self,
        gpa: u64,
        len: u64,
        value: u8,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        // The model reports a wrong range or code.
        if value != PAGE_VALID && value < POISON_MIN {
            return Ok(());
        }
        let Some(last) = len.checked_sub(1).and_then(|more| gpa.checked_add(more)) else {
            return Ok(());
        };
        if last >= self.model.memory().limit() {
            return Ok(());
        }
        let chunk = |addr| (addr / CHUNK_COVERS) as usize;
        let keep = chunk(gpa)..chunk(last) + 1;
        if self.mode() == Mode::Full {
            for chunk in keep.clone() {
                self.make_room(chunk, &keep, memslots)?;
                self.model.memory_mut().set_mapped(chunk, true);
            }
            return Ok(());
        }
        let first_partial = !gpa.is_multiple_of(PAGE_SIZE);
        let last_partial = last % PAGE_SIZE != PAGE_SIZE - 1;
        for (addr, partial) in [(gpa, first_partial), (last, last_partial)] {
            if partial && self.model.memory().page(addr) != value {
                self.make_room(chunk(addr), &keep, memslots)?;
                self.model.memory_mut().set_mapped(chunk(addr), true);
            }
        }
        Ok(())
    }

    /// Makes room for `chunk` within the limit. If needed, unmaps some unused ones but `keep`.
    pub(super) fn make_room(
        &mut self,
        chunk: usize,
        keep: &Range<usize>,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        if self.model.memory().is_mapped(chunk)
            || self.model.memory().mapped_bytes() + CHUNK_BYTES <= self.limit
        {
            return Ok(());
        }
        self.unmap_unused(keep, memslots)?;
        let needed = self.model.memory().mapped_bytes() + CHUNK_BYTES;
        if needed > self.limit {
            return Err(ShadowError::Limit { limit: self.limit, needed });
        }
        Ok(())
    }

    /// Whether a page of byte shadow, counted from the first of the window, is used by a page that
    /// is byte-checked or on its way to be. With a check shadow also if the group's entry still
    /// points there: the group is in use until the guest exchanges that.
    pub(super) fn shadow_page_in_use(&self, page: u64) -> bool {
        let (chunk, in_chunk) = (page / CHUNK_PAGES, page % CHUNK_PAGES);
        self.model.memory().shadow_page_in_use(chunk as usize, in_chunk) || self.is_real(page)
    }

    fn chunk_in_use(&self, chunk: usize) -> bool {
        let first = chunk as u64 * CHUNK_PAGES;
        self.model.memory().chunk_in_use(chunk)
            || (first..first + CHUNK_PAGES).any(|page| self.is_real(page))
    }

    fn is_real(&self, page: u64) -> bool {
        self.check.as_ref().is_some_and(|tables| tables.is_real(page))
    }

    /// Unmaps some chunks other than `keep` without byte-checked pages, and reclaims their host
    /// memory.
    ///
    /// Other vCPUs may run meanwhile. One of them may start a promotion after the first check of a
    /// chunk. So the page shadow is checked again after the memslot was removed. A vCPU stores to
    /// byte shadow only after it has marked the page `PAGE_BUSY`. So an earlier promotion is seen
    /// now, and a later one faults and waits for this thread.
    fn unmap_unused(
        &mut self,
        keep: &Range<usize>,
        memslots: &mut dyn Memslots,
    ) -> Result<(), ShadowError> {
        let unused: Vec<usize> = self
            .model
            .memory()
            .mapped_chunks()
            .filter(|chunk| !keep.contains(chunk) && !self.chunk_in_use(*chunk))
            .take(UNMAPPED)
            .collect();
        for chunk in unused {
            let at = chunk as u64 * CHUNK_BYTES;
            if let Some(memslot) = self.memslots.get_mut(chunk).and_then(Option::take) {
                let gpa = self.byte_window().gpa + at;
                memslots.unmap(memslot).map_err(|source| ShadowError::Memslot { gpa, source })?;
                if self.chunk_in_use(chunk) {
                    self.map_chunk(chunk, memslots)?;
                    continue;
                }
            }
            self.discard(std::slice::from_ref(&(at..at + CHUNK_BYTES)))?;
            self.accounting.sample_used(self.model.memory(), chunk);
            self.model.memory_mut().set_mapped(chunk, false);
        }
        Ok(())
    }
}

/// The chunks that `len` bytes at `at` of the byte window touch. `len` is not 0, and the end inside
/// the window.
fn chunks_of(at: u64, len: u64) -> Range<usize> {
    (at / CHUNK_BYTES) as usize..((at + len - 1) / CHUNK_BYTES + 1) as usize
}
