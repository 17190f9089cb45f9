//! Exits that no KVM made, of all kinds, and the instructions that are completed for a guest.

use arbitrary::{Arbitrary, Unstructured};
use umbra::machine::vcpu::{Data, VmExit};
use umbra_shadow::abi::PORT;
use vm_memory::GuestAddress;

use crate::guest::{Bytes, Number, Step, World};
use crate::show;

/// Ports with something behind them, and their neighbours.
const PORTS: [u16; 16] = [
    PORT,
    PORT + 1,
    0x3f8,
    0x3f9,
    0x3fb,
    0x3fd,
    0x3ff,
    0x60,
    0x64,
    0x70,
    0x71,
    0xcf9,
    0x604,
    0xf4,
    0x80,
    0xffff,
];

/// An exit.
#[derive(Clone, Debug, Arbitrary)]
enum Exit {
    /// What any guest does between its exits, and hypercalls.
    Step(Step),
    In {
        port: u8,
        len: u8,
    },
    Out {
        port: u8,
        bytes: [u8; 8],
        len: u8,
    },
    AnyPort {
        port: u16,
        bytes: [u8; 4],
        len: u8,
        out: bool,
    },
    Print(Text),
    Read {
        at: Number,
        len: u8,
    },
    Write {
        at: Number,
        bytes: [u8; 8],
        len: u8,
    },
    Fault {
        at: Number,
        size: Number,
        flags: u64,
    },
    Instruction {
        bytes: [u8; 15],
        len: u8,
        at: Number,
    },
    Plain {
        which: u8,
        value: u32,
    },
}

/// Lines of a console.
#[derive(Clone, Debug, Arbitrary)]
enum Text {
    Any(Bytes),
    Line(u8, u8),
}

/// What Linux prints when it ends.
const LINES: [&str; 8] = [
    "[    1.0] Kernel panic - not syncing: ",
    "---[ end Kernel panic - not syncing: ",
    "reboot: Power down",
    "reboot: System halted",
    "Oops: 0002 [#1] PREEMPT SMP",
    "BUG: kernel NULL pointer dereference",
    "\x1b[31m\u{202e}",
    "RIP: 0010:",
];

/// Runs the guest that the bytes describe: each exit takes some of them.
pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(mut world) = World::new(&mut u) else { return };
    while !u.is_empty() {
        let Ok(exit) = Exit::arbitrary(&mut u) else { break };
        show(&exit);
        if !one(&mut world, exit) {
            break;
        }
    }
    world.finish();
}

/// Makes an exit. False if the run ended.
fn one(world: &mut World, exit: Exit) -> bool {
    let port = |number: u8| PORTS[usize::from(number) % PORTS.len()];
    let gpa = |world: &World, at: Number| GuestAddress(world.value(at));
    let exit = match exit {
        Exit::Step(step) => return world.step(&step),
        Exit::Print(text) => return print(world, &text),
        Exit::In { port: number, len } => VmExit::IoIn { port: port(number), len },
        Exit::Out { port: number, bytes, len } => {
            let data = Data::new(&bytes[..usize::from(len) % 9]);
            VmExit::IoOut { port: port(number), data }
        }
        Exit::AnyPort { port, len, out: false, .. } => VmExit::IoIn { port, len },
        Exit::AnyPort { port, bytes, len, .. } => {
            VmExit::IoOut { port, data: Data::new(&bytes[..usize::from(len) % 5]) }
        }
        Exit::Read { at, len } => VmExit::MmioRead { gpa: gpa(world, at), len },
        Exit::Write { at, bytes, len } => {
            let data = Data::new(&bytes[..usize::from(len) % 9]);
            VmExit::MmioWrite { gpa: gpa(world, at), data }
        }
        Exit::Fault { at, size, flags } => {
            let (gpa, size) = (gpa(world, at), world.value(size));
            VmExit::MemoryFault { gpa, size, flags }
        }
        Exit::Instruction { bytes, len, at } => {
            (world.cpu.regs.rbx, world.cpu.regs.rdi) = (world.value(at), world.value(at));
            VmExit::EmulationFailed { bytes, len }
        }
        Exit::Plain { which, value } => plain(which, value),
    };
    world.exit(exit)
}

fn plain(which: u8, value: u32) -> VmExit {
    match which % 9 {
        0 => VmExit::Hlt,
        1 => VmExit::Shutdown,
        2 => VmExit::SystemEvent { kind: value },
        3 => VmExit::FailEntry { reason: value.into() },
        4 => VmExit::InternalError { suberror: value },
        5 => VmExit::Unsupported { reason: value },
        6 => VmExit::SystemManagement,
        7 => VmExit::TaskPriority,
        _ => VmExit::Interrupted,
    }
}

/// Prints a line on the console.
fn print(world: &mut World, text: &Text) -> bool {
    let bytes = match text {
        Text::Any(bytes) => bytes.as_slice().to_vec(),
        Text::Line(which, byte) => {
            let line = LINES[usize::from(*which) % LINES.len()];
            [line.as_bytes(), &[*byte, b'\n']].concat()
        }
    };
    bytes.iter().all(|byte| world.exit(VmExit::IoOut { port: 0x3f8, data: Data::new(&[*byte]) }))
}
