//! The program from outside: exit statuses, bad input, files and streams, signals, colours.

use std::fs;
use std::io::{Read, Write};
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

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// Where kernels are loaded at the least.
const BASE: u64 = 1 << 20;
/// `hlt`.
const HALT: [u8; 1] = [0xf4];
/// `1: jmp 1b`.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `ud2`, which nothing handles.
const CRASH: [u8; 2] = [0x0f, 0x0b];

fn umbra() -> Umbra {
    Umbra::new(PROGRAM, "run")
}

/// A kernel that is this code.
fn kernel(code: &[u8]) -> ElfBuilder {
    ElfBuilder::new(BASE).segment(BASE, code)
}

/// A kernel that halts.
fn good() -> Vec<u8> {
    kernel(&HALT).build()
}

/// The test kernel, told to run these scenarios.
fn scenarios(names: &str) -> Umbra {
    umbra().file(test_kernel().expect("checked before")).arg(format!("--cmdline=scenarios={names}"))
}

/// Runs a kernel that is refused for a reason with these words in it.
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
    assert!(run.stderr.starts_with("umbra: the guest triple-faulted at rip 0x100000"), "{}", run.stderr);
}

fn status_4_is_the_time_limit() {
    let run = umbra().file(&kernel(&SPIN).build()).args("--timeout 200ms").run();
    run.expect(4);
    assert!(run.stderr.contains("200ms"), "{}", run.stderr);
    assert!(run.time < Duration::from_secs(5), "{:?}", run.time);
}

fn demo_statuses() {
    let demo = |args: &str| Umbra::new(PROGRAM, "demo").args(args).run();
    let run = demo("kmalloc_uaf exact_fit");
    run.expect(0);
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(text.contains("kmalloc_uaf  ok") && text.contains("full"), "{text}");
    assert!(run.stderr.contains("BUG: KASAN: slab-use-after-free in "), "{}", run.stderr);
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

// Kernels that are none.

fn files_that_are_no_kernels() {
    umbra().arg("/nonexistent/kernel").run().expect_refusal(&["/nonexistent/kernel", "No such file"]);
    umbra().arg("/").run().expect_refusal(&["/", "not a regular file"]);
    umbra().arg("/dev/zero").run().expect_refusal(&["not a regular file"]);
    umbra().arg("").run().expect_usage(&["KERNEL"]);
    umbra().arg("x".repeat(5000)).run().expect(2);
}

fn images_that_are_no_kernels() {
    refused(b"", &["empty"]);
    refused(b"#!/bin/sh\n", &["neither an ELF file nor a bzImage"]);
    refused(&[0; 4096], &["neither an ELF file nor a bzImage"]);
    refused(&[0x1f, 0x8b, 8, 0], &["gzip"]);
    refused(b"\x7fELF", &["cut off"]);
    let elf = || kernel(&HALT);
    refused(&ElfBuilder { class: 1, ..elf() }.build(), &["32-bit"]);
    refused(&ElfBuilder { endian: 2, ..elf() }.build(), &["big-endian"]);
    refused(&ElfBuilder { machine: 183, ..elf() }.build(), &["183", "x86_64"]);
    refused(&ElfBuilder { machine: 0xffff, ..elf() }.build(), &["x86_64"]);
    refused(&ElfBuilder { kind: 1, ..elf() }.build(), &["cannot be booted"]);
    refused(&ElfBuilder { kind: 4, ..elf() }.build(), &["cannot be booted"]);
    refused(&ElfBuilder::new(BASE).build(), &["no segment"]);
    refused(&ElfBuilder { entry: 0, ..elf() }.build(), &["entry point"]);
    refused(&ElfBuilder { entry: u64::MAX, ..elf() }.build(), &["entry point"]);
}

fn segments_that_do_not_fit() {
    let memory = 256 << 20;
    let at = |gpa| ElfBuilder::new(gpa).segment(gpa, HALT).build();
    refused(&at(0), &["segment 0", "0x100000"]);
    refused(&at(BASE - 1), &["segment 0"]);
    refused(&at(memory), &["needs", "guest memory"]);
    refused(&at(0xd000_0000), &["outside of guest memory"]);
    refused(&at(1 << 50), &["outside of guest memory"]);
    refused(&at(u64::MAX), &["wraps around"]);
    let with = |change: fn(&mut umbra_tests::elf::Segment)| kernel(&HALT).with(change).build();
    refused(&with(|s| s.memory_size = Some(u64::MAX)), &["wraps around"]);
    refused(&with(|s| s.memory_size = Some(u64::MAX - BASE)), &["outside of guest memory"]);
    refused(&with(|s| s.memory_size = Some(1 << 40)), &["outside of guest memory"]);
    refused(&with(|s| s.memory_size = Some(0)), &["more than its 0x0 bytes"]);
    refused(&with(|s| (s.file_size, s.memory_size) = (Some(u64::MAX), Some(u64::MAX))), &["cut off"]);
    refused(&with(|s| s.file_size = Some(1 << 40)), &["cut off"]);
    refused(&with(|s| s.offset = Some(u64::MAX)), &["cut off"]);
    refused(&with(|s| s.offset = Some(1 << 32)), &["cut off"]);
    let overlapping = kernel(&[0xf4; 100]).segment(BASE + 99, HALT).build();
    refused(&overlapping, &["segments 0 and 1 overlap"]);
    let twice = kernel(&HALT).segment(BASE, HALT).build();
    refused(&twice, &["overlap"]);
    // Side by side is fine.
    umbra().file(&kernel(&HALT).segment(BASE + 1, HALT).build()).run().expect(0);
}

/// Cut off anywhere, a kernel is refused; whole, it runs.
fn kernels_cut_off_anywhere() {
    let image = kernel(&[0xf4; 40]).segment(BASE + 0x1000, [1; 40]).build();
    let headers = HEADER + 2 * PROGRAM_HEADER;
    let lengths = [1, 3, 4, 15, 16, 40, HEADER - 1, HEADER, HEADER + 1, headers - 1, headers, headers + 40];
    for length in lengths.into_iter().chain([image.len() - 1]) {
        let run = umbra().file(&image[..length]).run();
        run.expect_refusal(&[]);
    }
    umbra().file(&image).run().expect(0);
}

/// The real thing, cut off.
fn the_test_kernel_cut_off() {
    let image = test_kernel().expect("checked before");
    for length in [100, 1000, 64 << 10, image.len() / 2] {
        let run = umbra().file(&image[..length]).args("--timeout 20s").run();
        // The end of the file holds symbols and lines, without which it still runs.
        if run.code() == Some(2) {
            run.expect_refusal(&["cut off"]);
        } else {
            run.assert_no_panic();
        }
    }
}

// Arguments.

fn memory_sizes() {
    let run = |memory: &str| umbra().file(&good()).arg(format!("--memory={memory}")).run();
    for (memory, word) in [
        ("0", "too small"),
        ("1", "too small"),
        ("1M", "too small"),
        ("65G", "too large"),
        ("4097K", "not a multiple of 4096"),
        ("5000001", "not a multiple of 4096"),
    ] {
        run(memory).expect_refusal(&[word]);
    }
    for memory in ["15E", "18446744073709551615", "5000T"] {
        run(memory).expect_refusal(&["too large"]);
    }
    for memory in ["", "lots", "-1", "1e400", "99999999999999999999999", "0x", "16X"] {
        run(memory).expect_usage(&["--memory"]);
    }
    run("2M").expect(0);
    umbra()
        .file(&kernel(&HALT).with(|s| s.memory_size = Some(8 << 20)).build())
        .args("--memory 4M")
        .run()
        .expect_refusal(&["needs", "bytes of guest memory"]);
}

fn wrong_arguments() {
    let run = |args: &str| umbra().file(&good()).args(args).run();
    run("--no-such-flag").expect_usage(&["--no-such-flag"]);
    run("--shadow maybe").expect_usage(&["maybe", "per-page"]);
    run("--notify never").expect_usage(&["never", "ring"]);
    run("--timeout 0").expect_usage(&["--timeout"]);
    run("--timeout 0s").expect_usage(&["--timeout", "90s"]);
    run("--timeout soon").expect_usage(&["soon"]);
    run("--timeout -5s").expect_usage(&[]);
    run("--timeout 99999999999999999999s").expect_usage(&["--timeout"]);
    run("--stop-at 0").expect_usage(&["--stop-at"]);
    run("--stop-at many").expect_usage(&["many"]);
    run("--stop-at 2 --keep-going").expect_usage(&["--keep-going"]);
    for cpus in ["0", "65", "256", "-1", "two"] {
        run(&format!("--cpus={cpus}")).expect_usage(&["--cpus", cpus]);
    }
    run("--shadow-limit much").expect_usage(&["much"]);
    run("second-kernel").expect_usage(&["second-kernel"]);
    // An enormous limit is no limit.
    run("--timeout 1000000years").expect(0);
    run("--timeout none --shadow-limit 15E").expect(0);
}

fn command_lines() {
    let run = |cmdline: String| umbra().file(&good()).arg(format!("--cmdline={cmdline}")).run();
    run("x".repeat(2047)).expect(0);
    run("x".repeat(2048)).expect_refusal(&["2048", "2047"]);
    run("x".repeat(100_000)).expect_refusal(&["100000"]);
    run("--looks-like=a flag \u{1b}[31m é".into()).expect(0);
}

fn files_that_cannot_be_written() {
    for flag in ["--findings", "--stats"] {
        for (path, word) in [("/nonexistent/dir/file", "No such file"), ("/", "directory")] {
            let run = umbra().file(&good()).arg(flag).arg(path).run();
            run.expect_refusal(&["cannot write", word]);
        }
    }
    // A full disk shows at the end, and is told.
    let run = umbra().file(&good()).args("--stats /dev/full").run();
    run.expect(2);
    assert!(
        run.stderr.lines().last().is_some_and(|l| l.starts_with("umbra: ") && l.contains("No space")),
        "{}",
        run.stderr
    );
}

fn a_full_disk_does_not_hide_findings() {
    let run = scenarios("kmalloc_uaf").args("--findings /dev/full").run();
    run.assert_no_panic();
    assert!(run.stderr.contains("BUG: KASAN") && run.stderr.contains("No space"), "{}", run.stderr);
}

// The host.

/// Runs the program in a mount namespace of its own, after a command.
fn in_a_namespace(command: &str) -> Run {
    let mut umbra = umbra().file(&good());
    let arguments: Vec<_> = umbra.command().get_args().map(ToOwned::to_owned).collect();
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "sh", "-c", &format!("{command} && exec \"$0\" \"$@\""), PROGRAM]).args(arguments);
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
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
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
    let mode = fs::metadata("/dev/kvm").map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()));
    Need::unless((!mode.is_ok_and(|mode| mode & 6 == 0)).then(|| "everybody may open /dev/kvm here".into()))
}

// What is written.

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().map(|object| object.keys().map(String::as_str).collect()).unwrap_or_default()
}

/// Fails unless `value` has these fields, each of the type that its name ends in.
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
    let expected: Vec<_> = fields.split_ascii_whitespace().filter_map(|f| f.split(':').next()).collect();
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
        "outcome:s findings:n findings_total:n shadow:o quarantine:o redzones:o provenance:o guest:o exits:o events:o \
         host:o",
    );
    has_exactly(&s["quarantine"], "limit_bytes:n bytes:n peak_bytes:n objects:n held:n released:n");
    has_exactly(&s["redzones"], "bytes:n peak_bytes:n");
    has_exactly(
        &s["provenance"],
        "budget_bytes:n bytes:n live:n freed:n stacks:n allocations:n frees:n unknown_frees:n repeated_frees:n \
         evicted:n dropped:n lost_stacks:n unknown_related:n",
    );
    assert_eq!(run.figure("/quarantine/limit_bytes"), 8 << 20);
    assert!(run.figure("/quarantine/bytes") > 0 && run.figure("/provenance/freed") > 0);
    has_exactly(
        &s["shadow"],
        "mode:s notify:s page_bytes:n byte_mapped_bytes:n byte_resident_bytes:n byte_peak_resident_bytes:n \
         byte_used_peak_bytes:n byte_unused_bytes:n faults:n released_bytes:n",
    );
    has_exactly(&s["guest"], "memory_bytes:n cpus:n instructions:n?");
    has_exactly(&s["exits"], "total:n hypercall:n shadow_fault:n io:n mmio:n completed:o");
    has_exactly(&s["events"], "allocations:n frees:n ring_drains:n refused:n");
    has_exactly(
        &s["host"],
        "rss_peak_bytes:n vmm_overhead_bytes:n start_seconds:f seconds:f outside_seconds:f",
    );
    assert_eq!((run.outcome(), run.figure("/findings"), run.figure("/findings_total")), ("done", 1, 2));
    assert_eq!(s["shadow"]["mode"], "per-page");
    assert_eq!(run.figure("/guest/memory_bytes"), 256 << 20);
    let kinds = ["hypercall", "shadow_fault", "io", "mmio"].map(|kind| run.figure(&format!("/exits/{kind}")));
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
            "kind:s access:s size:n address:x ip:x cpu:n task:o frames:a object:o? allocated:o? freed:o? shadow:o notes:a",
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
        has_exactly(&uaf[event], "task:o frames:a");
        has_fields(&uaf[event]["frames"][0], "ip:x symbol:s offset:n");
    }
    assert!(run.findings[1]["variable"].is_object());
    assert_eq!(run.findings[2]["access"], "free");
}

/// Text and JSON tell the same of a finding.
fn text_is_a_kasan_report() {
    let run = scenarios("kmalloc_uaf").collect().run();
    run.expect(1);
    let finding = &run.findings[0];
    let address = finding["address"].as_str().and_then(|a| a.strip_prefix("0x")).expect("an address");
    let text = &run.stderr;
    for part in [
        "==================================================================\nBUG: KASAN: slab-use-after-free in ",
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
    assert!(run.stderr.contains("ran exact_fit"), "the console went to standard error:\n{}", run.stderr);
    let run = scenarios("exact_fit").args("--stats -").run();
    run.expect(0);
    let stats: Value = serde_json::from_slice(&run.stdout).expect("JSON and nothing else");
    assert_eq!(stats["outcome"], "done");
    // Without either, the console is there.
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
    assert_eq!((run.outcome(), run.findings.len()), ("done", 4));
}

fn repeats_are_counted() {
    let run = scenarios("kmalloc_uaf,kmalloc_uaf,kmalloc_uaf").args("--keep-going").collect().run();
    run.expect(1);
    assert_eq!((run.findings.len(), run.figure("/findings"), run.figure("/findings_total")), (1, 1, 3));
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

// Signals and streams.

/// A kernel that reports once and then never ends.
fn one_finding_and_no_end() -> Vec<u8> {
    #[rustfmt::skip]
    let code = [
        0x31, 0xff, //                         xor edi, edi
        0xbe, 0x00, 0x00, 0x00, 0x10, //       mov esi, 256 MiB
        0x31, 0xc9, //                         xor ecx, ecx
        0xba, 0x5e, 0x0b, 0x00, 0x00, //       mov edx, 0xb5e
        0xb8, 0x02, 0x00, 0x00, 0x00, //       mov eax, REGION_ADD
        0xef, //                               out dx, eax
        0xbf, 0x00, 0x00, 0x20, 0x00, //       mov edi, 2 MiB
        0xbe, 0x08, 0x00, 0x00, 0x00, //       mov esi, 8
        0x41, 0xb8, 0x00, 0x00, 0x10, 0x00, // mov r8d, 1 MiB
        0xb8, 0x09, 0x00, 0x00, 0x00, //       mov eax, REPORT
        0xef, //                               out dx, eax
        0xeb, 0xfe, //                         jmp .
    ];
    kernel(&code).build()
}

fn ctrl_c_ends_it_in_order() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut started = umbra().file(&one_finding_and_no_end()).args("--keep-going").collect().start();
        started.wait_for("stderr", "BUG: KASAN");
        let begin = Instant::now();
        started.signal(signal);
        let run = started.wait();
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        run.expect(130);
        assert_eq!((run.outcome(), run.findings.len()), ("interrupted", 1));
        assert!(run.stderr.contains("interrupted; 1 finding"), "{}", run.stderr);
    }
}

/// Nothing of it is left after `kill -9`: no process of its group, and no child of ours.
fn a_kill_leaves_nothing_behind() {
    let mut umbra = umbra().file(&one_finding_and_no_end()).args("--keep-going");
    umbra.command().process_group(0);
    let mut started = umbra.start();
    started.wait_for("stderr", "BUG: KASAN");
    let group = started.pid();
    let guests = || {
        fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
            let maps = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let in_group =
                stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().nth(2)?.parse().ok());
            maps == Path::new(PROGRAM) && in_group == Some(group)
        })
    };
    assert!(guests(), "it runs");
    started.signal(libc::SIGKILL);
    let run = started.wait();
    assert_eq!(run.code(), None);
    assert!(!guests(), "a process is left");
    // SAFETY: only asks whether the group has a member.
    let gone = unsafe { libc::kill(-group, 0) } == -1;
    assert!(gone, "the group has a member left");
}

/// Both ends of a pipe.
fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: an array of two.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: new descriptors that nobody else has.
    ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// Runs a command whose standard output, or error, is a pipe that nobody reads. Returns the exit status and what came
/// on the other one.
fn with_closed(which: &str, args: &[&str]) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("kernel");
    let image = if args.contains(&"SPIN") {
        one_finding_and_no_end()
    } else {
        test_kernel().map_or(good(), <[u8]>::to_vec)
    };
    fs::write(&path, image).expect("a kernel");
    let args = args
        .iter()
        .filter(|arg| **arg != "SPIN")
        .map(|arg| if *arg == "KERNEL" { path.as_os_str() } else { arg.as_ref() });
    let (read, write) = pipe();
    let mut command = Command::new(PROGRAM);
    command.args(args).stdin(Stdio::null()).env_remove("RUST_LOG");
    let (stdout, stderr) =
        if which == "stdout" { (write.into(), Stdio::piped()) } else { (Stdio::piped(), write.into()) };
    let mut child =
        command.stdout::<Stdio>(stdout).stderr::<Stdio>(stderr).spawn().expect("the program starts");
    // The command holds the pipe's end until it is dropped.
    drop((read, command));
    let mut text = String::new();
    if let Some(out) = &mut child.stdout {
        out.read_to_string(&mut text).expect("text");
    }
    if let Some(err) = &mut child.stderr {
        err.read_to_string(&mut text).expect("text");
    }
    (child.wait().expect("our child").code(), text)
}

fn closed_pipes() {
    for args in [
        &["run", "KERNEL", "--cmdline=scenarios=kmalloc_uaf", "--keep-going"][..],
        &["run", "KERNEL", "--cmdline=scenarios=kmalloc_uaf", "--keep-going", "--findings", "-"],
        &["demo", "kmalloc_uaf", "exact_fit"],
        &["demo", "--list"],
    ] {
        let (status, text) = with_closed("stdout", args);
        assert!(!text.contains("panicked"), "{args:?}: {text}");
        assert!(status.is_some_and(|status| status != 101), "{args:?}: {status:?} {text}");
        let (status, text) = with_closed("stderr", args);
        assert!(!text.contains("panicked"), "{args:?}: {text}");
        assert!(status.is_some_and(|status| status != 101), "{args:?}: {status:?}");
    }
    // The findings still count where standard error is gone.
    let (status, _) = with_closed("stderr", &["run", "KERNEL", "--cmdline=scenarios=kmalloc_uaf"]);
    assert_eq!(status, Some(1));
    let (status, _) = with_closed("stderr", &["run", "/nonexistent/kernel"]);
    assert_eq!(status, Some(2));
}

/// Both outputs are one pipe that fills up: the guest's findings cannot be written, and the time limit holds all the same.
fn a_full_pipe() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("kernel");
    fs::write(&path, test_kernel().expect("checked before")).expect("a kernel");
    // Smaller than the findings of all scenarios. It stays open, and nobody reads.
    let (read, write) = pipe();
    // SAFETY: a descriptor of this test's own, and a plain number.
    assert!(unsafe { libc::fcntl(read.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } > 0);
    let both = write.try_clone().expect("a second descriptor");
    let mut child = Command::new(PROGRAM)
        .args(["run", "--keep-going", "--timeout=3s"])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::from(write))
        .stderr(Stdio::from(both))
        .spawn()
        .expect("the program starts");
    for _ in 0..600 {
        if let Some(status) = child.try_wait().expect("a child") {
            assert_eq!(status.code(), Some(4));
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    child.kill().expect("a child");
    panic!("it waits for a reader for ever");
}

// Colours.

fn no_colours_into_a_file() {
    let run = scenarios("kmalloc_uaf").run();
    run.expect(1);
    assert!(!run.stderr.contains('\x1b') && !run.stdout.contains(&0x1b));
}

/// What the program writes to a terminal as standard error.
fn on_a_terminal(no_color: bool) -> String {
    let (mut main, mut other) = (0, 0);
    let null = std::ptr::null_mut();
    // SAFETY: two descriptors to fill in; the rest is left to its defaults.
    assert_eq!(unsafe { libc::openpty(&mut main, &mut other, null, null.cast(), null.cast()) }, 0);
    // SAFETY: new descriptors that nobody else has.
    let (main, other) = unsafe { (OwnedFd::from_raw_fd(main), OwnedFd::from_raw_fd(other)) };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("kernel");
    fs::write(&path, one_finding_and_no_end()).expect("a kernel");
    let mut command = Command::new(PROGRAM);
    command.arg("run").arg(&path).env("TERM", "xterm").env_remove("NO_COLOR").env_remove("CI");
    if no_color {
        command.env("NO_COLOR", "1");
    }
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(other).spawn().expect("the program starts");
    drop(command);
    let mut text = Vec::new();
    // A terminal whose other side is closed reads as an error.
    let _ = fs::File::from(main).read_to_end(&mut text);
    child.wait().expect("our child");
    String::from_utf8_lossy(&text).into_owned()
}

fn colours_on_a_terminal() {
    let text = on_a_terminal(false);
    assert!(text.contains("KASAN") && text.contains("\x1b["), "{text:?}");
    let text = on_a_terminal(true);
    assert!(text.contains("KASAN") && !text.contains("\x1b["), "{text:?}");
}

/// A file that grows while it is read, or goes away, is no kernel either.
fn a_fifo_is_no_kernel() {
    let mut umbra = umbra();
    let path = umbra.path("fifo");
    let made = Command::new("mkfifo").arg(&path).status();
    assert!(made.is_ok_and(|status| status.success()));
    umbra.command().arg(&path);
    let started = umbra.start();
    // Whoever opens a pipe waits for the other side.
    if let Ok(mut file) = fs::OpenOptions::new().write(true).open(&path) {
        let _ = file.write_all(b"\x7fELF");
    }
    started.wait().expect_refusal(&["not a regular file"]);
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let nothing = Need::There;
    let kvm = Need::kvm();
    let test_kernel = Need::test_kernel();
    let namespaces = kvm.and(&Need::root()).and(&namespaces());
    let nobody = kvm.and(&Need::root()).and(&kvm_is_guarded());
    let tests: [(&str, &Need, fn()); 34] = [
        ("status_0_is_clean", &test_kernel, status_0_is_clean),
        ("status_1_is_findings", &test_kernel, status_1_is_findings),
        ("status_2_is_a_host_or_usage_problem", &nothing, status_2_is_a_host_or_usage_problem),
        ("status_3_is_a_crash", &kvm, status_3_is_a_crash),
        ("status_4_is_the_time_limit", &kvm, status_4_is_the_time_limit),
        ("demo_statuses", &test_kernel, demo_statuses),
        ("help_and_version", &nothing, help_and_version),
        ("files_that_are_no_kernels", &nothing, files_that_are_no_kernels),
        ("images_that_are_no_kernels", &kvm, images_that_are_no_kernels),
        ("segments_that_do_not_fit", &kvm, segments_that_do_not_fit),
        ("kernels_cut_off_anywhere", &kvm, kernels_cut_off_anywhere),
        ("the_test_kernel_cut_off", &test_kernel, the_test_kernel_cut_off),
        ("memory_sizes", &kvm, memory_sizes),
        ("wrong_arguments", &kvm, wrong_arguments),
        ("command_lines", &kvm, command_lines),
        ("files_that_cannot_be_written", &kvm, files_that_cannot_be_written),
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
        ("ctrl_c_ends_it_in_order", &kvm, ctrl_c_ends_it_in_order),
        ("a_kill_leaves_nothing_behind", &kvm, a_kill_leaves_nothing_behind),
        ("closed_pipes", &test_kernel, closed_pipes),
        ("a_full_pipe", &test_kernel, a_full_pipe),
        ("no_colours_into_a_file", &test_kernel, no_colours_into_a_file),
        ("colours_on_a_terminal", &kvm, colours_on_a_terminal),
        ("a_fifo_is_no_kernel", &nothing, a_fifo_is_no_kernel),
        ("scenarios_are_listed_without_kvm", &test_kernel, || {
            Umbra::new(PROGRAM, "demo").arg("--list").run().expect(0);
        }),
    ];
    for (name, need, test) in tests {
        suite.add(name, need, test);
    }
    suite.run()
}
