//! Fuzzes without coverage, with inputs hundreds of times as long as libFuzzer's: guests that live
//! long, in which many things have happened before.
//!
//! `cargo run --profile fuzz --package umbra-fuzz --example soak TARGET REQUESTS [SEED]` makes each
//! input of pieces of the target's seeds and of random bytes, until there were so many requests.
//! Before a panic it prints the number of the input: with `1 NUMBER` as the last arguments it is
//! made again. With `--slowest` as the first argument it says, too, what the most expensive request
//! cost, and of which input it was; in the nested host with `--icount` a nanosecond is an
//! instruction.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use umbra_fuzz::{TARGETS, requests, slowest};

/// Bytes of an input.
const BYTES: usize = 128 << 10;
/// Time between two lines about the progress.
const PROGRESS: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let measures = arguments.first().is_some_and(|first| first == "--slowest");
    arguments.drain(..usize::from(measures));
    let Some((name, wanted, first)) = parsed(&arguments) else {
        eprintln!("usage: soak [--slowest] TARGET REQUESTS [SEED]");
        return ExitCode::from(2);
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
    let target = TARGETS.into_iter().find(|(other, _)| *other == name);
    let (Some((_, target)), Ok(seeds)) = (target, seeds(&folder)) else {
        eprintln!("error: there is no target {name}, or {} cannot be read", folder.display());
        return ExitCode::from(2);
    };
    let (begin, mut said) = (Instant::now(), Instant::now());
    let (mut number, mut most) = (first, (0, first));
    while requests() < wanted {
        let input = input(&seeds, number);
        let run = || {
            if measures {
                slowest(target, &input)
            } else {
                target(&input);
                0
            }
        };
        let cost = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            eprintln!("panicked: soak {name} 1 {number}");
            resume_unwind(panic)
        });
        most = most.max((cost, number));
        number += 1;
        if said.elapsed() > PROGRESS {
            said = Instant::now();
            eprintln!("{} requests, {} s", requests(), begin.elapsed().as_secs());
        }
    }
    let inputs = number - first;
    println!("{name}: {} requests of {inputs} inputs, 0 panics", requests());
    if measures {
        println!("the most expensive request: {} ns, of input {}", most.0, most.1);
    }
    ExitCode::SUCCESS
}

fn parsed(arguments: &[String]) -> Option<(&str, u64, u64)> {
    let [name, requests, seed @ ..] = arguments else { return None };
    let seed = match seed {
        [] => Some(0),
        [seed] => seed.parse().ok(),
        _ => None,
    };
    Some((name, requests.parse().ok()?, seed?))
}

/// The contents of the seeds, in the order of their names.
fn seeds(folder: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        paths.push(entry?.path());
    }
    paths.sort();
    paths.iter().map(fs::read).collect()
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

/// An input: it begins as a seed does, and goes on with pieces of all and with random bytes.
fn input(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
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
