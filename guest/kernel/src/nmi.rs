//! Events in non-maskable interrupts: `nmi=N` on the command line, for so many of them.
//!
//! The second CPU, whose ring is small, allocates and frees while the first sends it NMIs. They
//! come at any instruction, also in the middle of an event's record. Their handler is an allocator
//! with one object. The kernel prints the number of allocations; the host must have received as
//! many.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use umbra_guest::codes::{SLAB_FREE, SLAB_REDZONE};

use crate::slab::{kfree, kmalloc};
use crate::{apic, page, println, smp};

/// How many there are to be.
static NMIS: AtomicU64 = AtomicU64::new(0);
static HANDLED: AtomicU64 = AtomicU64::new(0);
/// Allocations and frees of the second CPU meanwhile.
static OPERATIONS: AtomicU64 = AtomicU64::new(0);
/// The handler's object, once there is one.
static OBJECT: AtomicU64 = AtomicU64::new(0);

/// Runs what the command line asks for.
pub fn run(command_line: &str) {
    let words = command_line.split_ascii_whitespace();
    for nmis in words.filter_map(|word| word.strip_prefix("nmi=")?.parse().ok()) {
        let Some(page) = page::alloc(0).filter(|_| smp::running() > 1) else {
            println!("nmi: needs memory and two CPUs");
            return;
        };
        OBJECT.store(page, Relaxed);
        // The first time the page's shadow is promoted, for which nothing may wait.
        use_object();
        NMIS.store(nmis, Relaxed);
        smp::on_all(work);
        println!("nmi: {nmis} NMIs, {} allocations", nmis + OPERATIONS.load(Relaxed));
    }
}

fn work(number: usize) {
    let all = NMIS.load(Relaxed);
    match number {
        1 => {
            while HANDLED.load(Relaxed) < all {
                if let Some(at) = kmalloc(64) {
                    OPERATIONS.fetch_add(1, Relaxed);
                    kfree(at);
                }
            }
        }
        0 => {
            for sent in 1..=all {
                smp::send(1, apic::NMI);
                while HANDLED.load(Relaxed) < sent {
                    core::hint::spin_loop();
                }
                // The other CPU ends what the NMI has interrupted before the next one comes: a ring
                // that is nearly full has room for the records of one in the middle of another.
                let before = OPERATIONS.load(Relaxed);
                while sent < all && OPERATIONS.load(Relaxed) == before {
                    core::hint::spin_loop();
                }
                (0..sent % 64).for_each(|_| core::hint::spin_loop());
            }
        }
        _ => {}
    }
}

fn use_object() {
    let at = OBJECT.load(Relaxed);
    umbra_guest::alloc(at, 64, 96, SLAB_REDZONE, 1);
    umbra_guest::free(at, at, 96, SLAB_FREE);
}

/// Handles an NMI.
pub fn handle() {
    use_object();
    HANDLED.fetch_add(1, Relaxed);
}
