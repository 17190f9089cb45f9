//! The parts of a finding that need no vCPU: the object with its history, and the shadow.

use umbra_provenance::{FoundObject, InvalidFree, ObjectEvent, Provenance, ShadowHint};
use umbra_report::{AccessKind, Finding, Object, Previous, ROW_SHADOW, ShadowDump, Task, Track};
use umbra_shadow::codes::{FREE_PAGE, GRANULE, LARGE_REDZONE, SLAB_REDZONE};
use umbra_shadow::{BugKind, Shadow as _};

use super::dispatch::Dispatcher;
use super::guest_info::GuestInfo;
use super::run_shadow::RunShadow;

/// [`GRANULE`], as shadow bytes count.
const GRANULE_BYTES: u8 = GRANULE as u8;

/// What the VMM knows. The rings are drained.
#[derive(Clone, Copy)]
pub(super) struct Known<'a> {
    pub shadow: &'a RunShadow,
    pub provenance: &'a Provenance,
    pub guest: &'a GuestInfo,
}

impl Dispatcher {
    /// What is known now, for another finding.
    pub(super) fn known(&self) -> Known<'_> {
        self.guest.symbols().begin();
        Known { shadow: &self.shadow, provenance: &self.provenance, guest: &self.guest }
    }
}

/// The first bad address of an access.
pub(super) struct BadAddress {
    /// The guest's own address.
    pub va: u64,
    /// Its key in the shadow and the object table; none outside of all regions.
    pub key: Option<u64>,
    pub kind: BugKind,
}

impl BadAddress {
    /// Whether the memory may belong to an object of an allocator.
    fn is_on_heap(&self) -> bool {
        !matches!(
            self.kind,
            BugKind::StackOutOfBounds
                | BugKind::GlobalOutOfBounds
                | BugKind::AllocaOutOfBounds
                | BugKind::UseAfterScope
        )
    }
}

/// What is known about the object that a bad address belongs to.
#[derive(Default)]
pub(super) struct History {
    pub object: Option<Object>,
    pub allocated: Option<Track>,
    pub freed: Option<Track>,
    pub related_work: Vec<Track>,
    pub previous: Option<Previous>,
}

impl Known<'_> {
    /// The object of a bad address, and its history.
    pub fn history(&self, bad: &BadAddress, notes: &mut Vec<String>) -> History {
        let Some(key) = bad.key.filter(|_| bad.is_on_heap()) else { return History::default() };
        let hint = match self.shadow.model().map(|model| model.state(key)) {
            Some(1..GRANULE_BYTES | LARGE_REDZONE) => ShadowHint::Behind,
            Some(SLAB_REDZONE) => ShadowHint::Redzone,
            // Memory that is freed wrongly may be accessible.
            Some(FREE_PAGE | 0) => ShadowHint::Inside,
            _ => ShadowHint::Anywhere,
        };
        let Some(found) = self.provenance.objects().nearest(key, hint) else {
            return History::default();
        };
        let mut track = |event: &ObjectEvent| {
            if event.lost {
                notes.push("a stack is missing: too many different ones were recorded".into());
            }
            let frames = self.guest.symbols().stack(&event.frames);
            Track {
                task: task(event.task, event.name),
                cpu: event.at.map(|at| at.cpu.into()),
                micros: event.at.and_then(|at| at.micros),
                frames,
            }
        };
        let allocated = found.allocated.as_ref().map(&mut track);
        let freed = found.freed.as_ref().map(&mut track);
        let related_work = found.related.iter().map(&mut track).collect();
        // Only if the pointer may have pointed to that object.
        let before = found
            .previous
            .as_ref()
            .filter(|p| (p.start..p.start.saturating_add(p.size)).contains(&key));
        let previous = before.map(|before| Previous {
            start: bad.va.wrapping_sub(key - before.start),
            size: before.size,
            allocated: before.allocated.as_ref().map(&mut track),
            freed: track(&before.freed),
        });
        let object = Some(object(&found, key, bad.va));
        History { object, allocated, freed, related_work, previous }
    }

    /// A note if the object may be missing because the table was full.
    pub fn forgotten(&self, bad: &BadAddress, history: &History) -> Option<String> {
        let counts = self.provenance.objects().counts();
        if counts.dropped + counts.forgotten == 0 || !bad.is_on_heap() {
            return None;
        }
        // Memory beside an object may belong to one that was dropped.
        let sure = |object: &&Object| (0..object.size.cast_signed()).contains(&object.offset);
        if history.object.as_ref().filter(sure).is_none() {
            Some("the table of objects was full: the object may be missing in it".into())
        } else if history.allocated.is_none() {
            Some("the table of objects was full: who allocated the object was forgotten".into())
        } else {
            None
        }
    }

    /// The shadow around the first bad address.
    pub fn shadow_around(&self, va: u64) -> ShadowDump {
        ShadowDump::around(va, |at| {
            let key = self.guest.regions().key_of(at, GRANULE * ROW_SHADOW as u64)?;
            let model = self.shadow.model()?;
            Some(std::array::from_fn(|i| model.state(key + i as u64 * GRANULE)))
        })
    }

    /// A finding about a free of an address inside of a live object. `note` says how it was found.
    pub fn invalid_free(&self, free: &InvalidFree, note: Option<&str>) -> Finding {
        let InvalidFree { address, key, at, task: id, ref frames } = *free;
        let symbols = self.guest.symbols();
        let bad = BadAddress { va: address, key: Some(key), kind: BugKind::InvalidFree };
        let mut notes: Vec<String> = note.map(str::to_owned).into_iter().collect();
        let history = self.history(&bad, &mut notes);
        notes.extend(symbols.notes());
        Finding {
            kind: bad.kind.as_str(),
            address,
            ip: frames.first().copied().unwrap_or_default(),
            cpu: at.cpu.into(),
            task: task(id, self.provenance.objects().task_name(id)),
            frames: symbols.stack(frames),
            object: history.object,
            allocated: history.allocated,
            freed: history.freed,
            related_work: history.related_work,
            previous: history.previous,
            shadow: self.shadow_around(address),
            image: symbols.image(),
            notes,
            ..Finding::new(AccessKind::Free)
        }
    }
}

/// An object of the table in the guest's own addresses; `va` is that of `key`.
fn object(found: &FoundObject, key: u64, va: u64) -> Object {
    let offset = key.wrapping_sub(found.start).cast_signed();
    Object {
        start: va.wrapping_sub(offset.cast_unsigned()),
        size: found.size,
        cache: found.cache.map(|cache| cache.name.to_owned()),
        cache_size: found.cache.map_or(0, |cache| cache.object_size),
        offset,
    }
}

/// A task of the guest; without a name if it gave none.
pub(super) fn task(id: u32, name: Option<&str>) -> Task {
    Task { id, name: name.unwrap_or_default().to_owned() }
}
