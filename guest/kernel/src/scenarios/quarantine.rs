//! Uses of freed memory in the quarantine are found, and an allocator that runs out of memory gets
//! it back.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use alloc::vec::Vec;

use super::{opaque, read, scenarios, write};
use crate::slab::{kfree, kmalloc};
use crate::{page, thread};

/// Allocates objects of 64 bytes, so many that without a quarantine the one that was freed last is
/// among them.
fn others() -> [u64; 100] {
    let mut objects = [0; 100];
    for object in &mut objects {
        *object = kmalloc(64).expect("memory for 100 small objects");
    }
    objects
}

/// The object that [`work`] frees.
static WORK: AtomicU64 = AtomicU64::new(0);

/// Queues the free of an object.
#[inline(never)]
fn queue() {
    umbra_guest::aux_stack(WORK.load(Relaxed));
    // No tail call: the call above keeps its frame.
    opaque(());
}

fn work() {
    kfree(WORK.swap(0, Relaxed));
}

scenarios! {
    quarantine_uaf, "slab-use-after-free Read 1 8",
    "reads a freed object whose memory would have been handed out again without a quarantine", {
        let Some(p) = kmalloc(64) else { return };
        kfree(p);
        let others = others();
        read(opaque(p + 8));
        others.into_iter().for_each(kfree);
    }

    quarantine_drained, "silent",
    "memory that came out of the quarantine is handed out again and used", {
        let Some(p) = kmalloc(64) else { return };
        kfree(p);
        umbra_guest::quarantine_drain();
        let others = others();
        assert!(others.contains(&p), "{p:#x} did not come back");
        for p in others {
            write(p, 1);
            write(p + 63, 1);
            kfree(p);
        }
    }

    stale_pointer_to_reused, "slab-out-of-bounds Read 1 50",
    "reads a freed object whose memory is a smaller one by now, behind that one's end", {
        let Some(p) = kmalloc(64) else { return };
        kfree(p);
        umbra_guest::quarantine_drain();
        let mut objects = [0; 100];
        for object in &mut objects {
            let Some(q) = kmalloc(40) else { return };
            *object = q;
        }
        assert!(objects.contains(&p), "{p:#x} did not come back");
        read(opaque(p + 50));
        objects.into_iter().for_each(kfree);
    }

    queued_work_uaf, "slab-use-after-free Read 1 16",
    "reads an object that was freed by work that another task has made", {
        let Some(p) = kmalloc(64) else { return };
        WORK.store(p, Relaxed);
        queue();
        thread::run("worker", work);
        read(opaque(p + 16));
    }

    quarantine_under_pressure, "silent",
    "objects that fit into what memory is left only if the quarantine gives way", {
        let mut blocks = Vec::with_capacity(4096);
        for order in (0..11).rev() {
            while let Some(block) = page::alloc(order) {
                blocks.push((block, order));
            }
        }
        // Leaves 1 MiB free, for objects of 4 MiB in all. Memory was more than 4 MiB, so there are
        // blocks of that size.
        let mut left = 256;
        while left > 0
            && let Some((block, order)) = blocks.pop()
        {
            page::free(block);
            left -= (1 << order).min(left);
        }
        for _ in 0..1000 {
            let p = kmalloc(4000).expect("the quarantine gives way");
            write(p, 1);
            write(p + 3999, 1);
            kfree(p);
        }
        blocks.into_iter().for_each(|(block, _)| page::free(block));
    }
}
