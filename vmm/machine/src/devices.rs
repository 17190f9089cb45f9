//! The devices of a PC that a kernel needs: a serial port for its console, the date, reset, power
//! off, and QEMU's debug port that ends a run. Interrupt controllers and timers are KVM's. All
//! other ports read as all ones and ignore writes.

use std::collections::VecDeque;
use std::io::{self, Write};

use vm_memory::GuestAddress;
use vm_superio::{Serial, Trigger};

use super::IrqLine;
use super::rtc::{self, Rtc};

/// First port of COM1, the console; 8 ports.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt.
pub const COM1_IRQ: u32 = 4;
const COM1_LAST: u16 = COM1 + 7;
/// Its line status register.
const COM1_STATUS: u16 = COM1 + 5;
/// Keyboard controller: data, and command/status.
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
/// Its command that pulses the CPU's reset line.
const I8042_RESET: u8 = 0xfe;
/// Progress codes of firmware; kernels write here to wait about a microsecond.
const POST: u16 = 0x80;
/// ACPI power management events: two bytes of status, two that enable them. There are no events, so
/// neither has an effect.
pub const ACPI_PM1_EVENT: u16 = 0x600;
/// ACPI power management control, two bytes, as on QEMU's PC.
pub const ACPI_PM1_CONTROL: u16 = 0x604;
const ACPI_PM1_CONTROL_LAST: u16 = ACPI_PM1_CONTROL + 1;
/// A bit of its first byte: the kernel, and not firmware, manages power. Always set.
const ACPI_SCI_ENABLE: u8 = 1;
/// A bit of its second byte: go to sleep now. There is one sleep, which is off.
const ACPI_SLEEP_ENABLE: u8 = 1 << 5;
/// Reset control.
pub const RESET_CONTROL: u16 = 0xcf9;
/// Its bit that resets the CPU.
pub const RESET_CPU: u8 = 1 << 2;

/// QEMU's `isa-debug-exit`, where small kernels and their tests have it: a write ends the run, and
/// its value is the result.
pub const DEBUG_EXIT: u16 = 0xf4;

/// Most unknown accesses that are logged; the rest are only counted.
const LOGGED: u64 = 16;
/// Most typed bytes that are pending for the guest.
const TYPED_BYTES: usize = 4096;
/// A console line longer than this is written in pieces.
const LINE_BYTES: usize = 1024;

/// The effect of an access to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// Nothing.
    None,
    /// The guest reset the machine.
    Reset,
    /// The guest switched the machine off.
    PowerOff,
    /// The guest wrote to [`DEBUG_EXIT`].
    DebugExit {
        /// What it wrote.
        value: u32,
        /// It is the value that means success.
        success: bool,
    },
}

/// Collects a line before it is written, so that a console costs one write per line and not one per
/// byte.
struct LineWriter {
    out: Box<dyn Write + Send>,
    line: Vec<u8>,
    /// Bytes of `line` that were written before its end came.
    written: usize,
    /// The last line that has ended, until it is taken.
    ended: Option<Vec<u8>>,
    failed: bool,
}

impl LineWriter {
    fn write_out(&mut self) {
        let rest = self.line.get(self.written..).unwrap_or_default();
        if rest.is_empty() {
            return;
        }
        let result = self.out.write_all(rest).and_then(|()| self.out.flush());
        self.written = self.line.len();
        if let Err(e) = result
            && !self.failed
        {
            self.failed = true;
            log::warn!("the guest's console output is lost: {e}");
        }
    }
}

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.write_out();
                self.written = 0;
                self.ended = Some(std::mem::take(&mut self.line));
            }
        }
        Ok(bytes.len())
    }

    /// Does nothing: the serial port flushes after each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct SerialInterrupt(Option<IrqLine>);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), IrqLine::pulse)
    }
}

/// All devices of a machine.
pub struct Devices {
    serial: Serial<SerialInterrupt, vm_superio::serial::NoEvents, LineWriter>,
    /// Typed bytes, and maybe a break, that the port has no room for yet.
    typed: VecDeque<u8>,
    /// The next byte that the guest reads is a break: a zero with this bit in the status.
    /// vm-superio does not know breaks.
    break_next: bool,
    /// The values in the ACPI registers: enabled events, and control.
    power: [u8; 4],
    rtc: Rtc,
    /// The value at [`DEBUG_EXIT`] that means success; none if there is no such port.
    debug_exit: Option<u32>,
    ignored: u64,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").field("ignored", &self.ignored).finish_non_exhaustive()
    }
}

impl Devices {
    /// `console` gets what the guest writes to COM1, line by line. `irq` is COM1's interrupt line,
    /// if there is an interrupt controller.
    pub fn new(console: Box<dyn Write + Send>, irq: Option<IrqLine>) -> Self {
        let writer =
            LineWriter { out: console, line: Vec::new(), written: 0, ended: None, failed: false };
        Self {
            serial: Serial::new(SerialInterrupt(irq), writer),
            typed: VecDeque::new(),
            break_next: false,
            power: [0; 4],
            rtc: Rtc::default(),
            debug_exit: None,
            ignored: 0,
        }
    }

    /// Adds the port [`DEBUG_EXIT`], if there is a value that means `success`. Without it the port
    /// is like any that has no device.
    #[must_use]
    pub fn with_debug_exit(mut self, success: Option<u32>) -> Self {
        self.debug_exit = success;
        self
    }

    /// The guest wrote `data` (1 to 4 bytes) to `port`.
    pub fn io_out(&mut self, port: u16, data: &[u8]) -> DeviceEvent {
        let value = data.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        if let (DEBUG_EXIT, Some(success)) = (port, self.debug_exit) {
            let value = value as u32;
            return DeviceEvent::DebugExit { value, success: value == success };
        }
        match port {
            COM1..=COM1_LAST => {
                for &byte in data {
                    if let Err(e) = self.serial.write((port - COM1) as u8, byte) {
                        log::debug!("serial port: {e}");
                    }
                }
            }
            I8042_COMMAND if value as u8 == I8042_RESET => return DeviceEvent::Reset,
            ACPI_PM1_EVENT..=ACPI_PM1_CONTROL_LAST => return self.power_out(port, data),
            RESET_CONTROL if value as u8 & RESET_CPU != 0 => return DeviceEvent::Reset,
            rtc::INDEX => self.rtc.select(value as u8),
            I8042_COMMAND | I8042_DATA | POST | RESET_CONTROL | rtc::DATA => {}
            _ => self.unknown_port("write to", port),
        }
        DeviceEvent::None
    }

    /// The guest reads from `port`; fills `data` (1 to 4 bytes).
    pub fn io_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            COM1..=COM1_LAST => data.fill_with(|| self.serial_in(port)),
            // Nothing to read, ready for a command: kernels wait for this before they reset.
            I8042_COMMAND | I8042_DATA => data.fill(0),
            ACPI_PM1_EVENT..=ACPI_PM1_CONTROL_LAST => {
                for (port, byte) in (port..).zip(data) {
                    *byte = self.power_in(port);
                }
            }
            rtc::DATA => data.fill(self.rtc.read()),
            POST | rtc::INDEX => {}
            _ => self.unknown_port("read from", port),
        }
    }

    /// A write to the power management registers.
    fn power_out(&mut self, port: u16, data: &[u8]) -> DeviceEvent {
        for (port, byte) in (port..).zip(data) {
            match port {
                ACPI_PM1_CONTROL_LAST if byte & ACPI_SLEEP_ENABLE != 0 => {
                    return DeviceEvent::PowerOff;
                }
                // The status takes ones to clear bits, of which none is set.
                _ => {
                    if let Some(at) = port.checked_sub(ACPI_PM1_EVENT + 2)
                        && let Some(kept) = self.power.get_mut(usize::from(at))
                    {
                        *kept = *byte;
                    }
                }
            }
        }
        DeviceEvent::None
    }

    /// One byte of the power management registers.
    fn power_in(&self, port: u16) -> u8 {
        let [enable0, enable1, control0, control1] = self.power;
        match port.wrapping_sub(ACPI_PM1_EVENT) {
            2 => enable0,
            3 => enable1,
            4 => control0 | ACPI_SCI_ENABLE,
            5 => control1,
            _ => 0,
        }
    }

    /// The guest wrote to an address where nothing is.
    pub fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        if self.count() {
            log::warn!("ignored a guest write of {} bytes to {:#x}", data.len(), gpa.0);
        }
    }

    /// The guest reads from an address where nothing is; fills `data`.
    pub fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
        if self.count() {
            log::warn!("a guest read of {} bytes from {:#x} gave all ones", data.len(), gpa.0);
        }
    }

    fn serial_in(&mut self, port: u16) -> u8 {
        const BREAK: u8 = 1 << 4;
        const DIVISOR_LATCH: u8 = 1 << 7;
        let value = self.serial.read((port - COM1) as u8);
        match port {
            // On a real port a read of the status clears a break, so Linux loses a break that comes
            // while it prints a message. Here the break stays with its byte.
            COM1_STATUS if self.break_next => value | BREAK,
            COM1 => {
                self.break_next &= self.serial.state().line_control & DIVISOR_LATCH != 0;
                self.pass_on();
                value
            }
            _ => value,
        }
    }

    /// Gives typed bytes to the port as far as it has room, which interrupts the guest.
    fn pass_on(&mut self) {
        while self.serial.fifo_capacity() > 0
            && let Some(byte) = self.typed.front()
        {
            match self.serial.enqueue_raw_bytes(&[*byte]) {
                // In loopback mode the port takes nothing; later it may.
                Ok(0) => return,
                Ok(_) => drop(self.typed.pop_front()),
                Err(e) => {
                    log::debug!("serial port: {e}");
                    self.typed.pop_front();
                }
            }
        }
    }

    /// Queues typed bytes for the guest. False if too many are pending already.
    pub fn input(&mut self, byte: u8) -> bool {
        if self.typed.len() >= TYPED_BYTES || self.break_next {
            return false;
        }
        self.typed.push_back(byte);
        self.pass_on();
        true
    }

    /// Queues a break for the guest. False if bytes are still pending.
    pub fn input_break(&mut self) -> bool {
        const DATA_READY: u8 = 1;
        let idle =
            self.typed.is_empty() && self.serial.read((COM1_STATUS - COM1) as u8) & DATA_READY == 0;
        let sent = idle && self.input(0);
        self.break_next |= sent;
        sent
    }

    /// The last line that the guest has ended on its console, once, with its end.
    pub fn take_line(&mut self) -> Option<Vec<u8>> {
        self.serial.writer_mut().ended.take()
    }

    /// Writes out a console line that has no end yet. Call it before other output, and at the end.
    pub fn flush(&mut self) {
        self.serial.writer_mut().write_out();
    }

    fn unknown_port(&mut self, what: &str, port: u16) {
        if self.count() {
            log::debug!("ignored a guest {what} port {port:#x}");
        }
    }

    /// Counts an ignored access. Returns whether to log it.
    fn count(&mut self) -> bool {
        self.ignored += 1;
        if self.ignored == LOGGED {
            log::debug!("further ignored accesses are only counted");
        }
        self.ignored < LOGGED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn console_comes_out_by_lines() {
        let out = Shared::default();
        let mut devices = Devices::new(Box::new(out.clone()), None);
        for byte in b"one\ntw" {
            assert_eq!(devices.io_out(COM1, &[*byte]), DeviceEvent::None);
        }
        assert_eq!(*out.0.lock().unwrap(), b"one\n");
        assert_eq!(devices.take_line().as_deref(), Some(&b"one\n"[..]));
        devices.flush();
        assert_eq!(*out.0.lock().unwrap(), b"one\ntw");
        devices.flush();
        devices.io_out(COM1, b"o\n");
        assert_eq!(*out.0.lock().unwrap(), b"one\ntwo\n");
        assert_eq!(
            devices.take_line().as_deref(),
            Some(&b"two\n"[..]),
            "whole, though written in two pieces"
        );
        assert_eq!(devices.take_line(), None);
        let mut status = [0];
        devices.io_in(COM1 + 5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "transmitter ready");
        devices.io_out(COM1, &vec![b'x'; 3 * LINE_BYTES]);
        assert!(devices.serial.writer().line.len() < LINE_BYTES, "bounded");
    }

    #[test]
    fn input_waits_for_the_guest_and_is_bounded() {
        let mut devices = Devices::new(Box::new(io::sink()), None);
        let read = |devices: &mut Devices, port| {
            let mut byte = [0];
            devices.io_in(port, &mut byte);
            byte[0]
        };
        assert_eq!(read(&mut devices, COM1_STATUS) & 1, 0);
        let taken = (0..10_000u32).take_while(|i| devices.input(*i as u8)).count();
        assert!((TYPED_BYTES..TYPED_BYTES + 100).contains(&taken), "{taken}");
        assert!(!devices.input_break(), "not before the rest is read");
        for i in 0..taken {
            assert_eq!(read(&mut devices, COM1_STATUS) & 1, 1);
            assert_eq!(read(&mut devices, COM1), i as u8);
        }
        assert!(devices.input_break());
        assert!(!devices.input(b'c'), "the break is first");
        assert_eq!([(); 2].map(|()| read(&mut devices, COM1_STATUS) & 0x11), [0x11; 2]);
        devices.io_out(COM1 + 3, &[0x83]);
        read(&mut devices, COM1);
        devices.io_out(COM1 + 3, &[3]);
        assert_eq!(read(&mut devices, COM1_STATUS) & 0x11, 0x11, "that was the divisor");
        assert_eq!((read(&mut devices, COM1), read(&mut devices, COM1_STATUS) & 0x11), (0, 0));
        assert!(devices.input(b'c'));
        assert_eq!((read(&mut devices, COM1), read(&mut devices, COM1_STATUS) & 1), (b'c', 0));
    }

    #[test]
    fn resets() {
        let mut devices = Devices::new(Box::new(io::sink()), None);
        assert_eq!(devices.io_out(0x64, &[0xfe]), DeviceEvent::Reset);
        assert_eq!(devices.io_out(0x64, &[0xd1]), DeviceEvent::None);
        assert_eq!(devices.io_out(0x604, &[0x00, 0x20]), DeviceEvent::PowerOff);
        assert_eq!(devices.io_out(0x605, &[0x34]), DeviceEvent::PowerOff);
        assert_eq!(devices.io_out(0x602, &[0x20, 0x01, 0x01, 0x14]), DeviceEvent::None);
        let mut registers = [0; 4];
        devices.io_in(0x602, &mut registers);
        assert_eq!(registers, [0x20, 0x01, 0x01, 0x14], "events that are enabled, and control");
        devices.io_in(0x600, &mut registers[..2]);
        assert_eq!(registers[..2], [0, 0], "none has come");
        assert_eq!(devices.io_out(0x604, &[0x00, 0x00]), DeviceEvent::None);
        assert_eq!(devices.io_out(0xcf9, &[0x06]), DeviceEvent::Reset);
        assert_eq!(devices.io_out(0xcf9, &[0x02]), DeviceEvent::None);
        assert_eq!(devices.ignored, 0);
    }

    #[test]
    fn a_debug_exit_has_a_value_or_is_no_device() {
        let devices = || Devices::new(Box::new(io::sink()), None);
        let exit = |value, success| DeviceEvent::DebugExit { value, success };
        let mut with = devices().with_debug_exit(Some(0x10));
        assert_eq!(with.io_out(DEBUG_EXIT, &[0x10]), exit(0x10, true));
        assert_eq!(with.io_out(DEBUG_EXIT, &[0x10, 0, 0, 0]), exit(0x10, true));
        assert_eq!(with.io_out(DEBUG_EXIT, &[0x10, 0, 0, 1]), exit(0x100_0010, false));
        assert_eq!(with.io_out(DEBUG_EXIT, &[0]), exit(0, false));
        assert_eq!(with.io_out(DEBUG_EXIT + 1, &[0x10]), DeviceEvent::None);
        let mut without = devices().with_debug_exit(None);
        assert_eq!(without.io_out(DEBUG_EXIT, &[0x10]), DeviceEvent::None);
        assert_eq!((with.ignored, without.ignored), (1, 1));
    }

    #[test]
    fn unknown_accesses_are_counted() {
        let mut devices = Devices::new(Box::new(io::sink()), None);
        let mut data = [0; 4];
        for port in 0x1000..0x2000 {
            devices.io_in(port, &mut data);
        }
        assert_eq!(data, [0xff; 4]);
        assert_eq!(devices.ignored, 0x1000);
        devices.mmio_read(GuestAddress(0xfee0_0000), &mut data[..2]);
        assert_eq!(devices.ignored, 0x1001);
    }
}
