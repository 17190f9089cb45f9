//! The CPU of this machine, which executes one instruction with given registers and memory.
//!
//! Code and memory are at the same addresses as in the guest, so that the instruction needs no
//! change.

use std::arch::naked_asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::mem::offset_of;
use std::ops::Range;
use std::sync::LazyLock;

use kvm_bindings::kvm_regs;
use umbra::machine::vcpu::XsaveArea;

/// Where the instruction is.
pub const CODE: u64 = 0x10_0000;
/// The memory that it may use.
pub const DATA: Range<u64> = 0x20_0000..0x20_2000;
/// Bytes of [`DATA`].
pub const DATA_BYTES: usize = (DATA.end - DATA.start) as usize;
/// x87, SSE, AVX and AVX-512.
const COMPONENTS: u64 = 0xe7;
/// CF, PF, AF, ZF, SF and OF.
pub const STATUS_FLAGS: u64 = 0x8d5;

/// All state before and after the instruction.
#[repr(C, align(64))]
struct Frame {
    guest: XsaveArea,
    host: XsaveArea,
    after: XsaveArea,
    /// rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15.
    registers: [u64; 15],
    flags: u64,
    components: u64,
}

/// The state after an instruction.
pub struct After {
    pub registers: [u64; 15],
    /// The status flags.
    pub flags: u64,
    pub area: Box<XsaveArea>,
}

/// This machine's CPU, if it has all instructions that are completed in software, and if the
/// addresses are free.
pub struct HostCpu {
    /// The components that it saves.
    pub components: u64,
}

static CPU: LazyLock<Option<HostCpu>> = LazyLock::new(HostCpu::open);

/// The general registers but rsp, as [`Frame::registers`] has them.
pub fn registers(regs: &kvm_regs) -> [u64; 15] {
    let &kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, .. } = regs;
    let &kvm_regs { r11, r12, r13, r14, r15, .. } = regs;
    [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15]
}

/// The place of a component in an area of `xsave`.
pub fn component(number: u32) -> Range<usize> {
    if number == 1 {
        return 160..416;
    }
    let leaf = __cpuid_count(0xd, number);
    leaf.ebx as usize..(leaf.ebx + leaf.eax) as usize
}

impl HostCpu {
    /// The CPU; none if it cannot be compared with.
    pub fn get() -> Option<&'static Self> {
        CPU.as_ref()
    }

    fn open() -> Option<Self> {
        macro_rules! all {
            ($($name:tt),*) => { true $(&& std::is_x86_feature_detected!($name))* };
        }
        let has = all!("xsave", "avx2", "popcnt", "lzcnt", "bmi1", "bmi2", "adx", "sse4.2")
            && all!("movbe", "cmpxchg16b");
        if !has || !map(CODE..CODE + 4096, true) || !map(DATA, false) {
            return None;
        }
        #[target_feature(enable = "xsave")]
        unsafe fn enabled() -> u64 {
            // SAFETY: register 0 is always there.
            unsafe { _xgetbv(0) }
        }
        // SAFETY: the CPU has xsave, and the operating system enabled it.
        let components = unsafe { enabled() } & COMPONENTS;
        (component(7).end <= 4096).then_some(Self { components })
    }

    /// Executes `code`, of which all memory operands lie in [`DATA`]; that holds `memory` then, and
    /// afterwards what the instruction makes of it.
    ///
    /// # Safety
    /// The instruction changes only general registers but rsp, vector and mask registers, status
    /// flags, and memory in [`DATA`]; and it raises no exception.
    pub unsafe fn execute(
        &self,
        code: &[u8],
        registers: [u64; 15],
        flags: u64,
        area: &XsaveArea,
        memory: &mut [u8],
    ) -> After {
        let mut frame = Box::new(Frame {
            guest: *area,
            host: XsaveArea::default(),
            after: XsaveArea::default(),
            registers,
            flags: flags & STATUS_FLAGS | 2,
            components: self.components,
        });
        assert!(code.len() < 64 && memory.len() == DATA_BYTES);
        let at = std::ptr::with_exposed_provenance_mut::<u8>(DATA.start as usize);
        let code_at = std::ptr::with_exposed_provenance_mut::<u8>(CODE as usize);
        // SAFETY: both are mappings of this module's own, which nothing has a reference to. What
        // the instruction does is the caller's promise; it ends with a return.
        unsafe {
            code_at.copy_from_nonoverlapping(code.as_ptr(), code.len());
            code_at.add(code.len()).write(0xc3);
            at.copy_from_nonoverlapping(memory.as_ptr(), memory.len());
            enter(&raw mut *frame, CODE);
            memory.as_mut_ptr().copy_from_nonoverlapping(at, memory.len());
        }
        let flags = frame.flags & STATUS_FLAGS;
        After { registers: frame.registers, flags, area: Box::new(frame.after) }
    }

    /// The same extended state as the CPU itself writes it, so that two can be compared. Without
    /// the header, which may say of a component that it is as at reset, or not.
    pub fn normal(&self, area: &XsaveArea) -> Box<XsaveArea> {
        // SAFETY: no instruction but a return.
        let after = unsafe { self.execute(&[], [0; 15], 0, area, &mut [0; DATA_BYTES]) };
        let mut area = after.area;
        area.0[416..576].fill(0);
        area
    }
}

/// Maps memory at these addresses of this process.
fn map(at: Range<u64>, code: bool) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE | if code { libc::PROT_EXEC } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let (address, bytes) = (at.start as usize, (at.end - at.start) as usize);
    let address = std::ptr::without_provenance_mut(address);
    // SAFETY: new memory, where nothing is.
    let got = unsafe { libc::mmap(address, bytes, protection, flags, -1, 0) };
    // The addresses are used as numbers, by the instruction and here.
    got.expose_provenance() as u64 == at.start
}

/// Executes what is at `code`, and returns.
///
/// # Safety
/// As [`HostCpu::execute`] says, and the code ends with a return.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter(frame: *mut Frame, code: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rsi",
        "push rdi",
        "mov eax, [rdi + {components}]",
        "mov edx, [rdi + {components} + 4]",
        "xsave64 [rdi + {host}]",
        "xrstor64 [rdi + {guest}]",
        "push qword ptr [rdi + {flags}]",
        "popfq",
        "mov rax, [rdi + {registers}]",
        "mov rbx, [rdi + {registers} + 8]",
        "mov rcx, [rdi + {registers} + 16]",
        "mov rdx, [rdi + {registers} + 24]",
        "mov rsi, [rdi + {registers} + 32]",
        "mov rbp, [rdi + {registers} + 48]",
        "mov r8, [rdi + {registers} + 56]",
        "mov r9, [rdi + {registers} + 64]",
        "mov r10, [rdi + {registers} + 72]",
        "mov r11, [rdi + {registers} + 80]",
        "mov r12, [rdi + {registers} + 88]",
        "mov r13, [rdi + {registers} + 96]",
        "mov r14, [rdi + {registers} + 104]",
        "mov r15, [rdi + {registers} + 112]",
        "mov rdi, [rdi + {registers} + 40]",
        "call qword ptr [rsp + 8]",
        // The frame, and the guest's rdi in its place.
        "xchg rdi, [rsp]",
        "mov [rdi + {registers}], rax",
        "mov [rdi + {registers} + 8], rbx",
        "mov [rdi + {registers} + 16], rcx",
        "mov [rdi + {registers} + 24], rdx",
        "mov [rdi + {registers} + 32], rsi",
        "mov [rdi + {registers} + 48], rbp",
        "mov [rdi + {registers} + 56], r8",
        "mov [rdi + {registers} + 64], r9",
        "mov [rdi + {registers} + 72], r10",
        "mov [rdi + {registers} + 80], r11",
        "mov [rdi + {registers} + 88], r12",
        "mov [rdi + {registers} + 96], r13",
        "mov [rdi + {registers} + 104], r14",
        "mov [rdi + {registers} + 112], r15",
        "pop qword ptr [rdi + {registers} + 40]",
        "pushfq",
        "pop qword ptr [rdi + {flags}]",
        "mov eax, [rdi + {components}]",
        "mov edx, [rdi + {components} + 4]",
        "xsave64 [rdi + {after}]",
        "xrstor64 [rdi + {host}]",
        "pop rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        components = const offset_of!(Frame, components),
        host = const offset_of!(Frame, host),
        guest = const offset_of!(Frame, guest),
        after = const offset_of!(Frame, after),
        flags = const offset_of!(Frame, flags),
        registers = const offset_of!(Frame, registers),
    )
}
