//! Bugs on allocations that are too large for a slab and have pages of their own. Names as in
//! Linux's KASAN test suite.

use super::slab::realloc_oob;
use super::{opaque, read, scenarios, write};
use crate::slab::{kfree, kmalloc};

scenarios! {
    kmalloc_pagealloc_oob_right, "slab-out-of-bounds Write 1 4106;slab-out-of-bounds Write 1 8191",
    "writes behind an allocation that has pages of its own", {
        let Some(p) = kmalloc(4096 + 10) else { return };
        write(p + 4105, 0);
        write(p + 4106, 0);
        write(p + 8191, 0);
        kfree(p);
    }

    kmalloc_pagealloc_uaf, "use-after-free Read 1 0", "reads freed pages", {
        let Some(p) = kmalloc(4096 + 10) else { return };
        kfree(p);
        read(p);
    }

    kmalloc_pagealloc_invalid_free, "invalid-free Free 0 1",
    "frees an address inside of the pages", {
        let Some(p) = kmalloc(4096 + 10) else { return };
        kfree(opaque(p + 1));
        kfree(p);
    }

    krealloc_pagealloc_more_oob, "slab-out-of-bounds Write 1 4331;slab-out-of-bounds Write 1 4336",
    "writes behind an allocation that has grown in place", {
        realloc_oob(4096 + 201, 4096 + 235, &[4296, 4297, 4314, 4330], &[]);
    }

    krealloc_pagealloc_less_oob,
    "slab-out-of-bounds Write 1 4297;slab-out-of-bounds Write 1 4304;\
     slab-out-of-bounds Write 1 4314;slab-out-of-bounds Write 1 4330;\
     slab-out-of-bounds Write 1 4331",
    "writes where an allocation reached before it shrank in place", {
        realloc_oob(4096 + 235, 4096 + 201, &[4296], &[4314, 4330, 4331]);
    }
}
