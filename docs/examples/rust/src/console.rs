//! The serial console.

use core::arch::asm;
use core::fmt;

/// The console as a `fmt::Write`.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the first serial port's data register.
            unsafe {
                asm!("out dx, al", in("dx") 0x3f8u16, in("al") byte, options(nomem, nostack));
            }
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(
            &mut $crate::console::Console,
            format_args!("{}\n", format_args!($($arg)*)),
        );
    }};
}
