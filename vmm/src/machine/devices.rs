//! The devices of a PC that a kernel cannot do without: a serial port for its console, and ways to reset.
//! Everything else reads as all ones and swallows writes.

use std::collections::BTreeMap;
use std::io::{self, Write};

use vm_memory::GuestAddress;
use vm_superio::{Serial, Trigger};

use super::IrqLine;

/// First port of COM1, the console; 8 ports.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt.
pub const COM1_IRQ: u32 = 4;
const COM1_LAST: u16 = COM1 + 7;
/// Keyboard controller: data, and command/status.
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
/// Its command that pulses the CPU's reset line.
const I8042_RESET: u8 = 0xfe;
/// Progress codes of firmware; kernels write here to wait about a microsecond.
const POST: u16 = 0x80;
/// ACPI power management control as on QEMU's PC; bit 13 means "go to sleep now".
const ACPI_PM1_CONTROL: u16 = 0x604;
const ACPI_SLEEP_ENABLE: u64 = 1 << 13;
/// Reset control; bit 2 resets the CPU.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u64 = 1 << 2;

/// How many unknown accesses are logged; the rest are only counted.
const LOGGED: u64 = 16;
/// How many different unknown ports are told apart.
const PORTS_COUNTED: usize = 64;
/// A console line longer than this is written in pieces.
const LINE_BYTES: usize = 1024;

/// What a device wants to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// Nothing.
    None,
    /// The guest reset itself, or switched itself off.
    Reset,
}

/// Collects a line before it is written, so that a console costs one write per line and not one per byte.
struct LineWriter {
    out: Box<dyn Write + Send>,
    line: Vec<u8>,
    failed: bool,
}

impl LineWriter {
    fn write_out(&mut self) {
        let result = self.out.write_all(&self.line).and_then(|()| self.out.flush());
        self.line.clear();
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
            }
        }
        Ok(bytes.len())
    }

    /// The serial port flushes after each byte: not what is wanted.
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
    ignored: u64,
    ports: BTreeMap<u16, u64>,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").field("ignored", &self.ignored).field("ports", &self.ports).finish()
    }
}

impl Devices {
    /// `console` gets what the guest writes to COM1, line by line. `irq` is COM1's interrupt line, if there is an
    /// interrupt controller.
    pub fn new(console: Box<dyn Write + Send>, irq: Option<IrqLine>) -> Self {
        let writer = LineWriter { out: console, line: Vec::new(), failed: false };
        Self { serial: Serial::new(SerialInterrupt(irq), writer), ignored: 0, ports: BTreeMap::new() }
    }

    /// The guest wrote `data` (1 to 4 bytes) to `port`.
    pub fn io_out(&mut self, port: u16, data: &[u8]) -> DeviceEvent {
        let value = data.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        match port {
            COM1..=COM1_LAST => {
                for &byte in data {
                    if let Err(e) = self.serial.write((port - COM1) as u8, byte) {
                        log::debug!("serial port: {e}");
                    }
                }
            }
            I8042_COMMAND if value as u8 == I8042_RESET => return DeviceEvent::Reset,
            ACPI_PM1_CONTROL if value & ACPI_SLEEP_ENABLE != 0 => return DeviceEvent::Reset,
            RESET_CONTROL if value & RESET_CPU != 0 => return DeviceEvent::Reset,
            I8042_COMMAND | I8042_DATA | POST | ACPI_PM1_CONTROL | RESET_CONTROL => {}
            _ => self.unknown_port("write to", port),
        }
        DeviceEvent::None
    }

    /// The guest reads from `port`; fills `data` (1 to 4 bytes).
    pub fn io_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            COM1..=COM1_LAST => data.fill_with(|| self.serial.read((port - COM1) as u8)),
            // Nothing to read, ready for a command: kernels wait for this before they reset.
            I8042_COMMAND | I8042_DATA => data.fill(0),
            POST => {}
            _ => self.unknown_port("read from", port),
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

    /// Writes out a console line that has no end yet. Call it before other output, and at the end.
    pub fn flush(&mut self) {
        self.serial.writer_mut().write_out();
    }

    /// How many accesses went nowhere.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// How often each unknown port was used (the first 64 different ones).
    pub fn unknown_ports(&self) -> &BTreeMap<u16, u64> {
        &self.ports
    }

    fn unknown_port(&mut self, what: &str, port: u16) {
        if self.ports.len() < PORTS_COUNTED || self.ports.contains_key(&port) {
            *self.ports.entry(port).or_default() += 1;
        }
        if self.count() {
            log::debug!("ignored a guest {what} port {port:#x}");
        }
    }

    /// Counts an ignored access; says whether to log it.
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
        devices.flush();
        assert_eq!(*out.0.lock().unwrap(), b"one\ntw");
        let mut status = [0];
        devices.io_in(COM1 + 5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "transmitter ready");
        devices.io_out(COM1, &vec![b'x'; 3 * LINE_BYTES]);
        assert!(devices.serial.writer().line.len() < LINE_BYTES, "bounded");
    }

    #[test]
    fn resets() {
        let mut devices = Devices::new(Box::new(io::sink()), None);
        assert_eq!(devices.io_out(0x64, &[0xfe]), DeviceEvent::Reset);
        assert_eq!(devices.io_out(0x64, &[0xd1]), DeviceEvent::None);
        assert_eq!(devices.io_out(0x604, &[0x00, 0x20]), DeviceEvent::Reset);
        assert_eq!(devices.io_out(0x604, &[0x00, 0x00]), DeviceEvent::None);
        assert_eq!(devices.io_out(0xcf9, &[0x06]), DeviceEvent::Reset);
        assert_eq!(devices.io_out(0xcf9, &[0x02]), DeviceEvent::None);
        assert_eq!(devices.ignored(), 0);
    }

    #[test]
    fn unknown_accesses_are_counted_within_bounds() {
        let mut devices = Devices::new(Box::new(io::sink()), None);
        let mut data = [0; 4];
        for port in 0x1000..0x2000 {
            devices.io_in(port, &mut data);
        }
        assert_eq!(data, [0xff; 4]);
        assert_eq!((devices.ignored(), devices.unknown_ports().len()), (0x1000, PORTS_COUNTED));
        devices.mmio_read(GuestAddress(0xfee0_0000), &mut data[..2]);
        assert_eq!(devices.ignored(), 0x1001);
    }
}
