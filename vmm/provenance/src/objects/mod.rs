//! Provenance: which objects a guest allocated and freed, where, by which task and from which call
//! stack.
//!
//! Everything here comes from the guest and is bounded: the oldest freed objects are forgotten
//! first, then new ones are not remembered, and both are counted.

mod ages;
mod chunk;
mod coding;
mod entry;
mod origins;
mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::iter::successors;

use umbra_shadow::codes::{GRANULE, PAGE_SIZE};

use super::heap;
use super::history::Allocation;
use super::names::{TaskNames, sanitize};
use super::stacks::StackId;
use entry::Entry;
use origins::{Origin, Origins};
use table::{EDIT_MOST, INSERT_MOST, Table};

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
    /// What it takes, names aside, in bytes, with what the allocator adds.
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

/// An allocator's cache, as the guest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache<'a> {
    /// The guest's id.
    pub id: u16,
    /// Its name, printable ASCII.
    pub name: &'a str,
    /// Bytes of one object slot; 0 if the guest did not say.
    pub object_size: u64,
}

/// What the shadow says about an address that [`Objects::nearest`] is to explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowHint {
    /// Nothing that would help.
    Anywhere,
    /// It is accessible, or in a free page: only an object that holds it explains it.
    Inside,
    /// It is a redzone: no freed object explains it.
    Redzone,
    /// It is the rest of a live object's last granule, or the redzone behind a large one: that
    /// object lies before it.
    Behind,
}

/// An allocation or a free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectEvent<'a> {
    /// The guest's task id.
    pub task: u32,
    /// The task's name, printable ASCII, if the guest gave it.
    pub name: Option<&'a str>,
    /// Return addresses, innermost first.
    pub frames: &'a [u64],
    /// There was a call stack, but no room for it.
    pub lost: bool,
}

/// An object that explains an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundObject<'a> {
    /// The key of its start.
    pub start: u64,
    /// Bytes that were asked for; 0 if only the free is known.
    pub size: u64,
    /// Whether it is allocated now.
    pub live: bool,
    /// Its cache, if it has one that the guest named.
    pub cache: Option<Cache<'a>>,
    /// Its allocation, if known.
    pub allocated: Option<ObjectEvent<'a>>,
    /// Its free, if it was freed.
    pub freed: Option<ObjectEvent<'a>>,
    /// What was in its place before, if that was freed.
    pub previous: Option<Previous<'a>>,
    /// Who queued work that had to do with it, such as the work that freed it: the last one first.
    pub related: Vec<ObjectEvent<'a>>,
}

/// An object that was freed before another one took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous<'a> {
    /// The key of its start.
    pub start: u64,
    /// Bytes that were asked for.
    pub size: u64,
    /// Its allocation, if known.
    pub allocated: Option<ObjectEvent<'a>>,
    /// Its free.
    pub freed: ObjectEvent<'a>,
}

/// How many stacks are taken in at least between two looks for those that nothing needs any more.
const COLLECT_PAUSE: usize = 16;
/// Without room, one in so many freed objects is forgotten, or one in so many of all if that is
/// more, and then there is a pause of as many events: so that it costs little for each, whatever a
/// guest does.
const EVICTED: usize = 8;
const EVICTED_OF_ALL: usize = 32;

/// Most objects with related work in so many bytes. When one goes and another one comes, a hash map
/// may grow that is half full.
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
    related: HashMap<u64, [Origin; 2]>,
    most_related: usize,
    /// Stacks to take in before the table of stacks is looked through again.
    collect_in: usize,
    /// Events before freed objects are forgotten again.
    evict_in: usize,
    caches: HashMap<u16, (String, u64)>,
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
            related: HashMap::new(),
            most_related: most_related(limits.related),
            collect_in: 0,
            evict_in: 0,
            caches: HashMap::new(),
            tasks: TaskNames::new(limits.tasks),
            most: limits.objects,
            counts: ObjectCounts::default(),
            redzones: 0,
            redzones_peak: 0,
        }
    }

    /// Names a cache and says how many bytes one of its object slots has.
    pub fn name_cache(&mut self, id: u16, name: &[u8], object_size: u64) {
        self.caches.insert(id, (sanitize(name), object_size));
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
        let bytes = self.table.bytes() + self.origins.bytes() + heap::of_map(&self.related);
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
    pub fn allocated(&mut self, new: Allocation, frames: &[u64]) {
        let Allocation { key, size, slot, cache, task } = new;
        self.counts.allocations = self.counts.allocations.saturating_add(1);
        // What the cache would hand out anyway is no redzone, nor the rest of the last page of an
        // object that has pages of its own.
        let object = self.caches.get(&cache).map_or(0, |(_, object_size)| *object_size).max(size);
        let redzone =
            if slot.is_multiple_of(PAGE_SIZE) { 0 } else { slot.saturating_sub(object) / GRANULE };
        let redzone = redzone.min(u8::MAX.into()) as u8;
        let origin = self.origin(task, frames);
        let Some(mut entry) = Entry::live(key, size, cache, origin, redzone) else {
            return self.drop_one();
        };
        let mut room = self.has_room(INSERT_MOST);
        // Those that overlap come last before its end, one after the other.
        while let Some(old) = self.table.up_to(entry.end() - 1)
            && old.end() > key
        {
            self.redzones -= u64::from(old.redzone());
            entry.follows(&old);
            self.related.remove(&old.start);
            if old.start == key {
                // The usual case: the same slot again. What lies before the same start cannot
                // overlap, as no two objects do.
                room |= self.fits(EDIT_MOST);
                if !room {
                    self.table.remove(key);
                }
                break;
            }
            self.table.remove(old.start);
        }
        if !room {
            return self.drop_one();
        }
        self.table.put(entry);
        self.redzones += u64::from(redzone);
        self.redzones_peak = self.redzones_peak.max(self.redzones);
    }

    /// Whether a free of `key` is certainly wrong: a live object holds `key`, and begins before it.
    /// A page inside a larger object may have been split off it. If objects are missing, the one
    /// that begins at `key` may be among them.
    pub fn is_invalid_free(&self, key: u64) -> bool {
        self.holder(key).is_some_and(|holder| self.is_inside(key, &holder))
    }

    /// Whether a free of `key`, which `holder` holds, is certainly wrong.
    fn is_inside(&self, key: u64, holder: &Entry) -> bool {
        let may_be_split = key.is_multiple_of(PAGE_SIZE) && u64::from(holder.size) >= PAGE_SIZE;
        self.counts.dropped == 0 && !holder.is_freed() && holder.start < key && !may_be_split
    }

    /// The object at `key` was freed. Returns false if that is certainly wrong
    /// ([`Objects::is_invalid_free`]).
    pub fn freed(&mut self, key: u64, task: u32, frames: &[u64]) -> bool {
        self.counts.frees = self.counts.frees.saturating_add(1);
        let origin = self.origin(task, frames);
        let room = self.has_room(EDIT_MOST);
        if let Some(entry) = self.table.free(key, origin, room) {
            if entry.is_freed() {
                // The first free is the one that explains later accesses.
                self.counts.repeated_frees = self.counts.repeated_frees.saturating_add(1);
            } else if !room {
                self.related.remove(&key);
                self.counts.forgotten = self.counts.forgotten.saturating_add(1);
            }
            self.redzones -= u64::from(entry.redzone());
            return true;
        }
        self.counts.unknown_frees = self.counts.unknown_frees.saturating_add(1);
        if let Some(holder) = self.holder(key) {
            return !self.is_inside(key, &holder); // No object of its own.
        }
        match Entry::live(key, 0, 0, Origin::NONE, 0) {
            Some(entry) if self.has_room(INSERT_MOST + EDIT_MOST) => {
                self.table.put(entry);
                self.table.free(key, origin, true);
            }
            _ => self.drop_one(),
        }
        true
    }

    /// Work was made that has to do with the object that holds `key`: it may free it, for instance.
    pub fn related(&mut self, key: u64, task: u32, frames: &[u64]) {
        let origin = self.origin(task, frames);
        let room = self.related.len() < self.most_related;
        match self.holder(key) {
            Some(Entry { start, .. }) if room || self.related.contains_key(&start) => {
                let [last, before] = self.related.entry(start).or_default();
                *before = std::mem::replace(last, origin);
            }
            _ => self.counts.unknown_related = self.counts.unknown_related.saturating_add(1),
        }
    }

    /// The object that `key` lies in, however small it is.
    fn holder(&self, key: u64) -> Option<Entry> {
        self.table.up_to(key).filter(|entry| entry.end() > key)
    }

    /// A task and a stack, as objects keep them. If there is no room for new ones, those that no
    /// object needs any more go, and if that is not enough, freed objects, the oldest first.
    fn origin(&mut self, task: u32, frames: &[u64]) -> Origin {
        if self.origins.is_full() && self.collect_in == 0 {
            self.collect();
            if self.origins.is_crowded() {
                self.evict(self.table.freed() / 2);
                self.collect();
            }
            // So that it costs little for each, whatever a guest does.
            self.collect_in = ((self.table.len() + self.origins.len()) / 4).max(COLLECT_PAUSE);
        }
        self.collect_in = self.collect_in.saturating_sub(1);
        self.origins.intern(task, frames)
    }

    fn collect(&mut self) {
        let Self { table, origins, related, .. } = self;
        origins.keep(|keep| {
            table.visit(keep);
            related.values_mut().flatten().for_each(keep);
        });
    }

    /// The object that explains an access to `key`: the one that holds it, rest of its slot
    /// included; else the closer one of its neighbours, if it is within 4 KiB. At equal distance
    /// the live object, then the one in the same page, then the left one. What the shadow says of
    /// `key` narrows it.
    pub fn nearest(&self, key: u64, hint: ShadowHint) -> Option<FoundObject<'_>> {
        // A freed object leaves its memory poisoned as freed. Where that is a redzone now, it was
        // before the memory was cut up anew.
        let freed_fits = matches!(hint, ShadowHint::Anywhere | ShadowHint::Inside);
        let fits = |entry: &Entry| freed_fits || !entry.is_freed();
        let table = &self.table;
        let mut before =
            successors(table.up_to(key), |entry| table.up_to(entry.start.checked_sub(1)?));
        let left = before.by_ref().take(PASSED_OVER).find(fits);
        let right = || {
            let behind =
                successors(table.from(key.checked_add(1)?), |entry| table.from(entry.start + 1));
            let entry = behind.take(PASSED_OVER).find(fits)?;
            Some((entry, entry.start - key)).filter(|(_, distance)| *distance <= NEARBY)
        };
        let Some(left) = left else {
            let right = right().filter(|_| hint != ShadowHint::Inside);
            return Some(self.found(right?.0));
        };
        let slot = match self.caches.get(&left.cache) {
            Some((_, object_size)) => *object_size,
            // Without a cache, an object that starts a page has pages of its own.
            None if left.start.is_multiple_of(PAGE_SIZE) => {
                u64::from(left.size).next_multiple_of(PAGE_SIZE)
            }
            None => 0,
        };
        let end = left.end().max(left.start.saturating_add(slot));
        if key < end {
            return Some(self.found(left));
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
                if (other, right.is_freed(), page(right.start) != page(key))
                    < (distance, left.is_freed(), page(end.saturating_sub(1)) != page(key))
                    && !(hint == ShadowHint::Behind && distance <= NEARBY) =>
            {
                Some(self.found(right))
            }
            _ if distance <= NEARBY => Some(self.found(left)),
            _ => None,
        }
    }

    fn found(&self, entry: Entry) -> FoundObject<'_> {
        let event = |origin| {
            let (task, stack) = self.origins.get(origin);
            ObjectEvent {
                task,
                name: self.tasks.get(task),
                frames: self.origins.frames(stack),
                lost: stack == StackId::LOST,
            }
        };
        let some = |origin: Origin| (origin != Origin::NONE).then(|| event(origin));
        let Entry { start, size, cache, allocated, previous, .. } = entry;
        let freed = entry.freed();
        FoundObject {
            start,
            size: size.into(),
            live: freed.is_none(),
            cache: self.caches.get(&cache).map(|(name, object_size)| Cache {
                id: cache,
                name,
                object_size: *object_size,
            }),
            allocated: some(allocated),
            freed: freed.map(event),
            previous: previous.map(|previous| Previous {
                start: start.wrapping_add_signed(previous.offset.into()),
                size: previous.size.into(),
                allocated: some(previous.allocated),
                freed: event(previous.freed),
            }),
            related: self
                .related
                .get(&start)
                .into_iter()
                .flatten()
                .filter_map(|o| some(*o))
                .collect(),
        }
    }

    /// Whether the table may grow by so many bytes.
    fn fits(&self, bytes: usize) -> bool {
        self.table.bytes() + bytes <= self.most && self.table.len() < u32::MAX as usize
    }

    /// Whether it may, at the cost of the oldest freed objects if need be. Called for each event.
    fn has_room(&mut self, bytes: usize) -> bool {
        self.evict_in = self.evict_in.saturating_sub(1);
        if self.evict_in == 0 && !self.fits(bytes) {
            let objects = self.table.len() / EVICTED_OF_ALL;
            let mut some = (self.table.freed() / EVICTED).max(objects).max(1);
            // As much room as the objects of the pause need.
            while self.table.freed() > 0 && !self.fits(bytes + self.most / EVICTED_OF_ALL) {
                self.evict(some);
                some *= 2;
            }
            self.evict_in = objects;
        }
        self.fits(bytes)
    }

    fn drop_one(&mut self) {
        self.counts.dropped = self.counts.dropped.saturating_add(1);
    }

    /// Forgets so many freed objects, the oldest.
    fn evict(&mut self, some: usize) {
        let Self { table, related, counts, .. } = self;
        let gone = table.forget_oldest(some, &mut |start| {
            related.remove(&start);
        });
        counts.forgotten = counts.forgotten.saturating_add(gone as u64);
    }
}
