//! CPU exceptions: their entry points and their handler. Most end the run through the exit call.

use core::arch::{asm, global_asm};

use umbra_guest::Trap;

use crate::cpu::VECTORS;
use crate::platform::{on_umbra, reset};
use crate::{apic, nmi, println, thread};

const NMI: u64 = 2;
const PAGE_FAULT: u64 = 14;
/// The vectors that push an error code: 8, 10 to 14, 17 and 21 (Intel SDM volume 3, table 6-1).
const WITH_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21;

global_asm!(
    ".macro fault_stub vector",
    ".balign 16",
    ".if (({with_error_code} >> \\vector) & 1) == 0",
    "push 0",
    ".endif",
    "push \\vector",
    "jmp fault_common",
    ".endm",
    ".balign 16",
    "fault_stubs:",
    ".irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "fault_stub \\vector",
    ".endr",
    ".irp vector, 16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "fault_stub \\vector",
    ".endr",
    // The wake-up interrupt only ends the `hlt`; the handler just signals the end of interrupt.
    ".balign 16",
    "push rax",
    "movabs rax, {end_of_interrupt}",
    "jmp wake_rest",
    ".balign 16",
    "wake_rest:",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    "fault_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push rbp",
    "mov rdi, rsp",
    "cld",
    // The stack began 16-byte aligned; 17 words are on it.
    "sub rsp, 8",
    "call {fault}",
    "add rsp, 8",
    "pop rbp",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    with_error_code = const WITH_ERROR_CODE,
    fault = sym fault,
    end_of_interrupt = const apic::REGISTERS + apic::END_OF_INTERRUPT,
);

unsafe extern "C" {
    static fault_stubs: [u8; 16 * (VECTORS + 1)];
}

/// The entry points, 16 bytes each: one for each exception, then that of the wake-up interrupt.
pub fn entries() -> u64 {
    (&raw const fault_stubs) as u64
}

/// The stack, as the entry points leave it for [`fault`].
#[repr(C)]
struct Frame {
    rbp: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

extern "C" fn fault(frame: &mut Frame) {
    if frame.vector == NMI {
        return nmi::handle();
    }
    let address: u64;
    // SAFETY: reads cr2.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
    if frame.vector == PAGE_FAULT {
        let mut trap =
            Trap { rdi: frame.rdi, rsi: frame.rsi, rbp: frame.rbp, rip: frame.rip, rsp: frame.rsp };
        // SAFETY: the registers are those at the fault.
        if unsafe { umbra_guest::page_fault(&mut trap) } {
            (frame.rip, frame.rsp) = (trap.rip, trap.rsp);
            return;
        }
        if let Some(exit) = thread::overflowed(address) {
            const WRITE: u64 = 2;
            // The size of the access is not known. Most are pushes of eight bytes.
            umbra_guest::report(address, 8, frame.error & WRITE != 0, &trap);
            (frame.rip, frame.rsp) = exit;
            frame.rbp = 0;
            return;
        }
    }
    let (vector, rip, error) = (frame.vector, frame.rip, frame.error);
    println!("exception {vector} at {rip:#x}, error code {error:#x}, cr2 {address:#x}");
    if on_umbra() {
        umbra_guest::exit_fault(vector as u32, error as u32, rip, address);
    }
    reset()
}
