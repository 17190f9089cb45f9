//! Whole sequences of hypercalls and ring records, in `ring` and `sync` mode, over guest memory
//! that the guest writes as it likes.

use arbitrary::{Arbitrary as _, Unstructured};

use crate::guest::{Step, World};
use crate::show;

/// Runs the guest that the bytes describe: each step takes some of them.
pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(mut world) = World::new(&mut u) else { return };
    while !u.is_empty() {
        let Ok(step) = Step::arbitrary(&mut u) else { break };
        show(&step);
        if !world.step(&step) {
            break;
        }
    }
    world.finish();
}
