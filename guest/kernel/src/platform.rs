//! The machine: whether it is Umbra's, I/O ports, reset.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

static ON_UMBRA: AtomicBool = AtomicBool::new(false);

/// Notes whether Umbra is underneath.
pub fn set_on_umbra(on_umbra: bool) {
    ON_UMBRA.store(on_umbra, Relaxed);
}

/// Whether Umbra is underneath, so that its exit calls exist.
pub fn on_umbra() -> bool {
    ON_UMBRA.load(Relaxed)
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the ports used are the UART's and the reset port; neither touches memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Resets the machine through the keyboard controller. The kernel ends so where there is no Umbra.
pub fn reset() -> ! {
    out8(0x64, 0xfe);
    loop {
        // SAFETY: stops this CPU.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
