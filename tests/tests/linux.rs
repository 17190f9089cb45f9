//! Real Linux, booted as a user boots it: the small kernel of `cargo xtask linux` by each protocol,
//! and Debian's own.

use std::process::{ExitCode, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use umbra_tests::linux::{initrd, kernel, need};
use umbra_tests::program::{Run, Started, Umbra};
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// Time limit of every guest here. Where ring 0 is emulated and the machine is shared, some need a
/// good part of it.
const LIMIT: Duration = Duration::from_secs(1500);
/// `1: jmp 1b`.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `1: mov $34, %eax; syscall; jmp 1b`: the system call `pause`.
const PAUSE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];
/// Linux's message before its first program.
const INIT: &str = "Run /init as init process";

/// Linux, whose first program is `code`.
fn linux(file: &str, code: &[u8]) -> Umbra {
    let umbra = Umbra::new(PROGRAM, "run").patience(LIMIT);
    let limit = format!("{}s", LIMIT.as_secs());
    umbra
        .arg(kernel(file))
        .args("--shadow off --timeout")
        .arg(limit)
        .arg("--initrd")
        .file(&initrd(code))
        .collect()
}

/// A first program that does nothing. It leaves the CPU to others, if its system calls reach the
/// kernel.
fn idle() -> &'static [u8] {
    static CODE: LazyLock<&[u8]> = LazyLock::new(|| match Need::programs() {
        Need::There => &PAUSE,
        _ => &SPIN,
    });
    &CODE
}

/// Starts it with a keyboard.
fn with_keyboard(mut umbra: Umbra) -> Started {
    umbra.command().stdin(Stdio::piped());
    umbra.start()
}

/// Boots to the first program, which spins, and sends a SysRq command.
fn sysrq(umbra: Umbra, command: u8) -> Run {
    let mut started = with_keyboard(umbra);
    started.wait_for("stdout", INIT);
    started.types(&[1, b'b', command]);
    started.wait()
}

fn console(run: &Run) -> String {
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// Panics unless the kernel's own report names this memory and these CPUs.
#[track_caller]
fn has(run: &Run, memory_mib: u64, cpus: u64) {
    let console = console(run);
    // All but its first page, and the PC's hole below 1 MiB.
    let kib = memory_mib * 1024 - 4 - 388;
    assert!(console.contains(&format!("/{kib}K available")), "not {kib} KiB:\n{console}");
    let cpus = format!("Brought up 1 node, {cpus} CPU{}", if cpus == 1 { "" } else { "s" });
    assert!(console.contains(&cpus), "not: {cpus}\n{console}");
    assert!(run.figure("/host/vmm_overhead_bytes") > 0);
}

fn elf_64m_panics() {
    let run = sysrq(linux("small/vmlinux", idle()).args("--memory 64M"), b'c');
    run.expect(3);
    assert_eq!(run.outcome(), "panic");
    assert!(
        run.stderr.contains("umbra: the guest panicked: sysrq triggered crash"),
        "{}",
        run.tail()
    );
    let tail = run.stats["console_tail"].as_array().expect("the last lines");
    assert!(
        tail.iter().any(|line| line.as_str().is_some_and(|line| line.contains("Kernel panic"))),
        "{tail:?}"
    );
    has(&run, 64, 1);
}

fn elf_two_cpus_256m_reboots() {
    let run = sysrq(linux("small/vmlinux", idle()).args("--memory 256M --cpus 2"), b'b');
    run.expect(0);
    assert_eq!(run.outcome(), "reset");
    assert!(run.stats.get("console_tail").is_none());
    has(&run, 256, 2);
}

fn pvh_5g_switches_itself_off() {
    let run = sysrq(linux("small/vmlinux", idle()).args("--memory 5G --boot pvh"), b'o');
    run.expect(0);
    assert_eq!(run.outcome(), "power-off");
    has(&run, 5 * 1024, 1);
}

/// A kernel that looks at ACPI's tables only.
fn acpi_names_the_cpus_and_switches_off() {
    for (boot, cpus) in [("elf", 2), ("pvh", 1)] {
        let umbra = linux("acpi/vmlinux", idle())
            .args(&format!("--memory 64M --cpus {cpus} --boot {boot}"));
        has(&switched_off_by_acpi(umbra), 64, cpus);
    }
}

/// Boots a kernel, which finds its CPUs by ACPI, and switches it off from the keyboard. It has no
/// console any more when it is off, so its writes to the power management registers show that it
/// switched itself off.
#[track_caller]
fn switched_off_by_acpi(umbra: Umbra) -> Run {
    let mut started = with_keyboard(umbra);
    started.wait_for("stdout", INIT);
    // The first command shows no result: if its message interrupts another line, it waits for that,
    // and then level 0 hides it.
    started.types(&[1, b'b', b'0', 1, b'b', b'o']);
    let run = started.wait();
    run.expect(0);
    assert_eq!(run.outcome(), "power-off");
    let console = console(&run);
    assert!(
        console.contains("ACPI: Using ACPI (MADT) for SMP configuration information"),
        "{console}"
    );
    assert!(!console.contains("Power down"), "{console}");
    assert!(!console.contains("ACPI Error") && !console.contains("ACPI BIOS"), "{console}");
    run
}

/// Boots to the first program and ends the run from the keyboard.
fn boots(umbra: Umbra) -> Run {
    let mut started = with_keyboard(umbra);
    started.wait_for("stdout", INIT);
    started.types(&[1, b'x']);
    let run = started.wait();
    run.expect(130);
    run
}

fn elf_32m_boots() {
    has(&boots(linux("small/vmlinux", idle()).args("--memory 32M")), 32, 1);
}

/// Linux takes no more memory than it needs: it would make a page descriptor for each page.
fn of_64g_linux_is_told_and_the_host_keeps_them() {
    let umbra = linux("small/vmlinux", idle()).args("--memory 64G").arg("--cmdline=mem=64M");
    let run = boots(umbra);
    let console = console(&run);
    for range in ["0000000000100000-0x00000000bfffffff", "0000000100000000-0x000000103fffffff"] {
        assert!(
            console.contains(&format!("BIOS-e820: [mem 0x{range}] usable")),
            "no {range}:\n{console}"
        );
    }
    assert!(run.figure("/host/rss_peak_bytes") < 128 << 20, "{}", run.stats);
}

/// The slower clock of emulated guests is not KVM's.
fn the_clock_is_kvms_if_asked_for() {
    let umbra = linux("small/vmlinux", idle()).args("--memory 64M --cmdline clocksource=kvm-clock");
    let mut started = with_keyboard(umbra);
    started.wait_for("stdout", "kvm-clock: Using msrs 4b564d01 and 4b564d00");
    started.types(&[1, b'x']);
    started.wait().expect(130);
}

fn bzimage_128m_unpacks_itself() {
    let run = boots(linux("small/bzImage", idle()).args("--memory 128M --boot bzimage"));
    has(&run, 128, 1);
}

fn a_guest_that_never_ends_meets_the_time_limit() {
    let umbra = Umbra::new(PROGRAM, "run").arg(kernel("small/vmlinux"));
    let run = umbra
        .args("--shadow off --memory 64M --timeout 10s --initrd")
        .file(&initrd(&SPIN))
        .collect()
        .run();
    run.expect(4);
    assert_eq!(run.outcome(), "time-limit");
    let tail = run.stats["console_tail"].as_array().expect("the last lines");
    assert!(!tail.is_empty());
}

fn the_users_words_come_last_and_init_may_be_missing() {
    let umbra = Umbra::new(PROGRAM, "run").patience(LIMIT).arg(kernel("small/vmlinux"));
    let run = umbra
        .args("--shadow off --memory 64M --timeout 1500s")
        .arg("--cmdline=panic=-1 loglevel=5")
        .collect()
        .run();
    run.expect(3);
    assert!(run.stderr.contains("the guest panicked: No working init found"), "{}", run.tail());
    let console = console(&run);
    assert!(!console.contains("Linux version"), "loglevel=5 hides it: {console}");
}

/// As a user boots it, with two CPUs.
fn debians_kernel_reaches_its_first_program_and_switches_off() {
    let mut umbra = Umbra::new(PROGRAM, "run").patience(2 * LIMIT).arg(kernel("debian/bzImage"));
    umbra = umbra.args("--shadow off --memory 256M --cpus 2 --timeout 3000s");
    let run = switched_off_by_acpi(umbra.arg("--initrd").file(&initrd(idle())).collect());
    let console = console(&run);
    assert!(console.contains("Debian"), "{console}");
    assert!(console.contains("Brought up 1 node, 2 CPUs"), "{console}");
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let small = need("small/vmlinux");
    suite.add("elf_64m_panics", &small, elf_64m_panics);
    suite.add("elf_two_cpus_256m_reboots", &small, elf_two_cpus_256m_reboots);
    let others: [(&str, &str, fn()); 9] = [
        (
            "a_guest_that_never_ends_meets_the_time_limit",
            "small/vmlinux",
            a_guest_that_never_ends_meets_the_time_limit,
        ),
        ("elf_32m_boots", "small/vmlinux", elf_32m_boots),
        (
            "of_64g_linux_is_told_and_the_host_keeps_them",
            "small/vmlinux",
            of_64g_linux_is_told_and_the_host_keeps_them,
        ),
        ("the_clock_is_kvms_if_asked_for", "small/vmlinux", the_clock_is_kvms_if_asked_for),
        ("pvh_5g_switches_itself_off", "small/vmlinux", pvh_5g_switches_itself_off),
        (
            "acpi_names_the_cpus_and_switches_off",
            "acpi/vmlinux",
            acpi_names_the_cpus_and_switches_off,
        ),
        ("bzimage_128m_unpacks_itself", "small/bzImage", bzimage_128m_unpacks_itself),
        (
            "the_users_words_come_last_and_init_may_be_missing",
            "small/vmlinux",
            the_users_words_come_last_and_init_may_be_missing,
        ),
        (
            "debians_kernel_reaches_its_first_program_and_switches_off",
            "debian/bzImage",
            debians_kernel_reaches_its_first_program_and_switches_off,
        ),
    ];
    for (name, kernel, test) in others {
        suite.add(name, &need(kernel).and(&Need::prefer_nested()), test);
    }
    suite.run()
}
