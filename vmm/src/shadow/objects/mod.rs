//! Provenance: which objects a guest allocated and freed, where, by which task and from which call stack.
//!
//! Everything here is told by the guest and bounded: the oldest freed objects are forgotten first, then new
//! ones are not remembered, and both is counted.

mod entry;
mod origins;
mod slab;
mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use umbra_shadow::codes::{GRANULE, PAGE_SIZE};

use super::names::{TaskNames, sanitize};
use super::stacks::StackId;
use entry::Entry;
pub(super) use origins::map_bytes;
use origins::{Origin, Origins};
use table::{END, LIST_BYTES, Place, Table};

/// How far from an object an address may lie to be explained by it, in bytes.
const NEARBY: u64 = 4096;

/// How many objects that do not fit are passed over in a search.
const PASSED_OVER: usize = 64;

/// Host memory for provenance unless a setting says otherwise, in bytes.
pub const DEFAULT_BUDGET: u64 = 64 << 20;
/// Of so many objects, one may have related work.
const RELATED_ONE_IN: usize = 4;
/// Bytes that related work takes at most for each object of which it is known: buckets of a hash map, of which 7/16 are in use when it
/// has just grown.
const RELATED_BYTES: usize = ((size_of::<(Place, [Origin; 2])>() + 1) * 16).div_ceil(7);
/// Bytes that an object takes at most: freed, with another one before it, its part of the list that finds it, and of what is known of few.
const OBJECT_BYTES: usize =
    size_of::<Entry>() + size_of::<entry::Previous>() + LIST_BYTES + RELATED_BYTES.div_ceil(RELATED_ONE_IN);

/// How much is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectLimits {
    /// Objects, live and freed.
    pub objects: u32,
    /// Bytes for the call stacks, and the tasks they are of.
    pub stack_bytes: usize,
    /// Task names. Up to 128 bytes each.
    pub tasks: usize,
}

impl ObjectLimits {
    /// What fits into so many bytes of host memory, names aside: a quarter of it is for stacks.
    pub fn of_budget(bytes: u64) -> Self {
        Self {
            objects: u32::try_from((bytes - bytes / 4) / OBJECT_BYTES as u64).unwrap_or(u32::MAX),
            stack_bytes: (bytes / 4).min(1 << 32) as usize,
            tasks: 1 << 16,
        }
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
    /// Allocations told.
    pub allocations: u64,
    /// Frees told.
    pub frees: u64,
    /// Frees of addresses at which no object was known.
    pub unknown_frees: u64,
    /// Frees of objects that were free.
    pub repeated_frees: u64,
    /// Freed objects forgotten to make room.
    pub evicted: u64,
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
    /// What it takes, names aside, in bytes. It does not shrink.
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

/// What the shadow says of an address that [`Objects::nearest`] is to explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Nothing that would help.
    Anywhere,
    /// It is a redzone: no freed object explains it.
    Redzone,
    /// It is the rest of a live object's last granule, or the redzone behind a large one: that object lies before it.
    Behind,
}

/// An allocation or a free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The guest's task id.
    pub task: u32,
    /// The task's name, printable ASCII, if the guest told it.
    pub name: Option<&'a str>,
    /// Return addresses, innermost first.
    pub frames: &'a [u64],
    /// There was a call stack, but no room for it.
    pub lost: bool,
}

/// An object that explains an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// Guest-physical start.
    pub start: u64,
    /// Bytes that were asked for; 0 if only the free is known.
    pub size: u64,
    /// Whether it is allocated now.
    pub live: bool,
    /// Its cache, if it has one that the guest named.
    pub cache: Option<Cache<'a>>,
    /// Its allocation, if known.
    pub allocated: Option<Event<'a>>,
    /// Its free, if it was freed.
    pub freed: Option<Event<'a>>,
    /// What was in its place before, if that was freed.
    pub previous: Option<Previous<'a>>,
    /// Who made work that had to do with it, such as the work that freed it: the last one first.
    pub related: Vec<Event<'a>>,
}

/// An object that was freed before another one took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous<'a> {
    /// Guest-physical start.
    pub start: u64,
    /// Bytes that were asked for.
    pub size: u64,
    /// Its allocation, if known.
    pub allocated: Option<Event<'a>>,
    /// Its free.
    pub freed: Event<'a>,
}

/// How many stacks are taken in at least between two looks for those that nothing needs any more.
const COLLECT_PAUSE: usize = 16;

/// All objects that are remembered, by guest-physical address. No two overlap.
#[derive(Debug)]
pub struct Objects {
    table: Table,
    origins: Origins,
    /// Of few objects: who made work that has to do with them, the last one first.
    related: HashMap<Place, [Origin; 2]>,
    /// Stacks to take in before the table of stacks is looked through again.
    collect_in: usize,
    caches: HashMap<u16, (String, u64)>,
    tasks: TaskNames,
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
            origins: Origins::new(limits.stack_bytes),
            related: HashMap::new(),
            collect_in: 0,
            caches: HashMap::new(),
            tasks: TaskNames::new(limits.tasks),
            most: limits.objects.min(END - 1) as usize,
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
        let bytes = self.table.bytes() + self.origins.bytes() + map_bytes(&self.related);
        ProvenanceFigures {
            budget_bytes,
            bytes: bytes as u64,
            live: (self.table.len() - self.table.freed()) as u64,
            freed: self.table.freed() as u64,
            stacks: self.origins.stacks() as u64,
            counts: self.counts(),
        }
    }

    /// Bytes of redzone behind live objects, now and at most: what their slots have beyond what their caches hand out.
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

    /// `size` bytes at `gpa` were allocated. Objects that were there before are forgotten.
    ///
    /// `slot` is what the allocator took for it, 0 if that is not known.
    pub fn allocated(&mut self, gpa: u64, size: u64, slot: u64, cache: u16, task: u32, frames: &[u64]) {
        self.counts.allocations = self.counts.allocations.saturating_add(1);
        // What the cache would hand out anyway is no redzone, nor the rest of the last page of an object that has pages of its own.
        let object = self.caches.get(&cache).map_or(0, |(_, object_size)| *object_size).max(size);
        let redzone = if slot.is_multiple_of(PAGE_SIZE) { 0 } else { slot.saturating_sub(object) / GRANULE };
        let redzone = redzone.min(u8::MAX.into()) as u8;
        let origin = self.origin(task, frames);
        let Some(mut entry) = Entry::live(gpa, size, cache, origin, redzone) else { return self.drop_one() };
        let mut known = None;
        // Those that overlap come last before its end, one after the other.
        while let Some((place, old)) = self.table.last_before(entry.end())
            && old.end() > gpa
        {
            self.redzones -= u64::from(old.redzone());
            entry.follows(&old);
            if old.start() == gpa {
                known = Some(place); // The usual case: the same slot again.
                break;
            }
            self.forget(place);
        }
        if let Some(place) = known {
            // What lies before the same start cannot overlap, as no two objects do.
            self.related.remove(&place);
            self.table.replace(place, entry);
        } else if self.insert(entry).is_none() {
            return;
        }
        self.redzones += u64::from(redzone);
        self.redzones_peak = self.redzones_peak.max(self.redzones);
    }

    /// The object at `gpa` was freed.
    pub fn freed(&mut self, gpa: u64, task: u32, frames: &[u64]) {
        self.counts.frees = self.counts.frees.saturating_add(1);
        let origin = self.origin(task, frames);
        if let Some(place) = self.table.at(gpa) {
            let Some(entry) = self.table.get(place) else { return };
            if entry.is_freed() {
                // The first free is the one that explains later accesses.
                self.counts.repeated_frees = self.counts.repeated_frees.saturating_add(1);
                return;
            }
            self.redzones -= u64::from(entry.redzone());
            self.table.free(place, origin);
            return;
        }
        self.counts.unknown_frees = self.counts.unknown_frees.saturating_add(1);
        if self.holder(gpa).is_some() {
            return; // Inside another object: no object of its own.
        }
        let Some(entry) = Entry::live(gpa, 0, 0, Origin::NONE, 0) else { return self.drop_one() };
        if let Some(place) = self.insert(entry) {
            self.table.free(place, origin);
        }
    }

    /// Work was made that has to do with the object that holds `gpa`: it may free it, for instance.
    pub fn related(&mut self, gpa: u64, task: u32, frames: &[u64]) {
        let origin = self.origin(task, frames);
        let room = self.related.len() < self.most / RELATED_ONE_IN;
        match self.holder(gpa) {
            Some(place) if room || self.related.contains_key(&place) => {
                let [last, before] = self.related.entry(place).or_default();
                *before = std::mem::replace(last, origin);
            }
            _ => self.counts.unknown_related = self.counts.unknown_related.saturating_add(1),
        }
    }

    /// The object that `gpa` lies in, however small it is.
    fn holder(&self, gpa: u64) -> Option<Place> {
        let place = self.table.at(gpa).or_else(|| self.table.before(gpa).next())?;
        self.table.get(place).filter(|entry| entry.end() > gpa).map(|_| place)
    }

    /// A task and a stack, as objects keep them. If there is no room for new ones, those that no object needs any more go, and if
    /// that is not enough, freed objects, the oldest first.
    fn origin(&mut self, task: u32, frames: &[u64]) -> Origin {
        if self.origins.is_full() && self.collect_in == 0 {
            self.collect();
            if self.origins.is_crowded() {
                let go = self.table.freed().div_ceil(2);
                while self.table.freed() > go && self.evict() {}
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

    /// The object that explains an access to `gpa`: the one that holds it, rest of its slot included; else
    /// the closer one of its neighbours, if it is within 4 KiB; the left one if both are as close. What the shadow says
    /// of `gpa` narrows it.
    pub fn nearest(&self, gpa: u64, at: At) -> Option<Found<'_>> {
        // A freed object leaves its memory poisoned as freed. Where that is a redzone now, it was before the memory was
        // cut up anew.
        let fits = |(_, entry): &(Place, &Entry)| at == At::Anywhere || !entry.is_freed();
        let entry = |place| Some((place, self.table.get(place)?));
        // `gpa` itself is the start of the last one; none starts at the end of the address space.
        let left = self.table.before(gpa.saturating_add(1)).take(PASSED_OVER).filter_map(entry).find(fits);
        let right = || {
            let behind = self.table.from(gpa.checked_add(1)?);
            let (place, entry) = behind.take(PASSED_OVER).filter_map(entry).find(fits)?;
            Some((place, entry.start() - gpa, entry)).filter(|(_, distance, _)| *distance <= NEARBY)
        };
        let Some((place, left)) = left else { return self.found(right()?.0) };
        let slot = match self.caches.get(&left.cache()) {
            Some((_, object_size)) => *object_size,
            // Without a cache, an object that starts a page has pages of its own.
            None if left.start().is_multiple_of(PAGE_SIZE) => {
                u64::from(left.size()).next_multiple_of(PAGE_SIZE)
            }
            None => 0,
        };
        let end = left.end().max(left.start().saturating_add(slot));
        if gpa < end {
            return self.found(place);
        }
        let distance = gpa - end;
        let page = |gpa: u64| gpa / PAGE_SIZE;
        match right() {
            // Between two that are as near the one in use is the likelier, and then the one in the same page.
            Some((nearer, other, right))
                if (other, right.is_freed(), page(right.start()) != page(gpa))
                    < (distance, left.is_freed(), page(end.saturating_sub(1)) != page(gpa))
                    && !(at == At::Behind && distance <= NEARBY) =>
            {
                self.found(nearer)
            }
            _ if distance <= NEARBY => self.found(place),
            _ => None,
        }
    }

    fn found(&self, place: Place) -> Option<Found<'_>> {
        let entry = self.table.get(place)?;
        let event = |origin| {
            let (task, stack) = self.origins.get(origin);
            Event {
                task,
                name: self.tasks.get(task),
                frames: self.origins.frames(stack),
                lost: stack == StackId::LOST,
            }
        };
        let some = |origin: Origin| (origin != Origin::NONE).then(|| event(origin));
        let (start, freed, previous) = (entry.start(), entry.freed(), self.table.previous(place));
        Some(Found {
            start,
            size: entry.size().into(),
            live: freed.is_none(),
            cache: self.caches.get(&entry.cache()).map(|(name, object_size)| Cache {
                id: entry.cache(),
                name,
                object_size: *object_size,
            }),
            allocated: some(entry.allocated()),
            freed: freed.map(|freed| event(freed.by)),
            previous: some(previous.freed).map(|freed| Previous {
                start: start.wrapping_add_signed(previous.offset.into()),
                size: previous.size.into(),
                allocated: some(previous.allocated),
                freed,
            }),
            related: self.related.get(&place).into_iter().flatten().filter_map(|o| some(*o)).collect(),
        })
    }

    /// Finds a place for a new object, at the cost of the oldest freed one if need be.
    fn insert(&mut self, entry: Entry) -> Option<Place> {
        let room = self.table.len() < self.most || self.evict();
        if !room {
            self.drop_one();
        }
        room.then(|| self.table.insert(entry))
    }

    fn drop_one(&mut self) {
        self.counts.dropped = self.counts.dropped.saturating_add(1);
    }

    /// Forgets the oldest freed object, if there is one.
    fn evict(&mut self) -> bool {
        let Some(oldest) = self.table.oldest_freed() else { return false };
        self.forget(oldest);
        self.counts.evicted = self.counts.evicted.saturating_add(1);
        true
    }

    fn forget(&mut self, place: Place) {
        self.related.remove(&place);
        self.table.remove(place);
    }
}
