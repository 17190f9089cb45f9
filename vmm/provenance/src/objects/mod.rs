//! Provenance: which objects a guest allocated and freed, where, by which task and from which call
//! stack.
//!
//! Everything here comes from the guest and is bounded: freed objects are forgotten first, those of
//! the page whose last free is the longest ago; then new ones are not remembered. Both are counted.

mod found;
mod origins;
mod page;
mod record;
mod table;
#[cfg(test)]
mod tests;

use std::iter::successors;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use umbra_shadow::codes::{GRANULE, PAGE_SIZE};

use super::heap;
use super::history::{Allocation, Event};
use super::names::{TaskNames, sanitize};
use super::stacks::StackId;
pub use found::{Cache, FoundObject, ObjectEvent, Previous, ShadowHint};
use origins::{Origin, Origins};
use record::{Record, When};
use table::{Found, Table};

/// How far from an object an address may lie to be explained by it, in bytes.
const NEARBY: u64 = 4096;

/// How many objects that do not fit are passed over in a search.
const PASSED_OVER: usize = 64;

/// Host memory for provenance unless a setting says otherwise, in bytes.
pub const DEFAULT_BUDGET: u64 = 64 << 20;

/// How much host memory there is for it, in bytes, names aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectLimits {
    /// For the objects, live and freed.
    pub objects: usize,
    /// For who made work that has to do with some of them.
    pub related: usize,
    /// For the call stacks, and the tasks they are of.
    pub stacks: usize,
    /// Task names: not bytes, but how many there may be. Up to 128 bytes each.
    pub tasks: usize,
}

impl ObjectLimits {
    /// Shares out so many bytes.
    pub fn of_budget(bytes: u64) -> Self {
        let bytes = bytes.min(1 << 40) as usize;
        let (related, stacks) = (bytes / 8, (bytes / 4).min(1 << 32));
        Self { objects: bytes - related - bytes / 4, related, stacks, tasks: 1 << 16 }
    }
}

impl Default for ObjectLimits {
    fn default() -> Self {
        Self::of_budget(DEFAULT_BUDGET)
    }
}

/// What happened to objects, and what could not be remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ObjectCounts {
    /// Allocations.
    pub allocations: u64,
    /// Frees.
    pub frees: u64,
    /// Frees of addresses at which no object was known.
    pub unknown_frees: u64,
    /// Frees of objects that were free.
    pub repeated_frees: u64,
    /// Freed objects forgotten to make room. In JSON it is `evicted`.
    #[serde(rename = "evicted")]
    pub forgotten: u64,
    /// Objects not remembered because the table was full of live ones.
    pub dropped: u64,
    /// Call stacks not remembered because their table was full.
    pub lost_stacks: u64,
    /// Stacks of related work for addresses at which no object was known.
    pub unknown_related: u64,
}

/// What is remembered, and what that takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ProvenanceFigures {
    /// The most host memory that it may take, in bytes.
    pub budget_bytes: u64,
    /// What it takes, in bytes, with what the allocator adds; but for names, and 18 KiB of caches
    /// that there always are.
    pub bytes: u64,
    /// Objects that are allocated.
    pub live: u64,
    /// Objects that were freed.
    pub freed: u64,
    /// Different call stacks.
    pub stacks: u64,
    /// What happened, and what was dropped.
    #[serde(flatten)]
    pub counts: ObjectCounts,
}

/// Most pages whose freed objects an event forgets to make room.
const PAGES_FORGOTTEN: usize = 8;

/// Most objects with related work in so many bytes: a hash map may grow when it is half full.
fn most_related(bytes: usize) -> usize {
    let buckets = (2..40).map(|shift| 1 << shift);
    let fits =
        |buckets: &usize| heap::taken(heap::of_buckets::<u64, [Origin; 2]>(*buckets)) <= bytes;
    buckets.take_while(fits).last().map_or(0, |buckets| buckets * 7 / 16)
}

/// All objects that are remembered, by key. No two overlap.
#[derive(Debug)]
pub struct Objects {
    table: Table,
    origins: Origins,
    /// Of few objects: who made work that has to do with them, the last one first.
    related: HashMap<u64, [Origin; 2], RandomState>,
    most_related: usize,
    /// Names of caches, and bytes of their object slots, by id.
    caches: Vec<Option<(String, u64)>>,
    tasks: TaskNames,
    /// Bytes for the table of objects.
    most: usize,
    counts: ObjectCounts,
    /// Granules of redzone of all live objects, now and at most.
    redzones: u64,
    redzones_peak: u64,
}

impl Default for Objects {
    fn default() -> Self {
        Self::new(ObjectLimits::default())
    }
}

impl Objects {
    /// An empty table.
    pub fn new(limits: ObjectLimits) -> Self {
        Self {
            table: Table::default(),
            origins: Origins::new(limits.stacks),
            related: HashMap::default(),
            most_related: most_related(limits.related),
            caches: Vec::new(),
            tasks: TaskNames::new(limits.tasks),
            most: limits.objects,
            counts: ObjectCounts::default(),
            redzones: 0,
            redzones_peak: 0,
        }
    }

    /// Names a cache and says how many bytes one of its object slots has.
    pub fn name_cache(&mut self, id: u16, name: &[u8], object_size: u64) {
        let id = usize::from(id);
        if self.caches.len() <= id {
            self.caches.resize(id + 1, None);
        }
        self.caches[id] = Some((sanitize(name), object_size));
    }

    /// The name of a cache, and the bytes of its object slots.
    #[inline]
    fn cache(&self, id: u16) -> Option<&(String, u64)> {
        self.caches.get(usize::from(id))?.as_ref()
    }

    /// Names a task.
    pub fn name_task(&mut self, task: u32, name: &[u8]) {
        self.tasks.set(task, name);
    }

    /// A task's name, printable ASCII.
    pub fn task_name(&self, task: u32) -> Option<&str> {
        self.tasks.get(task)
    }

    /// What happened so far.
    pub fn counts(&self) -> ObjectCounts {
        ObjectCounts { lost_stacks: self.origins.lost(), ..self.counts }
    }

    /// What is remembered, under a budget of so many bytes.
    pub fn figures(&self, budget_bytes: u64) -> ProvenanceFigures {
        let bytes =
            self.table.bytes() + self.origins.bytes() + heap::taken(self.related.allocation_size());
        ProvenanceFigures {
            budget_bytes,
            bytes: bytes as u64,
            live: (self.table.len() - self.table.freed()) as u64,
            freed: self.table.freed() as u64,
            stacks: self.origins.stacks() as u64,
            counts: self.counts(),
        }
    }

    /// Bytes of redzone behind live objects, now and at most: what their slots have beyond what
    /// their caches hand out.
    pub fn redzone_bytes(&self) -> (u64, u64) {
        (self.redzones * GRANULE, self.redzones_peak * GRANULE)
    }

    /// Objects remembered now.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether none is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Distinct call stacks remembered.
    pub fn stacks(&self) -> usize {
        self.origins.stacks()
    }

    /// An object was allocated. Objects that were there before are forgotten.
    pub fn allocated(&mut self, new: Allocation, by: &Event) {
        let Allocation { key, size, slot, cache } = new;
        self.counts.allocations = self.counts.allocations.saturating_add(1);
        // What the cache would hand out anyway is no redzone, nor the rest of the last page of an
        // object that has pages of its own.
        let of_cache = self.cache(cache).map_or(0, |(_, object_size)| *object_size);
        let redzone = match slot.is_multiple_of(PAGE_SIZE) {
            true => 0,
            false => slot.saturating_sub(of_cache.max(size)) / GRANULE,
        };
        let redzone = redzone.min(u8::MAX.into()) as u8;
        if key > Table::LAST_START {
            return self.drop_one();
        }
        let origin = self.origin(by);
        let record = Record::live(size, cache, redzone, origin, by.at);
        if self.put(key, slot.max(of_cache).max(size), record) {
            self.redzones += u64::from(redzone);
            self.redzones_peak = self.redzones_peak.max(self.redzones);
        } else {
            self.origins.release(origin);
            self.drop_one();
        }
    }

    /// Puts a live object in the place of those that it overlaps. Its slot has `slot` bytes.
    /// Returns false if there is no room for it.
    #[inline(always)]
    fn put(&mut self, key: u64, slot: u64, record: Record) -> bool {
        // The usual case: a slot again.
        match self.table.replaceable(key, record.bytes(), slot) {
            Some(old) => self.replace(old, record),
            None => self.put_over(key, slot, record),
        }
    }

    /// [`Objects::put`] where it may overlap any others.
    fn put_over(&mut self, key: u64, slot: u64, mut record: Record) -> bool {
        // By falling address.
        let mut end = key + record.bytes();
        while end > key
            && let Some(old) = self.table.last_over(key, end)
        {
            if old.start == key && self.table.can_replace(old, slot) {
                // No two objects overlap, so what lies before it does not overlap this one either.
                return self.replace(old, record);
            }
            let before = self.table.remove(old);
            self.succeed(&mut record, before, old.start, key);
            // Nothing is left between it and the end.
            end = old.start;
        }
        let fits = self.make_room(key, slot);
        if fits {
            self.table.insert(key, slot, record);
        } else if let Some(previous) = record.previous() {
            self.origins.release(previous.allocated);
            self.origins.release(previous.freed);
        }
        fits
    }

    /// Puts a live object in the place of one that starts there. It overlaps no other.
    #[inline(always)]
    fn replace(&mut self, old: Found, record: Record) -> bool {
        self.forget_related(old.start);
        if let Some((redzone, dropped)) = self.table.replace(old, record) {
            self.redzones -= u64::from(redzone);
            dropped.into_iter().for_each(|origin| self.origins.release(origin));
        }
        true
    }

    /// `record`, at `key`, comes in the place of `old`, which started at `start`.
    fn succeed(&mut self, record: &mut Record, old: Option<Record>, start: u64, key: u64) {
        let Some(old) = old else { return };
        self.redzones -= u64::from(old.redzone);
        self.forget_related(start);
        for origin in record.follows(&old, start.wrapping_sub(key).cast_signed()) {
            self.origins.release(origin);
        }
    }

    /// Whether a free of `key` is certainly wrong: a live object holds `key`, and begins before it.
    /// A page inside a larger object may have been split off it. If objects are missing, the one
    /// that begins at `key` may be among them.
    pub fn is_invalid_free(&self, key: u64) -> bool {
        self.table.at(key).is_none() && self.is_inside_live(key)
    }

    /// Whether a free of `key`, where no object starts, is certainly wrong.
    fn is_inside_live(&self, key: u64) -> bool {
        let Some(holder) = self.holder(key).filter(|_| self.counts.dropped == 0) else {
            return false;
        };
        self.table.get(holder).is_some_and(|record| {
            let may_be_split = key.is_multiple_of(PAGE_SIZE) && record.bytes() >= PAGE_SIZE;
            !record.is_freed() && !may_be_split
        })
    }

    /// The object at `key` was freed. Returns false if that is certainly wrong
    /// ([`Objects::is_invalid_free`]).
    pub fn freed(&mut self, key: u64, by: &Event) -> bool {
        self.counts.frees = self.counts.frees.saturating_add(1);
        if let Some(found) = self.table.at(key) {
            self.free(found, by);
            return true;
        }
        self.counts.unknown_frees = self.counts.unknown_frees.saturating_add(1);
        if self.holder(key).is_some() {
            return !self.is_inside_live(key); // No object of its own.
        }
        if key > Table::LAST_START {
            self.drop_one();
            return true;
        }
        let mut record = Record::live(0, 0, 0, Origin::NONE, by.at);
        (record.freed, record.freed_at) = (self.origin(by), When::new(by.at));
        if self.make_room(key, 0) {
            self.table.insert(key, 0, record);
        } else {
            self.origins.release(record.freed);
            self.drop_one();
        }
        true
    }

    /// A known object was freed.
    fn free(&mut self, found: Found, by: &Event) {
        let Some(record) = self.table.get(found).copied() else { return };
        if record.is_freed() {
            // The first free is the one that explains later accesses.
            self.counts.repeated_frees = self.counts.repeated_frees.saturating_add(1);
            return;
        }
        self.redzones -= u64::from(record.redzone);
        let freed = self.origin(by);
        // Live objects are not forgotten, so it is still there.
        self.table.free(found, freed, When::new(by.at));
    }

    /// Work was made that has to do with the object that holds `key`: it may free it, for instance.
    pub fn related(&mut self, key: u64, by: &Event) {
        let holder = self.holder(key).map(|found| found.start);
        let room = self.related.len() < self.most_related;
        let Some(start) = holder.filter(|start| room || self.related.contains_key(start)) else {
            self.counts.unknown_related = self.counts.unknown_related.saturating_add(1);
            return;
        };
        let origin = self.origin(by);
        if self.table.at(start).is_none() {
            // It was forgotten to make room for the stack.
            return self.origins.release(origin);
        }
        let [last, before] = self.related.entry(start).or_default();
        let gone = std::mem::replace(before, std::mem::replace(last, origin));
        self.origins.release(gone);
    }

    /// Forgets who made work that has to do with the object at `start`.
    fn forget_related(&mut self, start: u64) {
        if !self.related.is_empty()
            && let Some(gone) = self.related.remove(&start)
        {
            gone.into_iter().for_each(|origin| self.origins.release(origin));
        }
    }

    /// The object that `key` lies in, however small it is.
    fn holder(&self, key: u64) -> Option<Found> {
        self.table.up_to(key).filter(|found| self.table.end(*found) > key)
    }

    /// A task and a stack, as objects keep them. If there is no room for new ones, freed objects
    /// go, the oldest first, and their stacks with them.
    #[inline(always)]
    fn origin(&mut self, by: &Event) -> Origin {
        self.origins.recent(by.task, by.frames).unwrap_or_else(|| self.other_origin(by))
    }

    /// One that was not found lately.
    fn other_origin(&mut self, by: &Event) -> Origin {
        for _ in 0..PAGES_FORGOTTEN {
            if let Some(origin) = self.origins.intern(by.task, by.frames) {
                return origin;
            }
            self.forget_oldest();
        }
        let last = self.origins.intern(by.task, by.frames);
        last.unwrap_or_else(|| self.origins.lose())
    }

    /// The object that explains an access to `key`: the one that holds it, rest of its slot
    /// included; else the closer one of its neighbours, if it is within 4 KiB. At equal distance
    /// the live object, then the one in the same page, then the left one. What the shadow says of
    /// `key` narrows it.
    pub fn nearest(&self, key: u64, hint: ShadowHint) -> Option<FoundObject<'_>> {
        // A freed object leaves its memory poisoned as freed. Where that is a redzone now, it was
        // before the memory was cut up anew.
        let freed_fits = matches!(hint, ShadowHint::Anywhere | ShadowHint::Inside);
        let fits = |found: &Found| freed_fits || !self.is_freed(*found);
        let table = &self.table;
        let mut before =
            successors(table.up_to(key), |found| table.up_to(found.start.checked_sub(1)?));
        let left = before.by_ref().take(PASSED_OVER).find(fits);
        let right = || {
            let behind =
                successors(table.from(key.checked_add(1)?), |found| table.from(found.start + 1));
            let found = behind.take(PASSED_OVER).find(fits)?;
            Some((found, found.start - key)).filter(|(_, distance)| *distance <= NEARBY)
        };
        let Some(left) = left else {
            let right = right().filter(|_| hint != ShadowHint::Inside);
            return self.explained(right?.0);
        };
        let end = table.end(left).max(left.start.saturating_add(self.slot(left)));
        if key < end {
            return self.explained(left);
        }
        if hint == ShadowHint::Inside {
            return None;
        }
        let distance = key - end;
        let page = |key: u64| key / PAGE_SIZE;
        match right() {
            // Between two that are as near the one in use is the likelier, and then the one in the
            // same page.
            Some((right, other))
                if (other, self.is_freed(right), page(right.start) != page(key))
                    < (distance, self.is_freed(left), page(end.saturating_sub(1)) != page(key))
                    && !(hint == ShadowHint::Behind && distance <= NEARBY) =>
            {
                self.explained(right)
            }
            _ if distance <= NEARBY => self.explained(left),
            _ => None,
        }
    }

    fn is_freed(&self, found: Found) -> bool {
        self.table.get(found).is_some_and(Record::is_freed)
    }

    /// Bytes of an object's slot, as far as they are known.
    fn slot(&self, found: Found) -> u64 {
        let Some(record) = self.table.get(found) else { return 0 };
        match self.cache(record.cache) {
            Some((_, object_size)) => *object_size,
            // Without a cache, an object that starts a page has pages of its own.
            None if found.start.is_multiple_of(PAGE_SIZE) => {
                u64::from(record.size).next_multiple_of(PAGE_SIZE)
            }
            None => 0,
        }
    }

    fn explained(&self, found: Found) -> Option<FoundObject<'_>> {
        let record = self.table.get(found)?;
        let event = |origin, at: Option<When>| {
            let (task, stack) = self.origins.get(origin);
            ObjectEvent {
                task,
                name: self.tasks.get(task),
                at: at.map(When::moment),
                frames: self.origins.frames(stack),
                lost: stack == StackId::LOST,
            }
        };
        let some = |origin: Origin, at| (origin != Origin::NONE).then(|| event(origin, at));
        let Record { size, cache, .. } = *record;
        let related = self.related.get(&found.start).into_iter().flatten();
        Some(FoundObject {
            start: found.start,
            size: size.into(),
            live: !record.is_freed(),
            cache: self.cache(cache).map(|(name, object_size)| Cache {
                id: cache,
                name,
                object_size: *object_size,
            }),
            allocated: some(record.allocated, Some(record.allocated_at)),
            freed: some(record.freed, Some(record.freed_at)),
            previous: record.previous().map(|previous| Previous {
                start: found.start.wrapping_add_signed(previous.offset.into()),
                size: previous.size.into(),
                allocated: some(previous.allocated, None),
                freed: event(previous.freed, None),
            }),
            related: related.filter_map(|origin| some(*origin, None)).collect(),
        })
    }

    /// Makes room for an object at `key` that takes `bytes` bytes, at the cost of freed ones if
    /// need be. Returns whether there is some.
    fn make_room(&mut self, key: u64, bytes: u64) -> bool {
        for _ in 0..PAGES_FORGOTTEN {
            if self.table.fits(key, bytes, self.most) {
                return true;
            }
            self.forget_oldest();
        }
        self.table.fits(key, bytes, self.most)
    }

    fn drop_one(&mut self) {
        self.counts.dropped = self.counts.dropped.saturating_add(1);
    }

    /// Forgets the freed objects of a page, the one whose last free is the longest ago.
    fn forget_oldest(&mut self) {
        let gone = self.table.oldest();
        self.counts.forgotten = self.counts.forgotten.saturating_add(gone.len() as u64);
        for found in gone {
            self.forget_related(found.start);
            if let Some(record) = self.table.remove(found) {
                record.origins().into_iter().for_each(|origin| self.origins.release(origin));
            }
        }
    }
}
