//! The process that reads symbols and sources: this program itself, executed again.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal, getpgid, getpid, kill_process};
use umbra_report::symbols::{Contents, Deadline, Position, Symbols};
use umbra_report::{
    AccessKind, Finding, Findings, Frame, Names, RunSummary, ShadowSummary, SourceRoots, html,
};

/// Two functions, of which the first has another one inlined.
const KERNEL: &str = "\
volatile char table[40] = {1};
static inline __attribute__((always_inline)) void inner(int i) { table[i] = 1; }
__attribute__((noinline)) void store(int i) { inner(i); }
__attribute__((noinline)) void other(int i) { table[i] = 2; }
void _start(void) { store(3); other(4); }
";

/// Compiles or assembles a kernel in a folder.
fn build(folder: &Path, name: &str, source: &str) -> PathBuf {
    let (input, output) = (folder.join(name), folder.join("kernel.elf"));
    fs::write(&input, source).expect("a file");
    let made = Command::new("cc")
        .args(["-g", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie"])
        .args(["-fno-asynchronous-unwind-tables", "-Wl,--build-id=none", "-o"])
        .args([&output, &input])
        .current_dir(folder)
        .output()
        .expect("a compiler");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    output
}

/// A kernel with its symbols, and where its functions are.
struct Kernel {
    symbols: Symbols,
    deadline: Deadline,
    path: PathBuf,
    store: u64,
    other: u64,
    _folder: tempfile::TempDir,
}

fn address(path: &Path, name: &str) -> u64 {
    use object::{Object as _, ObjectSymbol as _};
    let bytes = fs::read(path).expect("the kernel");
    let elf = object::File::parse(&*bytes).expect("an ELF file");
    elf.symbols().find(|symbol| symbol.name() == Ok(name)).expect("a symbol").address()
}

fn kernel() -> Kernel {
    let folder = tempfile::tempdir().expect("a folder");
    let path = build(folder.path(), "kernel.c", KERNEL);
    let deadline = Deadline::default();
    let file = path.clone();
    let symbols = Symbols::lazy(move || Contents::disk(fs::File::open(file)?))
        .with_deadline(deadline.clone());
    let (store, other) = (address(&path, "store"), address(&path, "other"));
    Kernel { symbols, deadline, path, store, other, _folder: folder }
}

impl Kernel {
    /// Name and line of the function at an address, as for a new finding.
    fn at(&self, address: u64) -> (Option<String>, Option<u32>) {
        self.symbols.begin();
        let frames = self.symbols.frames(address, Position::Instruction);
        let last = frames.last().expect("there is always one");
        (last.symbol.as_deref().map(str::to_owned), last.line)
    }
}

fn named(name: &str, line: u32) -> (Option<String>, Option<u32>) {
    (Some(name.to_owned()), Some(line))
}

/// The workers of this process. One that was started but does not run yet is none: to stop it would
/// stop this process, too.
fn workers() -> Vec<Pid> {
    let is_worker = |pid: &Pid| {
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
        command.unwrap_or_default().ends_with(b"--umbra-symbol-worker\0")
    };
    children(starter()).into_iter().filter(is_worker).collect()
}

/// The process that starts workers, which this one has forked.
fn starter() -> Pid {
    children(getpid()).into_iter().next().expect("it was forked")
}

/// The living children of a process.
fn children(of: Pid) -> Vec<Pid> {
    let of = of.as_raw_nonzero().to_string();
    let all = fs::read_dir("/proc").expect("a list of processes").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // State and parent, behind the name in parentheses.
        let mut rest = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        rest.next().is_some_and(|state| state != "Z") && rest.next() == Some(&of)
    });
    ours.filter_map(Pid::from_raw).collect()
}

/// Waits until the workers are gone.
#[track_caller]
fn none_is_left() {
    let begin = std::time::Instant::now();
    while !workers().is_empty() {
        assert!(begin.elapsed().as_secs() < 20, "{:?}", workers());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn worker() -> Pid {
    let workers = workers();
    let [worker] = workers.as_slice() else { panic!("not one worker: {workers:?}") };
    *worker
}

fn names_and_lines_come_from_another_process() {
    let kernel = kernel();
    assert_eq!(workers(), [], "none before it is needed");
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    assert_eq!(kernel.at(kernel.other), named("other", 4));
    let inlined = (0..16).map(|i| kernel.symbols.frames(kernel.store + i, Position::Instruction));
    assert!(inlined.into_iter().any(|frames| frames[0].symbol.as_deref() == Some("inner")));
    let mut table = kernel.symbols.lookup_data(address(&kernel.path, "table")).expect("a variable");
    kernel.symbols.declare(&mut table);
    assert_eq!((table.file.as_deref(), table.line), (Some("kernel.c"), Some(1)));
    assert!(kernel.symbols.image().contains(&kernel.store));
    assert_eq!(kernel.symbols.notes(), [""; 0]);
    worker();
    // A kernel in memory has its own.
    let bytes = fs::read(&kernel.path).expect("the kernel");
    let store = kernel.store;
    drop(kernel);
    none_is_left();
    let symbols = Symbols::from_elf(bytes);
    let frames = symbols.frames(store, Position::Instruction);
    assert_eq!(frames.last().and_then(|frame| frame.symbol.as_deref()), Some("store"));
    worker();
}

fn it_has_no_descriptors_and_little_of_everything() {
    // Descriptors that are not closed when a program is executed, as a shell may leave them.
    let secret = tempfile::NamedTempFile::new().expect("a file");
    let leaked = rustix::io::dup(secret.as_file()).expect("a descriptor");
    let kernel = kernel();
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    let worker = worker();
    let proc = |what: &str| format!("/proc/{}/{what}", worker.as_raw_nonzero());
    let open = fs::read_dir(proc("fd")).expect("its descriptors").flatten();
    let open: Vec<_> = open.map(|entry| fs::read_link(entry.path()).unwrap_or_default()).collect();
    assert!(open.len() >= 3 && !open.contains(&secret.path().to_owned()), "{open:?}");
    for target in &open {
        let text = target.to_string_lossy();
        let expected = text.starts_with("socket:") || text == "/dev/null" || *target == kernel.path;
        assert!(expected, "{open:?}");
    }
    drop(leaked);
    let limits = fs::read_to_string(proc("limits")).expect("its limits");
    for (name, most) in [
        ("Max address space", 1 << 30),
        ("Max cpu time", 300),
        ("Max open files", 64),
        ("Max file size", 0),
        ("Max core file size", 0),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name)).expect("a line");
        let values = line.trim_start_matches(name).split_ascii_whitespace().take(2);
        let values: Vec<u64> = values.map(|value| value.parse().unwrap_or(u64::MAX)).collect();
        assert!(values.iter().all(|value| *value <= most), "{line}");
    }
    let group = getpgid(Some(worker)).expect("it is there");
    assert_ne!(Ok(group), getpgid(None), "Ctrl-C is not for it");
}

/// A process whose time is over ends, and the next question starts another. That time is minutes;
/// for this test it is made shorter from outside.
fn one_whose_time_is_over_is_followed_by_another() {
    let kernel = kernel();
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    let first = worker();
    let second = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
    let pid = first.as_raw_nonzero().get();
    // SAFETY: reads a structure, and writes none.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_CPU, &second, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    // It may end in the middle of a question or between two, which the next one notices.
    let mut address = kernel.store;
    while kernel.symbols.notes().is_empty() {
        address += 1;
        kernel.at(address);
    }
    let notes = kernel.symbols.notes();
    assert!(notes[0].contains("the process that reads the kernel's file died"), "{notes:?}");
    assert_eq!(kernel.at(kernel.other), named("other", 4), "another one was started");
    assert_ne!(worker(), first);
}

fn its_death_costs_lines_at_most() {
    let kernel = kernel();
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    kill_process(worker(), Signal::KILL).expect("it is there");
    assert_eq!(kernel.at(kernel.other), (Some("other".into()), None));
    let notes = kernel.symbols.notes();
    assert!(notes[0].contains("the process that reads the kernel's file died"), "{notes:?}");
    assert_eq!(kernel.at(kernel.other + 1), named("other", 4), "another one was started");
}

fn one_that_does_not_answer_is_ended_in_time() {
    let kernel = kernel();
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    let stopped = worker();
    kill_process(stopped, Signal::STOP).expect("it is there");
    kernel.deadline.set(Duration::from_millis(100));
    assert_eq!(kernel.at(kernel.other), (None, None));
    let begin = std::time::Instant::now();
    while workers().contains(&stopped) {
        assert!(begin.elapsed().as_secs() < 20, "it is gone");
        std::thread::sleep(Duration::from_millis(10));
    }
    let notes = kernel.symbols.notes();
    assert!(notes[0].contains("takes too long to read"), "{notes:?}");
    // The end of a run does not count against the file: afterwards all is as before.
    for _ in 0..10 {
        assert_eq!(kernel.at(kernel.other), (None, None));
    }
    kernel.deadline.set(Duration::from_secs(60));
    assert_eq!(kernel.at(kernel.other), named("other", 4));
}

/// Without any deadline. Names come from another process, with what is left of the time.
fn a_finding_waits_for_lines_for_a_while() {
    let kernel = kernel();
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    kill_process(worker(), Signal::STOP).expect("it is there");
    assert_eq!(kernel.at(kernel.other), (Some("other".into()), None));
    // The time of this finding is over, that of the next one is not.
    let frames = kernel.symbols.frames(kernel.store + 1, Position::Instruction);
    assert!(frames.iter().all(|frame| frame.line.is_none()), "{frames:?}");
    assert_eq!(kernel.at(kernel.store + 1), named("store", 3));
}

fn a_deadline_that_comes_nearer_holds() {
    let kernel = kernel();
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    kill_process(worker(), Signal::STOP).expect("it is there");
    std::thread::scope(|scope| {
        let deadline = kernel.deadline.clone();
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            deadline.set(Duration::ZERO);
        });
        // Without it, it would be long.
        assert_eq!(kernel.at(kernel.other), (None, None));
    });
}

/// A start that comes too late for a finding is none for the next one.
fn a_start_may_be_late() {
    let kernel = kernel();
    kill_process(starter(), Signal::STOP).expect("it is there");
    kernel.deadline.set(Duration::from_millis(100));
    assert_eq!(kernel.at(kernel.store), (None, None));
    kill_process(starter(), Signal::CONT).expect("it is there");
    kernel.deadline.set(Duration::from_secs(60));
    assert_eq!(kernel.at(kernel.store), named("store", 3));
    drop(kernel);
    none_is_left();
}

/// No process that reads names can be started: a finding goes without them after some seconds.
fn a_finding_does_not_wait_for_ever() {
    let kernel = kernel();
    kill_process(starter(), Signal::STOP).expect("it is there");
    assert_eq!(kernel.at(kernel.store), (None, None));
    kill_process(starter(), Signal::CONT).expect("it is there");
    let notes = kernel.symbols.notes();
    assert!(notes[0].contains("takes too long to read"), "{notes:?}");
    assert_eq!(kernel.at(kernel.other), named("other", 4));
    drop(kernel);
    none_is_left();
}

fn it_is_started_a_few_times() {
    let kernel = kernel();
    let mut started = 0;
    for i in 0..20 {
        for worker in workers() {
            started += 1;
            kill_process(worker, Signal::KILL).expect("it is there");
        }
        let frames = kernel.symbols.frames(kernel.store + i, Position::Instruction);
        assert_eq!(frames.last().map(|frame| frame.ip), Some(kernel.store + i));
    }
    assert!((3..12).contains(&started), "{started}");
    none_is_left();
    let notes = kernel.symbols.notes().join("\n");
    assert!(notes.contains("is not read any more, after several failures"), "{notes}");
}

/// So many rows of lines that they do not fit into its memory, or take too long.
fn more_lines_than_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = "
        .globl _start
        .type _start, @function
        .text
        _start: nop
        .size _start, 1
        .section .debug_abbrev,\"\",@progbits
        .byte 1, 0x11, 0, 0x11, 1, 0x12, 7, 0x10, 0x17, 0, 0, 0
        .section .debug_info,\"\",@progbits
        .long 24 + 4
        .short 4
        .long 0
        .byte 8, 1
        .quad _start, 1
        .long 0
        .section .debug_line,\"\",@progbits
        ";
    let rows = ".byte 0, 9, 2; .quad 0x1000; .fill 80000000, 1, 0x20";
    let lines =
        include_str!("dwarf/line_table.s").replace("FILE", ".asciz \"a.c\"").replace("ROWS", rows);
    let source = source.to_owned() + &lines;
    let (input, path) = (folder.path().join("kernel.s"), folder.path().join("kernel.elf"));
    fs::write(&input, source).expect("a file");
    let made = Command::new("cc")
        .args(["-static", "-nostdlib", "-no-pie", "-Wl,--build-id=none", "-o"])
        .args([&path, &input])
        .output()
        .expect("a compiler");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let start = address(&path, "_start");
    let file = path.clone();
    let symbols = Symbols::lazy(move || Contents::disk(fs::File::open(file)?));
    let frames = symbols.frames(start, Position::Instruction);
    let last = frames.last().expect("there is always one");
    assert_eq!((last.symbol.as_deref(), last.line), (Some("_start"), None));
    let notes = symbols.notes().join("\n");
    assert!(notes.contains("died") || notes.contains("takes too long"), "{notes}");
}

fn it_reads_nothing_but_its_socket() {
    let status = Command::new("/proc/self/exe")
        .arg("--umbra-symbol-worker")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .expect("it starts");
    assert_eq!(status.code(), Some(1));
}

/// A page about a finding in these places.
fn page(roots: &SourceRoots, paths: &[&Path]) -> String {
    let frame = |path: &&Path| Frame {
        ip: 1,
        symbol: Some("f".into()),
        path: Some(path.to_string_lossy().into()),
        file: Some(path.to_string_lossy().into()),
        line: Some(1),
        ..Frame::default()
    };
    let mut findings = Findings::default();
    let frames = paths.iter().map(frame).collect();
    findings.add(Finding { kind: "double-free", ip: 1, frames, ..Finding::new(AccessKind::Free) });
    let shadow = ShadowSummary { mode: "full", notify: "ring", limit_bytes: None, peak_bytes: 0 };
    let run = RunSummary {
        kernel_bytes: 1,
        cmdline: "",
        memory_bytes: 1,
        shadow: Some(shadow),
        timeout: None,
        stop_at: None,
        outcome: "done".into(),
        status: 1,
        findings: &findings,
        allocations: 0,
        frees: 0,
        exits: 0,
        seconds: 0.0,
        figures: serde_json::Value::Null,
        picture: None,
    };
    let names = Names::Demangled;
    let page = html::Page { kernel: "k", file: None, roots, run: &run, names, verdicts: vec![] };
    let mut out = Vec::new();
    html::write(&mut out, &page).expect("a Vec takes everything");
    String::from_utf8(out).expect("UTF-8")
}

fn a_page_has_lines_of_its_roots_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("root");
    fs::create_dir(&root).expect("a folder");
    let (good, secret, link) =
        (root.join("good.c"), folder.path().join("secret.c"), root.join("link.c"));
    fs::write(&good, "a good line\n").expect("a file");
    fs::write(&secret, "a secret line\n").expect("a file");
    symlink(&secret, &link).expect("a link");
    let roots = SourceRoots::new(std::slice::from_ref(&root)).expect("a folder");
    let text = page(&roots, &[&good, &secret, &link, &secret]);
    assert!(text.contains("a good line") && !text.contains("secret line"), "{text}");
    let remark = format!("Sources outside of {} are not shown", root.display());
    assert_eq!(text.matches(&remark).count(), 1);
    assert_eq!(text.matches("--source-root").count(), 1);
    // Nothing is missing, and nothing is said.
    assert!(!page(&roots, &[&good]).contains("--source-root"));
    // Lines that are too much for a page.
    let large = root.join("large.c");
    fs::write(&large, ("\"".repeat(200) + "\n").repeat(9)).expect("a file");
    let text = page(&roots, &[large.as_path(); 200]);
    assert!(text.contains("too large for this page") && text.len() < 128 << 10, "{}", text.len());
    // No folder at all.
    let text = page(&SourceRoots::default(), &[&good]);
    assert!(!text.contains("a good line") && text.contains("No folder of sources is named"));
}

/// Whoever reads the sources does not answer: the page is written nevertheless.
fn a_page_does_not_wait_for_ever() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths: Vec<_> = (0..200).map(|i| folder.path().join(format!("{i}.c"))).collect();
    let paths: Vec<_> = paths.iter().map(PathBuf::as_path).collect();
    let roots = SourceRoots::new(&[folder.path().to_owned()]).expect("a folder");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(SeqCst) {
                for worker in workers() {
                    // It may just have ended.
                    let _ = kill_process(worker, Signal::STOP);
                }
            }
        });
        let text = page(&roots, &paths);
        done.store(true, SeqCst);
        assert!(text.trim_end().ends_with("</html>"));
    });
    none_is_left();
}

/// In each worker, once its resources are limited. If it gets too many, it dies, and no test here
/// gets an answer.
fn descriptors_run_out() {
    let open = std::iter::repeat_with(|| fs::File::open("/dev/null")).take(1000);
    let open: Vec<_> = open.map_while(Result::ok).collect();
    assert!((1..64).contains(&open.len()), "{} more than it had", open.len());
}

fn main() -> ExitCode {
    // The jail is `umbra`'s, and has tests there.
    umbra_report::symbol_worker(|_| descriptors_run_out());
    type Test = (&'static str, fn());
    let tests: [Test; 14] = [
        ("names_and_lines_come_from_another_process", names_and_lines_come_from_another_process),
        (
            "it_has_no_descriptors_and_little_of_everything",
            it_has_no_descriptors_and_little_of_everything,
        ),
        (
            "one_whose_time_is_over_is_followed_by_another",
            one_whose_time_is_over_is_followed_by_another,
        ),
        ("its_death_costs_lines_at_most", its_death_costs_lines_at_most),
        ("one_that_does_not_answer_is_ended_in_time", one_that_does_not_answer_is_ended_in_time),
        ("a_finding_waits_for_lines_for_a_while", a_finding_waits_for_lines_for_a_while),
        ("a_page_does_not_wait_for_ever", a_page_does_not_wait_for_ever),
        ("a_finding_does_not_wait_for_ever", a_finding_does_not_wait_for_ever),
        ("a_deadline_that_comes_nearer_holds", a_deadline_that_comes_nearer_holds),
        ("a_start_may_be_late", a_start_may_be_late),
        ("it_is_started_a_few_times", it_is_started_a_few_times),
        ("more_lines_than_memory", more_lines_than_memory),
        ("it_reads_nothing_but_its_socket", it_reads_nothing_but_its_socket),
        ("a_page_has_lines_of_its_roots_only", a_page_has_lines_of_its_roots_only),
    ];
    // One after the other: they look at the children of this process.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}
