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
use std::process::ExitCode;
use std::time::{Duration, Instant};

use umbra_fuzz::inputs::{input, seeds};
use umbra_fuzz::{TARGETS, requests, slowest};

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
    let target = TARGETS.into_iter().find(|(other, _)| *other == name);
    let contents = seeds(name).and_then(|paths| paths.iter().map(fs::read).collect());
    let (Some((_, target)), Ok(seeds)): (_, Result<Vec<Vec<u8>>, _>) = (target, contents) else {
        eprintln!("error: there is no target {name}, or its seeds cannot be read");
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
