use proptest::prelude::*;

use super::*;
use crate::Moment;

fn limits(objects: usize) -> ObjectLimits {
    ObjectLimits { objects, related: 1 << 10, stacks: 1 << 16, tasks: 8 }
}

/// An allocation.
fn of(key: u64, size: u64, slot: u64, cache: u16) -> Allocation {
    Allocation { key, size, slot, cache }
}

/// Who did it: a task on the CPU with its number, as many microseconds after the start.
fn by(task: u32, frames: &[u64]) -> Event<'_> {
    Event {
        task,
        at: Moment { cpu: task as u16, micros: Some(task.into()) },
        frames: frames.into(),
    }
}

/// Start of the object that explains `key`.
fn nearest(objects: &Objects, key: u64) -> Option<u64> {
    objects.nearest(key, ShadowHint::Anywhere).map(|found| found.start)
}

#[test]
fn an_object_tells_its_history() {
    let mut objects = Objects::default();
    objects.name_cache(3, b"kmalloc-64", 64);
    objects.name_task(7, b"slab_oob");
    objects.allocated(of(0x1000, 50, 0, 3), &by(7, &[0xa, 0xb]));
    let live = objects.nearest(0x1010, ShadowHint::Anywhere).unwrap();
    assert_eq!((live.start, live.size, live.live, live.freed), (0x1000, 50, true, None));
    assert_eq!(live.cache, Some(Cache { id: 3, name: "kmalloc-64", object_size: 64 }));
    let at = |task| Some(by(task, &[]).at);
    let (name, frames) = (Some("slab_oob"), &[0xau64, 0xb] as &[u64]);
    let event = ObjectEvent { task: 7, name, at: at(7), frames: frames.to_vec(), lost: false };
    assert_eq!(live.allocated, Some(event.clone()));

    objects.freed(0x1000, &by(8, &[0xc]));
    objects.freed(0x1000, &by(9, &[0xd]));
    let freed = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap();
    assert_eq!((freed.live, freed.allocated), (false, Some(event)));
    let free = ObjectEvent { task: 8, name: None, at: at(8), frames: vec![0xc], lost: false };
    assert_eq!(freed.freed, Some(free));
    assert_eq!(objects.counts().repeated_frees, 1);

    // The slot again, for someone else.
    objects.allocated(of(0x1000, 20, 0, 0), &by(1, &[]));
    let again = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap();
    assert_eq!((again.size, again.live, again.cache, again.freed), (20, true, None, None));
    assert_eq!(
        again.allocated,
        Some(ObjectEvent { task: 1, name: None, at: at(1), frames: vec![], lost: false })
    );
    assert_eq!(objects.len(), 1);
}

#[test]
fn pages_of_its_own_belong_to_an_object() {
    let mut objects = Objects::default();
    objects.allocated(of(0x10000, 4106, 0, 0), &by(0, &[]));
    objects.allocated(of(0x12000, 4096, 0, 0), &by(0, &[]));
    assert_eq!(nearest(&objects, 0x11fff), Some(0x10000), "one byte before the next object");
    assert_eq!(nearest(&objects, 0x12000), Some(0x12000));
}

#[test]
fn the_closer_neighbour_explains() {
    let mut objects = Objects::default();
    objects.name_cache(1, b"c", 64);
    objects.allocated(of(0x10000, 50, 0, 1), &by(0, &[]));
    objects.allocated(of(0x10080, 50, 0, 0), &by(0, &[]));
    for (key, expected) in [
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
        assert_eq!(nearest(&objects, key), expected, "{key:#x}");
    }
    // Where the shadow says that it belongs to what lies before it, closeness does not count.
    let owner = |key| objects.nearest(key, ShadowHint::Behind).map(|found| found.start);
    assert_eq!(owner(0x1007f), Some(0x10000));
    assert_eq!(owner(0x10000 - 1), Some(0x10000));
    // An object that was freed long ago does not explain a redzone.
    objects.freed(0x10080, &by(0, &[]));
    let redzone = |key| objects.nearest(key, ShadowHint::Redzone).map(|found| found.start);
    assert_eq!((redzone(0x10090), nearest(&objects, 0x10090)), (Some(0x10000), Some(0x10080)));
    assert_eq!((redzone(0x1007f), redzone(0x10000 + 4096 + 64)), (Some(0x10000), Some(0x10000)));
    assert_eq!(redzone(0x10000 + 4096 + 65), None);
    // A free page has nothing to do with its neighbours, only with what was in it.
    let in_free_page = |gpa| objects.nearest(gpa, ShadowHint::Inside).map(|found| found.start);
    assert_eq!((in_free_page(0x10090), in_free_page(0x10000)), (Some(0x10080), Some(0x10000)));
    assert_eq!((in_free_page(0x10000 - 1), in_free_page(0x10000 + 4096)), (None, None));
    for _ in 0..3 {
        objects.allocated(of(u64::MAX, u64::MAX, 0, 0), &by(0, &[]));
        objects.freed(u64::MAX, &by(0, &[]));
    }
    assert_eq!(objects.len(), 2);
    // A slot size that claims everything does not reach over the next object.
    objects.name_cache(1, b"c", u64::MAX);
    assert_eq!(nearest(&objects, 0x10080), Some(0x10080));
    assert_eq!(nearest(&objects, 0x1007f), Some(0x10000));
    // Of two that are as near the one in use explains.
    let mut objects = Objects::default();
    objects.name_cache(1, b"c", 64);
    objects.allocated(of(0x10000, 50, 0, 1), &by(0, &[]));
    objects.allocated(of(0x10080, 50, 0, 0), &by(0, &[]));
    objects.freed(0x10000, &by(0, &[]));
    assert_eq!(nearest(&objects, 0x10060), Some(0x10080));
    assert_eq!(nearest(&objects, 0x1005f), Some(0x10000));
    // Or else the one in the same page.
    let mut objects = Objects::default();
    objects.allocated(of(0x10000, 4096, 0, 0), &by(0, &[]));
    objects.allocated(of(0x11010, 13, 0, 0), &by(0, &[]));
    assert_eq!(nearest(&objects, 0x11008), Some(0x11010));
    assert_eq!(nearest(&objects, 0x11007), Some(0x10000));
}

#[test]
fn frees_of_unknown_objects_are_remembered_where_they_can_be() {
    let mut objects = Objects::default();
    objects.freed(0x1000, &by(5, &[1]));
    let found = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap();
    assert_eq!((found.size, found.live, found.allocated), (0, false, None));
    assert_eq!(found.freed.unwrap().task, 5);
    objects.allocated(of(0x2000, 100, 0, 0), &by(0, &[]));
    objects.freed(0x2010, &by(5, &[1]));
    assert_eq!(
        objects.nearest(0x2010, ShadowHint::Anywhere).map(|found| (found.start, found.live)),
        Some((0x2000, true))
    );
    assert_eq!((objects.counts().unknown_frees, objects.len()), (2, 2));
}

/// Pages of eight objects each, in a table that is full: what is freed goes page by page.
#[test]
fn a_full_table_forgets_the_oldest_freed_objects() {
    const SLOT: u64 = 512;
    let mut objects = Objects::new(limits(1 << 16));
    let start = |i: u64| 0x10000 + i * SLOT;
    let live = |objects: &mut Objects, i| objects.allocated(of(start(i), 8, SLOT, 0), &by(0, &[]));
    let mut all = 0;
    while objects.counts().dropped == 0 {
        live(&mut objects, all);
        all += 1;
    }
    let most = (all - 1) / 8 * 8;
    assert!(objects.len() as u64 == all - 1 && most > 400, "{most}");
    let is_known = |objects: &Objects, i| objects.table.at(start(i)).is_some();
    assert!(is_known(&objects, most - 1) && !is_known(&objects, all - 1));
    // Every third page is freed, the last first, and its second object is used again.
    let pages: Vec<u64> = (0..most / 8).rev().step_by(3).collect();
    for page in &pages {
        (8 * page..8 * page + 8).for_each(|i| {
            objects.freed(start(i), &by(0, &[]));
        });
        live(&mut objects, 8 * page + 1);
    }
    // Others need their room.
    let freed = objects.figures(0).freed;
    for i in 0..freed / 2 {
        live(&mut objects, 2 * most + i);
        assert!(is_known(&objects, 2 * most + i), "{i}");
        let gone = pages.iter().take_while(|page| !is_known(&objects, 8 * **page)).count();
        for (nth, page) in pages.iter().enumerate() {
            for i in 8 * page..8 * page + 8 {
                assert_eq!(is_known(&objects, i), i % 8 == 1 || nth >= gone, "{nth} {i} {gone}");
            }
        }
    }
    let counts = objects.counts();
    assert!(counts.forgotten >= freed / 3 && counts.dropped == 1, "{counts:?}");
    objects.table.checked();
    // None is left that could go, and then none is taken in but in the place of another one.
    for i in 0..most {
        live(&mut objects, 4 * most + i);
    }
    let counts = objects.counts();
    assert!(counts.dropped > most / 4 && objects.figures(0).freed == 0, "{counts:?}");
    let last = start(8 * pages[0] + 1);
    objects.allocated(of(last, 16, SLOT, 0), &by(0, &[]));
    let found = |objects: &Objects| {
        let found = objects.nearest(last, ShadowHint::Anywhere).unwrap();
        (found.start, found.size, found.live)
    };
    assert_eq!(found(&objects), (last, 16, true));
    objects.freed(last, &by(0, &[]));
    assert_eq!(found(&objects), (last, 16, false));
    objects.table.checked();
}

#[test]
fn lost_stacks_say_so() {
    let mut objects = Objects::new(ObjectLimits { stacks: 4096, ..limits(1 << 16) });
    for i in 0..200u64 {
        objects.allocated(of(i * 0x100, 8, 0, 0), &by(3, &[i + 1]));
    }
    let (kept, lost) = (objects.stacks(), objects.counts().lost_stacks);
    assert!(kept > 35 && kept as u64 + lost == 200, "{kept} {lost}");
    let event = |key| objects.nearest(key, ShadowHint::Anywhere).unwrap().allocated.unwrap();
    assert_eq!((event(0x700).frames, event(0x700).lost), (vec![8], false));
    assert!(event(199 * 0x100).frames.is_empty() && event(199 * 0x100).lost);
    assert!(objects.origins.bytes() <= 4096);
}

#[test]
fn stacks_that_nothing_needs_make_room() {
    let mut objects = Objects::new(ObjectLimits { stacks: 8192, ..limits(1 << 16) });
    objects.allocated(of(0x100_0000, 8, 0, 0), &by(3, &[1, 2, 3]));
    // One slot, used again and again, each time from another place.
    for i in 0..20_000u64 {
        objects.allocated(of(0x1000, 8, 0, 0), &by(4, &[i + 10]));
        objects.freed(0x1000, &by(5, &[i + 11]));
    }
    let found = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap();
    assert!(!found.live && found.previous.is_some());
    let kept = objects.nearest(0x100_0000, ShadowHint::Anywhere).unwrap().allocated.unwrap();
    assert_eq!((kept.task, kept.frames), (3, vec![1, 2, 3]));
    assert!(
        objects.counts().lost_stacks == 0 && objects.stacks() < 100,
        "{:?}",
        objects.figures(0)
    );
}

#[test]
fn freed_objects_go_before_stacks_are_lost() {
    let mut objects = Objects::new(ObjectLimits { stacks: 8192, ..limits(1 << 16) });
    for i in 0..100u64 {
        objects.allocated(of(i * 0x100, 8, 0, 0), &by(1, &[i + 1]));
        objects.freed(i * 0x100, &by(1, &[1]));
    }
    for i in 100..140u64 {
        objects.allocated(of(i * 0x100, 8, 0, 0), &by(1, &[i + 1]));
    }
    let counts = objects.counts();
    assert!(counts.forgotten > 0 && counts.dropped == 0, "{counts:?}");
    let (old, new) = (
        objects.nearest(0, ShadowHint::Anywhere),
        objects.nearest(139 * 0x100, ShadowHint::Anywhere),
    );
    assert!(old.is_none());
    assert_eq!(new.unwrap().allocated.unwrap().frames, [140]);
}

#[test]
fn what_was_there_before_is_told() {
    let mut objects = Objects::default();
    objects.allocated(of(0x1000, 50, 64, 0), &by(1, &[0xa]));
    assert_eq!(objects.nearest(0x1000, ShadowHint::Anywhere).unwrap().previous, None);
    objects.freed(0x1000, &by(2, &[0xb]));
    objects.allocated(of(0x1000, 40, 64, 0), &by(3, &[0xc]));
    let event = |task, frames: &[u64]| ObjectEvent {
        task,
        name: None,
        at: None,
        frames: frames.to_vec(),
        lost: false,
    };
    let first = Previous {
        start: 0x1000,
        size: 50,
        allocated: Some(event(1, &[0xa])),
        freed: event(2, &[0xb]),
    };
    let found = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap();
    assert_eq!((found.size, found.freed, &found.previous), (40, None, &Some(first.clone())));
    // Freed as well, it still tells.
    objects.freed(0x1000, &by(4, &[0xd]));
    assert_eq!(objects.nearest(0x1000, ShadowHint::Anywhere).unwrap().previous, Some(first));
    // A larger one in the same memory, which starts before it.
    objects.allocated(of(0xff0, 100, 128, 0), &by(5, &[0xe]));
    let previous = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap().previous.unwrap();
    assert_eq!((previous.start, previous.size, previous.freed), (0x1000, 40, event(4, &[0xd])));
    // In place, as by realloc: what was before stays what was before.
    objects.allocated(of(0xff0, 120, 128, 0), &by(6, &[0xf]));
    assert_eq!(
        objects.nearest(0x1000, ShadowHint::Anywhere).unwrap().previous.unwrap().freed,
        event(4, &[0xd])
    );
}

#[test]
fn related_work_is_told_the_last_first() {
    let mut objects = Objects::new(limits(1 << 16));
    objects.related(0x1000, &by(1, &[1]));
    assert_eq!(objects.counts().unknown_related, 1);
    objects.allocated(of(0x1000, 50, 64, 0), &by(1, &[0xa]));
    let related = |objects: &Objects| {
        let found = objects.nearest(0x1000, ShadowHint::Anywhere).unwrap();
        found.related.iter().map(|event| (event.task, event.frames[0])).collect::<Vec<_>>()
    };
    for i in 1..4u32 {
        objects.related(0x1000 + 10 * u64::from(i), &by(i, &[u64::from(i)]));
    }
    assert_eq!(related(&objects), [(3, 3), (2, 2)]);
    objects.freed(0x1000, &by(9, &[0xb]));
    assert_eq!(related(&objects), [(3, 3), (2, 2)]);
    objects.allocated(of(0x1000, 50, 64, 0), &by(1, &[0xa]));
    assert!(related(&objects).is_empty());
    objects.related(0x1000 + 50, &by(1, &[1]));
    assert_eq!(objects.counts().unknown_related, 2, "behind it");
    // Few objects have any.
    for i in 2..99 {
        objects.allocated(of(i * 0x1000, 8, 0, 0), &by(1, &[]));
        objects.related(i * 0x1000, &by(1, &[1]));
    }
    assert_eq!(objects.related.len(), most_related(1 << 10));
    assert_eq!(objects.counts().unknown_related, 2 + 97 - 14);
}

/// A guest that does its worst: addresses far apart, everything different from what was before,
/// stacks that are never the same, related work, objects in the place of others; first only live
/// ones, so that none can go when those change.
#[test]
fn it_never_takes_more_than_its_budget() {
    for (budget, far) in
        [(0, true), (900, true), (4096, true), (16 << 10, false), (16 << 10, true), (1 << 18, true)]
    {
        let mut objects = Objects::new(ObjectLimits::of_budget(budget));
        let mut random = 1u64;
        let mut next = |most: u64| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (random >> 20) % most
        };
        let events = budget / 8 + 2000;
        for event in 0..events {
            let at = if far {
                next(budget + 100) * 77_777_777_777 % Table::LAST_START
            } else {
                event * 64
            };
            let (task, frames) = (next(50) as u32, [next(1 << 20); 3]);
            match next(9) {
                0..2 if event > events / 3 => {
                    objects.freed(at, &by(task, &frames));
                }
                2 => objects.related(at, &by(task, &frames)),
                _ => objects.allocated(
                    of(at, next(if far { 1 << 33 } else { 64 }), next(5000), next(1 << 16) as u16),
                    &by(task, &frames),
                ),
            }
            let figures = objects.figures(budget);
            assert!(figures.bytes <= budget, "{event}: {figures:?}");
        }
        let figures = objects.figures(budget);
        assert!(figures.counts.dropped > 0, "{figures:?}");
        assert!(budget < 4096 || figures.live > budget / 600, "{figures:?}");
        objects.table.checked();
    }
}

/// However full the table is, an event forgets few objects at a time.
#[test]
fn an_event_makes_room_in_small_steps() {
    let mut objects = Objects::new(limits(1 << 16));
    let mut before = 0;
    for i in 0..20_000u64 {
        objects.allocated(of(i * 64, 8, 64, 0), &by(0, &[]));
        objects.freed(i * 64, &by(0, &[]));
        let forgotten = objects.counts().forgotten;
        assert!(forgotten - before <= 64 * PAGES_FORGOTTEN as u64, "{i}");
        before = forgotten;
    }
    assert!(before > 18_000 && objects.counts().dropped == 0, "{:?}", objects.figures(0));
}

#[test]
fn redzones_of_live_objects_are_counted() {
    let mut objects = Objects::default();
    objects.name_cache(1, b"kmalloc-64", 64);
    objects.allocated(of(0x1000, 50, 96, 1), &by(0, &[]));
    assert_eq!(objects.redzone_bytes(), (32, 32));
    objects.allocated(of(0x2000, 50, 72, 0), &by(0, &[]));
    objects.allocated(of(0x4000, 4097, 8192, 0), &by(0, &[]));
    assert_eq!(objects.redzone_bytes(), (48, 48), "16 of 22 are whole granules");
    objects.allocated(of(0x1000, 20, 96, 1), &by(0, &[]));
    objects.freed(0x1000, &by(0, &[]));
    objects.freed(0x1000, &by(0, &[]));
    assert_eq!(objects.redzone_bytes(), (16, 48));
    objects.allocated(of(0x5000, 1, 1 << 40, 0), &by(0, &[]));
    assert_eq!(objects.redzone_bytes().0, 16, "whole pages");
    objects.allocated(of(0x7000, 1, (1 << 40) + 8, 0), &by(0, &[]));
    assert_eq!(objects.redzone_bytes().0, 16 + 2040);
}

proptest! {
    /// Against a plain list of objects; small address space, so that they overlap all the time.
    #[test]
    fn overlaps_agree_with_a_plain_list(
        steps in proptest::collection::vec((0..600u64, 0..80u64, any::<bool>()), 1..200),
        high: bool,
    ) {
        // Nothing here starts a page: such an object explains all of it.
        let base = if high { Table::LAST_START - 700 } else { 64 };
        let mut objects = Objects::new(limits(1 << 17));
        let mut plain: Vec<(u64, u64, bool)> = Vec::new();
        for (start, size, free) in steps {
            let (start, end) = (base + start, base + start + size.max(1));
            if free {
                objects.freed(start, &by(0, &[]));
                match plain.iter().position(|object| object.0 == start) {
                    Some(known) => plain[known].2 = true,
                    None if plain.iter().any(|object| object.0 < start && start < object.1) => {}
                    None => plain.push((start, start + 1, true)),
                }
            } else {
                objects.allocated(of(start, size, 0, 0), &by(0, &[]));
                plain.retain(|object| object.1 <= start || end <= object.0);
                plain.push((start, end, false));
            }
        }
        prop_assert_eq!(objects.len(), plain.len());
        for key in base..=base + 699 {
            let inside = plain.iter().find(|object| (object.0..object.1).contains(&key));
            let found = objects.nearest(key, ShadowHint::Anywhere);
            let found = found.map(|found| (found.start, found.live));
            match inside {
                Some(object) => prop_assert_eq!(found, Some((object.0, !object.2))),
                None => {
                    let distance = |object: &(u64, u64, bool)| match object.0 > key {
                        true => object.0 - key,
                        false => key - object.1,
                    };
                    let start = found.map(|found| found.0);
                    let found = plain.iter().find(|object| Some(object.0) == start);
                    prop_assert_eq!(found.map(distance), plain.iter().map(distance).min());
                }
            }
        }
    }

    /// It survives any history at a small limit.
    #[test]
    fn a_small_table_stays_whole(
        steps in proptest::collection::vec((0..400u64, 1..4u64, any::<bool>()), 1..600),
    ) {
        let limit = 3000;
        let mut objects = Objects::new(limits(limit));
        for (start, size, free) in steps {
            if free {
                objects.freed(start * 8, &by(0, &[]));
            } else {
                objects.allocated(of(start * 8, size * 8, 0, 0), &by(0, &[start]));
                let dropped = objects.counts().dropped;
                prop_assert!(dropped > 0 || nearest(&objects, start * 8) == Some(start * 8));
            }
            prop_assert!(objects.table.bytes() <= limit);
            objects.table.checked();
        }
    }

    /// What an object tells of itself and of what was freed in its place before, against a plain
    /// list. Every event has a task of its own, and the table of these is looked through for what
    /// nothing needs any more, again and again.
    #[test]
    fn histories_agree_with_a_plain_list(
        steps in proptest::collection::vec((0..90u64, 1..30u64, 0..5u8), 1..300),
    ) {
        // Start, end, allocation, free; and the same of the one before.
        type Known = (u64, u64, Option<u32>, Option<u32>);
        let mut objects = Objects::new(ObjectLimits { stacks: 4096, ..limits(1 << 16) });
        let mut plain: Vec<(Known, Option<Known>)> = Vec::new();
        let task = |event: Option<ObjectEvent>| event.map(|event| event.task);
        for (task, (start, size, what)) in (0u32..).zip(steps) {
            let (start, end) = (start, start + size);
            if what < 3 {
                objects.allocated(of(start, size, 0, 0), &by(task, &[]));
                let (mut others, mut previous) = (Vec::new(), None);
                // By falling address, as overlapping ones are forgotten: the last one that says
                // something is kept.
                plain.sort_by_key(|(object, _)| std::cmp::Reverse(object.0));
                for (object, before) in plain {
                    if object.1 <= start || end <= object.0 {
                        others.push((object, before));
                    } else if object.3.is_some() {
                        previous = Some(object);
                    } else if object.0 == start {
                        previous = before;
                    }
                }
                others.push(((start, end, Some(task), None), previous));
                plain = others;
            } else {
                objects.freed(start, &by(task, &[]));
                match plain.iter().position(|(object, _)| object.0 == start) {
                    Some(known) => {
                        plain[known].0.3.get_or_insert(task);
                    }
                    None if plain
                        .iter()
                        .any(|(object, _)| object.0 < start && start < object.1) => {}
                    None => plain.push(((start, start + 1, None, Some(task)), None)),
                }
            }
            objects.table.checked();
        }
        prop_assert_eq!(objects.counts().lost_stacks, 0);
        prop_assert_eq!(objects.len(), plain.len());
        for (object, before) in plain {
            let found = objects.nearest(object.0, ShadowHint::Anywhere).unwrap();
            let end = found.start + found.size.max(1);
            prop_assert_eq!((found.start, end, task(found.allocated), task(found.freed)), object);
            let previous = found.previous.map(|object| {
                let end = object.start + object.size.max(1);
                (object.start, end, task(object.allocated), Some(object.freed.task))
            });
            prop_assert_eq!(previous, before);
        }
    }
}
