//! Whole sequences of hypercalls and ring records, in `ring` and `sync` mode, over guest memory
//! that the guest writes as it likes.

use arbitrary::{Arbitrary as _, Unstructured};

use crate::guest::{Step, World};
use crate::show;

/// Most steps of one guest.
const STEPS: usize = 200;

/// Runs the guest that the bytes describe.
pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(mut world) = World::new(&mut u) else { return };
    for _ in 0..STEPS {
        if u.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut u) else { break };
        show(&step);
        if !world.step(&step) {
            break;
        }
    }
    world.finish();
}
