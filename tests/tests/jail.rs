//! The jail: what a process in it can still do, and the program with it and without it.
//!
//! For what must not work, this program starts itself again, enters the jail, and tries it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use umbra::jail::{Jail, Profile, ThreadKind};
use umbra::report::symbols::{Position, Symbols};
use umbra_tests::elf::ElfBuilder;
use umbra_tests::program::Umbra;
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// What the program that was started again tries.
const TRIAL: &str = "UMBRA_JAIL_TRIAL";
/// A folder for it.
const FOLDER: &str = "UMBRA_JAIL_FOLDER";
/// The lowest address of a kernel.
const BASE: u64 = 1 << 20;

/// What is tried. The result is what it printed and its exit status.
type Trial = fn(&Path) -> io::Result<()>;

/// Tries that happen in the first part of the jail, before it is closed.
const ENTERED: &[(&str, Trial)] = &[
    ("read what is allowed", |folder| fs::read(folder.join("read/file")).map(drop)),
    ("read something else", |_| fs::read("/etc/passwd").map(drop)),
    ("list something else", |_| fs::read_dir("/").map(drop)),
    ("write what may be read", |folder| fs::write(folder.join("read/file"), "x")),
    ("make a report", |folder| {
        fs::write(folder.join("write/new"), "x")?;
        fs::rename(folder.join("write/new"), folder.join("write/file"))
    }),
    ("make a file elsewhere", |folder| fs::write(folder.join("read/new"), "x")),
    ("make a folder", |folder| fs::create_dir(folder.join("write/folder"))),
    ("remove what may be read", |folder| fs::remove_file(folder.join("read/file"))),
    ("execute", |_| Command::new("/bin/true").status().map(drop)),
    ("have capabilities", |_| {
        let none = |set| caps(set).is_ok_and(|caps| caps == 0);
        if none(Set::Effective) && none(Set::Permitted) && none(Set::Inheritable) {
            Err(io::ErrorKind::PermissionDenied.into())
        } else {
            Ok(())
        }
    }),
    ("have new privileges", |_| {
        // SAFETY: only asks.
        let set = unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) };
        if set == 1 { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }),
    ("dump core", |_| {
        let mut limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
        // SAFETY: fills in a structure.
        unsafe { libc::getrlimit(libc::RLIMIT_CORE, &mut limit) };
        if limit.rlim_max == 0 { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }),
    ("open many files", |folder| {
        let file = || File::open(folder.join("read/file"));
        let files: io::Result<Vec<_>> = (0..1000).map(|_| file()).collect();
        files.map(drop)
    }),
    ("take much memory", |_| map(1 << 40, libc::PROT_READ).map(drop)),
    ("take some memory", |_| map(1 << 30, libc::PROT_READ).map(drop)),
    ("write a large file", |folder| {
        let file = File::create(folder.join("write/large"))?;
        file.set_len(1 << 40)
    }),
];

/// Calls that end the process once the jail is closed, and the words of the message.
const STOPPED: &[(&str, Trial)] = &[
    ("socket", |_| std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
    ("execve", |_| Err(Command::new("/bin/true").exec())),
    ("openat", |folder| fs::write(folder.join("write/file"), "x")),
    ("mmap", |_| map(4096, libc::PROT_READ | libc::PROT_EXEC).map(drop)),
    ("mprotect", |_| {
        let at = map(4096, libc::PROT_READ)?;
        // SAFETY: a mapping of its own.
        unsafe { libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_EXEC) };
        Ok(())
    }),
    ("ioctl", |_| {
        // KVM_CREATE_VM, on whatever this is. SAFETY: no argument is read.
        unsafe { libc::ioctl(2, 0xae01, 0) };
        Ok(())
    }),
    ("ptrace", |_| {
        // SAFETY: changes nothing of this process.
        unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        Ok(())
    }),
    ("tgkill", |_| {
        // SAFETY: signal 0 does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
        Ok(())
    }),
    ("setrlimit", |_| {
        let limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
        // SAFETY: reads a structure.
        unsafe { libc::syscall(libc::SYS_setrlimit, libc::RLIMIT_CORE, &limit) };
        Ok(())
    }),
    ("eventfd2", |_| {
        // SAFETY: takes no memory.
        unsafe { libc::eventfd(0, 0) };
        Ok(())
    }),
];

enum Set {
    Effective,
    Permitted,
    Inheritable,
}

/// A set of this thread's capabilities.
fn caps(set: Set) -> io::Result<u64> {
    // Version 3 (Linux, include/uapi/linux/capability.h).
    let header = [0x2008_0522u32, 0];
    let mut data = [[0u32; 3]; 2];
    // SAFETY: version 3 fills two structures of three words.
    if unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let at = match set {
        Set::Effective => 0,
        Set::Permitted => 1,
        Set::Inheritable => 2,
    };
    Ok(u64::from(data[0][at]) | u64::from(data[1][at]) << 32)
}

/// New memory.
fn map(bytes: usize, access: i32) -> io::Result<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

fn trial(all: &[(&str, Trial)], name: &str) -> Option<Trial> {
    all.iter().find(|(known, _)| *known == name).map(|(_, trial)| *trial)
}

/// The program that was started again. Prints the result of a trial.
fn jailed(name: &str) -> ExitCode {
    let folder = std::env::var_os(FOLDER).expect("a folder");
    let folder = Path::new(&folder);
    if let Some(name) = name.strip_prefix("reader: ") {
        umbra::jail::leave_only_reading(&[&folder.join("read"), Path::new("/nowhere")]);
        return tell(trial(ENTERED, name).or(trial(STOPPED, name)).expect("a trial")(folder));
    }
    let profile = Profile {
        read: vec![folder.join("read")],
        write: vec![folder.join("write")],
        memory: 1 << 30,
        cpus: 1,
        again: false,
    };
    let jail = Jail::enter(&profile, true).expect("a complete jail");
    let (kind, name) = name.split_once(": ").expect("a kind of thread");
    let kind = ThreadKind::ALL.into_iter().find(|known| known.as_str() == kind);
    let trial = match kind {
        Some(kind) => {
            jail.close(kind).expect("closed");
            trial(STOPPED, name)
        }
        None => trial(ENTERED, name),
    };
    tell(trial.expect("a trial")(folder))
}

fn tell(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => println!("allowed"),
        Err(error) => println!("refused: {error}"),
    }
    ExitCode::SUCCESS
}

/// Starts this program again, for a trial.
fn start(kind: &str, name: &str) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    for part in ["read", "write"] {
        fs::create_dir(folder.path().join(part)).expect("a folder");
        fs::write(folder.path().join(part).join("file"), "x").expect("a file");
    }
    Command::new(std::env::current_exe().expect("this program"))
        .env(TRIAL, format!("{kind}: {name}"))
        .env(FOLDER, folder.path())
        .output()
        .expect("this program runs")
}

fn what_is_not_needed_is_given_up() {
    for (name, _) in ENTERED {
        let output = start("none", name);
        let said = String::from_utf8_lossy(&output.stdout);
        let allowed =
            matches!(*name, "read what is allowed" | "make a report" | "take some memory");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(said.starts_with(if allowed { "allowed" } else { "refused" }), "{name}: {said}");
    }
}

fn other_system_calls_end_it_with_a_sentence() {
    for kind in ThreadKind::ALL {
        for (name, _) in STOPPED {
            let output = start(kind.as_str(), name);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{name}: {said}");
            let words = "umbra: the jail stopped system call";
            assert!(said.starts_with(words) && said.lines().count() == 1, "{name}: {said}");
            let thread = format!("of {}: this is a defect of Umbra, or an attack", kind.as_str());
            assert!(said.contains(&format!("({name}, ")) && said.contains(&thread), "{said}");
        }
    }
}

/// What parses files that nobody trusts may read in its folders, and nothing else. What it tries
/// besides is refused, or ends it by a signal.
fn what_reads_symbols_only_reads() {
    for (name, _) in ENTERED.iter().chain(STOPPED) {
        // Its memory and files are limited elsewhere (`vmm/report`).
        if ["dump core", "open many files", "take much memory", "take some memory"].contains(name) {
            continue;
        }
        let output = start("reader", name);
        let said = String::from_utf8_lossy(&output.stdout);
        if *name == "read what is allowed" {
            assert!(said.starts_with("allowed"), "{name}: {said}");
        } else {
            let ended = output.status.signal() == Some(libc::SIGSYS);
            assert!(said.starts_with("refused") || ended, "{name}: {said} {:?}", output.status);
        }
        let stopped = STOPPED.iter().any(|(known, _)| known == name);
        assert!(!stopped || output.status.signal().is_some(), "{name}: {said}");
    }
}

/// The process that this program reads symbols in, as `umbra` does, has given all that up.
fn the_reader_of_symbols_is_confined() {
    let kernel = umbra::kernel::test_kernel().expect("checked before");
    let symbols = Symbols::from_elf(kernel.to_vec());
    symbols.begin();
    let frames = symbols.frames(symbols.image().start, Position::Instruction);
    assert!(frames.iter().any(|frame| frame.symbol.is_some()), "{:?}", symbols.notes());
    let this = std::env::current_exe().expect("this program");
    let is_reader = |process: &Path| {
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        command.ends_with(b"--umbra-symbol-worker\0")
            && fs::read_link(process.join("exe")).is_ok_and(|program| program == this)
    };
    let processes = fs::read_dir("/proc").expect("a list of processes").flatten();
    let mut readers = processes.map(|entry| entry.path()).filter(|path| is_reader(path));
    let reader = readers.next().expect("another process reads them");
    let status = fs::read_to_string(reader.join("status")).expect("its status");
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.lines().any(|known| known == line), "{line}: {status}");
    }
    assert!(status.contains("Seccomp:\t2"), "{status}");
}

fn umbra() -> Umbra {
    Umbra::new(PROGRAM, "run").file(&ElfBuilder::new(BASE).segment(BASE, [0xf4]).build())
}

fn a_run_says_that_it_has_none() {
    for (args, none) in [("", false), ("--jail on", false), ("--jail off", true)] {
        let run = umbra().args(args).run();
        run.expect(0);
        assert_eq!(run.stderr.contains("without a jail"), none, "{args}: {}", run.stderr);
        assert_eq!(run.stderr.lines().count(), 1, "{args}: {}", run.stderr);
    }
    umbra().args("--jail required").run().expect(0);
    umbra().args("--jail some").run().expect_usage(&["--jail"]);
}

/// Features that read or write something while the guest runs, or after.
fn every_output_works_inside() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("modules")).expect("a folder");
    let kernel = umbra::kernel::test_kernel().expect("checked before");
    let mut umbra = Umbra::new(PROGRAM, "run").file(kernel);
    for (option, name) in [
        ("--html", "page"),
        ("--sarif", "log"),
        ("--stats", "stats"),
        ("--findings", "findings"),
        ("--modules", "modules"),
    ] {
        umbra = umbra.arg(option).arg(path(name));
    }
    let args = "--jail required --keep-going --mark kmalloc --cmdline=scenarios=kmalloc_uaf";
    umbra.args(args).run().expect(1);
    for name in ["page", "log", "stats", "findings"] {
        let text = fs::read_to_string(path(name)).expect("it was written");
        assert!(text.contains("kmalloc"), "{name}: {text}");
    }
    let names = fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(names, 5, "no temporary file is left");
}

/// A report whose reader does not read: the program ends all the same, a minute after the limit or
/// after a signal.
fn a_report_that_nobody_reads() {
    let folder = tempfile::tempdir().expect("a folder");
    let start = |name: &str, timeout: &str| {
        let path = folder.path().join(name);
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("no zero");
        // SAFETY: a string that ends with a zero.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let both = || File::options().read(true).write(true).open(&path).expect("a pipe");
        let reader = both();
        // SAFETY: a descriptor of this test's own, and a plain number.
        assert!(unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } > 0);
        (umbra().args(timeout).arg("--html").arg(&path).start(), reader)
    };
    let late = start("late", "--timeout 1s");
    let mut stopped = start("stopped", "");
    stopped.0.wait_for("stderr", "umbra: ");
    stopped.0.signal(libc::SIGTERM);
    for ((run, _reader), status) in [(late, 4), (stopped, 130)] {
        let run = run.wait();
        run.expect(status);
        assert!(run.stderr.contains("it is ended now"), "{}", run.stderr);
    }
}

/// Makes the program of a run fail to use a system call from the start on, as on a kernel that does
/// not have it.
fn without(call: i64, mut umbra: Umbra) -> Umbra {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
    let rules = std::iter::once((call, Vec::new())).collect();
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64);
    let filter: seccompiler::BpfProgram = filter.and_then(TryInto::try_into).expect("a filter");
    let apply = move || seccompiler::apply_filter(&filter).map_err(io::Error::other);
    // SAFETY: only makes two system calls.
    unsafe { umbra.command().pre_exec(apply) };
    umbra
}

fn an_old_host_is_named_or_refused() {
    let landlock = libc::SYS_landlock_create_ruleset;
    let run = without(landlock, umbra()).run();
    run.expect(0);
    let first = run.stderr.lines().next().unwrap_or_default();
    assert!(first.contains("weaker here") && first.contains("Landlock"), "{}", run.stderr);
    let run = without(landlock, umbra().args("--jail required")).run();
    run.expect_refusal(&["Landlock", "--jail on"]);
}

/// The limit of a file's size holds for the console, too: what is more is lost, and the run goes
/// on. Shadow is a file in memory.
fn a_flooded_console_fills_no_disk() {
    const LIMIT: u64 = 64 << 10;
    // mov ecx, 200000; mov edx, 0x3f8; mov al, 'x'; 1: out dx, al; dec ecx; jnz 1b; hlt
    let mut code = vec![0xb9];
    code.extend(200_000u32.to_le_bytes());
    code.extend([0xba, 0xf8, 3, 0, 0, 0xb0, b'x', 0xee, 0xff, 0xc9, 0x75, 0xfb, 0xf4]);
    let kernel = ElfBuilder::new(BASE).segment(BASE, code).build();
    let limit = || {
        let limit = libc::rlimit { rlim_cur: LIMIT, rlim_max: LIMIT };
        // SAFETY: reads a structure.
        match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let run = |shadow| {
        let mut umbra = Umbra::new(PROGRAM, "run").file(&kernel).args("--shadow").arg(shadow);
        // SAFETY: only makes a system call.
        unsafe { umbra.command().pre_exec(limit) };
        umbra.run()
    };
    let flooded = run("off");
    flooded.expect(0);
    assert_eq!(flooded.stdout.len() as u64, LIMIT);
    run("per-page").expect_refusal(&["shadow memory", "ulimit -f"]);
}

/// A guest of two CPUs has times where the host's counters are in step, which the jail does not let
/// a run find out.
fn the_jail_hides_no_times() {
    let times = |jail: &str| {
        let kernel = umbra::kernel::test_kernel().unwrap_or_default();
        let run = Umbra::new(PROGRAM, "run")
            .file(kernel)
            .args("--cpus 2 --cmdline scenarios=kmalloc_uaf --jail")
            .arg(jail)
            .collect()
            .run();
        run.expect(1);
        run.findings[0]["allocated"].get("micros").is_some()
    };
    assert_eq!(times("on"), times("off"));
}

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(TRIAL) {
        return jailed(&name);
    }
    umbra::symbol_worker();
    let mut suite = Suite::default();
    let (nothing, kvm) = (Need::There, Need::kvm());
    let test_kernel = Need::test_kernel();
    let missing = umbra::kernel::test_kernel().is_none();
    let built = Need::unless(missing.then(|| "umbra was built without a test kernel".into()));
    // They wait for a minute, and write for one.
    let slow = kvm.and(&Need::machine());
    let tests: [(&str, &Need, fn()); 10] = [
        ("what_is_not_needed_is_given_up", &nothing, what_is_not_needed_is_given_up),
        ("other_system_calls_end_it", &nothing, other_system_calls_end_it_with_a_sentence),
        ("what_reads_symbols_only_reads", &nothing, what_reads_symbols_only_reads),
        ("the_reader_of_symbols_is_confined", &built, the_reader_of_symbols_is_confined),
        ("a_run_says_that_it_has_none", &kvm, a_run_says_that_it_has_none),
        ("every_output_works_inside", &test_kernel, every_output_works_inside),
        ("the_jail_hides_no_times", &test_kernel, the_jail_hides_no_times),
        ("a_report_that_nobody_reads", &slow, a_report_that_nobody_reads),
        ("an_old_host_is_named_or_refused", &kvm, an_old_host_is_named_or_refused),
        ("a_flooded_console_fills_no_disk", &slow, a_flooded_console_fills_no_disk),
    ];
    for (name, need, test) in tests {
        suite.add(name, need, test);
    }
    suite.run()
}
