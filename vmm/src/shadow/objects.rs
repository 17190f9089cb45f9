//! Provenance: which objects a guest allocated and freed, where, by which task and from which call stack.
//!
//! Everything here is told by the guest and bounded: the oldest freed objects are forgotten first, then new
//! ones are not remembered, and both is counted.

use std::collections::{BTreeMap, HashMap};

use umbra_shadow::codes::PAGE_SIZE;

use super::{
    names::{TaskNames, sanitize},
    stacks::{StackId, Stacks},
};

/// How far from an object an address may lie to be explained by it, in bytes.
const NEARBY: u64 = 4096;

/// How many objects that do not fit are passed over in a search.
const PASSED_OVER: usize = 64;

/// How much is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectLimits {
    /// Objects, live and freed. About 64 bytes each.
    pub objects: u32,
    /// Distinct call stacks. Up to 160 bytes each.
    pub stacks: u32,
    /// Task names. Up to 128 bytes each.
    pub tasks: usize,
}

impl Default for ObjectLimits {
    fn default() -> Self {
        Self { objects: 1 << 20, stacks: 1 << 16, tasks: 1 << 16 }
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// Position in the table; [`END`] ends a list.
type Index = u32;
const END: Index = u32::MAX;

/// The allocation is known.
const ALLOCATED: u8 = 1;
/// It was freed. Such objects are in the list of freed ones.
const FREED: u8 = 2;

/// One object.
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: u64,
    /// Saturated: 4 GiB stands for that and more.
    size: u32,
    allocated_task: u32,
    allocated_stack: StackId,
    freed_task: u32,
    freed_stack: StackId,
    /// Neighbours in the list of freed objects; `newer` links vacant places, too.
    older: Index,
    newer: Index,
    cache: u16,
    state: u8,
}

const _: () = assert!(size_of::<Entry>() <= 48);

impl Entry {
    /// The first address behind it. An object of no bytes still has a place of its own.
    fn end(&self) -> u64 {
        self.start.saturating_add(u64::from(self.size.max(1)))
    }
}

/// All objects that are remembered, by guest-physical address. No two overlap.
#[derive(Debug)]
pub struct Objects {
    by_start: BTreeMap<u64, Index>,
    entries: Vec<Entry>,
    vacant: Index,
    oldest_freed: Index,
    newest_freed: Index,
    stacks: Stacks,
    caches: HashMap<u16, (String, u64)>,
    tasks: TaskNames,
    most: usize,
    counts: ObjectCounts,
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
            by_start: BTreeMap::new(),
            entries: Vec::new(),
            vacant: END,
            oldest_freed: END,
            newest_freed: END,
            stacks: Stacks::new(limits.stacks),
            caches: HashMap::new(),
            tasks: TaskNames::new(limits.tasks),
            most: limits.objects.min(END - 1) as usize,
            counts: ObjectCounts::default(),
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
        ObjectCounts { lost_stacks: self.stacks.lost(), ..self.counts }
    }

    /// Objects remembered now.
    pub fn len(&self) -> usize {
        self.by_start.len()
    }

    /// Whether none is remembered.
    pub fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }

    /// Distinct call stacks remembered.
    pub fn stacks(&self) -> usize {
        self.stacks.len()
    }

    /// `size` bytes at `gpa` were allocated. Objects that were there before are forgotten.
    pub fn allocated(&mut self, gpa: u64, size: u64, cache: u16, task: u32, frames: &[u64]) {
        self.counts.allocations = self.counts.allocations.saturating_add(1);
        let mut entry = Entry {
            start: gpa,
            size: u32::try_from(size).unwrap_or(u32::MAX),
            allocated_task: task,
            allocated_stack: self.stacks.intern(frames),
            freed_task: 0,
            freed_stack: StackId::NONE,
            older: END,
            newer: END,
            cache,
            state: ALLOCATED,
        };
        let mut place = None;
        // Those that overlap come last before its end, one after the other.
        while let Some((&start, &index)) = self.by_start.range(..entry.end()).next_back() {
            if self.entries[index as usize].end() <= gpa {
                break;
            }
            self.unlink(index);
            if start == gpa {
                place = Some(index); // The usual case: the same slot again.
                break;
            }
            self.by_start.remove(&start);
            self.vacate(index);
        }
        if let Some(index) = place {
            // What lies before the same start cannot overlap, as no two objects do.
            std::mem::swap(&mut self.entries[index as usize], &mut entry);
        } else {
            self.insert(entry);
        }
    }

    /// The object at `gpa` was freed.
    pub fn freed(&mut self, gpa: u64, task: u32, frames: &[u64]) {
        self.counts.frees = self.counts.frees.saturating_add(1);
        if let Some(&index) = self.by_start.get(&gpa) {
            if self.entries[index as usize].state & FREED != 0 {
                // The first free is the one that explains later accesses.
                self.counts.repeated_frees = self.counts.repeated_frees.saturating_add(1);
                return;
            }
            let stack = self.stacks.intern(frames);
            let entry = &mut self.entries[index as usize];
            entry.freed_task = task;
            entry.freed_stack = stack;
            entry.state |= FREED;
            self.link_freed(index);
            return;
        }
        self.counts.unknown_frees = self.counts.unknown_frees.saturating_add(1);
        let before =
            self.by_start.range(..gpa).next_back().map(|(_, &index)| self.entries[index as usize].end());
        if before.is_some_and(|end| end > gpa) {
            return; // Inside another object: no object of its own.
        }
        let entry = Entry {
            start: gpa,
            size: 0,
            allocated_task: 0,
            allocated_stack: StackId::NONE,
            freed_task: task,
            freed_stack: self.stacks.intern(frames),
            older: END,
            newer: END,
            cache: 0,
            state: FREED,
        };
        if let Some(index) = self.insert(entry) {
            self.link_freed(index);
        }
    }

    /// The object that explains an access to `gpa`: the one that holds it, rest of its slot included; else
    /// the closer one of its neighbours, if it is within 4 KiB; the left one if both are as close. What the shadow says
    /// of `gpa` narrows it.
    pub fn nearest(&self, gpa: u64, at: At) -> Option<Found<'_>> {
        // A freed object leaves its memory poisoned as freed. Where that is a redzone now, it was before the memory was
        // cut up anew.
        let fits = |entry: &&Entry| at == At::Anywhere || entry.state & FREED == 0;
        let entry = |(_, index): (&u64, &Index)| self.entries.get(*index as usize);
        let left = self.by_start.range(..=gpa).rev().take(PASSED_OVER).filter_map(entry).find(fits);
        let right = || {
            let behind = self.by_start.range(gpa.checked_add(1)?..);
            let entry = behind.take(PASSED_OVER).filter_map(entry).find(fits)?;
            Some((entry, entry.start - gpa)).filter(|(_, distance)| *distance <= NEARBY)
        };
        let Some(left) = left else { return right().map(|(entry, _)| self.found(entry)) };
        let slot = match self.caches.get(&left.cache) {
            Some((_, object_size)) => *object_size,
            // Without a cache, an object that starts a page has pages of its own.
            None if left.start.is_multiple_of(PAGE_SIZE) => u64::from(left.size).next_multiple_of(PAGE_SIZE),
            None => 0,
        };
        let end = left.end().max(left.start.saturating_add(slot));
        if gpa < end {
            return Some(self.found(left));
        }
        let distance = gpa - end;
        match right() {
            Some((entry, other)) if other < distance && !(at == At::Behind && distance <= NEARBY) => {
                Some(self.found(entry))
            }
            _ if distance <= NEARBY => Some(self.found(left)),
            _ => None,
        }
    }

    fn found(&self, entry: &Entry) -> Found<'_> {
        let event = |task, stack| Event {
            task,
            name: self.tasks.get(task),
            frames: self.stacks.get(stack),
            lost: stack == StackId::LOST,
        };
        let known = entry.state & ALLOCATED != 0;
        let freed = entry.state & FREED != 0;
        Found {
            start: entry.start,
            size: u64::from(entry.size),
            live: !freed,
            cache: self.caches.get(&entry.cache).map(|(name, object_size)| Cache {
                id: entry.cache,
                name,
                object_size: *object_size,
            }),
            allocated: known.then(|| event(entry.allocated_task, entry.allocated_stack)),
            freed: freed.then(|| event(entry.freed_task, entry.freed_stack)),
        }
    }

    /// Finds a place for a new object, at the cost of the oldest freed one if need be.
    fn insert(&mut self, entry: Entry) -> Option<Index> {
        if entry.start == u64::MAX {
            // No range ends behind it, so a search for overlaps would not find it.
            self.counts.dropped = self.counts.dropped.saturating_add(1);
            return None;
        }
        if self.by_start.len() >= self.most {
            let oldest = self.oldest_freed;
            let Some(start) = self.entries.get(oldest as usize).map(|entry| entry.start) else {
                self.counts.dropped = self.counts.dropped.saturating_add(1);
                return None;
            };
            self.unlink(oldest);
            self.by_start.remove(&start);
            self.vacate(oldest);
            self.counts.evicted = self.counts.evicted.saturating_add(1);
        }
        let start = entry.start;
        let index = match self.entries.get_mut(self.vacant as usize) {
            Some(place) => {
                let index = self.vacant;
                self.vacant = place.newer;
                *place = entry;
                index
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as Index
            }
        };
        self.by_start.insert(start, index);
        Some(index)
    }

    fn vacate(&mut self, index: Index) {
        self.entries[index as usize].newer = self.vacant;
        self.vacant = index;
    }

    /// Makes an object the newest freed one.
    fn link_freed(&mut self, index: Index) {
        let older = self.newest_freed;
        let entry = &mut self.entries[index as usize];
        entry.older = older;
        entry.newer = END;
        match self.entries.get_mut(older as usize) {
            Some(entry) => entry.newer = index,
            None => self.oldest_freed = index,
        }
        self.newest_freed = index;
    }

    /// Takes an object out of the list of freed ones, if it is in it.
    fn unlink(&mut self, index: Index) {
        let Entry { older, newer, state, .. } = self.entries[index as usize];
        if state & FREED == 0 {
            return;
        }
        match self.entries.get_mut(older as usize) {
            Some(entry) => entry.newer = newer,
            None => self.oldest_freed = newer,
        }
        match self.entries.get_mut(newer as usize) {
            Some(entry) => entry.older = older,
            None => self.newest_freed = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(objects: u32) -> ObjectLimits {
        ObjectLimits { objects, stacks: 8, tasks: 8 }
    }

    /// Start of the object that explains `gpa`.
    fn nearest(objects: &Objects, gpa: u64) -> Option<u64> {
        objects.nearest(gpa, At::Anywhere).map(|found| found.start)
    }

    #[test]
    fn an_object_tells_its_history() {
        let mut objects = Objects::default();
        objects.name_cache(3, b"kmalloc-64", 64);
        objects.name_task(7, b"slab_oob");
        objects.allocated(0x1000, 50, 3, 7, &[0xa, 0xb]);
        let live = objects.nearest(0x1010, At::Anywhere).unwrap();
        assert_eq!((live.start, live.size, live.live, live.freed), (0x1000, 50, true, None));
        assert_eq!(live.cache, Some(Cache { id: 3, name: "kmalloc-64", object_size: 64 }));
        let event = Event { task: 7, name: Some("slab_oob"), frames: &[0xa, 0xb], lost: false };
        assert_eq!(live.allocated, Some(event));

        objects.freed(0x1000, 8, &[0xc]);
        objects.freed(0x1000, 9, &[0xd]);
        let freed = objects.nearest(0x1000, At::Anywhere).unwrap();
        assert_eq!((freed.live, freed.allocated), (false, Some(event)));
        assert_eq!(freed.freed, Some(Event { task: 8, name: None, frames: &[0xc], lost: false }));
        assert_eq!(objects.counts().repeated_frees, 1);

        // The slot again, for someone else.
        objects.allocated(0x1000, 20, 0, 1, &[]);
        let again = objects.nearest(0x1000, At::Anywhere).unwrap();
        assert_eq!((again.size, again.live, again.cache, again.freed), (20, true, None, None));
        assert_eq!(again.allocated, Some(Event { task: 1, name: None, frames: &[], lost: false }));
        assert_eq!(objects.len(), 1);
    }

    #[test]
    fn pages_of_its_own_belong_to_an_object() {
        let mut objects = Objects::default();
        objects.allocated(0x10000, 4106, 0, 0, &[]);
        objects.allocated(0x12000, 4096, 0, 0, &[]);
        assert_eq!(nearest(&objects, 0x11fff), Some(0x10000), "one byte before the next object");
        assert_eq!(nearest(&objects, 0x12000), Some(0x12000));
    }

    #[test]
    fn the_closer_neighbour_explains() {
        let mut objects = Objects::default();
        objects.name_cache(1, b"c", 64);
        objects.allocated(0x10000, 50, 1, 0, &[]);
        objects.allocated(0x10080, 50, 0, 0, &[]);
        for (gpa, expected) in [
            (0x10000, Some(0x10000)),
            (0x10031, Some(0x10000)),
            (0x1003f, Some(0x10000)), // The rest of its slot.
            (0x10060, Some(0x10000)), // 32 bytes from each.
            (0x10061, Some(0x10080)),
            (0x100b1, Some(0x10080)),
            (0x100b2, Some(0x10080)),
            (0x100b2 + 4096, Some(0x10080)),
            (0x100b3 + 4096, None),
            (0x10000 - 4096, Some(0x10000)),
            (0x10000 - 4097, None),
            (0, None),
            (u64::MAX, None),
        ] {
            assert_eq!(nearest(&objects, gpa), expected, "{gpa:#x}");
        }
        // Where the shadow says that it belongs to what lies before it, closeness does not count.
        let owner = |gpa| objects.nearest(gpa, At::Behind).map(|found| found.start);
        assert_eq!(owner(0x1007f), Some(0x10000));
        assert_eq!(owner(0x10000 - 1), Some(0x10000));
        // An object that was freed long ago does not explain a redzone.
        objects.freed(0x10080, 0, &[]);
        let redzone = |gpa| objects.nearest(gpa, At::Redzone).map(|found| found.start);
        assert_eq!((redzone(0x10090), nearest(&objects, 0x10090)), (Some(0x10000), Some(0x10080)));
        assert_eq!((redzone(0x1007f), redzone(0x10000 + 4096 + 64)), (Some(0x10000), Some(0x10000)));
        assert_eq!(redzone(0x10000 + 4096 + 65), None);
        for _ in 0..3 {
            objects.allocated(u64::MAX, u64::MAX, 0, 0, &[]);
            objects.freed(u64::MAX, 0, &[]);
        }
        assert_eq!((objects.len(), objects.entries.len()), (2, 2));
        // A slot size that claims everything does not reach over the next object.
        objects.name_cache(1, b"c", u64::MAX);
        assert_eq!(nearest(&objects, 0x10080), Some(0x10080));
        assert_eq!(nearest(&objects, 0x1007f), Some(0x10000));
    }

    #[test]
    fn frees_of_unknown_objects_are_remembered_where_they_can_be() {
        let mut objects = Objects::default();
        objects.freed(0x1000, 5, &[1]);
        let found = objects.nearest(0x1000, At::Anywhere).unwrap();
        assert_eq!((found.size, found.live, found.allocated), (0, false, None));
        assert_eq!(found.freed.unwrap().task, 5);
        objects.allocated(0x2000, 100, 0, 0, &[]);
        objects.freed(0x2010, 5, &[1]);
        assert_eq!(
            objects.nearest(0x2010, At::Anywhere).map(|found| (found.start, found.live)),
            Some((0x2000, true))
        );
        assert_eq!((objects.counts().unknown_frees, objects.len()), (2, 2));
    }

    #[test]
    fn a_full_table_forgets_the_oldest_freed_objects() {
        let mut objects = Objects::new(limits(4));
        for start in [0x10000, 0x20000, 0x30000, 0x40000] {
            objects.allocated(start, 8, 0, 0, &[]);
        }
        for start in [0x30000, 0x10000, 0x40000] {
            objects.freed(start, 0, &[]);
        }
        // No longer freed: not a candidate.
        objects.allocated(0x10000, 8, 0, 0, &[]);
        for (start, gone) in [(0x50000, 0x30000), (0x60000, 0x40000)] {
            objects.allocated(start, 8, 0, 0, &[]);
            assert_eq!((nearest(&objects, start), nearest(&objects, gone)), (Some(start), None));
        }
        objects.allocated(0x70000, 8, 0, 0, &[]);
        objects.freed(0x80000, 0, &[]);
        assert_eq!((nearest(&objects, 0x70000), nearest(&objects, 0x80000)), (None, None));
        let counts = objects.counts();
        assert_eq!((counts.evicted, counts.dropped, objects.len()), (2, 2, 4));
        // A known slot still takes its next object.
        objects.allocated(0x20000, 16, 0, 0, &[]);
        assert_eq!(objects.nearest(0x20000, At::Anywhere).unwrap().size, 16);
    }

    #[test]
    fn lost_stacks_say_so() {
        let mut objects = Objects::new(limits(100));
        for i in 0..20u64 {
            objects.allocated(i * 0x100, 8, 0, 0, &[i + 1]);
        }
        assert_eq!((objects.counts().lost_stacks, objects.stacks()), (12, 8));
        let event = |gpa| objects.nearest(gpa, At::Anywhere).unwrap().allocated.unwrap();
        assert_eq!((event(0x700).frames, event(0x700).lost), (&[8u64] as &[u64], false));
        assert!(event(0x800).frames.is_empty() && event(0x800).lost);
    }

    proptest! {
        /// Against a plain list of objects; small address space, so that they overlap all the time.
        #[test]
        fn overlaps_agree_with_a_plain_list(
            steps in proptest::collection::vec((0..600u64, 0..80u64, any::<bool>()), 1..200),
            high: bool,
        ) {
            // Nothing here starts a page: such an object explains all of it.
            let base = if high { u64::MAX - 700 } else { 64 };
            let mut objects = Objects::new(limits(1000));
            let mut plain: Vec<(u64, u64, bool)> = Vec::new();
            for (start, size, free) in steps {
                let (start, end) = (base + start, base + start + size.max(1));
                if free {
                    objects.freed(start, 0, &[]);
                    match plain.iter().position(|object| object.0 == start) {
                        Some(known) => plain[known].2 = true,
                        None if plain.iter().any(|object| object.0 < start && start < object.1) => {}
                        None => plain.push((start, start + 1, true)),
                    }
                } else {
                    objects.allocated(start, size, 0, 0, &[]);
                    plain.retain(|object| object.1 <= start || end <= object.0);
                    plain.push((start, end, false));
                }
            }
            prop_assert_eq!(objects.len(), plain.len());
            for gpa in base..=base + 699 {
                let inside = plain.iter().find(|object| (object.0..object.1).contains(&gpa));
                let found = objects.nearest(gpa, At::Anywhere).map(|found| (found.start, found.live));
                match inside {
                    Some(object) => prop_assert_eq!(found, Some((object.0, !object.2))),
                    None => {
                        let distance = |object: &(u64, u64, bool)| match object.0 > gpa {
                            true => object.0 - gpa,
                            false => gpa - object.1,
                        };
                        let found = plain.iter().find(|object| Some(object.0) == found.map(|found| found.0));
                        prop_assert_eq!(found.map(distance), plain.iter().map(distance).min());
                    }
                }
            }
        }

        /// The list of freed objects and the vacant places survive any history at a small limit.
        #[test]
        fn a_small_table_stays_whole(
            steps in proptest::collection::vec((0..40u64, 1..4u64, any::<bool>()), 1..300),
        ) {
            let mut objects = Objects::new(limits(8));
            for (start, size, free) in steps {
                if free {
                    objects.freed(start * 8, 0, &[]);
                } else {
                    objects.allocated(start * 8, size * 8, 0, 0, &[start]);
                    let dropped = objects.counts().dropped;
                    prop_assert!(dropped > 0 || nearest(&objects, start * 8) == Some(start * 8));
                }
                prop_assert!(objects.len() <= 8 && objects.entries.len() <= 8);
                let freed = objects.entries.iter().enumerate().filter(|(index, entry)| {
                    entry.state & FREED != 0 && objects.by_start.get(&entry.start) == Some(&(*index as Index))
                });
                let mut listed = 0;
                let (mut at, mut older) = (objects.oldest_freed, END);
                while at != END {
                    let entry = &objects.entries[at as usize];
                    prop_assert_eq!(entry.older, older);
                    (older, at) = (at, entry.newer);
                    listed += 1;
                    prop_assert!(listed <= 8, "a loop");
                }
                prop_assert_eq!((older, listed), (objects.newest_freed, freed.count()));
            }
        }
    }
}
