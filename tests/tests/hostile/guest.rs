//! Guests that misbehave, assembled here and wrapped into a small ELF file.
//!
//! They run on the boot page tables, which map the first 4 GiB one to one; a prologue adds the GiBs of the two shadow
//! windows, so that a virtual address is the guest-physical one everywhere.

use iced_x86::code_asm::*;
use umbra::machine::layout::BOOT_PDPT;
use umbra_shadow::abi::{PORT, call, exit};
use umbra_tests::elf::ElfBuilder;

/// Guest memory of all these guests, in bytes.
pub const RAM: u64 = 16 << 20;
/// Where the page-shadow window lies with this memory.
pub const PAGE_WINDOW: u64 = 4 << 30;
/// Its bytes.
pub const PAGE_WINDOW_BYTES: u64 = RAM / 4096;
/// Where the byte-shadow window lies.
pub const BYTE_WINDOW: u64 = 5 << 30;
/// Its bytes.
pub const BYTE_WINDOW_BYTES: u64 = RAM / 8;
/// The code.
pub const CODE: u64 = 0x10_0000;
/// Where nothing else is: for rings and other tables of a test's own.
pub const FREE: u64 = 0x80_0000;

const STACK: u64 = 0x1f_f000;
const DATA: u64 = 0x20_0000;

/// One call: its number, `rdi`, `rsi`, `rcx`, `r8`.
pub type Row = [u64; 5];

/// A guest in the making.
pub struct Guest {
    /// Its code so far.
    pub asm: CodeAssembler,
    data: Vec<u8>,
}

/// Two page directories, for the GiB of each window.
fn window_tables() -> Vec<u8> {
    let entries = (PAGE_WINDOW..BYTE_WINDOW + (1 << 30)).step_by(2 << 20);
    entries.flat_map(|gpa| (gpa | 0x83).to_le_bytes()).collect()
}

impl Guest {
    /// A guest that begins with `body`.
    pub fn new(body: impl FnOnce(&mut Self) -> Result<(), IcedError>) -> Self {
        let mut guest =
            Self { asm: CodeAssembler::new(64).expect("64-bit code exists"), data: window_tables() };
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
        a.mov(qword_ptr(rbx + 5 * 8), rax)
    }

    /// Puts `bytes` into the guest's memory. Returns their address.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(64), 0);
        let at = DATA + self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        at
    }

    /// Makes one call.
    pub fn call(&mut self, number: u32, [a, b, c, d]: [u64; 4]) -> Result<(), IcedError> {
        for (register, value) in [(rdi, a), (rsi, b), (rcx, c), (r8, d)] {
            self.asm.mov(register, value)?;
        }
        self.asm.mov(edx, u32::from(PORT))?;
        self.asm.mov(eax, number)?;
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

    /// Tells of all its memory, one to one.
    pub fn region(&mut self) -> Result<(), IcedError> {
        self.call(call::REGION_ADD, [0, RAM, 0, 0])
    }

    /// Reports an access.
    pub fn report(&mut self, address: u64, size: u64, what: u64, ip: u64) -> Result<(), IcedError> {
        self.call(call::REPORT, [address, size, what, ip])
    }

    /// Ends the run: done, and it went well.
    pub fn done(&mut self) -> Result<(), IcedError> {
        self.call(call::EXIT, [exit::DONE, 0, 0, 0])
    }

    /// Ends the run: done; it went wrong if `rbx` is not 0.
    pub fn done_unless_rbx(&mut self) -> Result<(), IcedError> {
        self.asm.mov(rsi, rbx)?;
        self.asm.mov(rdi, exit::DONE)?;
        self.asm.mov(edx, u32::from(PORT))?;
        self.asm.mov(eax, call::EXIT)?;
        self.asm.out(dx, eax)
    }

    /// The ELF file.
    pub fn elf(&mut self) -> Vec<u8> {
        let code = self.asm.assemble(CODE).expect("code that can be encoded");
        ElfBuilder::new(CODE).segment(CODE, code).segment(DATA, self.data.clone()).build()
    }
}
