//! The test kernel on several CPUs: a stress in which objects go from CPU to CPU, with no false
//! finding and no lost notification, and one planted bug for each two CPUs, found with the right
//! CPU, allocation and free.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use umbra::kernel::{irqchip, test_kernel};
use umbra::report::Finding;
use umbra::sandbox::{self, Config, Distinct, Outcome, RunReport, ShadowMode};
use umbra::shadow::Notify;
use umbra_tests::suite::{Need, Suite, inline_kernel};

/// Allocator operations of each CPU.
const OPERATIONS: u32 = 300;
/// The number of a bug is the CPU that frees, times this, plus the CPU that uses. As in
/// `guest/kernel/src/stress.rs`.
const PLANTED: u64 = 4;

/// How the kernel checks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checks {
    Calls,
    Inline,
}

/// The report and the kernel's output of a run that does `work` so often.
fn run(
    checks: Checks,
    cpus: u8,
    shadow: ShadowMode,
    notify: Notify,
    work: &str,
    operations: u32,
) -> (RunReport, String) {
    let config = Config {
        kernel: match checks {
            Checks::Calls => test_kernel().expect("checked before").into(),
            Checks::Inline => inline_kernel().expect("checked before"),
        },
        cmdline: format!("scenarios=- {work}={operations}"),
        cpus,
        irqchip: irqchip(cpus),
        shadow,
        notify,
        timeout: Some(Duration::from_secs(600)),
        // The planted bugs are instances of one generic function.
        distinct: Distinct::Places,
        ..Config::default()
    };
    let console = Screen::default();
    let report =
        sandbox::run(&config, Box::new(console.clone()), Box::new(()), &AtomicBool::new(false))
            .expect("it boots");
    assert!(matches!(report.outcome, Outcome::Done), "{}", report.outcome);
    assert_eq!(report.stats.events.refused, 0);
    let said = console.0.lock().expect("no panic").clone();
    (report, String::from_utf8(said).expect("text"))
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The allocations and frees of the stress, as the kernel counted them.
fn counted(said: &str) -> (u64, u64) {
    let line = said
        .lines()
        .find(|line| line.contains(" allocations, "))
        .expect("the stress came to its end");
    let mut numbers = line.split_ascii_whitespace().filter_map(|word| word.parse().ok());
    (numbers.next().expect("allocations"), numbers.next().expect("frees"))
}

/// A planted bug, as the finding must show it: the CPU that uses, the offset, and the tasks that
/// used, allocated and freed.
type Bug = (u32, i64, [String; 3]);

fn planted(cpus: u64) -> Vec<Bug> {
    let pairs = (0..cpus * cpus).map(|pair| (pair / cpus, pair % cpus)).filter(|(a, b)| a != b);
    let bug = |(frees, uses): (u64, u64)| {
        let allocates = (0..cpus).rev().find(|cpu| *cpu != frees && *cpu != uses).unwrap_or(frees);
        let names = [uses, allocates, frees].map(|cpu| format!("cpu{cpu}"));
        (uses as u32, (frees * PLANTED + uses) as i64, names)
    };
    pairs.map(bug).collect()
}

fn told(finding: &Finding) -> Bug {
    assert_eq!((finding.kind, finding.size), ("slab-use-after-free", 1), "{}", finding.task.name);
    let object = finding.object.as_ref().expect("an object");
    assert_eq!((object.size, object.cache.as_deref()), (64, Some("kmalloc-64")));
    let by = |event: &Option<umbra::report::Track>| {
        let event = event.as_ref().expect("who did it");
        assert!(!event.frames.is_empty());
        event.task.name.clone()
    };
    let names = [finding.task.name.clone(), by(&finding.allocated), by(&finding.freed)];
    (finding.cpu, object.offset, names)
}

fn stress(checks: Checks, cpus: u8, shadow: ShadowMode, notify: Notify) {
    let (report, said) = run(checks, cpus, shadow, notify, "smp", OPERATIONS);
    let mut found: Vec<_> = report.findings.iter().map(|(finding, _)| told(finding)).collect();
    let mut expected = planted(cpus.into());
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    let events = &report.stats.events;
    assert_eq!(report.stats.guest.cpus, cpus);
    // No notification was lost or came twice.
    let (other, nothing) = run(checks, cpus, shadow, notify, "smp", 0);
    let other = &other.stats.events;
    assert_eq!(counted(&nothing), (0, 0));
    assert_eq!(
        (events.allocations - other.allocations, events.frees - other.frees),
        counted(&said)
    );
    assert!(counted(&said).0 > u64::from(cpus) * 50, "{said}");
    if notify == Notify::Ring {
        // Rings were full in between, too, and were read before they were.
        let reports = report.stats.findings_total;
        assert!(events.ring_drains > reports + 1, "{events:?}");
        assert!(events.collected > 0, "{events:?}");
    }
}

/// Inline checks with page tables that lag behind as long as they may: no false finding, and each
/// bug is found when the CPU that makes it has had a tick.
fn lagging(cpus: u8) {
    let (report, said) =
        run(Checks::Inline, cpus, ShadowMode::PerPage, Notify::Ring, "lag smp", OPERATIONS);
    let findings = report.findings.iter().map(|(finding, _)| finding);
    let (pages, objects): (Vec<_>, Vec<_>) =
        findings.partition(|finding| finding.kind == "use-after-free");
    let mut found: Vec<_> = objects.into_iter().map(told).collect();
    let mut expected = planted(cpus.into());
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    let mut users: Vec<_> = pages.iter().map(|finding| finding.cpu).collect();
    let mut expected: Vec<_> = expected.iter().map(|(cpu, ..)| *cpu).collect();
    users.sort();
    expected.sort();
    assert_eq!(users, expected);
    // They do lag.
    let missed = format!("smp: {} bugs missed before a tick, 0 after it", expected.len());
    assert!(said.contains(&missed), "{said}");
}

/// NMIs come at any point of a record or a drain, and write records of their own. None is lost.
fn nmis(checks: Checks) {
    const NMIS: u32 = 1000;
    let run = |nmis| {
        let (report, said) = run(checks, 2, ShadowMode::PerPage, Notify::Ring, "nmi", nmis);
        assert_eq!(report.stats.findings_total, 0, "{said}");
        let words = said.lines().filter_map(|line| line.strip_prefix("nmi: ")?.split(' ').nth(2));
        let counted: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        let events = report.stats.events;
        ([events.allocations, events.frees], counted[0])
    };
    let ((with, counted), (without, none)) = (run(NMIS), run(0));
    assert_eq!(none, 0);
    assert!(counted > u64::from(NMIS) + 100, "{counted}");
    assert_eq!([with[0] - without[0], with[1] - without[1]], [counted; 2]);
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let (kernel, inline) = (Need::test_kernel(), Need::inline_kernel());
    for cpus in [2, 4] {
        for (name, shadow, notify) in [
            ("per-page/ring", ShadowMode::PerPage, Notify::Ring),
            ("per-page/sync", ShadowMode::PerPage, Notify::Sync),
            ("full/ring", ShadowMode::Full, Notify::Ring),
            ("full/sync", ShadowMode::Full, Notify::Sync),
        ] {
            suite.add(format!("{cpus} CPUs, {name}"), &kernel, move || {
                stress(Checks::Calls, cpus, shadow, notify);
            });
        }
        for (name, shadow) in [("per-page", ShadowMode::PerPage), ("full", ShadowMode::Full)] {
            suite.add(format!("{cpus} CPUs, {name}/inline"), &inline, move || {
                stress(Checks::Inline, cpus, shadow, Notify::Ring);
            });
        }
    }
    for cpus in [2, 4] {
        suite.add(format!("{cpus} CPUs, tables that lag"), &inline, move || lagging(cpus));
    }
    suite.add("NMIs", &kernel, || nmis(Checks::Calls));
    suite.add("NMIs, inline", &inline, || nmis(Checks::Inline));
    suite.run()
}
