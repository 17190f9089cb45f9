//! The serial console (COM1).

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use crate::cpu;
use crate::platform::out8;

const COM1: u16 = 0x3f8;

/// The serial port as a `fmt::Write`.
struct SerialPort;

impl fmt::Write for SerialPort {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                out8(COM1, b'\r');
            }
            out8(COM1, byte);
        }
        Ok(())
    }
}

/// The CPU that prints now, as its number plus 1; else 0.
static PRINTING: AtomicUsize = AtomicUsize::new(0);

/// Prints a line. Lines of several CPUs do not mix. A line that this CPU prints while it prints
/// another (in a panic) does not wait.
pub fn print_line(line: fmt::Arguments) {
    let me = cpu::number() + 1;
    let nested = loop {
        match PRINTING.compare_exchange(0, me, Acquire, Relaxed) {
            Ok(_) => break false,
            Err(cpu) if cpu == me => break true,
            Err(_) => core::hint::spin_loop(),
        }
    };
    let _ = fmt::Write::write_fmt(&mut SerialPort, format_args!("{line}\n"));
    if !nested {
        PRINTING.store(0, Release);
    }
}

/// Prints a line on the console.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {
        $crate::console::print_line(format_args!($($arg)*))
    };
}
