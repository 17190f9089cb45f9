//! The program from outside: exit statuses, bad input, files and streams, signals, colours.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use umbra::kernel::test_kernel;
use umbra_tests::elf::{ElfBuilder, HEADER, PROGRAM_HEADER};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite};

mod images;
mod reports;
mod streams;

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// The lowest address of a kernel.
const BASE: u64 = 1 << 20;
/// `hlt`.
const HALT: [u8; 1] = [0xf4];
/// `1: jmp 1b`.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `ud2`, without a handler.
const CRASH: [u8; 2] = [0x0f, 0x0b];

fn umbra() -> Umbra {
    Umbra::new(PROGRAM, "run")
}

/// A kernel with this code.
fn kernel(code: &[u8]) -> ElfBuilder {
    ElfBuilder::new(BASE).segment(BASE, code)
}

/// A kernel that halts.
fn good() -> Vec<u8> {
    kernel(&HALT).build()
}

/// The test kernel with these scenarios.
fn scenarios(names: &str) -> Umbra {
    umbra().file(test_kernel().expect("checked before")).arg(format!("--cmdline=scenarios={names}"))
}

/// Runs a kernel that is refused. The message holds these words.
#[track_caller]
fn refused(image: &[u8], words: &[&str]) {
    umbra().file(image).run().expect_refusal(words);
}

// Exit statuses.

fn status_0_is_clean() {
    umbra().file(&good()).run().expect(0);
    scenarios("exact_fit").run().expect(0);
}

fn status_1_is_findings() {
    scenarios("kmalloc_uaf").run().expect(1);
    scenarios("kmalloc_uaf").arg("--keep-going").run().expect(1);
}

fn status_2_is_a_host_or_usage_problem() {
    umbra().arg("/nonexistent/kernel").run().expect(2);
    umbra().run().expect(2);
    Umbra::new(PROGRAM, "no-such-command").run().expect(2);
}

fn status_3_is_a_crash() {
    let run = umbra().file(&kernel(&CRASH).build()).run();
    run.expect(3);
    // The state of the CPU, then the outcome.
    assert!(run.stderr.starts_with("CPU 0 was in "), "{}", run.stderr);
    let last = run.stderr.lines().last().unwrap_or_default();
    // KVM for AMD resets the CPU first.
    let places = ["rip 0x", "an unknown place: the CPU was reset"];
    let told = places.map(|place| format!("umbra: the guest triple-faulted at {place}"));
    assert!(told.iter().any(|told| last.starts_with(told)), "{}", run.stderr);
}

fn status_5_is_unchecked() {
    let unchecked = "the guest ran unchecked: it did not look for Umbra";
    let run = umbra().file(&good()).run();
    run.expect(0);
    assert!(run.stderr.contains(unchecked), "{}", run.stderr);
    let run = umbra().file(&good()).arg("--require-checks").run();
    run.expect(5);
    assert!(run.stderr.contains(unchecked), "{}", run.stderr);
    // A crash says more.
    umbra().file(&kernel(&CRASH).build()).arg("--require-checks").run().expect(3);
    let run = scenarios("exact_fit").args("--require-checks --stats -").run();
    run.expect(0);
    let run = scenarios("exact_fit").args("--require-checks --shadow off").run();
    run.expect(5);
    assert!(run.stderr.contains("unchecked: there is no shadow"), "{}", run.stderr);
}

fn status_4_is_the_time_limit() {
    let run = umbra().file(&kernel(&SPIN).build()).args("--timeout 200ms").run();
    run.expect(4);
    assert!(run.stderr.contains("200ms"), "{}", run.stderr);
    // Otherwise it runs for ever.
    assert!(run.time < Duration::from_secs(60), "{:?}", run.time);
}

fn demo_statuses() {
    let demo = |args: &str| Umbra::new(PROGRAM, "demo").args(args).run();
    let run = demo("kmalloc_uaf exact_fit");
    run.expect(0);
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(text.contains("kmalloc_uaf  ok") && text.contains("full"), "{text}");
    assert!(run.stderr.contains("BUG: KASAN: slab-use-after-free in "), "{}", run.stderr);
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("new/folder");
    let run = demo(&format!("kmalloc_uaf kmalloc_oob_right --out {}", out.display()));
    run.expect(0);
    assert!(String::from_utf8_lossy(&run.stdout).contains("report.html"));
    let read = |file: &str| std::fs::read_to_string(out.join(file)).expect("it was written");
    assert_eq!(read("findings.txt").matches("BUG: KASAN: ").count(), 4);
    assert_eq!(read("findings.json").lines().count(), 4);
    assert!(read("report.html").contains("4 findings"));
    let run = demo("kmalloc_uaf --quiet");
    run.expect(0);
    assert!(!run.stderr.contains("BUG"), "{}", run.stderr);
    let run = demo("--list");
    run.expect(0);
    let list = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(list.lines().count() > 40 && list.contains("huge_churn"), "{list}");
    demo("no_such_scenario").expect_refusal(&["no_such_scenario", "--list"]);
    demo("kmalloc_uaf no_such_scenario").expect_refusal(&["no_such_scenario"]);
}

fn help_and_version() {
    for (args, part) in [("--help", "--findings"), ("-h", "--shadow-limit")] {
        let run = umbra().arg(args).run();
        run.expect(0);
        assert!(String::from_utf8_lossy(&run.stdout).contains(part));
    }
    let run = Umbra::new(PROGRAM, "--version").run();
    run.expect(0);
    assert!(run.stdout.starts_with(b"umbra "));
}

fn files_that_cannot_be_written() {
    for flag in ["--findings", "--stats", "--html", "--sarif"] {
        for (path, word) in [("/nonexistent/dir/file", "No such file"), ("/", "directory")] {
            let run = umbra().file(&good()).arg(flag).arg(path).run();
            run.expect_refusal(&["cannot write", word]);
        }
    }
    // A full disk shows at the end, with a message.
    let run = umbra().file(&good()).args("--stats /dev/full").run();
    run.expect(2);
    assert!(
        run.stderr
            .lines()
            .last()
            .is_some_and(|l| l.starts_with("umbra: ") && l.contains("No space")),
        "{}",
        run.stderr
    );
}

/// Pipes that nobody reads, sockets, and links to them: refused before the run, and not waited for.
fn outputs_that_are_no_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let fifo = std::ffi::CString::new(path("fifo").as_os_str().as_encoded_bytes());
    // SAFETY: a string that ends with a zero.
    assert_eq!(unsafe { libc::mkfifo(fifo.expect("no zero").as_ptr(), 0o600) }, 0);
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).expect("a socket");
    for (link, target) in [("to-fifo", "fifo"), ("to-itself", "to-itself")] {
        std::os::unix::fs::symlink(path(target), path(link)).expect("a link");
    }
    for option in ["--findings", "--stats", "--html", "--sarif"] {
        for (name, word) in [
            ("fifo", "start its reader"),
            ("to-fifo", "start its reader"),
            ("socket", "it is a socket"),
            ("to-itself", "symbolic links"),
            ("socket/below", "Not a directory"),
            ("", "directory"),
        ] {
            let run = umbra().file(&good()).arg(option).arg(path(name)).run();
            run.expect_refusal(&["cannot write", word]);
        }
        let run = umbra().file(&good()).arg(option).arg("/dev/full").run();
        // There are no findings, so that nothing is lost.
        run.expect(if option == "--findings" { 0 } else { 2 });
        assert!(option == "--findings" || run.stderr.contains("No space left"), "{}", run.stderr);
    }
}

fn a_full_disk_does_not_hide_findings() {
    let run = scenarios("kmalloc_uaf").args("--findings /dev/full").run();
    run.expect(2);
    assert!(run.stderr.contains("BUG: KASAN") && run.stderr.contains("No space"), "{}", run.stderr);
}

// The host.

/// Runs the program in a mount namespace of its own, after a command.
fn in_a_namespace(command: &str) -> Run {
    let mut umbra = umbra().file(&good());
    let arguments: Vec<_> = umbra.command().get_args().map(ToOwned::to_owned).collect();
    let mut shell = Command::new("unshare");
    shell
        .args(["--mount", "sh", "-c", &format!("{command} && exec \"$0\" \"$@\""), PROGRAM])
        .args(arguments);
    *umbra.command() = shell;
    umbra.run()
}

/// Whether namespaces and mounts are permitted.
fn namespaces() -> Need {
    let run = Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount --bind /dev/null /dev/null"])
        .stderr(Stdio::null())
        .status();
    let good = run.is_ok_and(|status| status.success());
    Need::unless((!good).then(|| "mount namespaces are not permitted here".into()))
}

fn no_kvm() {
    in_a_namespace("mount --bind /dev/null /dev/kvm").expect_refusal(&["/dev/kvm is not KVM"]);
    let run = in_a_namespace("mount -t tmpfs none /dev");
    run.expect_refusal(&["/dev/kvm does not exist"]);
}

fn no_permission() {
    // As nobody, who may read the program and the kernel but not open the device.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (program, image) = (dir.path().join("umbra"), dir.path().join("kernel"));
    fs::copy(PROGRAM, &program).expect("a copy of the program");
    fs::write(&image, good()).expect("a kernel");
    for path in [dir.path(), &program] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("permissions");
    }
    let output = Command::new(&program)
        .arg("run")
        .arg(&image)
        .uid(65534)
        .gid(65534)
        .output()
        .expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("umbra: no permission to open /dev/kvm") && stderr.contains("group kvm"),
        "{stderr}"
    );
}

/// The device is open to its owner alone.
fn kvm_is_guarded() -> Need {
    let mode =
        fs::metadata("/dev/kvm").map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()));
    Need::unless(
        (!mode.is_ok_and(|mode| mode & 6 == 0)).then(|| "everybody may open /dev/kvm here".into()),
    )
}

// Output.

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().map(|object| object.keys().map(String::as_str).collect()).unwrap_or_default()
}

/// Fails unless `value` has these fields, with the types behind their names.
#[track_caller]
fn has_fields(value: &Value, fields: &str) {
    for field in fields.split_ascii_whitespace() {
        let (name, kind) = field.split_once(':').expect("name:type");
        let found = value.get(name).unwrap_or_else(|| panic!("no {name} in {value}"));
        let good = match kind {
            "n" => found.is_u64(),
            "i" => found.is_i64() || found.is_u64(),
            "f" => found.is_f64(),
            "s" => found.is_string(),
            "x" => found
                .as_str()
                .and_then(|s| s.strip_prefix("0x"))
                .is_some_and(|s| u64::from_str_radix(s, 16).is_ok()),
            "a" => found.is_array(),
            "o" => found.is_object(),
            "b" => found.is_boolean(),
            "n?" => found.is_u64() || found.is_null(),
            "s?" => found.is_string() || found.is_null(),
            "o?" => found.is_object() || found.is_null(),
            _ => panic!("unknown type {kind}"),
        };
        assert!(good, "{name} is {found}, not {kind}");
    }
}

/// Fails unless these are all the fields.
#[track_caller]
fn has_exactly(value: &Value, fields: &str) {
    has_fields(value, fields);
    let expected: Vec<_> =
        fields.split_ascii_whitespace().filter_map(|f| f.split(':').next()).collect();
    for key in keys(value) {
        assert!(expected.contains(&key), "{key} is not documented");
    }
}

fn stats_have_the_documented_fields() {
    let run = scenarios("kmalloc_uaf,kmalloc_uaf").arg("--keep-going").collect().run();
    run.expect(1);
    let s = &run.stats;
    has_exactly(
        s,
        "outcome:s findings:n findings_total:n shadow:o quarantine:o redzones:o provenance:o \
         guest:o exits:o events:o host:o",
    );
    has_exactly(&s["quarantine"], "limit_bytes:n bytes:n peak_bytes:n objects:n held:n released:n");
    has_exactly(&s["redzones"], "bytes:n peak_bytes:n");
    has_exactly(
        &s["provenance"],
        "budget_bytes:n bytes:n live:n freed:n stacks:n allocations:n frees:n unknown_frees:n \
         repeated_frees:n evicted:n dropped:n lost_stacks:n unknown_related:n",
    );
    assert_eq!(run.figure("/quarantine/limit_bytes"), 8 << 20);
    assert!(run.figure("/quarantine/bytes") > 0 && run.figure("/provenance/freed") > 0);
    has_exactly(
        &s["shadow"],
        "mode:s notify:s page_bytes:n check_bytes:n byte_mapped_bytes:n byte_resident_bytes:n \
         byte_peak_resident_bytes:n byte_used_peak_bytes:n byte_unused_bytes:n faults:n \
         released_bytes:n",
    );
    has_exactly(&s["guest"], "memory_bytes:n cpus:n instructions:n? released_bytes:n");
    has_exactly(&s["exits"], "total:n hypercall:n shadow_fault:n io:n mmio:n completed:o");
    has_exactly(&s["events"], "allocations:n frees:n ring_drains:n collected:n refused:n");
    has_exactly(
        &s["host"],
        "rss_peak_bytes:n vmm_overhead_bytes:n start_seconds:f seconds:f outside_seconds:f \
         vcpus_cpu_seconds:f collector_cpu_seconds:f others_cpu_seconds:f pauses:n \
         paused_seconds:f longest_pause_seconds:f waits:n waited_seconds:f \
         longest_wait_seconds:f",
    );
    assert_eq!(
        (run.outcome(), run.figure("/findings"), run.figure("/findings_total")),
        ("done", 1, 2)
    );
    assert_eq!(s["shadow"]["mode"], "per-page");
    assert_eq!(run.figure("/guest/memory_bytes"), 256 << 20);
    let kinds = ["hypercall", "shadow_fault", "io", "mmio"]
        .map(|kind| run.figure(&format!("/exits/{kind}")));
    assert!(run.figure("/exits/total") >= kinds.iter().sum());
}

fn findings_have_the_documented_fields() {
    let run = scenarios("kmalloc_uaf,kasan_global_oob_right,kmem_cache_double_free")
        .arg("--keep-going")
        .collect()
        .run();
    run.expect(1);
    assert_eq!(run.findings.len(), 3);
    for finding in &run.findings {
        has_fields(
            finding,
            "kind:s access:s size:n address:x ip:x cpu:n task:o frames:a object:o? allocated:o? \
             freed:o? shadow:o notes:a",
        );
        has_exactly(&finding["task"], "id:n name:s");
        let frames = finding["frames"].as_array().expect("checked");
        assert!(frames.len() > 1);
        for frame in frames {
            has_fields(frame, "ip:x symbol:s? offset:n size:n file:s? line:n? inlined:b");
        }
        has_fields(&finding["shadow"], "first_bad:x rows:a");
        for row in finding["shadow"]["rows"].as_array().expect("checked") {
            has_exactly(row, "address:x bytes:s");
        }
    }
    let uaf = &run.findings[0];
    assert_eq!(
        (&uaf["kind"], &uaf["access"], &uaf["size"]),
        (&"slab-use-after-free".into(), &"read".into(), &1.into())
    );
    assert_eq!(uaf["task"]["name"], "kmalloc_uaf");
    has_exactly(&uaf["object"], "start:x size:n cache:s? cache_size:n offset:i");
    assert_eq!((&uaf["object"]["size"], &uaf["object"]["offset"]), (&10.into(), &8.into()));
    for event in ["allocated", "freed"] {
        has_exactly(&uaf[event], "task:o cpu:n micros:n frames:a");
        has_fields(&uaf[event]["frames"][0], "ip:x symbol:s offset:n");
    }
    assert!(run.findings[1]["variable"].is_object());
    assert_eq!(run.findings[2]["access"], "free");
}

/// Text and JSON of a finding agree.
fn text_is_a_kasan_report() {
    let run = scenarios("kmalloc_uaf").collect().run();
    run.expect(1);
    let finding = &run.findings[0];
    let address =
        finding["address"].as_str().and_then(|a| a.strip_prefix("0x")).expect("an address");
    let text = &run.stderr;
    for part in [
        "==================================================================\n\
         BUG: KASAN: slab-use-after-free in ",
        &format!("Read of size 1 at addr {address} by task kmalloc_uaf/"),
        "Call Trace:",
        "Allocated by task",
        "Freed by task",
        "The buggy address belongs to the object at ",
        "which belongs to the cache kmalloc-",
        "Memory state around the buggy address:",
    ] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    let headline = text.lines().find(|line| line.starts_with("BUG: ")).expect("a headline");
    assert!(headline.contains("kmalloc_uaf") && !headline.contains("ffff"), "{headline}");
}

fn dashes_are_pure_json() {
    let run = scenarios("kmalloc_uaf,exact_fit").args("--keep-going --findings -").run();
    run.expect(1);
    let lines: Vec<Value> = String::from_utf8_lossy(&run.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    assert_eq!(lines.len(), 1);
    assert!(
        run.stderr.contains("ran exact_fit"),
        "the console went to standard error:\n{}",
        run.stderr
    );
    let run = scenarios("exact_fit").args("--stats -").run();
    run.expect(0);
    let stats: Value = serde_json::from_slice(&run.stdout).expect("JSON and nothing else");
    assert_eq!(stats["outcome"], "done");
    // Without either, there is the console.
    let run = scenarios("exact_fit").run();
    assert!(String::from_utf8_lossy(&run.stdout).contains("ran exact_fit"));
}

fn it_stops_after_the_first_finding() {
    let args = "kmalloc_oob_right,kmalloc_uaf";
    let run = scenarios(args).collect().run();
    run.expect(1);
    assert_eq!((run.outcome(), run.findings.len()), ("finding-limit", 1));
    let run = scenarios(args).args("--stop-at 2").collect().run();
    run.expect(1);
    assert_eq!((run.outcome(), run.findings.len()), ("finding-limit", 2));
    let run = scenarios(args).args("--keep-going").collect().run();
    run.expect(1);
    // Both writes of the first scenario are one bug.
    assert_eq!((run.outcome(), run.findings.len()), ("done", 3));
    assert_eq!(run.figure("/findings_total"), 4);
}

fn repeats_are_counted() {
    let run = scenarios("kmalloc_uaf,kmalloc_uaf,kmalloc_uaf").args("--keep-going").collect().run();
    run.expect(1);
    assert_eq!(
        (run.findings.len(), run.figure("/findings"), run.figure("/findings_total")),
        (1, 1, 3)
    );
    assert_eq!(run.stderr.matches("Read of size 1").count(), 1);
    assert!(run.stderr.contains("2 more of: BUG: KASAN: slab-use-after-free"), "{}", run.stderr);
}

fn linkage_names() {
    let headline = |args: &str| {
        let run = scenarios("kmalloc_uaf").args(args).run();
        run.expect(1);
        run.stderr.lines().find(|line| line.starts_with("BUG: ")).expect("a headline").to_owned()
    };
    assert!(headline("").contains("::"), "{}", headline(""));
    assert!(headline("--symbols linkage").contains(" in _"), "{}", headline("--symbols linkage"));
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    // What is refused before a guest runs, and what happens to outputs, is the same on each host.
    let nothing = Need::machine();
    let kvm = Need::kvm();
    let refused = kvm.and(&nothing);
    let test_kernel = Need::test_kernel();
    let outputs = test_kernel.and(&nothing);
    let namespaces = kvm.and(&Need::root()).and(&namespaces());
    let nobody = kvm.and(&Need::root()).and(&kvm_is_guarded());
    let jq = test_kernel.and(&reports::jq());
    let traced = test_kernel.and(&Need::root());
    let tests: [(&str, &Need, fn()); 46] = [
        ("status_0_is_clean", &test_kernel, status_0_is_clean),
        ("status_1_is_findings", &test_kernel, status_1_is_findings),
        ("status_2_is_a_host_or_usage_problem", &nothing, status_2_is_a_host_or_usage_problem),
        ("status_3_is_a_crash", &kvm, status_3_is_a_crash),
        ("status_4_is_the_time_limit", &kvm, status_4_is_the_time_limit),
        ("status_5_is_unchecked", &test_kernel, status_5_is_unchecked),
        ("demo_statuses", &test_kernel, demo_statuses),
        ("help_and_version", &nothing, help_and_version),
        ("files_that_are_no_kernels", &refused, images::files_that_are_no_kernels),
        ("images_that_are_no_kernels", &refused, images::images_that_are_no_kernels),
        ("headers_that_name_the_same_bytes", &refused, images::headers_that_name_the_same_bytes),
        (
            "a_sparse_kernel_costs_what_it_loads",
            &refused,
            images::a_sparse_kernel_costs_what_it_loads,
        ),
        ("sections_that_lie", &refused, images::sections_that_lie),
        ("outputs_that_are_no_files", &refused, outputs_that_are_no_files),
        ("segments_that_do_not_fit", &refused, images::segments_that_do_not_fit),
        ("kernels_cut_off_anywhere", &refused, images::kernels_cut_off_anywhere),
        ("the_test_kernel_cut_off", &outputs, images::the_test_kernel_cut_off),
        ("memory_sizes", &refused, images::memory_sizes),
        ("wrong_arguments", &refused, images::wrong_arguments),
        ("command_lines", &refused, images::command_lines),
        ("files_that_cannot_be_written", &refused, files_that_cannot_be_written),
        ("a_full_disk_does_not_hide_findings", &test_kernel, a_full_disk_does_not_hide_findings),
        ("no_kvm", &namespaces, no_kvm),
        ("no_permission", &nobody, no_permission),
        ("stats_have_the_documented_fields", &test_kernel, stats_have_the_documented_fields),
        ("findings_have_the_documented_fields", &test_kernel, findings_have_the_documented_fields),
        ("text_is_a_kasan_report", &test_kernel, text_is_a_kasan_report),
        ("dashes_are_pure_json", &test_kernel, dashes_are_pure_json),
        ("it_stops_after_the_first_finding", &test_kernel, it_stops_after_the_first_finding),
        ("repeats_are_counted", &test_kernel, repeats_are_counted),
        ("linkage_names", &test_kernel, linkage_names),
        ("findings_match_their_schema", &test_kernel, reports::findings_match_their_schema),
        ("fingerprints_stay_the_same", &test_kernel, reports::fingerprints_stay_the_same),
        ("a_log_of_each_run", &test_kernel, reports::a_log_of_each_run),
        ("one_file_for_two_outputs", &nothing, reports::one_file_for_two_outputs),
        ("the_script_finds_new_bugs", &jq, reports::the_script_finds_new_bugs),
        ("ctrl_c_ends_it_in_order", &kvm, streams::ctrl_c_ends_it_in_order),
        ("a_signal_may_come_at_any_time", &test_kernel, streams::a_signal_may_come_at_any_time),
        ("a_collector_that_does_not_run", &traced, streams::a_collector_that_does_not_run),
        ("a_kill_leaves_nothing_behind", &kvm, streams::a_kill_leaves_nothing_behind),
        ("closed_pipes", &outputs, streams::closed_pipes),
        ("a_full_pipe", &outputs, streams::a_full_pipe),
        ("no_colours_into_a_file", &test_kernel, streams::no_colours_into_a_file),
        ("colours_on_a_terminal", &kvm, streams::colours_on_a_terminal),
        ("a_fifo_is_no_kernel", &refused, streams::a_fifo_is_no_kernel),
        ("scenarios_are_listed_without_kvm", &test_kernel, || {
            Umbra::new(PROGRAM, "demo").arg("--list").run().expect(0);
        }),
    ];
    for (name, need, test) in tests {
        suite.add(name, need, test);
    }
    suite.run()
}
