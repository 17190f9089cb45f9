//! The runtime's ready interrupt entries, in the C test kernel, whose interrupt table has nothing
//! else in these runs: bad accesses are findings, and any other fault is the end, with its place.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use umbra::report::{Finding, text};
use umbra::sandbox::{self, Config, Outcome, RunReport, ShadowMode};
use umbra_tests::suite::{Need, Suite};

const COMPILERS: [&str; 2] = ["gcc", "clang"];

/// Addresses of guest/c/kernel/ready.c.
const GUARD_END: u64 = 0xffff_c900_0000_1000;
const WILD: u64 = 0xffff_b000_0000_0008;
const WILD_UNMAPPED: u64 = WILD + 4096;

fn run(elf: &Arc<[u8]>, case: &str, shadow: ShadowMode) -> RunReport {
    let config = Config {
        kernel: elf.clone().into(),
        memory: 64 << 20,
        cmdline: format!("ready={case}"),
        shadow,
        timeout: Some(Duration::from_secs(60)),
        ..Config::default()
    };
    sandbox::run(&config, Box::new(std::io::sink()), Box::new(()), &AtomicBool::new(false))
        .expect("it boots")
}

/// The only finding. Its stack begins in `function`, and goes on in the same or in `caller`.
#[track_caller]
fn only<'a>(report: &'a RunReport, function: &str, caller: &str) -> &'a Finding {
    let shown: Vec<_> =
        report.findings.iter().map(|(f, _)| text::to_string(f, Default::default())).collect();
    let found: Vec<_> = report.findings.iter().collect();
    let [(finding, 1)] = found[..] else { panic!("not one finding: {}", shown.join("\n")) };
    let mut calls =
        finding.frames.iter().filter(|f| !f.inlined).filter_map(|f| f.symbol.as_deref());
    // The first push into a guard page may be that of a function of the runtime.
    let first = calls.find(|name| !name.starts_with(RUNTIME));
    assert_eq!(first, Some(function), "{}", shown[0]);
    assert_eq!(calls.next(), Some(caller), "{}", shown[0]);
    finding
}

/// How the names of the runtime's functions begin that compiled code calls.
const RUNTIME: &str = "__asan_";

/// The guest died of that exception at that address, in that function.
#[track_caller]
fn died(report: &RunReport, exception: u32, at: u64, function: &str) {
    let Outcome::Fault { vector, place, address, .. } = &report.outcome else {
        panic!("{}", report.outcome)
    };
    assert_eq!((*vector, *address), (exception, at), "{}", report.outcome);
    let here = |name: &str| place.contains(&format!(" {name}"));
    assert!(here(function) || vector == &8 && here(RUNTIME), "{}", report.outcome);
}

/// A wild access is a finding; the kernel goes on behind it, since its page is mapped.
fn wild(elf: &Arc<[u8]>, shadow: ShadowMode) {
    let report = run(elf, "wild", shadow);
    assert!(matches!(report.outcome, Outcome::Done), "{}", report.outcome);
    let finding = only(&report, "read_wild", "ready_run");
    assert_eq!((finding.kind, finding.address), ("wild-memory-access", WILD));
}

/// Where its page is not mapped, the access itself is the end.
fn wild_unmapped(elf: &Arc<[u8]>, shadow: ShadowMode) {
    let report = run(elf, "wild_unmapped", shadow);
    let finding = only(&report, "read_wild", "ready_run");
    assert_eq!((finding.kind, finding.address), ("wild-memory-access", WILD_UNMAPPED));
    died(&report, 14, WILD_UNMAPPED, "read_wild");
}

/// A fault of code without a check is no finding, but the end.
fn page_fault(elf: &Arc<[u8]>, shadow: ShadowMode) {
    let report = run(elf, "page_fault", shadow);
    assert!(report.findings.is_empty());
    died(&report, 14, WILD_UNMAPPED, "read_unchecked");
}

/// A lookup that faults for a good access is neither.
fn last_page(elf: &Arc<[u8]>, shadow: ShadowMode) {
    let report = run(elf, "last_page", shadow);
    assert!(matches!(report.outcome, Outcome::Done), "{}", report.outcome);
    assert!(report.findings.is_empty());
}

/// A stack that grows into its guard page is a finding with its stack, and then the end.
fn overflow(elf: &Arc<[u8]>, shadow: ShadowMode) {
    let report = run(elf, "overflow", shadow);
    let finding = only(&report, "too_deep", "too_deep");
    assert_eq!((finding.kind, finding.size), ("stack-out-of-bounds", 8));
    // The CPU pushes a few words, and one of them is the first in the guard page.
    assert!((GUARD_END - 64..GUARD_END).contains(&finding.address), "{:#x}", finding.address);
    died(&report, 8, finding.address, "too_deep");
}

/// Without an entry for page faults, the one for double faults still reports a wild access.
fn double_fault_alone(elf: &Arc<[u8]>, shadow: ShadowMode) {
    let report = run(elf, "double_fault_alone", shadow);
    let finding = only(&report, "read_wild", "ready_run");
    assert_eq!((finding.kind, finding.address), ("wild-memory-access", WILD));
    let Outcome::Fault { vector: 8, .. } = report.outcome else { panic!("{}", report.outcome) };
}

fn main() -> ExitCode {
    type Case = (&'static str, fn(&Arc<[u8]>, ShadowMode));
    let cases: [Case; 6] = [
        ("wild", wild),
        ("wild_unmapped", wild_unmapped),
        ("page_fault", page_fault),
        ("last_page", last_page),
        ("overflow", overflow),
        ("double_fault_alone", double_fault_alone),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let mut suite = Suite::default();
    for compiler in COMPILERS {
        let kernel = std::fs::read(folder.join(format!("c-kernel-{compiler}")));
        let missing = "not built: `cargo xtask guest --c` does, with the compiler and make";
        let need = Need::kvm().and(&Need::unless(kernel.is_err().then(|| missing.to_owned())));
        let elf: Arc<[u8]> = kernel.unwrap_or_default().into();
        for (name, case) in cases {
            for (mode, shadow) in [("per-page", ShadowMode::PerPage), ("full", ShadowMode::Full)] {
                let elf = elf.clone();
                suite.add(format!("{compiler}/{mode}/{name}"), &need, move || case(&elf, shadow));
            }
        }
    }
    suite.run()
}
