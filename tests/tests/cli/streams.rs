//! Signals, pipes, terminals.

use umbra_tests::program::children;

use super::*;

/// A kernel that reports once and then never ends.
pub fn one_finding_and_no_end() -> Vec<u8> {
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

pub fn ctrl_c_ends_it_in_order() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut started =
            umbra().file(&one_finding_and_no_end()).args("--keep-going").collect().start();
        started.wait_for("stderr", "BUG: KASAN");
        let begin = Instant::now();
        started.signal(signal);
        let run = started.wait();
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
        run.expect(130);
        assert_eq!((run.outcome(), run.findings.len()), ("interrupted", 1));
        assert!(run.stderr.contains("interrupted; 1 finding"), "{}", run.stderr);
    }
}

/// SIGTERM ends a run in order whenever it comes: while it is set up, and while rings are read.
pub fn a_signal_may_come_at_any_time() {
    for delay in (0..32).map(|turn| Duration::from_millis(turn * turn / 2)) {
        let started = scenarios("huge_churn churn=100000000").start();
        std::thread::sleep(delay);
        started.signal(libc::SIGTERM);
        let run = started.wait();
        run.assert_no_panic();
        // In its first moments the program has no handler yet.
        assert!(matches!(run.code(), Some(130) | None), "{delay:?}: {}", run.stderr);
        assert!(run.time < Duration::from_secs(30), "{delay:?}: {:?}", run.time);
    }
}

/// The thread of a process that has this name, once there is one.
fn thread_of(pid: i32, name: &str) -> i32 {
    let tasks = || fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let is_it = |task: &Path| {
        fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    for _ in 0..1000 {
        if let Some(task) = tasks().find(|task| is_it(&task.path())) {
            return task.file_name().to_string_lossy().parse().expect("a number");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no thread {name}");
}

/// Stops one thread for so long, as a host without a processor for it does.
fn hold(thread: i32, time: Duration) {
    // SAFETY: the thread is one of our child's, for which this thread is the tracer now; the calls
    // get and give no memory.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0), 0);
        assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0), 0);
        assert_eq!(libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL), thread);
        std::thread::sleep(time);
        assert_eq!(libc::ptrace(libc::PTRACE_DETACH, thread, 0, 0), 0);
    }
}

/// CPUs whose rings are full have them drained themselves. Nothing is lost.
pub fn a_collector_that_does_not_run() {
    let churn = || scenarios("huge_churn churn=15000").collect();
    let undisturbed = churn().run();
    let started = churn().start();
    hold(thread_of(started.pid(), "collector"), Duration::from_millis(1200));
    let disturbed = started.wait();
    for run in [&undisturbed, &disturbed] {
        run.expect(0);
        assert_eq!(run.figure("/events/refused"), 0);
    }
    for figure in ["/events/allocations", "/events/frees"] {
        assert_eq!(disturbed.figure(figure), undisturbed.figure(figure), "{figure}");
    }
}

/// After `kill -9` nothing is left: no process of its group, no child of this process, and not the
/// one that reads symbols, which sees that nobody is there to ask any more.
pub fn a_kill_leaves_nothing_behind() {
    let mut umbra = umbra().file(&one_finding_and_no_end()).args("--keep-going");
    umbra.command().process_group(0);
    let mut started = umbra.start();
    started.wait_for("stderr", "BUG: KASAN");
    let group = started.pid();
    let guests = || {
        fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
            let maps = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let in_group = stat
                .rsplit(')')
                .next()
                .and_then(|rest| rest.split_ascii_whitespace().nth(2)?.parse().ok());
            maps == Path::new(PROGRAM) && in_group == Some(group)
        })
    };
    assert!(guests(), "it runs");
    let workers = children(group);
    assert_eq!(workers.len(), 1, "one that reads symbols");
    started.signal(libc::SIGKILL);
    let run = started.wait();
    assert_eq!(run.code(), None);
    assert!(!guests(), "a process is left");
    // SAFETY: only asks whether the group has a member.
    let gone = unsafe { libc::kill(-group, 0) } == -1;
    assert!(gone, "the group has a member left");
    let begin = Instant::now();
    let lives = |pid: &i32| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == Path::new(PROGRAM))
    };
    while workers.iter().any(lives) {
        assert!(begin.elapsed() < Duration::from_secs(60), "a worker is left");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Both ends of a pipe.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: an array of two.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: new descriptors that nobody else has.
    ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// Runs a command whose standard output, or error, is a pipe that nobody reads. Returns the exit
/// status and the output on the other one.
pub fn with_closed(which: &str, args: &[&str]) -> (Option<i32>, String) {
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
    let (stdout, stderr) = if which == "stdout" {
        (write.into(), Stdio::piped())
    } else {
        (Stdio::piped(), write.into())
    };
    let mut child = command
        .stdout::<Stdio>(stdout)
        .stderr::<Stdio>(stderr)
        .spawn()
        .expect("the program starts");
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

pub fn closed_pipes() {
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

/// Both outputs are one pipe that fills up: the guest's findings cannot be written, and the time
/// limit holds all the same.
pub fn a_full_pipe() {
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

pub fn no_colours_into_a_file() {
    let run = scenarios("kmalloc_uaf").run();
    run.expect(1);
    assert!(!run.stderr.contains('\x1b') && !run.stdout.contains(&0x1b));
}

/// The program's standard error on a terminal.
pub fn on_a_terminal(no_color: bool) -> String {
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
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(other)
        .spawn()
        .expect("the program starts");
    drop(command);
    let mut text = Vec::new();
    // A terminal whose other side is closed reads as an error.
    let _ = fs::File::from(main).read_to_end(&mut text);
    child.wait().expect("our child");
    String::from_utf8_lossy(&text).into_owned()
}

pub fn colours_on_a_terminal() {
    let text = on_a_terminal(false);
    assert!(text.contains("KASAN") && text.contains("\x1b["), "{text:?}");
    let text = on_a_terminal(true);
    assert!(text.contains("KASAN") && !text.contains("\x1b["), "{text:?}");
}

/// A pipe is refused at once, though nobody writes to it.
pub fn a_fifo_is_no_kernel() {
    for option in [None, Some("--initrd")] {
        let mut umbra = super::umbra();
        let path = umbra.path("fifo");
        let made = Command::new("mkfifo").arg(&path).status();
        assert!(made.is_ok_and(|status| status.success()));
        if let Some(option) = option {
            umbra = umbra.file(&good()).arg(option);
        }
        umbra.arg(&path).run().expect_refusal(&["not a regular file", "a pipe"]);
    }
}
