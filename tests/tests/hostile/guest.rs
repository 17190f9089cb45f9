//! Guests that misbehave, assembled here and wrapped into a small ELF file.
//!
//! They run on the boot page tables, which map the first 4 GiB one to one; a prologue adds the GiBs
//! of the shadow windows, so that a virtual address is the guest-physical one everywhere.

use iced_x86::code_asm::*;
use umbra::machine::layout::{BOOT_PDPT, BOOT_PML4, GDT};
use umbra_shadow::abi::{CallNumber, ExitReason, PORT};
use umbra_tests::elf::ElfBuilder;

/// Guest memory of all these guests, in bytes.
pub const RAM: u64 = 16 << 20;
/// Start of the page-shadow window with this memory.
pub const PAGE_WINDOW: u64 = 4 << 30;
/// Its bytes for this memory; behind them it goes on for virtual memory.
pub const PAGE_WINDOW_BYTES: u64 = RAM / 4096;
/// Start of the byte-shadow window.
pub const BYTE_WINDOW: u64 = 5 << 30;
/// Its bytes, likewise.
pub const BYTE_WINDOW_BYTES: u64 = RAM / 8;
/// Start of what the check shadow needs: patterns, tables, entries.
pub const CHECK_WINDOWS: u64 = 6 << 30;
/// Bytes of virtual memory that can have shadow.
pub const VIRTUAL_BYTES: u64 = 4 << 30;
/// The code.
pub const CODE: u64 = 0x10_0000;
/// Free memory for rings and other tables of a test.
pub const FREE: u64 = 0x80_0000;

const STACK: u64 = 0x1f_f000;
const DATA: u64 = 0x20_0000;

/// The page where other CPUs start in real mode, below 1 MiB. Nothing else uses it.
const TRAMPOLINE: u64 = 0x8000;
/// The end of the first CPU's stack if there are several CPUs. Each has a page.
const OTHER_STACKS: u64 = 0x3_1000;

/// From real mode to long mode, with the boot page tables and the boot GDT, to the address at 0xf8.
#[rustfmt::skip]
const TRAMPOLINE_CODE: [u8; 0x100] = {
    let code = [
        0xfa,                                           // cli
        0x8c, 0xc8,                                     // mov ax, cs
        0x8e, 0xd8,                                     // mov ds, ax
        0x66, 0xb8, 0x00, 0x90, 0x00, 0x00,             // mov eax, BOOT_PML4
        0x0f, 0x22, 0xd8,                               // mov cr3, eax
        0x66, 0xb8, 0x20, 0x00, 0x00, 0x00,             // mov eax, PAE
        0x0f, 0x22, 0xe0,                               // mov cr4, eax
        0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,             // mov ecx, EFER
        0x66, 0x31, 0xd2,                               // xor edx, edx
        0x66, 0xb8, 0x00, 0x01, 0x00, 0x00,             // mov eax, LME
        0x0f, 0x30,                                     // wrmsr
        0x66, 0x0f, 0x01, 0x16, 0xf0, 0x00,             // lgdt [0xf0]
        0x66, 0xb8, 0x11, 0x00, 0x00, 0x80,             // mov eax, PG, ET, PE
        0x0f, 0x22, 0xc0,                               // mov cr0, eax
        0x66, 0xea, 0x80, 0x80, 0x00, 0x00, 0x10, 0x00, // jmp 0x10:0x8080
    ];
    let mut page = [0; 0x100];
    let mut i = 0;
    while i < code.len() {
        page[i] = code[i];
        i += 1;
    }
    // 64-bit: mov rax, [rip + 0x71]; jmp rax
    let long = [0x48, 0x8b, 0x05, 0x71, 0x00, 0x00, 0x00, 0xff, 0xe0];
    i = 0;
    while i < long.len() {
        page[0x80 + i] = long[i];
        i += 1;
    }
    // The GDT's limit and address.
    (page[0xf0], page[0xf3]) = (31, (GDT >> 8) as u8);
    page
};
const _: () = assert!(BOOT_PML4 == 0x9000 && GDT == 0x500);

/// One call: its number, `rdi`, `rsi`, `rcx`, `r8`.
pub type Row = [u64; 5];

/// Builds a guest.
pub struct Guest {
    /// Its code so far.
    pub asm: CodeAssembler,
    data: Vec<u8>,
}

/// Page directories for the GiB of each window.
fn window_tables() -> Vec<u8> {
    let entries = (PAGE_WINDOW..CHECK_WINDOWS + (1 << 30)).step_by(2 << 20);
    entries.flat_map(|gpa| (gpa | 0x83).to_le_bytes()).collect()
}

impl Guest {
    /// A guest that begins with `body`.
    pub fn new(body: impl FnOnce(&mut Self) -> Result<(), IcedError>) -> Self {
        let mut guest = Self {
            asm: CodeAssembler::new(64).expect("64-bit code exists"),
            data: window_tables(),
        };
        guest.prologue().and_then(|()| body(&mut guest)).expect("code that can be encoded");
        guest
    }

    fn prologue(&mut self) -> Result<(), IcedError> {
        let a = &mut self.asm;
        a.mov(rsp, STACK)?;
        a.xor(ebp, ebp)?;
        a.mov(rbx, BOOT_PDPT)?;
        a.mov(rax, DATA | 3)?;
        a.mov(qword_ptr(rbx + 4 * 8), rax)?;
        a.mov(rax, (DATA + 4096) | 3)?;
        a.mov(qword_ptr(rbx + 5 * 8), rax)?;
        a.mov(rax, (DATA + 8192) | 3)?;
        a.mov(qword_ptr(rbx + 6 * 8), rax)
    }

    /// Puts `bytes` into the guest's memory. Returns their address.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(64), 0);
        let at = DATA + self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        at
    }

    /// Makes one call.
    pub fn call(
        &mut self,
        number: impl Into<u32>,
        [a, b, c, d]: [u64; 4],
    ) -> Result<(), IcedError> {
        for (register, value) in [(rdi, a), (rsi, b), (rcx, c), (r8, d)] {
            self.asm.mov(register, value)?;
        }
        self.asm.mov(edx, u32::from(PORT))?;
        self.asm.mov(eax, number.into())?;
        self.asm.out(dx, eax)
    }

    /// Makes all of `rows`, in order.
    pub fn calls(&mut self, rows: &[Row]) -> Result<(), IcedError> {
        let bytes: Vec<u8> = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
        let table = self.data(&bytes);
        let a = &mut self.asm;
        let mut next = a.create_label();
        a.mov(rbx, table)?;
        a.mov(r12, rows.len() as u64)?;
        a.mov(edx, u32::from(PORT))?;
        a.set_label(&mut next)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(rdi, qword_ptr(rbx + 8))?;
        a.mov(rsi, qword_ptr(rbx + 16))?;
        a.mov(rcx, qword_ptr(rbx + 24))?;
        a.mov(r8, qword_ptr(rbx + 32))?;
        a.out(dx, eax)?;
        a.add(rbx, 40)?;
        a.dec(r12)?;
        a.jnz(next)
    }

    /// Adds all its memory as a region, one to one.
    pub fn region(&mut self) -> Result<(), IcedError> {
        self.call(CallNumber::RegionAdd, [0, RAM, 0, 0])
    }

    /// Reports an access.
    pub fn report(&mut self, address: u64, size: u64, what: u64, ip: u64) -> Result<(), IcedError> {
        self.call(CallNumber::Report, [address, size, what, ip])
    }

    /// Starts all other CPUs. All go on behind this in 64-bit mode, each on a stack of its own;
    /// `r15` is the CPU's number.
    pub fn start_others(&mut self) -> Result<(), IcedError> {
        let code = self.data(&TRAMPOLINE_CODE);
        let a = &mut self.asm;
        let mut here = a.create_label();
        a.mov(rsi, code)?;
        a.mov(rdi, TRAMPOLINE)?;
        a.mov(ecx, TRAMPOLINE_CODE.len() as u32)?;
        a.rep().movsb()?;
        a.lea(rax, ptr(here))?;
        a.mov(rdi, TRAMPOLINE + 0xf8)?;
        a.mov(qword_ptr(rdi), rax)?;
        // The local APIC: on; to all but this one, INIT and STARTUP at the trampoline's page.
        a.mov(ebx, 0xfee0_0000u32)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc_4500)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc_4600 | (TRAMPOLINE >> 12) as u32)?;
        a.set_label(&mut here)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.shr(ebx, 24)?;
        a.mov(r15, rbx)?;
        a.shl(ebx, 12)?;
        a.lea(rsp, ptr(rbx + OTHER_STACKS))?;
        a.xor(ebp, ebp)
    }

    /// Stops this CPU for good.
    pub fn halt(&mut self) -> Result<(), IcedError> {
        let mut again = self.asm.create_label();
        self.asm.cli()?;
        self.asm.set_label(&mut again)?;
        self.asm.hlt()?;
        self.asm.jmp(again)
    }

    /// Ends the run with success.
    pub fn done(&mut self) -> Result<(), IcedError> {
        self.call(CallNumber::Exit, [ExitReason::Done.into(), 0, 0, 0])
    }

    /// Ends the run, with failure if `rbx` is not 0.
    pub fn done_unless_rbx(&mut self) -> Result<(), IcedError> {
        self.asm.mov(rsi, rbx)?;
        self.asm.mov(rdi, u64::from(ExitReason::Done))?;
        self.asm.mov(edx, u32::from(PORT))?;
        self.asm.mov(eax, u32::from(CallNumber::Exit))?;
        self.asm.out(dx, eax)
    }

    /// The ELF file.
    pub fn elf(&mut self) -> Vec<u8> {
        self.builder().build()
    }

    /// The ELF file, to add to it.
    pub fn builder(&mut self) -> ElfBuilder {
        let code = self.asm.assemble(CODE).expect("code that can be encoded");
        ElfBuilder::new(CODE).segment(CODE, code).segment(DATA, self.data.clone())
    }
}
