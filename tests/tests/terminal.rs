//! The terminal as a guest's console: keys reach the guest, and the terminal is restored however
//! the run ends.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use tempfile::TempDir;
use umbra_tests::elf::ElfBuilder;
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
const BASE: u64 = 1 << 20;
/// Time limit of everything here.
const HUNG: Duration = Duration::from_secs(60);

/// A guest that passes for Linux, prints `>` without a line end, and then each key that comes; `q`
/// makes it reset itself, `c` crash.
fn echo() -> Vec<u8> {
    let code = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let [mut wait, mut reset, mut crash] = [(); 3].map(|()| a.create_label());
        a.mov(edx, 0x3f8)?;
        a.mov(al, 0x3e)?;
        a.out(dx, al)?;
        a.set_label(&mut wait)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.jz(wait)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.cmp(al, i32::from(b'q'))?;
        a.je(reset)?;
        a.cmp(al, i32::from(b'c'))?;
        a.je(crash)?;
        a.out(dx, al)?;
        a.jmp(wait)?;
        a.set_label(&mut reset)?;
        a.mov(al, 0xfe)?;
        a.out(0x64, al)?;
        a.set_label(&mut crash)?;
        a.ud2()?;
        a.db(b"Linux version 6.6.6")?;
        a.assemble(BASE)
    };
    ElfBuilder::new(BASE).segment(BASE, code().expect("code that can be encoded")).build()
}

/// A run on a terminal.
struct OnTerminal {
    main: OwnedFd,
    other: OwnedFd,
    child: Child,
    seen: Vec<u8>,
    before: libc::termios,
    _dir: TempDir,
}

impl OnTerminal {
    fn start(args: &[&str]) -> Self {
        let (mut main, mut other) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: fills in two descriptors; the rest are defaults.
        let opened =
            unsafe { libc::openpty(&mut main, &mut other, null, null.cast(), null.cast()) };
        assert_eq!(opened, 0);
        // SAFETY: new descriptors that nobody else has.
        let (main, other) = unsafe { (OwnedFd::from_raw_fd(main), OwnedFd::from_raw_fd(other)) };
        let dir = TempDir::new().expect("a temporary directory");
        let path = dir.path().join("kernel");
        std::fs::write(&path, echo()).expect("a kernel");
        let before = settings(&other);
        let clone = || other.try_clone().expect("a copy");
        let mut command = Command::new(PROGRAM);
        command.arg("run").arg(&path).args(["--memory", "16M"]).args(args).env_remove("RUST_LOG");
        command.stdin(clone()).stdout(clone()).stderr(clone());
        let leads = || {
            // SAFETY: both only concern the calling process, and may be called between fork and
            // exec. Its standard input is the terminal.
            let result =
                unsafe { if libc::setsid() < 0 { -1 } else { libc::ioctl(0, libc::TIOCSCTTY, 0) } };
            if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure allocates nothing and takes no lock.
        unsafe { command.pre_exec(leads) };
        let child = command.spawn().expect("the program starts");
        let mut run = Self { main, other, child, seen: Vec::new(), before, _dir: dir };
        run.wait_for(">");
        run
    }

    /// Reads the terminal until it shows `text`.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let begin = Instant::now();
        let mut file = File::from(self.main.try_clone().expect("a copy"));
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            assert!(
                begin.elapsed() < HUNG,
                "no {text:?} in {:?}",
                String::from_utf8_lossy(&self.seen)
            );
            let mut poll =
                libc::pollfd { fd: self.main.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor, ours.
            if unsafe { libc::poll(&mut poll, 1, 100) } > 0 {
                let mut chunk = [0; 4096];
                let count = file.read(&mut chunk).unwrap_or(0);
                self.seen.extend_from_slice(&chunk[..count]);
            }
        }
    }

    fn types(&self, keys: &[u8]) {
        File::from(self.main.try_clone().expect("a copy")).write_all(keys).expect("it is open");
    }

    fn signal(&self, signal: i32) {
        // SAFETY: our child, which has not been waited for: nobody else can have its id.
        unsafe { libc::kill(self.child.id().cast_signed(), signal) };
    }

    /// Waits for the end. Panics unless the terminal is as it was before.
    #[track_caller]
    fn ends(mut self) -> Option<i32> {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            if begin.elapsed() > HUNG {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("it does not end: {:?}", String::from_utf8_lossy(&self.seen));
            }
            // It may block until its output is read.
            let mut poll =
                libc::pollfd { fd: self.main.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor, ours.
            if unsafe { libc::poll(&mut poll, 1, 10) } > 0 {
                let _ = File::from(self.main.try_clone().expect("a copy")).read(&mut [0; 4096]);
            }
        };
        assert!(same(&settings(&self.other), &self.before), "the terminal is not put back");
        status.code()
    }
}

fn settings(terminal: &OwnedFd) -> libc::termios {
    let mut now = MaybeUninit::uninit();
    // SAFETY: a terminal, and room for its settings.
    assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), now.as_mut_ptr()) }, 0);
    // SAFETY: the call has filled it in.
    unsafe { now.assume_init() }
}

fn same(a: &libc::termios, b: &libc::termios) -> bool {
    (a.c_iflag, a.c_oflag, a.c_lflag, a.c_cc) == (b.c_iflag, b.c_oflag, b.c_lflag, b.c_cc)
}

fn keys_reach_the_guest_and_ctrl_a_x_ends_the_run() {
    let mut run = OnTerminal::start(&[]);
    run.wait_for("Ctrl-A x");
    let raw = settings(&run.other);
    assert_eq!(raw.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
    assert_eq!(raw.c_oflag, run.before.c_oflag, "lines still end as they should");
    // Ctrl-C is a key for the guest.
    run.types(b"hello\x03");
    run.wait_for("hello\x03");
    run.types(b"\x01\x01!");
    run.wait_for("\x01!");
    run.types(b"\x01x");
    assert_eq!(run.ends(), Some(130));
}

fn the_terminal_is_put_back_after_the_guests_own_end() {
    let mut run = OnTerminal::start(&[]);
    run.wait_for("Ctrl-A x");
    run.types(b"q");
    assert_eq!(run.ends(), Some(0));
    let mut run = OnTerminal::start(&[]);
    run.wait_for("Ctrl-A x");
    run.types(b"c");
    assert_eq!(run.ends(), Some(3));
}

fn the_terminal_is_put_back_at_the_time_limit() {
    let run = OnTerminal::start(&["--timeout", "1s"]);
    assert_eq!(run.ends(), Some(4));
}

fn the_terminal_is_put_back_after_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGABRT] {
        let mut run = OnTerminal::start(&[]);
        run.wait_for("Ctrl-A x");
        run.signal(signal);
        let code = run.ends();
        let ends_in_order = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].contains(&signal);
        assert_eq!(code, ends_in_order.then_some(130), "signal {signal}");
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let kvm = Need::kvm();
    for (name, test) in [
        (
            "keys_reach_the_guest_and_ctrl_a_x_ends_the_run",
            keys_reach_the_guest_and_ctrl_a_x_ends_the_run as fn(),
        ),
        (
            "the_terminal_is_put_back_after_the_guests_own_end",
            the_terminal_is_put_back_after_the_guests_own_end,
        ),
        ("the_terminal_is_put_back_at_the_time_limit", the_terminal_is_put_back_at_the_time_limit),
        ("the_terminal_is_put_back_after_signals", the_terminal_is_put_back_after_signals),
    ] {
        suite.add(name, &kvm, test);
    }
    suite.run()
}
