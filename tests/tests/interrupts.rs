//! Kernels with timers and interrupts, assembled here: each kind of timer, the ends of a run that
//! depend on interrupts, and the debug port by which such kernels give their result.

use std::process::ExitCode;
use std::time::Duration;

use umbra_testkit::guest;
use umbra_tests::elf::ElfBuilder;
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
/// Where the code lies.
const BASE: u64 = 1 << 20;
/// Where the code finds its parameter.
const PARAMETER: u64 = 0x20_0000;
/// QEMU's status for the value of success.
const SUCCESS: &str = "value 0x10 (QEMU's exit status 33)";

/// Machine code that begins with an IDT. The vectors 2 and 0x20 to 0x3f lead to a handler that
/// counts at 0x300000 and acknowledges the interrupt to the old controller and the local APIC.
macro_rules! with_handler {
    ($($line:literal),+ $(,)?) => {
        guest!(
            "jmp 29f",
            "27: push rax",
            "inc qword ptr [0x300000]",
            "mov al, 0x20",
            "out 0x20, al",
            "mov eax, 0xfee000b0",
            "mov dword ptr [rax], 0",
            "pop rax",
            "iretq",
            "28: .short 0x3ff",
            ".quad 0x180000",
            "29: mov esp, 0x170000",
            "lea rax, [rip + 27b]",
            "mov rdx, rax",
            "shr rdx, 16",
            "mov edi, 0x180000",
            "xor ecx, ecx",
            "26: cmp ecx, 2",
            "je 25f",
            "cmp ecx, 0x20",
            "jb 24f",
            "25: mov word ptr [rdi], ax",
            "mov word ptr [rdi + 2], 0x10",
            "mov word ptr [rdi + 4], 0x8e00",
            "mov word ptr [rdi + 6], dx",
            "24: add edi, 16",
            "inc ecx",
            "cmp ecx, 0x40",
            "jb 26b",
            "lidt [rip + 28b]",
            $($line),+
        )
    };
}

/// A kernel of this code, which finds `parameter` in its memory.
fn kernel(code: &[u8], parameter: u32) -> Vec<u8> {
    ElfBuilder::new(BASE).segment(BASE, code).segment(PARAMETER, parameter.to_le_bytes()).build()
}

/// `umbra run` with it.
fn umbra(code: &[u8], parameter: u32, args: &str) -> Umbra {
    Umbra::new(PROGRAM, "run").file(&kernel(code, parameter)).args("--memory 16M").args(args)
}

fn run(code: &[u8], parameter: u32, args: &str) -> Run {
    umbra(code, parameter, args).collect().run()
}

/// Runs a kernel that ends by the debug port, and writes 0x10 if all was well.
#[track_caller]
fn succeeds(code: &[u8], parameter: u32) {
    let run = run(code, parameter, "--timeout 90s");
    assert!(run.stderr.contains(SUCCESS), "{}", run.tail());
    run.expect(0);
    assert_eq!(run.outcome(), "debug-exit");
}

/// Waits 10 ms for channel 2, whose output is bit 5 of port 0x61, as kernels do that calibrate
/// with it. Between two polls it waits for as many rounds as its parameter says.
fn channel_2() {
    let code = guest!(
        "mov r9d, [0x200000]",
        "in al, 0x61",
        "and al, 0xfc",
        "out 0x61, al", // gate off
        "mov al, 0xb0", // channel 2, both bytes, mode 0
        "out 0x43, al",
        "rdtsc",
        "shl rdx, 32",
        "lea rbx, [rax + rdx]",
        "mov al, 0x9b", // 11931 of 1193182 Hz
        "out 0x42, al",
        "mov al, 0x2e",
        "out 0x42, al",
        "in al, 0x61",
        "or al, 1",
        "out 0x61, al",
        "2: mov ecx, r9d",
        "3: dec ecx",
        "jnz 3b",
        "in al, 0x61",
        "test al, 0x20",
        "jz 2b",
        "rdtsc",
        "shl rdx, 32",
        "add rax, rdx",
        "sub rax, rbx",
        "cmp rax, 1000000", // a counter of at least 100 MHz
        "jb 9f",
        "mov al, 0x10",
        "out 0xf4, al",
        "9: mov al, 0x20",
        "out 0xf4, al",
    );
    for rounds in [1, 300, 100_000] {
        succeeds(code, rounds);
    }
}

/// Reads channel 0's counter over a whole period, in the mode that its parameter sets.
fn channel_0() {
    let code = guest!(
        "mov al, [0x200000]",
        "out 0x43, al",
        "xor eax, eax", // 65536
        "out 0x40, al",
        "out 0x40, al",
        "mov r8d, 0x8000", // first below the middle, then above it, then below again
        "xor r9d, r9d",
        "2: xor eax, eax", // latch channel 0
        "out 0x43, al",
        "in al, 0x40",
        "mov bl, al",
        "in al, 0x40",
        "mov bh, al",
        "movzx ebx, bx",
        "cmp ebx, r8d",
        "setae al",
        "movzx eax, al",
        "mov ecx, r9d",
        "and ecx, 1",
        "cmp eax, ecx",
        "jne 2b",
        "inc r9d",
        "cmp r9d, 5",
        "jb 2b",
        "mov al, 0x10",
        "out 0xf4, al",
    );
    for mode in [0x34, 0x36] {
        succeeds(code, mode);
    }
}

/// Three interrupts of the local APIC's timer, each at a value of the time-stamp counter.
fn deadline() {
    let code = with_handler!(
        "mov eax, 1",
        "cpuid",
        "bt ecx, 24", // the timer is offered
        "jnc 9f",
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x320], 0x40030", // deadline mode, vector 0x30
        "2: rdtsc",
        "add eax, 10000000",
        "adc edx, 0",
        "mov ecx, 0x6e0",
        "wrmsr",
        "mov rsi, [0x300000]",
        "3: sti",
        "hlt",
        "cli",
        "cmp rsi, [0x300000]",
        "je 3b",
        "cmp qword ptr [0x300000], 3",
        "jb 2b",
        "mov al, 0x10",
        "out 0xf4, al",
        "9: mov al, 0x20",
        "out 0xf4, al",
    );
    succeeds(code, 0);
}

/// Five ticks of 100 Hz through the old interrupt controllers.
fn ticks_through_the_pic() {
    let code = with_handler!(
        "mov al, 0x11",
        "out 0x20, al",
        "out 0xa0, al",
        "mov al, 0x20",
        "out 0x21, al",
        "mov al, 0x28",
        "out 0xa1, al",
        "mov al, 4",
        "out 0x21, al",
        "mov al, 2",
        "out 0xa1, al",
        "mov al, 1",
        "out 0x21, al",
        "out 0xa1, al",
        "mov al, 0xfe", // only the timer
        "out 0x21, al",
        "mov al, 0xff",
        "out 0xa1, al",
        "mov al, 0x34",
        "out 0x43, al",
        "mov al, 0x9c",
        "out 0x40, al",
        "mov al, 0x2e",
        "out 0x40, al",
        "2: sti",
        "hlt",
        "cli",
        "cmp qword ptr [0x300000], 5",
        "jb 2b",
        "mov al, 0x10",
        "out 0xf4, al",
    );
    succeeds(code, 0);
}

/// Code that waits for twenty ticks through pin 2 of the I/O APIC, after some more code.
macro_rules! io_apic_ticks {
    ($($first:literal,)*) => {
        with_handler!(
            "mov al, 0xff",
            "out 0x21, al",
            "out 0xa1, al",
            $($first,)*
            "mov ebx, 0xfec00000",
            "mov dword ptr [rbx], 0x15",
            "mov dword ptr [rbx + 0x10], 0",
            "mov dword ptr [rbx], 0x14",
            "mov dword ptr [rbx + 0x10], 0x30",
            "mov al, 0x34",
            "out 0x43, al",
            "mov eax, [0x200000]",
            "out 0x40, al",
            "mov al, ah",
            "out 0x40, al",
            "2: sti",
            "hlt",
            "cli",
            "cmp qword ptr [0x300000], 20",
            "jb 2b",
            "mov al, 0x10",
            "out 0xf4, al",
        )
    };
}

/// Twenty ticks, 100 in a second, then 500.
fn ticks_through_the_io_apic() {
    let code = io_apic_ticks!("mov ebx, 0xfee00000", "mov dword ptr [rbx + 0xf0], 0x1ff",);
    for divisor in [11932, 2386] {
        succeeds(code, divisor);
    }
}

/// The local APIC takes interrupts from the start, as firmware leaves it: a kernel calibrates by
/// ticks through the I/O APIC before it sets up the local one.
fn ticks_before_the_local_apic_is_set_up() {
    succeeds(io_apic_ticks!(), 11932);
}

/// 500 ticks in a second, while interrupts are off for 200 ms. In the 50 ms after that come those
/// of this time, and not those that are late.
fn late_ticks_are_dropped() {
    let code = with_handler!(
        "jmp 6f",
        "4: in al, 0x61", // waits 50 ms for channel 2
        "and al, 0xfc",
        "out 0x61, al",
        "mov al, 0xb0",
        "out 0x43, al",
        "mov eax, 59659",
        "out 0x42, al",
        "mov al, ah",
        "out 0x42, al",
        "in al, 0x61",
        "or al, 1",
        "out 0x61, al",
        "5: in al, 0x61",
        "test al, 0x20",
        "jz 5b",
        "ret",
        "6: mov al, 0xff",
        "out 0x21, al",
        "out 0xa1, al",
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov ebx, 0xfec00000",
        "mov dword ptr [rbx], 0x14",
        "mov dword ptr [rbx + 0x10], 0x30",
        "mov al, 0x34",
        "out 0x43, al",
        "mov eax, 2386",
        "out 0x40, al",
        "mov al, ah",
        "out 0x40, al",
        "sti",
        "hlt",
        "cli",
        "call 4b",
        "call 4b",
        "call 4b",
        "call 4b",
        "mov rsi, [0x300000]",
        "sti",
        "call 4b",
        "cli",
        "mov rax, [0x300000]",
        "sub rax, rsi",
        "cmp rax, 40",
        "ja 9f",
        "test eax, eax",
        "jz 9f",
        "mov al, 0x10",
        "out 0xf4, al",
        "9: mov al, 0x20",
        "out 0xf4, al",
    );
    succeeds(code, 0);
}

/// The timer ticks, but the only CPU has interrupts off.
fn ticks_do_not_wake_a_cpu_with_interrupts_off() {
    let code = with_handler!(
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov ebx, 0xfec00000",
        "mov dword ptr [rbx], 0x14",
        "mov dword ptr [rbx + 0x10], 0x30",
        "mov al, 0x34",
        "out 0x43, al",
        "mov al, 0x9c",
        "out 0x40, al",
        "mov al, 0x2e",
        "out 0x40, al",
        "cli",
        "hlt",
        "mov al, 0x10",
        "out 0xf4, al",
    );
    let run = run(code, 0, "--timeout 60s");
    run.expect(0);
    assert_eq!(run.outcome(), "halted");
}

/// A watchdog: the timer's ticks are non-maskable interrupts, and the CPU waits for 30 of them with
/// interrupts off, for longer than it takes to see that a guest has halted for good.
fn nmi_wakes_a_cpu_with_interrupts_off() {
    let code = with_handler!(
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x350], 0x400", // local input 0: NMI
        "mov al, 0x34",
        "out 0x43, al",
        "xor eax, eax", // 18 Hz
        "out 0x40, al",
        "out 0x40, al",
        "cli",
        "2: hlt",
        "cmp qword ptr [0x300000], 30",
        "jb 2b",
        "mov al, 0x10",
        "out 0xf4, al",
    );
    succeeds(code, 0);
}

/// With interrupts off nothing can follow.
fn cli_hlt_ends_the_run() {
    let cli_hlt = guest!("sti", "nop", "cli", "hlt");
    for args in ["", "--irqchip off", "--cpus 2"] {
        let run = run(cli_hlt, 0, &format!("--timeout 60s {args}"));
        run.expect(0);
        assert_eq!(run.outcome(), "halted");
        assert!(run.time < Duration::from_secs(10), "{:?}", run.time);
    }
}

/// With interrupts on the guest waits for one, until the time limit; without controllers none can
/// come.
fn sti_hlt_waits() {
    let sti_hlt = guest!("2: sti", "hlt", "jmp 2b");
    let waits = run(sti_hlt, 0, "--timeout 1500ms");
    waits.expect(4);
    assert_eq!(waits.outcome(), "time-limit");
    assert!(waits.time < Duration::from_secs(10), "{:?}", waits.time);
    let ends = run(sti_hlt, 0, "--irqchip off --timeout 60s");
    ends.expect(0);
    assert_eq!(ends.outcome(), "halted");
}

/// Ctrl-C ends a guest that waits.
fn ctrl_c_ends_a_waiting_guest() {
    let code = guest!(
        "mov edx, 0x3f8",
        "mov al, 0x57",
        "out dx, al",
        "mov al, 0x0a",
        "out dx, al",
        "2: sti",
        "hlt",
        "jmp 2b",
    );
    let mut started = umbra(code, 0, "--timeout none").start();
    started.wait_for("stdout", "W");
    started.signal(libc::SIGINT);
    let run = started.wait();
    run.expect(130);
    assert!(!run.stderr.contains("left behind"), "{}", run.stderr);
}

/// Both timers at their highest rates, with handlers that do nothing else than come again, and
/// writes to all ports between: the time limit is kept.
fn timers_at_their_highest_rate() {
    let code = with_handler!(
        "mov al, 0xff",
        "out 0x21, al",
        "out 0xa1, al",
        "mov al, 0x34",
        "out 0x43, al",
        "mov al, 1",
        "out 0x40, al",
        "xor eax, eax",
        "out 0x40, al",
        "mov ebx, 0xfec00000",
        "mov dword ptr [rbx], 0x14",
        "mov dword ptr [rbx + 0x10], 0x31",
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x3e0], 0xb",     // no divider
        "mov dword ptr [rbx + 0x320], 0x20030", // periodic
        "mov dword ptr [rbx + 0x380], 1",
        "sti",
        "xor edx, edx",
        // All but those that would end the run, or move interrupts to vectors without a handler.
        "2: inc edx",
        "mov eax, edx",
        "and ax, 0xff7e",
        "cmp ax, 0x20",
        "je 2b",
        "cmp dx, 0xf4",
        "je 2b",
        "cmp dx, 0x64",
        "je 2b",
        "cmp dx, 0xcf9",
        "je 2b",
        "cmp dx, 0xb5e",
        "je 2b",
        "cmp dx, 0x605",
        "je 2b",
        "cmp dx, 0x604",
        "je 2b",
        "mov al, 0x11",
        "out dx, al",
        "jmp 2b",
    );
    let run = run(code, 0, "--timeout 3s");
    run.expect(4);
    assert!(run.time < Duration::from_secs(20), "{:?}", run.time);
    assert!(run.stderr.len() < 64 << 10, "{} bytes", run.stderr.len());
}

/// One CPU finds ACPI's tables, too.
fn acpi_with_one_cpu() {
    let code = guest!(
        "mov rbx, [rsi + 0x70]", // boot_params: the root pointer
        "mov rax, 0x2052545020445352",
        "cmp rax, [rbx]",
        "mov al, 0x10",
        "je 2f",
        "mov al, 0x20",
        "2: out 0xf4, al",
    );
    succeeds(code, 0);
}

fn debug_exits() {
    let code = guest!("mov eax, [0x200000]", "out 0xf4, eax", "cli", "hlt");
    for (value, args, status, outcome) in [
        (0x10, "", 0, "debug-exit"),
        (0x11, "", 3, "debug-exit"),
        (0, "", 3, "debug-exit"),
        (0x11, "--debug-exit 0x11", 0, "debug-exit"),
        (0x10, "--debug-exit 17", 3, "debug-exit"),
        (0x0100_0010, "--debug-exit auto", 3, "debug-exit"),
        (0x11, "--debug-exit off", 0, "halted"),
        (0x10, "--require-checks", 5, "debug-exit"),
    ] {
        let run = run(code, value, args);
        run.expect(status);
        assert_eq!(run.outcome(), outcome, "{value:#x} {args}");
    }
    let failed = run(code, 0x20, "");
    let text = "exited by its debug port with value 0x20 (QEMU's exit status 65): --debug-exit";
    assert!(failed.stderr.contains(text), "{}", failed.stderr);
}

/// Linux's panic counts, and not what it writes to a port that may be another device's.
fn linux_has_no_debug_exit() {
    let code = guest!(
        "mov al, 0x20",
        "out 0xf4, al",
        "mov al, 0xfe",
        "out 0x64, al",
        ".ascii \"Linux version 6.6.6\"",
    );
    let reset = run(code, 0, "");
    reset.expect(0);
    assert_eq!(reset.outcome(), "reset");
    let asked = run(code, 0, "--debug-exit 0x10");
    asked.expect(3);
    assert_eq!(asked.outcome(), "debug-exit");
    umbra(code, 0, "--irqchip off").run().expect_refusal(&["Linux needs interrupt controllers"]);
}

fn several_cpus_need_interrupt_controllers() {
    let run = umbra(guest!("hlt"), 0, "--cpus 2 --irqchip off").run();
    run.expect_refusal(&["2 CPUs", "needs interrupt controllers"]);
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let kvm = Need::kvm();
    let tests: [(&str, fn()); 17] = [
        ("channel_2_of_the_timer", channel_2),
        ("channel_0_of_the_timer", channel_0),
        ("deadlines_of_the_time_stamp_counter", deadline),
        ("ticks_through_the_pic", ticks_through_the_pic),
        ("ticks_through_the_io_apic", ticks_through_the_io_apic),
        ("ticks_before_the_local_apic_is_set_up", ticks_before_the_local_apic_is_set_up),
        ("late_ticks_are_dropped", late_ticks_are_dropped),
        (
            "ticks_do_not_wake_a_cpu_with_interrupts_off",
            ticks_do_not_wake_a_cpu_with_interrupts_off,
        ),
        ("nmi_wakes_a_cpu_with_interrupts_off", nmi_wakes_a_cpu_with_interrupts_off),
        ("cli_hlt_ends_the_run", cli_hlt_ends_the_run),
        ("sti_hlt_waits", sti_hlt_waits),
        ("ctrl_c_ends_a_waiting_guest", ctrl_c_ends_a_waiting_guest),
        ("timers_at_their_highest_rate", timers_at_their_highest_rate),
        ("acpi_with_one_cpu", acpi_with_one_cpu),
        ("debug_exits", debug_exits),
        ("linux_has_no_debug_exit", linux_has_no_debug_exit),
        ("several_cpus_need_interrupt_controllers", several_cpus_need_interrupt_controllers),
    ];
    for (name, test) in tests {
        suite.add(name, &kvm, test);
    }
    suite.run()
}
