//! Linux that is checked by Umbra, with bugs of the shapes that public reports describe
//! (`mm/umbra_bugs.c` of the patched sources). Each is a thread of its own name.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use umbra_tests::linux::{initrd, kernel, need};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
const KERNEL: &str = "umbra/vmlinux";
/// The same with `CONFIG_KASAN_VMALLOC`.
const VMALLOC: &str = "umbra-vmalloc/vmlinux";
const LIMIT: Duration = Duration::from_secs(600);
/// A first program. The kernel does not come to run it: it waits until all bugs have run.
const PROGRAM_CODE: [u8; 2] = [0xeb, 0xfe];

/// Runs these bugs, and then the kernel switches itself off.
fn run(file: &str, bugs: &str, options: &str) -> Run {
    Umbra::new(PROGRAM, "run")
        .patience(LIMIT)
        .arg(kernel(file))
        .args("--memory 128M --keep-going --timeout 500s")
        .args(options)
        .arg(format!("--cmdline=kunit.enable=0 umbra_bugs={bugs}"))
        .arg("--initrd")
        .file(&initrd(&PROGRAM_CODE))
        .collect()
        .run()
}

/// The findings of a bug.
fn of<'a>(run: &'a Run, bug: &str) -> Vec<&'a Value> {
    let console = String::from_utf8_lossy(&run.stdout);
    assert!(console.contains(&format!("umbra_bugs: ran {bug}")), "{bug} did not run:\n{console}");
    let found = run.findings.iter().filter(|finding| {
        let through = |frames: &Value| {
            frames.as_array().is_some_and(|frames| {
                frames.iter().any(|frame| frame["symbol"].as_str() == Some(bug))
            })
        };
        let tracks = ["allocated", "freed"].iter().any(|track| through(&finding[track]["frames"]));
        through(&finding["frames"]) || tracks
    });
    found.collect()
}

/// The only finding of a bug, of that kind.
#[track_caller]
fn one<'a>(run: &'a Run, bug: &str, kind: &str) -> &'a Value {
    match of(run, bug).as_slice() {
        [finding] if finding["kind"] == kind => finding,
        others => panic!("{bug}: not one {kind}: {others:#?}\n{}", run.tail()),
    }
}

/// Whether the stack of a track goes through a function.
fn track_goes_through(finding: &Value, track: &str, function: &str) -> bool {
    finding[track]["frames"]
        .as_array()
        .is_some_and(|frames| frames.iter().any(|frame| frame["symbol"].as_str() == Some(function)))
}

fn bugs_have_the_right_verdicts() {
    let run = run(
        KERNEL,
        "destroyed_cache,freed_member,freed_pages,init_data,other_owner,pending_work,ended_task,\
         used_stacks",
        "",
    );
    run.expect(1);
    assert_eq!(run.outcome(), "power-off");

    let gone = one(&run, "destroyed_cache", "use-after-free");
    for track in ["allocated", "freed"] {
        assert!(track_goes_through(gone, track, "destroyed_cache"), "{track}: {gone:#}");
    }
    assert_eq!(
        (&gone["object"]["cache"], &gone["object"]["offset"]),
        (&"umbra_gone".into(), &9.into())
    );

    let member = one(&run, "freed_member", "invalid-free");
    assert_eq!((&member["object"]["size"], &member["object"]["offset"]), (&32.into(), &8.into()));

    let pages = one(&run, "freed_pages", "use-after-free");
    assert_eq!(pages["object"], Value::Null, "a bystander: {pages:#}");

    let init = one(&run, "init_data", "use-after-free");
    assert_eq!(init["variable"]["name"], "umbra_init_table", "{init:#}");

    let other = one(&run, "other_owner", "slab-out-of-bounds");
    assert_eq!(other["allocated"]["task"]["name"], "umbra_owner", "{other:#}");
    assert_eq!(other["task"]["name"], "other_owner", "{other:#}");

    let task = one(&run, "ended_task", "slab-use-after-free");
    assert_eq!(task["object"]["cache"], "task_struct", "{task:#}");
    assert!(track_goes_through(task, "allocated", "copy_process"), "{task:#}");
    assert!(track_goes_through(task, "freed", "rcu_core"), "{task:#}");

    // Many accesses of timer and workqueue code are one bug.
    let pending = one(&run, "pending_work", "slab-use-after-free");
    assert!(track_goes_through(pending, "freed", "pending_work"), "{pending:#}");

    // Stacks that are used again are no bug, and nothing else is found.
    of(&run, "used_stacks");
    assert_eq!(run.findings.len(), 7, "{:#?}", run.findings);
}

fn a_fault_of_the_kernel_is_an_outcome() {
    let run = run(KERNEL, "freed_error", "");
    run.expect(6);
    assert_eq!(run.outcome(), "oops");
    assert!(run.findings.is_empty(), "{:#?}", run.findings);
}

fn areas_have_owners() {
    let run = run(VMALLOC, "vmalloc_tail", "");
    run.expect(1);
    let tail = one(&run, "vmalloc_tail", "vmalloc-out-of-bounds");
    assert!(track_goes_through(tail, "allocated", "vmalloc_tail"), "{tail:#}");
    assert_eq!((&tail["object"]["size"], &tail["object"]["offset"]), (&5000.into(), &5000.into()));
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let umbra = need(KERNEL).and(&Need::prefer_nested());
    suite.add("linux_bugs::have_the_right_verdicts", &umbra, bugs_have_the_right_verdicts);
    suite.add("linux_bugs::a_fault_is_an_outcome", &umbra, a_fault_of_the_kernel_is_an_outcome);
    let vmalloc = need(VMALLOC).and(&Need::prefer_nested());
    suite.add("linux_bugs::areas_have_owners", &vmalloc, areas_have_owners);
    suite.run()
}
