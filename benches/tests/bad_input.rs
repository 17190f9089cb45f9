//! The benchmarks with traces that are none, on hosts without KVM, and on hosts with too little
//! memory.
//!
//! Called with `--bench`, this program is the benchmarks; else it runs itself so.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use umbra_benches::suite;
use umbra_benches::trace::SLICE;
use umbra_tests::suite::{Need, Suite};

/// The benchmarks with these arguments.
fn benchmarks(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program's path"));
    command.arg("--bench").arg("--keep").args(arguments);
    command
}

/// The same on a host that has 4 GiB of memory for it less a little, and perhaps no KVM.
fn on_a_poor_host(kvm: bool, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("meminfo");
    fs::write(&file, "MemTotal: 8388608 kB\nMemAvailable: 4194303 kB\n").expect("a file");
    let inner = benchmarks(arguments);
    let device = if kvm { "/dev/kvm" } else { "/dev/null" };
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(
        "mount --bind \"$0\" /proc/meminfo && mount --bind \"$1\" /dev/kvm && shift && exec \"$@\"",
    );
    command.arg(file).arg(device).arg(inner.get_program()).args(inner.get_args());
    command.output().expect("unshare starts")
}

/// Whether namespaces and mounts are permitted.
fn namespaces() -> Need {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind /dev/null /dev/null"]).stderr(Stdio::null());
    let good = command.status().is_ok_and(|status| status.success());
    Need::unless((!good).then(|| "mount namespaces are not permitted here".into()))
}

/// Refused with this sentence, as the only line.
#[track_caller]
fn refused(trace: &Path, sentence: &str) {
    let output = benchmarks(&["replay", "--trace"]).arg(trace).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.starts_with("error: ") && said.contains(sentence) && said.lines().count() == 1,
        "{said}"
    );
}

fn bad_traces() {
    refused(Path::new("/no/such/trace"), "cannot read the trace /no/such/trace");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("trace");
    let whole = fs::read(SLICE).expect("the slice");
    fs::write(&file, &whole[..whole.len() / 2]).expect("a file");
    refused(&file, "truncated");
    fs::write(&file, b"\x7fELF, and what follows").expect("a file");
    refused(&file, "trace");
    fs::write(&file, b"").expect("a file");
    refused(&file, "trace");
}

fn without_kvm() {
    let guests =
        ["guest-replay", "checks", "ring3", "costs", "workload", "process", "scale", "start"];
    let output = on_a_poor_host(false, &[&["replay"], &guests[..]].concat());
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(
        out.contains("page shadow and peak resident byte shadow"),
        "the native part ran: {out}"
    );
    let why = if umbra::kernel::test_kernel().is_some() {
        "/dev/kvm is not KVM"
    } else {
        "no test kernel"
    };
    for part in guests {
        let line = out.lines().find(|line| line.starts_with(&umbra_skip::line(part, "")));
        assert!(line.is_some_and(|line| line.contains(why)), "{part}: {out}");
    }
}

fn too_little_memory() {
    let output = on_a_poor_host(true, &["replay", "--memory", "24G"]);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{out}");
    let said = umbra_skip::line(
        "the replay with a full shadow",
        "it needs 4096 MiB of host memory, and 4095 MiB are available",
    );
    assert!(out.contains(&said), "{out}");
    assert!(out.contains("page shadow and peak resident byte shadow"), "{out}");
}

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|first| first == "--bench") {
        return suite::main();
    }
    let mut suite = Suite::default();
    // What is refused is the same on each host.
    let machine = Need::machine();
    let kvm = Need::kvm().and(&Need::root()).and(&namespaces()).and(&machine);
    suite.add("bad_traces", &machine, bad_traces);
    suite.add("without_kvm", &kvm, without_kvm);
    suite.add("too_little_memory", &kvm, too_little_memory);
    suite.run()
}
