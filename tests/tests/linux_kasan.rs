//! Linux that is checked by Umbra: the patched kernel of `cargo xtask linux`, with Linux's own
//! tests of KASAN.
//!
//! Each case must have the same result as with Linux's own KASAN. `data/kasan-suite.txt` lists
//! those (`cargo xtask linux expected` makes it).

use std::fs;
use std::io::Write;
use std::process::{Command, ExitCode};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use umbra::machine::cpuid::CpuidLeaf;
use umbra::sandbox::{self, Config, GuestFile};
use umbra::shadow::Layout;
use umbra_shadow::abi::{self, Features};
use umbra_tests::ktap::{self, Case, Verdict};
use umbra_tests::linux::{kernel, need};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite, has_program, is_long_wished};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// The kernel.
const KERNEL: &str = "umbra/vmlinux";
const BZIMAGE: &str = "umbra/bzImage";
/// The same with `CONFIG_KASAN_VMALLOC`.
const VMALLOC: &str = "umbra-vmalloc/vmlinux";
/// Where ring 0 is emulated and the machine is shared, the suite takes minutes.
const LIMIT: Duration = Duration::from_secs(1500);
/// The results with Linux's own KASAN.
const EXPECTED: &str = include_str!("../data/kasan-suite.txt");

/// A kernel with a command line of its own.
fn linux(file: &str, options: &str, cmdline: &str) -> Umbra {
    let umbra = Umbra::new(PROGRAM, "run").patience(LIMIT).arg(kernel(file)).args(options);
    umbra
        .args("--memory 128M --keep-going --timeout")
        .arg(format!("{}s", LIMIT.as_secs()))
        .arg("--cmdline")
        .arg(cmdline)
}

/// The words that end the run after the suite, or instead of it.
const SUITE: &str = "kunit_shutdown=reboot";
const NO_SUITE: &str = "kunit.enable=0";

fn console(run: &Run) -> String {
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// Whether one of a finding's stacks goes through a function.
fn goes_through(finding: &Value, function: &str) -> bool {
    finding["frames"].as_array().is_some_and(|frames| {
        frames.iter().any(|frame| frame["symbol"].as_str().is_some_and(|symbol| symbol == function))
    })
}

/// What Linux's own KASAN makes of its suite.
fn expected() -> Vec<Case> {
    ktap::parse_list(EXPECTED)
}

fn list(cases: &[Case]) -> String {
    cases.iter().map(|case| format!("{case}\n")).collect()
}

/// Runs the suite, and compares each case with its expected result.
fn suite(file: &str, options: &str, expected: &[Case]) -> Run {
    assert!(expected.len() > 50, "a list of {} cases", expected.len());
    cases(linux(file, options, SUITE), expected)
}

/// Runs cases of the suite, and compares each with its expected result.
fn cases(umbra: Umbra, expected: &[Case]) -> Run {
    let run = umbra.collect().run();
    run.expect(1);
    assert_eq!(run.outcome(), "reset");
    let console = console(&run);
    let cases = ktap::cases(&console);
    assert_eq!(list(&cases), list(expected), "\n{}", run.tail());
    // Each case with a report of KASAN on the console has a finding of Umbra, too.
    let missing: Vec<_> = expected
        .iter()
        .filter(|case| case.verdict == Verdict::Pass && case.reports > 0)
        .filter(|case| !run.findings.iter().any(|finding| goes_through(finding, &case.name)))
        .map(|case| case.name.as_str())
        .collect();
    assert!(missing.is_empty(), "no finding for {missing:?}\n{}", run.tail());
    run
}

fn suite_with_rings() {
    let run = suite(KERNEL, "--notify ring", &expected());
    // The stacks of allocation and free come from the rings.
    let finding = |function: &str| {
        let found = run.findings.iter().find(|finding| goes_through(finding, function));
        found.unwrap_or_else(|| panic!("no finding in {function}"))
    };
    let uaf = finding("kmalloc_uaf");
    for event in ["allocated", "freed"] {
        let through = uaf[event]["frames"].as_array().is_some_and(|frames| {
            frames.iter().any(|frame| frame["symbol"].as_str() == Some("kmalloc_uaf"))
        });
        assert!(through, "{event}: {uaf}");
    }
    assert_eq!(uaf["kind"], "slab-use-after-free");
    assert_eq!(finding("kmalloc_oob_right")["object"]["cache"], "kmalloc-128");
    assert!(run.figure("/events/ring_drains") > 0);
}

/// What the names of those cases begin with that run in sync mode each time.
const FEW: &str = "kmalloc_oob_";

/// Some cases, or all if tests may take long.
fn suite_in_sync_mode() {
    let sync = "--notify sync";
    let run = if is_long_wished() {
        suite(KERNEL, sync, &expected())
    } else {
        let mut few = expected();
        few.retain(|case| case.name.starts_with(FEW));
        assert!(few.len() > 5, "a list of {} cases", few.len());
        cases(linux(KERNEL, sync, &format!("{SUITE} kunit.filter_glob=kasan.{FEW}*")), &few)
    };
    assert!(
        !run.findings.iter().any(|finding| finding["kind"] == "shadow-tampering"),
        "{}",
        run.tail()
    );
}

fn suite_with_virtual_memory() {
    let mut expected = expected();
    for case in &mut expected {
        // A bad access at each end of an object with pages of its own.
        if case.name == "vmalloc_oob" {
            (case.verdict, case.reports) = (Verdict::Pass, 2);
        }
    }
    let run = suite(VMALLOC, "", &expected);
    let kinds = run.findings.iter().filter(|finding| finding["kind"] == "vmalloc-out-of-bounds");
    assert!(kinds.count() > 0, "{}", run.tail());
}

/// The file of the replay initcall (`mm/umbra_replay.c`): equally many allocations of each kind, of
/// all sizes; then the frees of every second one.
fn recording(of_each: u32) -> Vec<u8> {
    const KINDS: u32 = 3;
    let slots = KINDS * of_each;
    let mut events = Vec::new();
    let mut event = |kind: u32, which: u8, slot: u32, size: u32| {
        events.extend([kind as u8, which, 0, 0]);
        events.extend(slot.to_le_bytes());
        events.extend(size.to_le_bytes());
    };
    // Allocations of a kind, and after them its frees, have the numbers 0 to 5. A cache has one
    // size, a block of pages an order.
    let which = |slot: u32| (slot / KINDS % 4) as u8;
    for slot in 0..slots {
        let size = if slot % KINDS == 1 {
            24 + 100 * u32::from(which(slot))
        } else {
            1 + slot * slot % 9000
        };
        event(slot % KINDS * 2, which(slot), slot, size);
    }
    for slot in (0..slots).filter(|slot| (slot / KINDS).is_multiple_of(2)) {
        event(slot % KINDS * 2 + 1, which(slot), slot, 0);
    }
    let mut bytes = b"UMBRPLY1".to_vec();
    for field in [events.len() as u32 / 12, slots, 4, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(events);
    bytes
}

fn boots_and_works_without_a_finding() {
    // Without a first program Linux panics at the end.
    let umbra = linux(KERNEL, "", &format!("{NO_SUITE} umbra_replay=1"))
        .args("--mark")
        .arg("memory at the end");
    let run = umbra.arg("--initrd").file(&recording(100)).collect().run();
    run.expect(3);
    assert_eq!(run.figure("/findings"), 0, "{}", run.tail());
    let console = console(&run);
    assert!(
        console
            .contains("KernelAddressSanitizer initialized (per-page shadow, in the sandbox, ring)")
    );
    assert!(!console.contains("BUG: "), "{console}");
    assert!(console.contains("umbra replay: 300 allocations, 150 frees, 0 failed"), "{console}");
    assert!(console.contains("Kernel panic - not syncing: No working init found"));
    // Memory that it needed at boot only is free again; a mark looks for it.
    assert!(run.figure("/guest/released_bytes") > 100 << 10, "{}", run.tail());
}

fn what_lies_in_a_memory_pool_is_free() {
    let run = linux(KERNEL, "", &format!("{NO_SUITE} umbra_replay=pools")).collect().run();
    run.expect(1);
    // One read of an element while it is in its pool, for a pool of slab objects and one of pages;
    // using others is silent.
    let kinds: Vec<_> =
        run.findings.iter().map(|finding| finding["kind"].as_str().expect("text")).collect();
    assert_eq!(kinds, ["slab-use-after-free", "use-after-free"], "{}", run.tail());
    assert!(console(&run).contains("umbra replay: pools are done"));
}

fn follows_the_quarantine_and_redzone_settings() {
    // Linux's case for a quarantine: memory that was just freed is not handed out again.
    let case = |options: &str| {
        let run = linux(KERNEL, options, &format!("{SUITE} kunit.filter_glob=kasan.kmalloc_uaf2"))
            .collect()
            .run();
        let cases = ktap::cases(&console(&run));
        assert_eq!(cases.len(), 1, "{}", run.tail());
        cases[0].verdict
    };
    assert_eq!(case(""), Verdict::Pass);
    assert_eq!(case("--quarantine off"), Verdict::Fail);
    // Objects without redzones take less memory.
    let free = |options: &str| {
        let umbra = linux(KERNEL, options, &format!("{NO_SUITE} umbra_replay=restart"));
        let run = umbra.arg("--initrd").file(&recording(300)).collect().run();
        run.expect(0);
        let console = console(&run);
        let line = console.lines().find(|line| line.contains("umbra replay: memory at the end"));
        let mut words = line
            .expect("it says so")
            .split_ascii_whitespace()
            .skip_while(|word| *word != "MemFree:");
        words.nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number")
    };
    let (apart, close) = (free("--quarantine off"), free("--quarantine off --redzone off"));
    assert!(close > apart, "{close} KiB free without redzones, {apart} with them");
}

fn boots_unchecked_where_there_is_no_shadow() {
    let run = linux(KERNEL, "--shadow off", NO_SUITE).collect().run();
    run.expect(3);
    let console = console(&run);
    let line = "kasan: umbra: memory is NOT checked: Umbra keeps no shadow for this run";
    assert!(console.contains(line), "{console}");
    assert!(console.contains("Kernel panic - not syncing: No working init found"));
}

/// The console of a guest in this process.
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

/// The kernel's last message when only a first program is missing.
const END: &str = "Kernel panic - not syncing: No working init found";

/// Memory of a guest in this process.
const MEMORY: u64 = 128 << 20;

/// Boots with a CPUID leaf that differs from the real Umbra's: the kernel prints why it is not
/// checked, and goes on without.
fn told(leaf: CpuidLeaf, why: &str) {
    let screen = Screen::default();
    let config = Config {
        kernel: GuestFile::open("kernel", &kernel(KERNEL)).expect("it is there"),
        cmdline: NO_SUITE.into(),
        memory: MEMORY,
        timeout: Some(LIMIT),
        cpuid: vec![leaf],
        ..Config::default()
    };
    let stop = AtomicBool::new(false);
    let report =
        sandbox::run(&config, Box::new(screen.clone()), Box::new(()), &stop).expect("it boots");
    let console = String::from_utf8_lossy(&screen.0.lock().unwrap()).into_owned();
    assert!(console.contains(&format!("kasan: umbra: memory is NOT checked: {why}")), "{console}");
    assert!(console.contains(END), "{console}");
    assert_eq!((report.outcome.word(), report.stats.findings), ("panic", 0));
    // It has not used the leaf that it cannot trust.
    assert_eq!((report.stats.events.allocations, report.stats.shadow.faults), (0, 0));
}

/// A CPUID leaf of Umbra's, by its distance from the first.
fn leaf(number: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf { function: abi::CPUID_FIRST + abi::CPUID_STEP + number, eax, ebx, ecx, edx }
}

fn another_version() {
    let offered = (Features::PER_PAGE | Features::RING).bits();
    told(
        leaf(abi::CPUID_LEAF_FEATURES, [abi::VERSION + 1, abi::PORT.into(), offered, 0]),
        "this Umbra speaks another version of the interface",
    );
}

fn windows_too_small() {
    let window = Layout::new(MEMORY).expect("a layout for so much memory").byte;
    // For half of the memory.
    let leaf = leaf(
        abi::CPUID_LEAF_BYTE_WINDOW,
        [window.gpa as u32, (window.gpa >> 32) as u32, (MEMORY / 16) as u32, 0],
    );
    told(leaf, "the shadow windows are too small for the memory");
}

fn shadow_limit() {
    let run = linux(KERNEL, "--shadow-limit 512K", NO_SUITE).collect().run();
    run.expect(2);
    assert_eq!(run.outcome(), "shadow-limit");
    assert!(run.stderr.contains("--shadow-limit gives it more"), "{}", run.stderr);
    assert!(run.figure("/shadow/byte_mapped_bytes") <= 512 << 10);
}

/// QEMU's software CPU, without Umbra.
fn qemu(cmdline: &str) -> String {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "128",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ]);
    qemu.args(["-serial", "stdio", "-kernel"]).arg(kernel(BZIMAGE)).arg("-append");
    qemu.arg(format!("console=ttyS0 panic=-1 reboot=k {cmdline}"));
    let output = qemu.output().expect("QEMU starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn boots_unchecked_under_qemu() {
    let console = qemu(NO_SUITE);
    let line = "kasan: umbra: memory is NOT checked: there is no Umbra underneath";
    assert!(console.contains(line), "{console}");
    assert!(console.contains(END), "{console}");
}

/// With its shadow in its own memory the kernel needs no Umbra: the quick way to try the patches.
fn suite_under_qemu() {
    let console = qemu(&format!("kasan.umbra=ram {SUITE}"));
    assert_eq!(list(&ktap::cases(&console)), list(&expected()), "{console}");
}

/// The sources that the kernels are built from.
const SOURCES: &str = "source/linux-source-6.1";

/// Runs a program that must succeed.
fn succeeds(command: &mut Command) {
    let output = command.output().expect("it starts");
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(output.status.success(), "{command:?}: {}", said.concat());
}

/// Linux's own checker finds nothing in the patches, and `git am` applies them.
fn patches_are_in_good_form() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest/linux/patches");
    let mut patches: Vec<_> = fs::read_dir(folder)
        .expect("it is there")
        .map(|entry| entry.expect("it is read").path())
        .collect();
    patches.sort();
    assert!(!patches.is_empty());
    let (sources, tree) = (kernel(SOURCES), tempfile::tempdir().expect("a folder"));
    for patch in &patches {
        let checker = sources.join("scripts/checkpatch.pl");
        succeeds(Command::new("perl").arg(checker).args(["--no-tree", "--quiet"]).arg(patch));
        // Only the files that the series changes, in their old state.
        for line in fs::read_to_string(patch).expect("it is text").lines() {
            let Some(file) = line.strip_prefix("--- a/") else { continue };
            let to = tree.path().join(file);
            if sources.join(file).exists() && !to.exists() {
                fs::create_dir_all(to.parent().expect("it lies in the tree")).expect("a folder");
                fs::copy(sources.join(file), to).expect("it is copied");
            }
        }
    }
    let git = || {
        let mut git = Command::new("git");
        git.current_dir(&tree).args([
            "-c",
            "user.name=umbra",
            "-c",
            "user.email=umbra@example.org",
        ]);
        git
    };
    succeeds(git().args(["init", "--quiet"]));
    succeeds(git().args(["add", "--force", "."]));
    succeeds(git().args(["commit", "--quiet", "--message=Linux"]));
    succeeds(git().args(["am", "--quiet"]).args(&patches));
}

fn main() -> ExitCode {
    let need = need(KERNEL);
    let sources = Need::unless(
        (!kernel(SOURCES).exists() || !has_program("git") || !has_program("perl")).then(|| {
            "it needs git, perl, and the sources that `cargo xtask linux` fetches".to_owned()
        }),
    );
    let mut suite = Suite::default();
    let here = sources.and(&Need::machine());
    suite.add("linux_kasan::patches_are_in_good_form", &here, patches_are_in_good_form);
    suite.add(
        "linux_kasan::boots_and_works_without_a_finding",
        &need,
        boots_and_works_without_a_finding,
    );
    let nested = need.and(&Need::prefer_nested());
    suite.add(
        "linux_kasan::what_lies_in_a_memory_pool_is_free",
        &nested,
        what_lies_in_a_memory_pool_is_free,
    );
    suite.add(
        "linux_kasan::follows_the_quarantine_and_redzone_settings",
        &nested,
        follows_the_quarantine_and_redzone_settings,
    );
    suite.add(
        "linux_kasan::boots_unchecked_where_there_is_no_shadow",
        &nested,
        boots_unchecked_where_there_is_no_shadow,
    );
    suite.add("linux_kasan::boots_unchecked_on_another_version", &nested, another_version);
    suite.add("linux_kasan::boots_unchecked_with_windows_too_small", &nested, windows_too_small);
    suite.add("linux_kasan::ends_at_the_shadow_limit", &nested, shadow_limit);
    let missing = (!has_program("qemu-system-x86_64"))
        .then(|| "QEMU is not installed: qemu-system-x86".to_owned());
    let emulator =
        umbra_tests::linux::need(BZIMAGE).and(&Need::unless(missing)).and(&Need::fast_cpu());
    suite.add("linux_kasan::boots_unchecked_under_qemu", &emulator, boots_unchecked_under_qemu);
    suite.add("linux_kasan::suite_under_qemu", &emulator, suite_under_qemu);
    suite.add("linux_kasan::suite_with_rings", &nested, suite_with_rings);
    // The compiler's code poisons the stack itself: each of these stores is an exit in sync mode.
    let sync = need.and(&Need::fast_cpu());
    suite.add("linux_kasan::suite_in_sync_mode", &sync, suite_in_sync_mode);
    let vmalloc = umbra_tests::linux::need(VMALLOC);
    suite.add("linux_kasan::suite_with_virtual_memory", &vmalloc, suite_with_virtual_memory);
    suite.run()
}
