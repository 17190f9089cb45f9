//! Inputs without coverage: pieces of a target's seeds, and random bytes. They are hundreds of
//! times as long as libFuzzer's, so that a guest lives long, and many things have happened before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of an input.
const BYTES: usize = 128 << 10;

/// The files of a target's seeds, by name.
///
/// # Errors
/// They cannot be listed.
pub fn seeds(target: &str) -> io::Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        paths.push(entry?.path());
    }
    paths.sort();
    Ok(paths)
}

/// Random numbers (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    /// One below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(mixed ^ (mixed >> 31)) * limit as u128) >> 64) as usize
    }
}

/// Input `number`: it begins as one of the seeds does, and goes on with pieces of all and with
/// random bytes.
pub fn input(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    let mut random = Random(number.wrapping_mul(0xd134_2543_de82_ef95));
    let mut input = Vec::with_capacity(BYTES + 4096);
    while input.len() < BYTES {
        let seed = &seeds[random.below(seeds.len())];
        let start = if input.is_empty() { 0 } else { random.below(seed.len().max(1)) };
        let len = (random.below(512) + 1).min(seed.len().saturating_sub(start));
        let at = input.len();
        input.extend_from_slice(seed.get(start..start + len).unwrap_or_default());
        for _ in 0..random.below(4) {
            if let Some(byte) = input.get_mut(at + random.below(len.max(1))) {
                *byte = random.below(256) as u8;
            }
        }
        for _ in 0..random.below(32) {
            input.push(random.below(256) as u8);
        }
    }
    input
}
