//! Bugs on stack and global variables.

use super::{opaque, read, scenarios, write};

static mut GLOBAL: [u8; 10] = [7; 10];

scenarios! {
    kasan_stack_oob, "stack-out-of-bounds Read 1 -", "reads behind an array on the stack", {
        let mut array = [0u8; 10];
        let p = opaque(&raw mut array) as u64;
        write(p + 9, 1);
        read(p + 10);
    }

    kasan_stack_oob_left, "stack-out-of-bounds Write 1 -", "writes before an array on the stack", {
        let mut array = [0u8; 24];
        let p = opaque(&raw mut array) as u64;
        write(p, 1);
        write(p - 1, 1);
    }

    kasan_global_oob_right, "global-out-of-bounds Read 1 -", "reads behind a global variable", {
        let p = &raw const GLOBAL as u64;
        read(p + 9);
        read(p + 10);
    }
}
