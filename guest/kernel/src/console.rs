//! The serial console (COM1).

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use crate::cpu;

const COM1: u16 = 0x3f8;

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the ports used are the UART's and the reset port; neither touches memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// The console as a `fmt::Write`.
pub struct Console;

impl fmt::Write for Console {
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

/// Who prints at the moment: the CPU's number plus 1, or 0.
static PRINTING: AtomicUsize = AtomicUsize::new(0);

/// Prints a line. Those of several CPUs do not mix; one that comes while this CPU prints (in a
/// panic) is not held up.
pub fn print_line(line: fmt::Arguments) {
    let me = cpu::number() + 1;
    let nested = loop {
        match PRINTING.compare_exchange(0, me, Acquire, Relaxed) {
            Ok(_) => break false,
            Err(who) if who == me => break true,
            Err(_) => core::hint::spin_loop(),
        }
    };
    let _ = fmt::Write::write_fmt(&mut Console, format_args!("{line}\n"));
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
