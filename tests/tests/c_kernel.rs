//! The C test kernel, built by gcc and by clang, in each configuration: every scenario's exact
//! verdict, and reports that name C functions, files and lines.
//!
//! A configuration's guest runs when the first test asks for it, and once for all of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use umbra::kernel::{Scenario, scenarios};
use umbra::report::{Finding, text};
use umbra::sandbox::{Config, RunReport, ShadowMode};
use umbra::shadow::Notify;
use umbra::verdicts::{self, Verdict};
use umbra_tests::suite::{Need, Suite};
use umbra_tests::table::{hold, table};

/// Guest memory of these tests, in bytes.
const MEMORY: u64 = 64 << 20;

const COMPILERS: [&str; 2] = ["gcc", "clang"];
/// The configurations and their names in docs/scenarios.md.
const CONFIGURATIONS: [(&str, &str, ShadowMode, Notify); 6] = [
    ("per-page/ring", "`ring`", ShadowMode::PerPage, Notify::Ring),
    ("per-page/sync", "`sync`", ShadowMode::PerPage, Notify::Sync),
    ("full/ring", "`full`", ShadowMode::Full, Notify::Ring),
    ("full/sync", "`full`, `sync`", ShadowMode::Full, Notify::Sync),
    ("per-page/inline", "inline", ShadowMode::PerPage, Notify::Ring),
    ("full/inline", "`full`, inline", ShadowMode::Full, Notify::Ring),
];

/// Whether a configuration is one of the kernel whose compiler checks inline.
fn is_inline(name: &str) -> bool {
    name.ends_with("/inline")
}

/// The kernel that a compiler made, and its scenarios.
struct Kernel {
    elf: Arc<[u8]>,
    scenarios: Vec<Scenario>,
}

impl Kernel {
    /// The kernel of `cargo xtask guest --c`, if it was built.
    fn built(compiler: &str, inline: bool) -> Option<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
        let name = format!("c-kernel-{compiler}{}", if inline { "-inline" } else { "" });
        let elf: Arc<[u8]> = std::fs::read(folder.join(name)).ok()?.into();
        let scenarios = scenarios(&elf).expect("the kernel tells its scenarios");
        Some(Self { elf, scenarios })
    }

    fn boot(
        &self,
        chosen: &[Scenario],
        shadow: ShadowMode,
        notify: Notify,
    ) -> (Vec<Verdict>, RunReport) {
        let config = Config {
            kernel: self.elf.clone().into(),
            memory: MEMORY,
            shadow,
            notify,
            timeout: Some(Duration::from_secs(90)),
            ..Config::default()
        };
        let run = verdicts::run(&config, chosen, false, Box::new(()), &AtomicBool::new(false));
        let (verdicts, report) = run.expect("it boots");
        assert!(report.outcome.is_regular(), "{}", report.outcome);
        (verdicts, report)
    }
}

/// A configuration of one kernel.
struct Run {
    kernel: Arc<Kernel>,
    inline: bool,
    shadow: ShadowMode,
    notify: Notify,
    outcome: OnceLock<(Vec<Verdict>, RunReport)>,
}

impl Run {
    fn get(&self) -> &(Vec<Verdict>, RunReport) {
        self.outcome
            .get_or_init(|| self.kernel.boot(&self.kernel.scenarios, self.shadow, self.notify))
    }

    fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.get().1.findings.iter().map(|(finding, _)| finding)
    }
}

/// A check of a whole run.
type Check = (&'static str, fn(&Run));

fn shown(finding: &Finding) -> String {
    text::to_string(finding, Default::default())
}

/// Fails unless a scenario ran, with exactly the expected findings.
fn exactly(run: &Run, scenario: &Scenario) {
    let verdict = run.get().0.iter().find(|v| v.name == scenario.name).expect("all were chosen");
    assert!(verdict.ran, "it did not run to its end");
    match scenario.name.as_str() {
        // Where no memory is, inline checks read zeros, as those of Linux do.
        "beyond_memory" if run.inline => assert!(verdict.found.is_empty()),
        // LLVM's inline checks pass on the address of the last byte, gcc's that of the first.
        "kmalloc_unaligned_oob" if run.inline && !verdict.good() => {
            let [found, expected] = [&verdict.found[..], &scenario.expected[..]]
                .map(|all| all.iter().map(|e| (e.kind.clone(), e.size)).collect::<Vec<_>>());
            assert_eq!(found, expected);
        }
        _ => assert_eq!(verdict.found, scenario.expected),
    }
}

/// Nothing was found outside of the scenarios, such as a compiler's own store taken for tampering.
fn nothing_else(run: &Run) {
    let known: BTreeSet<_> = run.kernel.scenarios.iter().map(|s| s.name.as_str()).collect();
    let stray: Vec<_> =
        run.findings().filter(|f| !known.contains(f.task.name.as_str())).map(shown).collect();
    assert!(stray.is_empty(), "{}", stray.join("\n"));
    assert_eq!(run.get().1.stats.events.refused, 0, "the kernel made calls that were refused");
}

/// Each finding names its scenario's function with file and line, and its object has stacks.
fn told_in_c(run: &Run) {
    for finding in run.findings() {
        let text = shown(finding);
        let frame = |f: &&umbra::report::Frame| {
            let file = f.file.as_deref().unwrap_or_default();
            file.starts_with("guest/c/kernel/")
                && file.ends_with(".c")
                && f.line.is_some_and(|line| line > 0)
        };
        let scenario = finding.frames.iter().filter(frame).filter_map(|f| f.symbol.as_deref());
        // Most scenarios misbehave in their own function, others in one that they call.
        assert!(scenario.into_iter().any(|symbol| symbol == finding.task.name), "{text}");
        // The VMM sees that free only in the records of a ring.
        let later = finding.task.name == "header_invalid_free";
        assert!(finding.notes.is_empty() || later, "{text}");
        if finding.kind == "global-out-of-bounds" {
            let variable =
                finding.variable.as_ref().unwrap_or_else(|| panic!("which variable?\n{text}"));
            let file = variable.file.as_deref().unwrap_or_default();
            assert!(file.starts_with("guest/c/kernel/") && variable.line > Some(0), "{text}");
            assert!(
                variable.name.starts_with("global_") && [10, 13, 4000].contains(&variable.size),
                "{text}"
            );
        }
        if finding.kind == "slab-use-after-free" || finding.kind == "double-free" {
            let freed = finding.freed.as_ref().unwrap_or_else(|| panic!("who freed it?\n{text}"));
            assert!(
                freed.frames.iter().any(|f| f.symbol.as_deref() == Some(&finding.task.name)),
                "{text}"
            );
        }
        if finding.kind.starts_with("slab-") {
            let allocated =
                finding.allocated.as_ref().unwrap_or_else(|| panic!("who allocated it?\n{text}"));
            assert!(
                allocated.frames.iter().any(|f| f.symbol.as_deref() == Some(&finding.task.name)),
                "{text}"
            );
        }
    }
}

/// The same kernel without shadow: harmless scenarios run, though compiled code still stores the
/// shadow of stacks.
fn unchecked(kernel: &Kernel) {
    let mut silent = kernel.scenarios.clone();
    silent.retain(|scenario| scenario.expected.is_empty());
    assert!(silent.len() >= 8);
    let (verdicts, report) = kernel.boot(&silent, ShadowMode::Off, Notify::Ring);
    assert!(report.findings.is_empty());
    assert!(verdicts.iter().all(|v| v.ran), "{:?}", verdicts.iter().find(|v| !v.ran));
}

/// docs/scenarios.md has the table of these findings.
fn the_table_is_true(compiler: &str, runs: &[(&str, Arc<Run>)]) {
    let columns: Vec<_> =
        runs.iter().map(|(title, run)| (*title, run.get().0.as_slice())).collect();
    hold(&format!("the C kernel by {compiler}"), &table(&columns, |_| true));
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    for compiler in COMPILERS {
        let kernels = [false, true].map(|inline| Kernel::built(compiler, inline).map(Arc::new));
        let [Some(kernel), Some(inline)] = kernels else {
            let missing =
                format!("not built: `cargo xtask guest --c` does, with {compiler} and make");
            suite.add(format!("{compiler}: all scenarios"), &Need::Missing(missing), || {});
            continue;
        };
        let mut runs = Vec::new();
        for (name, title, shadow, notify) in CONFIGURATIONS {
            let kernel = if is_inline(name) { &inline } else { &kernel };
            let run = Arc::new(Run {
                kernel: kernel.clone(),
                inline: is_inline(name),
                shadow,
                notify,
                outcome: OnceLock::new(),
            });
            runs.push((title, run.clone()));
            for scenario in kernel.scenarios.clone() {
                let run = run.clone();
                suite.add(
                    format!("{compiler}/{name}/{}", scenario.name),
                    &Need::kvm(),
                    move || {
                        exactly(&run, &scenario);
                    },
                );
            }
            let checks: [Check; 2] =
                [("nothing else is found", nothing_else), ("findings are told in C", told_in_c)];
            for (what, check) in checks {
                let run = run.clone();
                suite.add(format!("{compiler}/{name}: {what}"), &Need::kvm(), move || check(&run));
            }
        }
        suite.add(format!("{compiler}: the table is true"), &Need::kvm(), move || {
            the_table_is_true(compiler, &runs);
        });
        for (what, kernel) in [("unchecked", kernel), ("unchecked, inline", inline)] {
            suite.add(format!("{compiler}: {what}"), &Need::kvm(), move || unchecked(&kernel));
        }
    }
    suite.run()
}
