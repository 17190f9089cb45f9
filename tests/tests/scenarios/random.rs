//! Random allocator operations with accesses at every edge and planted bugs:
//! `guest/kernel/src/random.rs` makes them.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use umbra::kernel::irqchip;
use umbra::sandbox::{self, Config};

use super::{CONFIGURATIONS, Configuration, INLINE, MEMORY, RING, Screen};

/// Runs the kernel's random operations, and compares its counts with the findings.
fn random(configuration: &Configuration, operations: u64, seed: u64, tell_each: u64) {
    let console = Screen::default();
    let config = Config {
        kernel: configuration.kernel(),
        irqchip: irqchip(1),
        cmdline: format!("random={operations}:{seed}:{tell_each} scenarios=-"),
        memory: MEMORY,
        shadow: configuration.shadow,
        notify: configuration.notify,
        timeout: Some(Duration::from_secs(300 + operations / 200)),
        count_instructions: true,
        ..Config::default()
    };
    let run =
        sandbox::run(&config, Box::new(console.clone()), Box::new(()), &AtomicBool::new(false));
    let report = run.expect("it boots");
    let text =
        String::from_utf8_lossy(&console.0.lock().expect("nobody panics with it")).into_owned();
    assert!(report.outcome.is_regular(), "{}\n{text}", report.outcome);
    let lines: Vec<_> =
        text.lines().filter_map(|line| line.trim_end().strip_prefix("random: ")).collect();
    let [first, reported, wrong] = lines[..] else { panic!("{text}") };
    println!("{first}; {reported}; {wrong}; {:?} instructions", report.stats.guest.instructions);
    let numbers = |line: &str| -> Vec<u64> {
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
    };
    let [done, good, planted] = numbers(first)[..] else { panic!("{first}") };
    assert_eq!(done, operations);
    assert!(good > 4 * operations && planted > 2 * operations, "{first}");
    assert_eq!(wrong, "0 missed, 0 false, 0 corrupt");
    // Each reported bug is a finding of its kind, and there are no others.
    let seen = |kinds: &[&str]| -> u64 {
        report
            .findings
            .iter()
            .filter(|(finding, _)| kinds.contains(&finding.kind))
            .map(|(_, seen)| seen)
            .sum()
    };
    let kinds = [
        seen(&["slab-out-of-bounds"]),
        seen(&["slab-use-after-free", "use-after-free"]),
        seen(&["double-free"]),
        seen(&["invalid-free"]),
    ];
    assert_eq!(numbers(reported), kinds, "{reported}");
    assert!(kinds.iter().all(|seen| *seen > 0), "{reported}");
    assert_eq!(report.findings.total(), kinds.iter().sum::<u64>());
    assert!(report.findings.iter().all(|(finding, _)| finding.task.name == "random"));
    assert_eq!(report.stats.events.refused, 0);
}

/// A few in each configuration.
pub fn random_operations() {
    for (i, configuration) in CONFIGURATIONS.iter().enumerate() {
        // In `sync` mode each is some calls, of 10 µs each.
        random(configuration, 1000, 1 + i as u64, 25);
    }
}

/// Takes minutes where ring 0 is emulated.
pub fn a_million_random_operations() {
    [&RING, &INLINE].into_iter().for_each(|run| random(run, 500_000, 7, 1000));
}
