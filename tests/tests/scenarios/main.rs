//! The test kernel in each configuration: every scenario's exact verdict, and the number of exits.
//!
//! A configuration's guest runs when the first test asks for it, and once for all of them.

mod random;
mod reports;

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use umbra::kernel::{Expected, Scenario, scenarios, test_kernel};
use umbra::machine::complete::Completer;
use umbra::machine::devices::{DeviceEvent, Devices};
use umbra::machine::loader::Boot;
use umbra::machine::vcpu::VmExit;
use umbra::machine::{Kvm, Machine, MachineConfig};
use umbra::provenance::QuarantineSize;
use umbra::sandbox::{Config, GuestFile, RunReport, ShadowMode};
use umbra::shadow::{CHUNK_BYTES, Notify};
use umbra::verdicts::{self, Verdict};
use umbra_shadow::group::PATTERN_BYTES;
use umbra_tests::suite::{Need, Suite, has_program, inline_kernel};
use umbra_tests::table::{SUITE, hold, table};

/// Guest memory of these tests, in bytes.
const MEMORY: u64 = 128 << 20;
/// Bytes of virtual memory with shadow, for the scenarios that use it.
const VIRTUAL: u64 = 16 << 20;

/// One scenario for each kind of finding, and some that are silent.
const FEW: &str = "kmalloc_oob_right,kmalloc_uaf,kmem_cache_double_free,kmem_cache_invalid_free,\
                   pagealloc_uaf,kasan_stack_oob,kasan_global_oob_right,exact_fit,\
                   reuse_after_free,threads";

/// Operations of the churn when it runs with other scenarios.
const LITTLE_CHURN: &str = "churn=1000";

/// A run of the test kernel.
struct Outcome {
    verdicts: Vec<Verdict>,
    report: RunReport,
}

impl Outcome {
    #[track_caller]
    fn verdict(&self, name: &str) -> &Verdict {
        self.verdicts
            .iter()
            .find(|v| v.name == name)
            .unwrap_or_else(|| panic!("{name} was not chosen"))
    }

    /// The findings of a task, in order.
    fn findings(&self) -> Vec<(String, String, &'static str, u64)> {
        let all = self.report.findings.iter();
        all.map(|(f, _)| (f.task.name.clone(), f.access.to_string(), f.kind, f.size)).collect()
    }
}

/// All scenarios of the test kernel.
fn all() -> Vec<Scenario> {
    test_kernel()
        .map(|kernel| scenarios(kernel).expect("the kernel tells its scenarios"))
        .unwrap_or_default()
}

/// The scenarios of these names, in this order.
fn named(names: &str) -> Vec<Scenario> {
    let all = all();
    let find = |name: &str| all.iter().find(|s| s.name == name).cloned();
    names
        .split(',')
        .map(|name| find(name).unwrap_or_else(|| panic!("no scenario {name}")))
        .collect()
}

/// Boots the test kernel.
fn boot(shadow: ShadowMode, notify: Notify, chosen: &[Scenario], cmdline: &str) -> Outcome {
    boot_with(QuarantineSize::Auto, shadow, notify, chosen, cmdline)
}

fn boot_with(
    quarantine: QuarantineSize,
    shadow: ShadowMode,
    notify: Notify,
    chosen: &[Scenario],
    cmdline: &str,
) -> Outcome {
    let kernel = test_kernel().expect("checked before").into();
    boot_file(kernel, quarantine, shadow, notify, chosen, cmdline)
}

/// Boots a kernel that has the test kernel's scenarios.
fn boot_file(
    kernel: GuestFile,
    quarantine: QuarantineSize,
    shadow: ShadowMode,
    notify: Notify,
    chosen: &[Scenario],
    cmdline: &str,
) -> Outcome {
    let config = Config {
        kernel,
        quarantine,
        cmdline: cmdline.into(),
        memory: MEMORY,
        shadow,
        notify,
        timeout: Some(Duration::from_secs(300)),
        count_instructions: true,
        ..Config::default()
    };
    let run = verdicts::run(&config, chosen, false, Box::new(()), &AtomicBool::new(false));
    let (verdicts, report) = run.expect("it boots");
    assert!(report.outcome.is_regular(), "{}", report.outcome);
    Outcome { verdicts, report }
}

const PER_PAGE: ShadowMode = ShadowMode::PerPage;
const FULL: ShadowMode = ShadowMode::Full;

/// The configurations in which all scenarios are tried.
struct Configuration {
    name: &'static str,
    /// Its name in docs/scenarios.md.
    title: &'static str,
    shadow: ShadowMode,
    notify: Notify,
    /// The kernel's compiler checks inline.
    inline: bool,
    run: OnceLock<Outcome>,
}

impl Configuration {
    const fn new(
        name: &'static str,
        title: &'static str,
        shadow: ShadowMode,
        notify: Notify,
    ) -> Self {
        Self { name, title, shadow, notify, inline: false, run: OnceLock::new() }
    }

    const fn inline(name: &'static str, title: &'static str, shadow: ShadowMode) -> Self {
        let (notify, inline) = (Notify::Ring, true);
        Self { name, title, shadow, notify, inline, run: OnceLock::new() }
    }

    fn kernel(&self) -> GuestFile {
        if self.inline {
            inline_kernel().expect("checked before")
        } else {
            test_kernel().expect("checked before").into()
        }
    }

    fn get(&self) -> &Outcome {
        self.run.get_or_init(|| {
            let quarantine = QuarantineSize::Auto;
            boot_file(self.kernel(), quarantine, self.shadow, self.notify, &all(), LITTLE_CHURN)
        })
    }

    /// Fails unless a scenario ran here, with exactly the expected findings.
    #[track_caller]
    fn finds(&self, scenario: &Scenario) {
        let (name, verdict) = (scenario.name.as_str(), self.get().verdict(&scenario.name));
        if self.inline && MISSED_INLINE.contains(&name) {
            return exactly(&[], verdict);
        }
        if self.inline && LAST_BYTE_INLINE.contains(&name) {
            let without_offset = |found: &[Expected]| -> Vec<_> {
                found.iter().map(|e| (e.kind.clone(), e.access.clone(), e.size)).collect()
            };
            assert!(!verdict.good(), "the compiler tells where the access begins");
            return assert_eq!(without_offset(&verdict.found), without_offset(&scenario.expected));
        }
        exactly(&scenario.expected, verdict);
    }
}

/// What only calls find. Where no memory is there is no shadow either, and inline checks read
/// zeros, as those of Linux do: its `kasan_init` maps one page of zeros there.
const MISSED_INLINE: [&str; 1] = ["beyond_memory"];

/// Unaligned accesses whose last byte is bad. LLVM's inline checks pass on the last byte's address
/// then (`instrumentUnusualSizeOrAlignment` in its `AddressSanitizer.cpp`), for Linux as well.
const LAST_BYTE_INLINE: [&str; 6] = [
    "linked_list_oob",
    "buddy_oob",
    "talc_oob",
    "packed_header_oob",
    "kmalloc_unaligned_oob",
    "page_crossing_uaf",
];

static RING: Configuration = Configuration::new("per-page/ring", "`ring`", PER_PAGE, Notify::Ring);
static SYNC: Configuration = Configuration::new("per-page/sync", "`sync`", PER_PAGE, Notify::Sync);
static FULL_RING: Configuration = Configuration::new("full/ring", "`full`", FULL, Notify::Ring);
static FULL_SYNC: Configuration =
    Configuration::new("full/sync", "`full`, `sync`", FULL, Notify::Sync);
static INLINE: Configuration = Configuration::inline("per-page/inline", "inline", PER_PAGE);
static FULL_INLINE: Configuration = Configuration::inline("full/inline", "`full`, inline", FULL);
static CONFIGURATIONS: [&Configuration; 6] =
    [&RING, &SYNC, &FULL_RING, &FULL_SYNC, &INLINE, &FULL_INLINE];

/// Fails unless a scenario ran, with exactly the expected findings.
#[track_caller]
fn exactly(expected: &[Expected], verdict: &Verdict) {
    assert!(verdict.ran, "it did not run to its end");
    assert_eq!((verdict.found.len(), verdict.found.as_slice()), (expected.len(), expected));
}

fn no_stray_findings(configuration: &Configuration) {
    let run = configuration.get();
    let stray: Vec<_> = run
        .report
        .findings
        .iter()
        .filter(|(finding, _)| !run.verdicts.iter().any(|v| v.name == finding.task.name))
        .map(|(finding, _)| umbra::report::text::to_string(finding, Default::default()))
        .collect();
    assert!(stray.is_empty(), "{}", stray.join("\n"));
    assert_eq!(run.report.stats.events.refused, 0, "the kernel made calls that were refused");
    assert_eq!(run.report.findings.dropped(), 0);
}

/// The findings of `other` are those that `ring` has of the same scenarios.
fn the_same_findings(other: &Configuration) {
    let [other, ring] = [other, &RING].map(|configuration| {
        let mut findings = configuration.get().findings();
        findings.retain(|(task, ..)| !other.inline || !MISSED_INLINE.contains(&task.as_str()));
        findings.sort();
        findings
    });
    assert_eq!(other, ring);
    assert!(!ring.is_empty());
}

/// The guest has no timer: two equal runs execute the same, to the instruction.
fn runs_repeat_exactly() {
    for notify in [Notify::Ring, Notify::Sync] {
        let runs = [(); 2]
            .map(|()| boot(PER_PAGE, notify, &named("kmalloc_oob_right,exact_fit,threads"), ""));
        let [a, b] = runs.each_ref().map(|run| &run.report.stats);
        assert_eq!(a.guest.instructions, b.guest.instructions);
        let exits = |s: &umbra::sandbox::stats::Stats| {
            let e = s.exits.clone();
            (e.hypercall, e.shadow_fault, e.io, e.mmio, e.completed)
        };
        assert_eq!(exits(a), exits(b));
        assert_eq!((a.events.allocations, a.events.frees), (b.events.allocations, b.events.frees));
        assert!(a.events.allocations > 0 && a.exits.hypercall > 0);
        assert_eq!(runs[0].findings(), runs[1].findings());
    }
}

/// The scenarios of [`FEW`] around a churn without operations, and around one that fills the ring.
fn around_churn(quarantine: QuarantineSize) -> [Outcome; 2] {
    // They run in this order, the first one before and after the churn.
    let chosen = named(&format!("kmalloc_oob_right,huge_churn,{FEW}"));
    ["churn=0", "churn=8000"]
        .map(|churn| boot_with(quarantine, PER_PAGE, Notify::Ring, &chosen, churn))
}

/// The allocations and frees, hypercalls, and exits that the second run has more.
fn more([few, many]: [&Outcome; 2]) -> (u64, u64, u64) {
    let [few, many] = [few, many].map(|run| &run.report.stats);
    let events = |s: &umbra::sandbox::stats::Stats| s.events.allocations + s.events.frees;
    (
        events(many) - events(few),
        many.exits.hypercall - few.exits.hypercall,
        many.exits.total - few.exits.total,
    )
}

fn ring_exits() {
    let (events, hypercalls, _) = more(around_churn(QuarantineSize::Auto).each_ref());
    assert!(events >= 8000, "{events} events");
    assert!(hypercalls > 0, "the ring was drained");
    assert!(hypercalls * 1000 <= events, "{hypercalls} exits for {events} events");
}

fn sync_exits() {
    let [few, many] = ["churn=0", "churn=300"]
        .map(|churn| boot(PER_PAGE, Notify::Sync, &named("huge_churn"), churn));
    let (events, hypercalls, exits) = more([&few, &many]);
    assert!(events >= 300, "{events} events");
    // Each is one call, and each call one exit. The other calls are `poison` and `unpoison`.
    assert!(hypercalls >= events, "{hypercalls} calls for {events} events");
    // The only other exits are first touches of a chunk by the guest's checks.
    assert!((exits - hypercalls) * 1000 <= hypercalls, "{exits} exits for {hypercalls} calls");
}

/// Shadow is reclaimed while the guest allocates and frees. Nothing is lost by that: earlier
/// findings are still reported, and later bugs are found as ever.
fn giving_shadow_back_loses_nothing() {
    // A small quarantine: slabs become free soon, so that there is shadow to reclaim.
    let [before, run] = around_churn(QuarantineSize::Bytes(QuarantineSize::MIN));
    let shadow = &run.report.stats.shadow;
    assert!(shadow.released_bytes > 0, "{shadow:?}");
    for verdict in &run.verdicts {
        exactly(&verdict.expected, verdict);
    }
    let expected: usize = named(FEW).iter().map(|s| s.expected.len()).sum();
    assert_eq!(run.report.findings.distinct(), expected, "{:?}", run.findings());
    let mut findings = [before.findings(), run.findings()];
    findings.iter_mut().for_each(|f| f.sort());
    assert_eq!(findings[0], findings[1]);
    // The one that ran twice was found twice.
    let twice = run.report.findings.iter().filter(|(_, seen)| *seen == 2).count();
    assert_eq!(twice, named("kmalloc_oob_right")[0].expected.len());
}

/// Peak, resident and used shadow are consistent, and far below 1/8 of the memory.
fn figures_fit_together() {
    for configuration in [&RING, &SYNC, &INLINE] {
        let s = &configuration.get().report.stats.shadow;
        assert_eq!(s.page_bytes, MEMORY / 4096 + VIRTUAL / 4096, "{}", configuration.name);
        assert!(s.byte_resident_bytes <= s.byte_peak_resident_bytes, "{s:?}");
        assert!(s.byte_resident_bytes <= s.byte_mapped_bytes, "{s:?}");
        assert!(
            s.byte_used_peak_bytes > 0 && s.byte_used_peak_bytes <= s.byte_peak_resident_bytes,
            "{s:?}"
        );
        assert!(s.peak_bytes() < MEMORY / 8 / 5, "{s:?}");
        // The pattern pages, an entry for each group, and some tables above.
        let entries = s.page_bytes..s.page_bytes + (192 << 10);
        let check = configuration.inline.then(|| s.check_bytes - PATTERN_BYTES);
        assert!(check.is_none_or(|bytes| entries.contains(&bytes)), "{s:?}");
        assert!(configuration.inline || s.check_bytes == 0, "{s:?}");
    }
    let full = &FULL_RING.get().report.stats.shadow;
    // The used part of virtual memory, in chunks.
    assert_eq!((full.page_bytes, full.byte_peak_resident_bytes), (0, MEMORY / 8 + CHUNK_BYTES));
    assert!(RING.get().report.stats.shadow.faults > 0);
}

/// The scenarios that a kernel survives without checks: bad frees that nobody stops ruin its
/// allocators, one move of nearly all memory ruins everything, and without redzones a write behind
/// an object hits another one.
fn survivable() -> Vec<Scenario> {
    let deadly = ["double-free", "invalid-free", "out-of-bounds", "wild-memory-access"];
    let mut all = all();
    let overruns = |e: &Expected| e.kind == "slab-out-of-bounds" && e.access == "Write";
    all.retain(|s| !s.expected.iter().any(|e| deadly.contains(&e.kind.as_str()) || overruns(e)));
    all
}

fn off_finds_nothing() {
    let run = boot(ShadowMode::Off, Notify::Ring, &survivable(), LITTLE_CHURN);
    assert!(run.report.findings.is_empty());
    assert!(run.verdicts.iter().all(|v| v.ran), "{:?}", run.verdicts.iter().find(|v| !v.ran));
    let stats = &run.report.stats;
    assert_eq!(
        (stats.shadow.page_bytes, stats.shadow.byte_mapped_bytes, stats.exits.shadow_fault),
        (0, 0, 0)
    );
    assert_eq!(stats.events.allocations, 0);
}

/// Collects the console's output.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The same kernel on a machine that has no Umbra.
fn runs_without_umbra() {
    let kvm = Kvm::open().expect("checked before");
    let config = MachineConfig { memory_bytes: MEMORY, ..Default::default() };
    let mut machine = Machine::new(&kvm, config).expect("a machine");
    let chosen = survivable();
    let cmdline = format!("{LITTLE_CHURN} {}", verdicts::choice(&all(), &chosen));
    machine.load(&Boot::new(test_kernel().expect("checked before"), &cmdline)).expect("it loads");
    let mut vcpu = machine.create_vcpu(0).expect("a vCPU");
    let console = Screen::default();
    let mut devices = Devices::new(Box::new(console.clone()), None);
    let mut completer = Completer::default();
    loop {
        match vcpu.run().expect("it runs") {
            VmExit::Interrupted => {}
            VmExit::EmulationFailed { bytes, len } => {
                let done = completer.complete(&mut vcpu, machine.ram(), &bytes[..usize::from(len)]);
                done.expect("an instruction that is known");
            }
            VmExit::IoOut { port, data } => {
                assert_ne!(port, umbra_shadow::abi::PORT, "a hypercall, and no Umbra");
                if devices.io_out(port, data.as_slice()) == DeviceEvent::Reset {
                    break;
                }
            }
            VmExit::IoIn { port, len } => {
                let mut data = [0; 4];
                devices.io_in(port, &mut data[..usize::from(len)]);
                vcpu.complete_read(&data[..usize::from(len)]);
            }
            other => panic!("{other:?}"),
        }
    }
    devices.flush();
    let text = String::from_utf8_lossy(&console.0.lock().expect("as above")).into_owned();
    assert!(text.contains("no Umbra underneath"), "{text}");
    for scenario in chosen {
        assert!(
            text.lines().any(|line| line.trim_end() == format!("ran {}", scenario.name)),
            "{}",
            scenario.name
        );
    }
}

fn unknown_names_are_told() {
    let chosen =
        [Scenario { name: "no_such_thing".into(), expected: Vec::new(), about: String::new() }];
    let run = boot(PER_PAGE, Notify::Ring, &chosen, "");
    assert!(!run.verdicts[0].ran && !run.verdicts[0].good());
}

/// The list has the number of scenarios that the project promises.
fn there_are_enough_scenarios() {
    let all = all();
    let silent = all.iter().filter(|s| s.expected.is_empty()).count();
    assert!(silent >= 10, "{silent}");
    let kinds = [
        "slab-out-of-bounds",
        "slab-use-after-free",
        "use-after-free",
        "double-free",
        "invalid-free",
        "stack-out-of-bounds",
        "global-out-of-bounds",
        "vmalloc-out-of-bounds",
        "out-of-bounds",
    ];
    for kind in kinds {
        assert!(all.iter().flat_map(|s| &s.expected).any(|e| e.kind == kind), "{kind}");
    }
    let mut names: Vec<_> = all.iter().map(|s| &s.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all.len());
}

/// Each case of Linux's suite has a scenario with its name.
fn the_suite_is_complete() {
    let all = all();
    let missing: Vec<_> =
        SUITE.iter().filter(|name| !all.iter().any(|s| s.name == **name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// docs/scenarios.md has the table of these findings.
fn the_table_is_true() {
    let columns = CONFIGURATIONS.map(|c| (c.title, c.get().verdicts.as_slice()));
    let text = format!(
        "Of Linux 6.1's KASAN suite:\n\n{}\nBeyond it:\n\n{}",
        table(&columns, |name| SUITE.contains(&name)),
        table(&columns, |name| !SUITE.contains(&name))
    );
    hold("the test kernel", &text);
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let (calls, inline) = (Need::test_kernel(), Need::inline_kernel());
    let need = calls.clone().and(&inline);
    for configuration in CONFIGURATIONS {
        let need = if configuration.inline { &inline } else { &calls };
        for scenario in all() {
            suite.add(format!("{}/{}", configuration.name, scenario.name), need, move || {
                configuration.finds(&scenario);
            });
        }
        suite.add(format!("{}: no stray findings", configuration.name), need, || {
            no_stray_findings(configuration)
        });
        suite.add(format!("{}: the same findings", configuration.name), need, || {
            the_same_findings(configuration)
        });
    }
    let others: [(&str, fn()); 16] = [
        ("findings_are_symbolized", reports::findings_are_symbolized),
        ("a_stripped_kernel_has_addresses", reports::a_stripped_kernel_has_addresses),
        ("damaged_debug_information_is_told", reports::damaged_debug_information_is_told),
        ("a_truncated_file_is_told", reports::a_truncated_file_is_told),
        ("runs_repeat_exactly", runs_repeat_exactly),
        ("ring_exits", ring_exits),
        ("sync_exits", sync_exits),
        ("giving_shadow_back_loses_nothing", giving_shadow_back_loses_nothing),
        ("figures_fit_together", figures_fit_together),
        ("off_finds_nothing", off_finds_nothing),
        ("runs_without_umbra", runs_without_umbra),
        ("unknown_names_are_told", unknown_names_are_told),
        ("random_operations", random::random_operations),
        ("there_are_enough_scenarios", there_are_enough_scenarios),
        ("the_suite_is_complete", the_suite_is_complete),
        ("the table is true", the_table_is_true),
    ];
    for (name, test) in others {
        suite.add(name, &need, test);
    }
    let script = Need::unless((!reports::decode_stacktrace().is_file()).then(|| {
        "there is no target/linux/source with Linux's scripts: `cargo xtask linux` fetches it"
            .into()
    }));
    let tools = ["bash", "nm", "addr2line", "awk"].into_iter().find(|tool| !has_program(tool));
    let tools = Need::unless(tools.map(|tool| format!("{tool} is not installed")));
    suite.add(
        "decode_stacktrace_knows_the_frames",
        &need.and(&script).and(&tools).and(&Need::machine()),
        reports::decode_stacktrace_knows_the_frames,
    );
    // Where ring 0 is emulated that takes an hour.
    let long = Need::long_if_emulated("`UMBRA_LONG_TESTS=1 cargo xtask test a_million` runs it");
    suite.add("a_million_random_operations", &need.and(&long), random::a_million_random_operations);
    suite.run()
}
