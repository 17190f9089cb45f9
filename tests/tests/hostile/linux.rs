//! Guests that pass for Linux. They get interrupt controllers, a timer and a console with input,
//! and the VMM reads their console.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use umbra_tests::program::Umbra;

use super::guest::{Guest, RAM};
use super::{OVERHEAD, PROGRAM, quiet};

/// All tests of this file.
pub const ALL: &[(&str, fn())] = &[
    ("a_false_linux_halts_with_interrupts_off", halts),
    ("a_false_linux_panics_and_resets", panics_and_resets),
    ("a_false_linux_panics_and_stays", panics_and_stays),
    ("a_false_linux_switches_itself_off", switches_off),
    ("wild_power_management", wild_power_management),
    ("a_console_line_without_end", a_line_without_end),
    ("wild_serial_registers", wild_serial_registers),
    ("wild_interrupt_controllers_and_timers", wild_interrupt_controllers),
    ("input_that_nobody_reads", input_that_nobody_reads),
];

/// A guest with Linux's version line in its image.
fn linux(body: impl FnOnce(&mut Guest) -> Result<(), IcedError>) -> Guest {
    Guest::new(|g| {
        g.data(b"Linux version 6.6.6");
        body(g)
    })
}

/// Writes `text` to the console.
fn print(g: &mut Guest, text: &str) -> Result<(), IcedError> {
    let at = g.data(text.as_bytes());
    g.asm.mov(rsi, at)?;
    g.asm.mov(ecx, text.len() as u32)?;
    g.asm.mov(edx, 0x3f8)?;
    g.asm.rep().outsb()
}

/// `1: jmp 1b`.
fn spin(g: &mut Guest) -> Result<(), IcedError> {
    let mut here = g.asm.create_label();
    g.asm.set_label(&mut here)?;
    g.asm.jmp(here)
}

/// Writes `al` to a port for each of `values`.
fn out(g: &mut Guest, port: u32, values: &[u32]) -> Result<(), IcedError> {
    g.asm.mov(edx, port)?;
    for value in values {
        g.asm.mov(eax, *value)?;
        g.asm.out(dx, al)?;
    }
    Ok(())
}

fn halts() {
    let run = quiet(linux(|g| g.asm.cli().and_then(|()| g.asm.hlt())), "");
    run.expect(3);
    assert_eq!(run.outcome(), "halted-for-good");
    assert!(run.stderr.contains("halted with interrupts off, the first at"), "{}", run.stderr);
}

fn panics_and_resets() {
    let run = quiet(
        linux(|g| {
            print(g, "[    0.1] Kernel panic - not syncing: \x1b[31mfirst\u{202e}\u{200b}\n")?;
            print(g, "Kernel panic - not syncing: second\n")?;
            out(g, 0x64, &[0xfe])
        }),
        "",
    );
    run.expect(3);
    assert_eq!(run.outcome(), "panic");
    let shown = r"the guest panicked: \u{1b}[31mfirst\u{202e}\u{200b}";
    assert!(run.stderr.contains(shown), "{}", run.stderr);
}

fn panics_and_stays() {
    let text = "Kernel panic - not syncing: why\n---[ end Kernel panic - not syncing: why ]---\n";
    let run = quiet(linux(|g| print(g, text).and_then(|()| spin(g))), "");
    run.expect(3);
    assert_eq!(run.stats["console_tail"][0], "Kernel panic - not syncing: why");
}

fn switches_off() {
    let run = quiet(linux(|g| print(g, "reboot: Power down\r\n").and_then(|()| spin(g))), "");
    run.expect(0);
    assert_eq!(run.outcome(), "power-off");
}

/// Nonsense in ACPI's registers; then the value that switches off.
fn wild_power_management() {
    let run = quiet(
        linux(|g| {
            for port in 0x600..0x605 {
                out(g, port, &[0xff, 0x5a, 0, 0xff])?;
                g.asm.in_(eax, dx)?;
                // Four bytes, some of them in the next register or behind the last.
                g.asm.mov(eax, 0xdfdf_dfdfu32)?;
                g.asm.out(dx, eax)?;
            }
            out(g, 0x605, &[0xdf, 0])?;
            print(g, "still on\n")?;
            g.asm.mov(edx, 0x604)?;
            g.asm.mov(eax, 5 << 10 | 1 << 13)?;
            g.asm.out(dx, ax)?;
            spin(g)
        }),
        "",
    );
    run.expect(0);
    assert_eq!(run.outcome(), "power-off");
    assert_eq!(run.stdout, b"still on\n");
}

fn a_line_without_end() {
    const BYTES: u32 = 20_000;
    let run = quiet(
        linux(|g| {
            let at = g.data(&[b'x'; BYTES as usize]);
            g.asm.mov(rsi, at)?;
            g.asm.mov(ecx, BYTES)?;
            g.asm.mov(edx, 0x3f8)?;
            g.asm.rep().outsb()?;
            spin(g)
        }),
        "--timeout 3s",
    );
    run.expect(4);
    assert!(run.stdout.iter().all(|byte| *byte == b'x') && run.stdout.len() <= BYTES as usize);
    let tail = run.stats["console_tail"].to_string();
    assert!(tail.len() < 64 << 10, "{} bytes", tail.len());
}

/// All values in all registers of the serial port, with interrupts and loopback; then it still
/// works.
fn wild_serial_registers() {
    let run = quiet(
        linux(|g| {
            for port in [0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff] {
                let values: Vec<_> = (0..256).step_by(5).map(|value| (value * 7) & 0xff).collect();
                out(g, port, &values)?;
                g.asm.in_(al, dx)?;
            }
            // Through the loopback, more than it holds.
            out(g, 0x3fb, &[3])?;
            out(g, 0x3f9, &[0xf])?;
            out(g, 0x3fc, &[0x1f])?;
            out(g, 0x3f8, &[1; 100])?;
            out(g, 0x3fc, &[0])?;
            print(g, "still here\n")?;
            g.done()
        }),
        "",
    );
    run.expect(0);
    assert!(String::from_utf8_lossy(&run.stdout).contains("still here"), "{:?}", run.stdout);
}

/// Nonsense in the interrupt controllers and the timer, which are the host's.
fn wild_interrupt_controllers() {
    let run = quiet(
        linux(|g| {
            for port in [0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x4d0, 0x4d1] {
                out(g, port, &[0xff, 0, 0x11, 0x36, 0x80, 0x1f, 0xfe, 1])?;
                g.asm.in_(al, dx)?;
            }
            for (base, step) in [(0xfec0_0000u64, 0x10), (0xfee0_0000, 0x10)] {
                g.asm.mov(rbx, base)?;
                for register in 0..16 {
                    g.asm.mov(dword_ptr(rbx + register * step), 0xffff_ffffu32)?;
                    g.asm.mov(eax, dword_ptr(rbx + register * step))?;
                }
            }
            g.done()
        }),
        "",
    );
    run.expect(0);
}

fn input_that_nobody_reads() {
    let mut umbra =
        Umbra::new(PROGRAM, "run").file(&linux(spin).elf()).arg("--memory").arg(RAM.to_string());
    umbra = umbra.args("--timeout 3s").collect();
    umbra.command().stdin(Stdio::piped());
    let mut started = umbra.start();
    let mut stdin = started.stdin();
    let typist = std::thread::spawn(move || {
        let chunk = [b'k'; 4096];
        let mut written = 0;
        while stdin.write_all(&chunk).is_ok() {
            written += chunk.len();
        }
        written
    });
    let run = started.wait();
    let written = typist.join().expect("it ends with the pipe");
    run.expect(4);
    assert!(written < 1 << 20, "{written} bytes were taken");
    assert!(run.time < Duration::from_secs(20), "{:?}", run.time);
    assert!(run.figure("/host/rss_peak_bytes") < RAM + OVERHEAD);
}
