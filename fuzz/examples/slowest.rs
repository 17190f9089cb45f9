//! Prints the inputs with the most expensive requests, such as exits of a guest, and what these
//! cost.
//!
//! `cargo run --release --package umbra-fuzz --example slowest TARGET FOLDER` runs each file of the
//! folder. In the nested host with `--icount` a nanosecond is an instruction.

use std::fs;
use std::io::Write as _;
use std::process::ExitCode;

use umbra_fuzz::{TARGETS, slowest};

/// Inputs that are printed.
const SHOWN: usize = 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, folder] = arguments.as_slice() else {
        eprintln!("usage: slowest TARGET FOLDER");
        return ExitCode::from(2);
    };
    let target = TARGETS.into_iter().find(|(other, _)| other == name);
    let (Some((_, target)), Ok(entries)) = (target, fs::read_dir(folder)) else {
        eprintln!("error: there is no target {name}, or the folder {folder} cannot be read");
        return ExitCode::from(2);
    };
    let mut costs = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let Ok(data) = fs::read(&path) else { continue };
        costs.push((slowest(target, &data), path));
    }
    costs.sort();
    let mut out = std::io::stdout().lock();
    for (nanoseconds, path) in costs.iter().rev().take(SHOWN) {
        // Who closed the pipe does not want more.
        if writeln!(out, "{nanoseconds:>12} ns {}", path.display()).is_err() {
            break;
        }
    }
    ExitCode::SUCCESS
}
