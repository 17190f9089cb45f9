//! The seeds, and inputs that once failed, through the functions that the fuzzers call.

use std::fs;
use std::path::Path;

use umbra_fuzz::TARGETS;
use umbra_fuzz::inputs::{input, seeds};
use umbra_skip::skip_part;

/// Inputs of each target that are made of its seeds.
const INPUTS: u64 = 10_000;

/// Runs all seeds of a target, and inputs that are made of them. The last line before a panic names
/// the input.
fn run(name: &str) {
    let (_, target) = TARGETS.into_iter().find(|(other, _)| *other == name).expect("a target");
    let paths = seeds(name).expect("seeds");
    assert!(!paths.is_empty(), "{name} has no seeds");
    let mut all = Vec::new();
    for path in paths {
        println!("{}", path.display());
        let seed = fs::read(&path).expect("a seed");
        target(&seed);
        all.push(seed);
    }
    target(&[]);
    for number in 0..INPUTS {
        println!("soak {name} 1 {number}");
        target(&input(&all, number));
    }
}

#[test]
fn hypercalls() {
    run("hypercalls");
}

#[test]
fn exits() {
    run("exits");
}

#[test]
fn completion() {
    if !umbra_fuzz::completion::is_compared() {
        skip_part!("compared", "this machine's CPU lacks instructions that are completed");
    }
    run("completion");
}

#[test]
fn loader() {
    run("loader");
}

#[test]
fn symbols() {
    run("symbols");
}

#[test]
fn answers() {
    run("answers");
}

#[test]
fn each_target_has_its_fuzzer_and_its_seeds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let names = |part: &str| {
        let entries = fs::read_dir(folder.join(part)).expect("a folder");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let mut names: Vec<_> =
            paths.map(|path| path.file_stem().expect("a name").to_owned()).collect();
        names.sort();
        names
    };
    let mut targets = TARGETS.map(|(name, _)| name).to_vec();
    targets.sort_unstable();
    assert_eq!(names("fuzz_targets"), targets);
    assert_eq!(names("seeds"), targets);
}
