//! The seeds, and inputs that once failed, through the functions that the fuzzers call.

use std::fs;
use std::path::{Path, PathBuf};

use umbra_fuzz::TARGETS;
use umbra_skip::skip_part;

/// The files of a target's seeds, by name.
fn seeds(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

/// Runs all seeds of a target. The last line before a panic names the seed.
fn run(name: &str) {
    let (_, target) = TARGETS.into_iter().find(|(other, _)| *other == name).expect("a target");
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "{name} has no seeds");
    for path in seeds {
        println!("{}", path.display());
        target(&fs::read(&path).expect("a seed"));
    }
    target(&[]);
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
