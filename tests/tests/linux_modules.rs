//! Bugs of Linux's modules (guest/linux/modules), in a kernel that Umbra checks: the names in
//! findings come from the guest, the lines from the modules' files.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use umbra_tests::linux::{first_program, kernel, need, need_first_program, with_files};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
const KERNEL: &str = "umbra-modules/vmlinux";
const LIMIT: Duration = Duration::from_secs(600);
/// The module with bugs, and the one that uses what that has left.
const STRAY: (&str, &str) =
    ("umbra_stray.c", include_str!("../../guest/linux/modules/umbra_stray.c"));
const SHELF: (&str, &str) =
    ("umbra_shelf.c", include_str!("../../guest/linux/modules/umbra_shelf.c"));

/// Boots the kernel, whose first program loads (`+NAME:PARAMETERS`) and unloads (`-NAME`) modules.
/// With `lines` their files are named to Umbra.
fn run(parts: &str, lines: bool) -> Run {
    let folder = kernel("umbra-modules");
    let module = |name| fs::read(folder.join(name)).expect("the module");
    let shelf = module("umbra_shelf.ko");
    let files = [
        ("umbra_other.ko", with_name(&shelf, b"umbra_shelf", b"umbra_other")),
        ("umbra_stray.ko", module("umbra_stray.ko")),
        ("umbra_shelf.ko", shelf),
    ];
    let program = fs::read(first_program()).expect("the program");
    let mut umbra = Umbra::new(PROGRAM, "run")
        .patience(LIMIT)
        .arg(kernel(KERNEL))
        .args("--memory 128M --keep-going --timeout 500s");
    if lines {
        umbra = umbra.arg("--modules").arg(folder);
    }
    let run = umbra
        .arg(format!("--cmdline=kunit.enable=0 -- {parts}"))
        .arg("--initrd")
        .file(&with_files(&program, &files))
        .collect()
        .run();
    let console = String::from_utf8_lossy(&run.stdout);
    for part in parts.split(' ') {
        // A crash of the first program may be expected in the last part.
        let done = console.contains(&format!("program: {part} done"));
        assert!(done || (run.outcome() == "panic" && parts.ends_with(part)), "{part}:\n{console}");
    }
    run
}

/// The same module with another name: all of its names change.
fn with_name(module: &[u8], name: &[u8; 11], other: &[u8; 11]) -> Vec<u8> {
    let mut module = module.to_vec();
    for at in 0..module.len() - name.len() {
        if module[at..].starts_with(name) {
            module[at..at + name.len()].copy_from_slice(other);
        }
    }
    module
}

/// Whether a frame is of that function, or of what the compiler made of it (`function.isra.0`).
fn is_of(frame: &Value, function: &str) -> bool {
    let symbol = frame["symbol"].as_str().unwrap_or_default();
    symbol.split('.').next() == Some(function)
}

/// The findings whose access is in `function`.
fn all_in<'a>(run: &'a Run, function: &str) -> Vec<&'a Value> {
    let first = |finding: &Value| {
        let frames = finding["frames"].as_array().expect("frames");
        frames.iter().find(|frame| frame["inlined"] == false).cloned().unwrap_or_default()
    };
    run.findings.iter().filter(|finding| is_of(&first(finding), function)).collect()
}

/// The only one.
#[track_caller]
fn only<'a>(run: &'a Run, function: &str) -> &'a Value {
    match all_in(run, function)[..] {
        [finding] => finding,
        ref found => panic!("not one finding in {function}: {found:#?}\n{}", run.tail()),
    }
}

/// The line with a comment that begins with `mark`.
#[track_caller]
fn line((_, text): (&str, &str), mark: &str) -> usize {
    let at = text.lines().position(|line| line.contains(&format!("/* {mark} */")));
    1 + at.expect("the mark")
}

/// Fails unless a frame is of that function, at the marked line; at none if `lines` is false.
#[track_caller]
fn is_at(frames: &Value, function: &str, source: (&str, &str), mark: &str, lines: bool) {
    let frames = frames.as_array().expect("frames");
    let Some(frame) = frames.iter().find(|frame| is_of(frame, function)) else {
        panic!("no {function} in {frames:#?}")
    };
    if lines {
        let file = frame["file"].as_str().unwrap_or_default();
        assert!(file.ends_with(&format!("/{}", source.0)), "{frame:#}");
        assert_eq!(frame["line"], line(source, mark), "{frame:#}");
    } else {
        assert_eq!(frame["line"], Value::Null, "{frame:#}");
    }
}

/// Its findings have the right kind, place and object, when it is loaded and when it is unloaded.
fn bugs_have_the_right_verdicts(late: bool, lines: bool) {
    let late = if late { ",late=1" } else { "" };
    let parts: Vec<_> = ["level", "step", "behind", "freed"]
        .map(|bug| format!("+umbra_stray:bug={bug}{late} -umbra_stray"))
        .into();
    let run = run(&format!("+umbra_shelf {}", parts.join(" ")), lines);
    run.expect(1);

    for (function, mark, access, size, name, bytes) in [
        ("level_set", "bad: level", "write", 4, "levels", 24),
        ("step_get", "bad: step", "read", 1, "steps", 21),
    ] {
        let finding = only(&run, function);
        assert_eq!(finding["kind"], "global-out-of-bounds", "{finding:#}");
        assert_eq!((&finding["access"], &finding["size"]), (&access.into(), &size.into()));
        assert_eq!(finding["variable"]["name"], name, "{finding:#}");
        assert_eq!(finding["variable"]["size"], bytes, "{finding:#}");
        is_at(&finding["frames"], function, STRAY, mark, lines);
    }
    let records = all_in(&run, "record_get");
    let [behind, freed] = records[..] else { panic!("{records:#?}\n{}", run.tail()) };
    assert_eq!(
        (&behind["kind"], &behind["access"]),
        (&"slab-out-of-bounds".into(), &"read".into())
    );
    assert_eq!(freed["kind"], "slab-use-after-free", "{freed:#}");
    for (finding, offset) in [(behind, 36), (freed, 3)] {
        assert_eq!(
            (&finding["object"]["size"], &finding["object"]["offset"]),
            (&36.into(), &offset.into()),
            "{finding:#}"
        );
        is_at(&finding["frames"], "record_get", STRAY, "bad: record", lines);
        is_at(&finding["allocated"]["frames"], "record_new", STRAY, "allocated", lines);
    }
    is_at(&freed["freed"]["frames"], "record_drop", STRAY, "freed", lines);
    assert_eq!(run.findings.len(), 4, "{}", run.tail());
}

/// All of its memory is used, and nothing is found.
fn good_use_is_silent() {
    let run = run(
        "+umbra_shelf +umbra_stray -umbra_stray +umbra_stray:late=1 -umbra_stray -umbra_shelf",
        false,
    );
    run.expect(0);
    assert!(run.findings.is_empty(), "{}", run.tail());
}

/// The same bug of a module that is loaded twice, at different addresses, is one finding.
fn two_loads_are_one_finding() {
    // The other one takes the first place, where there is no more room then.
    let once = "+umbra_stray:bug=level -umbra_stray +umbra_stray:bug=behind -umbra_stray";
    let run = run(&format!("+umbra_shelf {once} +umbra_other {once}"), false);
    run.expect(1);
    let console = String::from_utf8_lossy(&run.stdout);
    let places: Vec<_> =
        console.lines().filter_map(|line| line.split("run() is at ").nth(1)).collect();
    assert!(places.len() == 4 && places[0] != places[2], "the same addresses: {places:?}");
    only(&run, "level_set");
    only(&run, "record_get");
    assert_eq!(run.findings.len(), 2, "{}", run.tail());
    assert_eq!(run.figure("/findings_total"), 4);
}

/// An object is freed by a timer or by RCU: that is where it was freed.
fn freed_in_another_context(bug: &str, function: &str) {
    let run = run(&format!("+umbra_shelf +umbra_stray:bug={bug}"), true);
    run.expect(1);
    let finding = only(&run, "ticket_mark");
    assert_eq!(finding["kind"], "slab-use-after-free", "{finding:#}");
    assert_eq!((&finding["access"], &finding["size"]), (&"write".into(), &8.into()));
    is_at(&finding["frames"], "ticket_mark", STRAY, "bad: ticket", true);
    is_at(&finding["allocated"]["frames"], "ticket_late", STRAY, "allocated: ticket", true);
    is_at(&finding["freed"]["frames"], function, STRAY, &format!("freed: {bug}"), true);
    assert_eq!(run.findings.len(), 1, "{}", run.tail());
}

/// Reads where no object is. Each read itself then faults, which ends a thread, and not the kernel.
fn no_object() {
    let bugs = [
        ("null", "null-ptr-deref", "0x1f8"),
        ("user", "user-memory-access", "0x12345678"),
        ("wild", "wild-memory-access", "0xdead000000000100"),
    ];
    let parts = bugs.map(|(bug, ..)| format!("+umbra_stray:bug={bug} -umbra_stray"));
    let run = run(&format!("+umbra_shelf {}", parts.join(" ")), true);
    run.expect(6);
    let found = all_in(&run, "stray_thread");
    assert_eq!((found.len(), run.findings.len()), (3, 3), "{}", run.tail());
    for (finding, (_, kind, address)) in found.into_iter().zip(bugs) {
        assert_eq!((&finding["kind"], &finding["size"]), (&kind.into(), &4.into()), "{finding:#}");
        assert_eq!(finding["address"], address, "{finding:#}");
        assert_eq!(finding["task"]["name"], "umbra_stray", "{finding:#}");
        is_at(&finding["frames"], "stray_thread", STRAY, "bad: thread", true);
    }
}

/// What a module has left is used when it is gone. The access itself then faults, and ends the
/// first program, which the kernel does not survive.
fn use_after_unload(left: &str) {
    let run = run(&format!("+umbra_shelf +umbra_stray:bug={left} -umbra_stray -umbra_shelf"), true);
    run.expect(3);
    let finding = only(&run, "shelf_read");
    assert_eq!(finding["kind"], "vmalloc-out-of-bounds", "{finding:#}");
    is_at(&finding["frames"], "shelf_read", SHELF, "bad: shelf", true);
    assert_eq!(run.findings.len(), 1, "{}", run.tail());
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let modules = need(KERNEL).and(&need_first_program()).and(&Need::prefer_nested());
    for (name, late, lines) in [
        ("linux_modules::bugs_at_load_have_the_right_verdicts", false, true),
        ("linux_modules::bugs_at_unload_have_the_right_verdicts", true, true),
        ("linux_modules::without_their_files_they_have_names", true, false),
    ] {
        suite.add(name, &modules, move || bugs_have_the_right_verdicts(late, lines));
    }
    suite.add("linux_modules::good_use_is_silent", &modules, good_use_is_silent);
    suite.add("linux_modules::two_loads_are_one_finding", &modules, two_loads_are_one_finding);
    for left in ["left", "init_left"] {
        suite.add(format!("linux_modules::use_after_unload: {left}"), &modules, move || {
            use_after_unload(left);
        });
    }
    for (bug, function) in [("rcu", "ticket_reclaim"), ("timer", "ticket_tick")] {
        let name = format!("linux_modules::freed_in_another_context: {bug}");
        suite.add(name, &modules, move || freed_in_another_context(bug, function));
    }
    suite.add("linux_modules::no_object", &modules, no_object);
    suite.run()
}
