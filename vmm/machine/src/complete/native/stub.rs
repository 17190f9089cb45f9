//! Runs one instruction on the host's CPU, between the guest's registers and the host's.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::LazyLock;

use iced_x86::Register;
use kvm_bindings::kvm_regs;

use super::super::operand::{register_value, slot};
use super::super::state;
use super::class::{MAX_CODE, Registers};
use crate::vcpu::XsaveArea;

/// Bytes of the code area.
const AREA: usize = 16 << 10;
/// State components of `xsave`.
const SSE: u32 = 1 << 1;
const AVX: u32 = 1 << 2;
/// The opmask registers; bits 256 and up of zmm0 to zmm15, which instructions with a VEX prefix
/// clear; and zmm16 to zmm31.
const OPMASK: u32 = 1 << 5;
const ZMM_HIGH: u32 = 1 << 6;
const HIGH_ZMM: u32 = 1 << 7;
const AVX512: u32 = OPMASK | ZMM_HIGH | HIGH_ZMM;
/// Bytes of an `xsave` area with all of these, wherever CPUs have put AVX-512's.
const XSAVE: usize = 2816;
/// The status flags before an instruction, and the bit that is always one.
const START_FLAGS: u64 = super::RFLAGS_STATUS;
const FLAGS_FIXED: u64 = 2;

/// The components that this process can save and restore: bit and place of each, and all bits.
struct Components {
    all: u32,
    places: Vec<(u32, Range<usize>)>,
}

static COMPONENTS: LazyLock<Components> = LazyLock::new(|| {
    let mut found = Components { all: 0, places: Vec::new() };
    if !std::is_x86_feature_detected!("xsave") {
        return found;
    }
    // SAFETY: std found `xsave` enabled by the operating system.
    let enabled = unsafe { xcr0() } as u32;
    let at = |component: u32| {
        let leaf = __cpuid_count(0xd, component);
        leaf.ebx as usize..(leaf.ebx + leaf.eax) as usize
    };
    let mut add = |bit: u32, place: Range<usize>| {
        found.all |= bit;
        found.places.push((bit, place));
    };
    if enabled & SSE != 0 {
        add(SSE, state::XMM);
    }
    // Where the CPU has AVX-512, VEX instructions clear a part of it.
    let avx512 = [(OPMASK, 5, 64), (ZMM_HIGH, 6, 512), (HIGH_ZMM, 7, 1024)];
    let fits = |component, bytes| {
        let place: Range<usize> = at(component);
        place.len() == bytes && place.start >= state::AVX.end && place.end <= XSAVE
    };
    let none = enabled & AVX512 == 0;
    let all = enabled & AVX512 == AVX512
        && avx512.iter().all(|(_, component, bytes)| fits(*component, *bytes));
    if enabled & (SSE | AVX) == SSE | AVX && at(2) == state::AVX && (none || all) {
        add(AVX, state::AVX);
        if all {
            avx512.into_iter().for_each(|(bit, component, _)| add(bit, at(component)));
        }
    }
    found
});

/// # Safety
/// The CPU has `xsave`, and the operating system enabled it.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: register 0 is always there.
    unsafe { _xgetbv(0) }
}

/// Whether instructions can be run at all.
pub(super) fn is_possible() -> bool {
    COMPONENTS.all & SSE != 0
}

/// Whether these registers can be handled.
pub(super) fn has(registers: Registers) -> bool {
    let needed = match registers {
        Registers::Xmm => SSE,
        Registers::Ymm => SSE | AVX,
        Registers::Zmm => SSE | AVX | AVX512,
    };
    COMPONENTS.all & needed == needed
}

/// All state before and after an instruction.
#[repr(C, align(64))]
pub(super) struct Frame {
    guest: [u8; XSAVE],
    host: [u8; XSAVE],
    /// The memory operand, aligned for everything.
    pub memory: [u8; 64],
    /// In the encoding's order.
    registers: [u64; 16],
    /// The status flags.
    pub flags: u64,
    entry: *const u8,
    components: u32,
}

/// The general registers in the encoding's order.
const REGISTERS: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

impl Frame {
    /// The guest's general registers and flags, and an initial extended state.
    pub fn new(regs: kvm_regs, touched: Registers) -> Box<Self> {
        let components = match touched {
            Registers::Xmm => SSE,
            Registers::Ymm => SSE | AVX | ZMM_HIGH,
            Registers::Zmm => SSE | AVX | AVX512,
        };
        Box::new(Self {
            guest: [0; XSAVE],
            host: [0; XSAVE],
            memory: [0; 64],
            registers: REGISTERS.map(|r| register_value(&regs, r)),
            flags: regs.rflags & START_FLAGS | FLAGS_FIXED,
            entry: std::ptr::null(),
            components: components & COMPONENTS.all,
        })
    }

    /// Makes `register` point to the memory operand.
    pub fn set_pointer(&mut self, register: Register) {
        let address = (&raw const self.memory) as u64;
        if let Some(i) = REGISTERS.iter().position(|r| *r == register) {
            self.registers[i] = address;
        }
    }

    /// The general registers after the instruction, except the one that pointed to memory.
    pub fn take_registers(&self, regs: &mut kvm_regs, pointer: Register) {
        for (register, value) in REGISTERS.into_iter().zip(self.registers) {
            if register != Register::RSP
                && register != pointer
                && let Some(slot) = slot(regs, register)
            {
                *slot = value;
            }
        }
    }

    /// The components of this instruction: bit and range.
    fn parts(&self) -> impl Iterator<Item = (u32, Range<usize>)> + use<> {
        let components = self.components;
        COMPONENTS.places.iter().filter(move |(bit, _)| components & bit != 0).cloned()
    }

    /// Copies the guest's vector registers in. The copy is valid for `xrstor`, whatever `area`
    /// holds.
    pub fn load(&mut self, area: &XsaveArea) {
        for (_, part) in self.parts() {
            self.guest[part.clone()].copy_from_slice(&area.0[part]);
        }
        let there = state::xstate_bv(area) & u64::from(self.components);
        self.guest[state::XSTATE_BV].copy_from_slice(&there.to_le_bytes());
    }

    /// Copies them back.
    pub fn store(&self, area: &mut XsaveArea) {
        let components = u64::from(self.components);
        let header = state::xstate_bv(area) & !components | self.header() & components;
        for (_, part) in self.parts() {
            area.0[part.clone()].copy_from_slice(&self.guest[part]);
        }
        area.0[state::XSTATE_BV].copy_from_slice(&header.to_le_bytes());
        state::set_mxcsr(area, self.mxcsr());
    }

    /// Whether [`Frame::store`] would change anything.
    pub fn changed(&self, area: &XsaveArea) -> bool {
        let (before, after) = (state::xstate_bv(area), self.header());
        state::mxcsr(area) != self.mxcsr()
            || (before ^ after) & u64::from(self.components) != 0
            || self.parts().any(|(bit, part)| {
                after & u64::from(bit) != 0 && area.0[part.clone()] != self.guest[part]
            })
    }

    fn header(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.guest[state::XSTATE_BV]);
        u64::from_le_bytes(bytes)
    }

    /// MXCSR before or after the instruction.
    pub fn mxcsr(&self) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.guest[state::MXCSR]);
        u32::from_le_bytes(bytes)
    }

    pub fn set_mxcsr(&mut self, value: u32) {
        self.guest[state::MXCSR].copy_from_slice(&value.to_le_bytes());
    }
}

/// Host code: instructions, each followed by a `ret`. Its memory is mapped twice, once to write and
/// once to execute. Both are made at the start, so that a jail need allow no executable memory
/// later; no mapping is writable and executable.
#[derive(Debug)]
pub(super) struct Code {
    write: *mut u8,
    execute: *const u8,
    used: usize,
    known: HashMap<Vec<u8>, usize>,
}

// SAFETY: the memory belongs to this value alone, and only `&mut self` uses it.
unsafe impl Send for Code {}

impl Code {
    pub fn new() -> io::Result<Self> {
        // SAFETY: a string that ends with a zero, and a flag.
        let fd = unsafe { libc::memfd_create(c"umbra-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, which nobody else has. It is closed when the mappings are made.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(AREA as u64)?;
        let write = map(&file, libc::PROT_READ | libc::PROT_WRITE)?;
        match map(&file, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(execute) => Ok(Self { write, execute, used: 0, known: HashMap::new() }),
            Err(error) => {
                unmap(write);
                Err(error)
            }
        }
    }

    /// Executes one instruction, which [`super::class`] accepted.
    pub fn execute(&mut self, instruction: &[u8], frame: &mut Frame) -> io::Result<()> {
        let offset = match self.known.get(instruction) {
            Some(offset) => *offset,
            None => self.add(instruction)?,
        };
        // SAFETY: `offset` is inside the mapping.
        frame.entry = unsafe { self.execute.add(offset) };
        // SAFETY: at `entry` are an instruction that changes nothing but the registers in `frame`
        // and its memory operand, which is in `frame` as well, and raises no exception; and a
        // `ret`. The components are those that the CPU and the operating system have.
        unsafe { call(frame) };
        Ok(())
    }

    fn add(&mut self, instruction: &[u8]) -> io::Result<usize> {
        if instruction.len() >= MAX_CODE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.used + MAX_CODE > AREA {
            self.used = 0;
            self.known.clear();
        }
        let mut code = [0xc3; MAX_CODE]; // ret
        code[..instruction.len()].copy_from_slice(instruction);
        // SAFETY: inside the mapping. Nobody executes it while `self` is borrowed, and the jump to
        // it makes this CPU see the new code, though at another address (Intel SDM volume 3,
        // "Self-modifying code": after a serializing instruction).
        unsafe {
            self.write.add(self.used).copy_from_nonoverlapping(code.as_ptr(), MAX_CODE);
            __cpuid_count(0, 0);
        }
        let offset = self.used;
        self.used += MAX_CODE;
        self.known.insert(instruction.to_vec(), offset);
        Ok(offset)
    }
}

/// Maps the whole area.
fn map(file: &File, access: i32) -> io::Result<*mut u8> {
    // SAFETY: a new mapping, of nobody else's memory.
    let base = unsafe {
        let fd = file.as_raw_fd();
        libc::mmap(std::ptr::null_mut(), AREA, access, libc::MAP_SHARED, fd, 0)
    };
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base.cast()) }
}

fn unmap(base: *mut u8) {
    // SAFETY: the mapping is ours, and nothing points to it any more.
    unsafe { libc::munmap(base.cast(), AREA) };
}

impl Drop for Code {
    fn drop(&mut self) {
        unmap(self.write);
        unmap(self.execute.cast_mut());
    }
}

/// Loads the guest's registers, calls `frame.entry`, and stores them again.
///
/// # Safety
/// `entry` points to code that ends with `ret`, keeps the stack and raises no exception;
/// `components` can be saved and restored; `guest` is what `xrstor` accepts.
unsafe fn call(frame: &mut Frame) {
    // SAFETY: the caller's promise. All registers are outputs, or put back: rbx, rbp and rsp here,
    // and the vector registers and MXCSR from `host`. The header of `host` is zero but for what
    // `xsave` writes.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "mov eax, [rdi + {components}]",
            "xor edx, edx",
            "xsave64 [rdi + {host}]",
            "xrstor64 [rdi + {guest}]",
            "push rdi",
            "push qword ptr [rdi + {entry}]",
            "push qword ptr [rdi + {flags}]",
            "mov rax, [rdi + {registers}]",
            "mov rcx, [rdi + {registers} + 8]",
            "mov rdx, [rdi + {registers} + 16]",
            "mov rbx, [rdi + {registers} + 24]",
            "mov rbp, [rdi + {registers} + 40]",
            "mov rsi, [rdi + {registers} + 48]",
            "mov r8, [rdi + {registers} + 64]",
            "mov r9, [rdi + {registers} + 72]",
            "mov r10, [rdi + {registers} + 80]",
            "mov r11, [rdi + {registers} + 88]",
            "mov r12, [rdi + {registers} + 96]",
            "mov r13, [rdi + {registers} + 104]",
            "mov r14, [rdi + {registers} + 112]",
            "mov r15, [rdi + {registers} + 120]",
            "mov rdi, [rdi + {registers} + 56]",
            "popfq",
            "call [rsp]",
            // The entry's word on the stack is free now.
            "mov [rsp], rdi",
            "mov rdi, [rsp + 8]",
            "mov [rdi + {registers}], rax",
            "mov [rdi + {registers} + 8], rcx",
            "mov [rdi + {registers} + 16], rdx",
            "mov [rdi + {registers} + 24], rbx",
            "mov [rdi + {registers} + 40], rbp",
            "mov [rdi + {registers} + 48], rsi",
            "mov [rdi + {registers} + 64], r8",
            "mov [rdi + {registers} + 72], r9",
            "mov [rdi + {registers} + 80], r10",
            "mov [rdi + {registers} + 88], r11",
            "mov [rdi + {registers} + 96], r12",
            "mov [rdi + {registers} + 104], r13",
            "mov [rdi + {registers} + 112], r14",
            "mov [rdi + {registers} + 120], r15",
            "pushfq",
            "pop rax",
            "mov [rdi + {flags}], rax",
            "pop rax",
            "mov [rdi + {registers} + 56], rax",
            "pop rdi",
            "mov eax, [rdi + {components}]",
            "xor edx, edx",
            "xsave64 [rdi + {guest}]",
            "xrstor64 [rdi + {host}]",
            "pop rbp",
            "pop rbx",
            components = const offset_of!(Frame, components),
            host = const offset_of!(Frame, host),
            guest = const offset_of!(Frame, guest),
            registers = const offset_of!(Frame, registers),
            flags = const offset_of!(Frame, flags),
            entry = const offset_of!(Frame, entry),
            inout("rdi") &raw mut *frame => _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
            clobber_abi("sysv64"),
        );
    }
}

const _: () = assert!(offset_of!(Frame, host) % 64 == 0 && offset_of!(Frame, memory) % 64 == 0);
