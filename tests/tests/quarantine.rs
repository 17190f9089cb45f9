//! Quarantine and redzones: their sizes hold, they can be switched off, and the figures show their
//! cost.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use umbra::kernel::{irqchip, test_kernel};
use umbra::provenance::QuarantineSize;
use umbra::report::Track;
use umbra::sandbox::{self, Config, Distinct, Outcome, Redzone, RunReport, ShadowMode};
use umbra::shadow::Notify;
use umbra_tests::suite::{Need, Suite};

/// Guest memory of these tests, in bytes.
const MEMORY: u64 = 64 << 20;

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

fn config(cmdline: &str) -> Config {
    Config {
        kernel: test_kernel().expect("checked before").into(),
        irqchip: irqchip(1),
        cmdline: cmdline.into(),
        memory: MEMORY,
        timeout: Some(Duration::from_secs(120)),
        distinct: Distinct::Places,
        ..Config::default()
    }
}

/// Runs the test kernel to its regular end. Returns its output, too.
fn run(config: &Config) -> (RunReport, String) {
    let console = Screen::default();
    let report =
        sandbox::run(config, Box::new(console.clone()), Box::new(()), &AtomicBool::new(false))
            .expect("it boots");
    let said = String::from_utf8(console.0.lock().expect("no panic").clone()).expect("text");
    assert!(matches!(report.outcome, Outcome::Done), "{}\n{said}", report.outcome);
    assert_eq!(report.stats.events.refused, 0);
    (report, said)
}

const OFF: QuarantineSize = QuarantineSize::Bytes(0);

/// The quarantine makes a use after free visible: without it the memory belongs to another object
/// by then.
fn finds_what_was_reused(shadow: ShadowMode, notify: Notify) {
    for (quarantine, found) in [(QuarantineSize::Auto, 1), (OFF, 0)] {
        let config = Config { quarantine, shadow, notify, ..config("scenarios=quarantine_uaf") };
        let (report, _) = run(&config);
        let kinds: Vec<_> = report.findings.iter().map(|(finding, _)| finding.kind).collect();
        assert_eq!(kinds, vec!["slab-use-after-free"; found], "{quarantine:?}");
        let figures = report.stats.quarantine;
        assert_eq!(figures.held > 0, found > 0, "{figures:?}");
        if found == 0 {
            assert_eq!((figures.limit_bytes, figures.bytes, figures.peak_bytes), (0, 0, 0));
        } else {
            assert_eq!(figures.limit_bytes, MEMORY / 32);
            // The object was in the quarantine, and the finding has its free.
            let (finding, _) = report.findings.iter().next().expect("one");
            assert!(finding.freed.as_ref().is_some_and(|freed| !freed.frames.is_empty()));
        }
    }
}

/// However much is freed, the quarantine keeps its limit, and releases the rest.
fn keeps_to_its_size(notify: Notify, cpus: u8) {
    let (limit, cmdline) = match cpus {
        1 => (256 << 10, "scenarios=huge_churn churn=3000"),
        _ => (64 << 10, "scenarios=- smp=600"),
    };
    let quarantine = QuarantineSize::Bytes(limit);
    let config = Config { quarantine, notify, cpus, irqchip: irqchip(cpus), ..config(cmdline) };
    let (report, _) = run(&config);
    let figures = report.stats.quarantine;
    assert!(figures.peak_bytes <= limit && figures.peak_bytes >= limit / 2, "{figures:?}");
    assert!(figures.bytes <= figures.peak_bytes && figures.bytes > 0, "{figures:?}");
    assert!(
        figures.released > 0 && figures.held == figures.released + figures.objects,
        "{figures:?}"
    );
    if cpus == 1 {
        assert!(report.findings.is_empty());
    }
}

/// It is drained when memory runs out, and the released memory is handed out again.
fn gives_way(notify: Notify) {
    let scenarios = "scenarios=quarantine_under_pressure,quarantine_drained";
    let (report, said) = run(&Config { notify, ..config(scenarios) });
    assert!(report.findings.is_empty());
    for name in ["ran quarantine_under_pressure", "ran quarantine_drained"] {
        assert!(said.lines().any(|line| line.trim_end() == name), "{said}");
    }
    let figures = report.stats.quarantine;
    assert!(figures.released > 0 && figures.peak_bytes <= figures.limit_bytes, "{figures:?}");
}

/// A finding shows both objects, the current and the previous one, and the stack that queued a
/// free.
fn tells_both_objects(notify: Notify) {
    let (report, _) =
        run(&Config { notify, ..config("scenarios=stale_pointer_to_reused,queued_work_uaf") });
    let findings: Vec<_> = report.findings.iter().map(|(finding, _)| finding).collect();
    let [reused, queued] = findings[..] else { panic!("{} findings", findings.len()) };
    let function = |event: &Track, name: &str| {
        event
            .frames
            .iter()
            .any(|frame| frame.symbol.as_deref().is_some_and(|symbol| symbol.contains(name)))
    };
    let text = umbra::report::text::to_string(reused, Default::default());
    assert_eq!(reused.object.as_ref().map(|object| object.size), Some(40));
    let previous = reused.previous.as_ref().unwrap_or_else(|| panic!("{text}"));
    assert_eq!(
        (previous.size, previous.start),
        (64, reused.object.as_ref().expect("as above").start)
    );
    let allocated = previous.allocated.as_ref().expect("who allocated it");
    assert!(function(allocated, "stale_pointer_to_reused"), "{text}");
    assert!(function(&previous.freed, "stale_pointer_to_reused"), "{text}");
    for line in ["Allocated by task", "Previously allocated by task", "Previously freed by task"] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{text}");
    }
    let text = umbra::report::text::to_string(queued, Default::default());
    assert_eq!((queued.related_work.len(), queued.previous.is_none()), (1, true), "{text}");
    let [work] = &queued.related_work[..] else { panic!("{text}") };
    assert!(function(work, "quarantine::queue") && work.task.name == "queued_work_uaf", "{text}");
    assert_eq!(queued.freed.as_ref().map(|freed| freed.task.name.as_str()), Some("worker"));
    assert!(text.contains("\nLast potentially related work creation:\n "), "{text}");
}

/// With tables past their budget the findings are the same. Notes say what is missing, and dropped
/// entries are counted.
fn little_room_for_provenance(notify: Notify) {
    let cmdline =
        "scenarios=huge_churn,kmalloc_oob_right,kmalloc_uaf,kmem_cache_double_free churn=1000";
    let config = Config { notify, ..config(cmdline) };
    let (all, _) = run(&config);
    let headlines = |report: &RunReport| {
        let findings = report.findings.iter();
        findings
            .map(|(finding, seen)| (finding.headline(Default::default()), seen))
            .collect::<Vec<_>>()
    };
    assert!(
        headlines(&all).len() >= 4
            && all.findings.iter().all(|(finding, _)| finding.notes.is_empty())
    );
    for budget in [0, 4096, 7 << 10] {
        let (report, _) = run(&Config { provenance: budget, ..config.clone() });
        assert_eq!(headlines(&report), headlines(&all), "{budget}");
        let figures = report.stats.provenance;
        assert_eq!(figures.budget_bytes, budget);
        assert!(figures.counts.dropped + figures.counts.forgotten > 0, "{figures:?}");
        assert!(figures.bytes <= budget, "{figures:?}");
        for (finding, _) in report.findings.iter() {
            let text = umbra::report::text::to_string(finding, Default::default());
            let whole = finding.allocated.as_ref().is_some_and(|event| !event.frames.is_empty());
            assert!(whole || text.contains("\nNote: "), "{text}");
        }
        if budget == 0 {
            assert_eq!((figures.live, figures.freed, figures.stacks), (0, 0, 0));
            assert!(report.findings.iter().all(|(finding, _)| finding.object.is_none()));
        }
    }
}

/// The slot size of each cache.
fn slots(config: &Config) -> (RunReport, Vec<u64>) {
    let (report, said) = run(config);
    let slots: Vec<_> = said
        .lines()
        .filter_map(|line| line.strip_prefix("slot of ")?.split(' ').next()?.parse().ok())
        .collect();
    assert!(slots.len() >= 12, "{said}");
    (report, slots)
}

/// With redzones off, memory is laid out as in a kernel that is not checked. Uses after free are
/// still found.
fn redzones_can_be_off() {
    let config = config("slots scenarios=kmalloc_uaf,exact_fit,huge_churn churn=300");
    let (unchecked, plain) = slots(&Config { shadow: ShadowMode::Off, ..config.clone() });
    assert!(unchecked.findings.is_empty());
    let (report, off) = slots(&Config { redzone: Redzone::Off, ..config.clone() });
    assert_eq!(off, plain);
    assert_eq!((report.stats.redzones.peak_bytes, report.findings.distinct()), (0, 1));
    let (report, adaptive) = slots(&config);
    assert!(adaptive.iter().zip(&plain).all(|(a, b)| *a >= b + 16), "{adaptive:?} {plain:?}");
    assert!(report.stats.redzones.peak_bytes > 0 && report.findings.distinct() == 1);
    let (_, wide) = slots(&Config { redzone: Redzone::Bytes(256), ..config });
    assert!(wide.iter().zip(&plain).all(|(a, b)| *a == b + 256), "{wide:?} {plain:?}");
}

/// One object more has exactly one redzone more.
fn redzones_are_counted() {
    let bytes = |scenarios: &str| run(&config(scenarios)).0.stats.redzones.peak_bytes;
    // A request of 31 bytes from a cache of 32: the last byte does not count.
    let (none, some) = (bytes("scenarios=-"), bytes("scenarios=caches"));
    // 40 objects of 72 bytes, and the cache's descriptor of 32.
    assert_eq!(some - none, 40 * 32 + 16);
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let need = Need::test_kernel();
    for (name, shadow, notify) in [
        ("per-page/ring", ShadowMode::PerPage, Notify::Ring),
        ("per-page/sync", ShadowMode::PerPage, Notify::Sync),
        ("full/ring", ShadowMode::Full, Notify::Ring),
    ] {
        suite.add(format!("{name}: what was freed and wanted again is found"), &need, move || {
            finds_what_was_reused(shadow, notify);
        });
    }
    for (name, notify) in [("ring", Notify::Ring), ("sync", Notify::Sync)] {
        for cpus in [1, 4] {
            suite.add(format!("{name}, {cpus} CPUs: it keeps to its size"), &need, move || {
                keeps_to_its_size(notify, cpus);
            });
        }
        suite.add(format!("{name}: it gives way"), &need, move || gives_way(notify));
        suite.add(format!("{name}: little room for provenance"), &need, move || {
            little_room_for_provenance(notify);
        });
        suite.add(format!("{name}: both objects are told"), &need, move || {
            tells_both_objects(notify)
        });
    }
    suite.add("redzones can be off", &need, redzones_can_be_off);
    suite.add("redzones are counted", &need, redzones_are_counted);
    suite.run()
}
