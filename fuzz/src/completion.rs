//! Instructions that KVM does not know, completed for a guest. Where this machine's CPU can execute
//! the same instruction with the same registers and memory, the results have to be equal.

use std::cell::RefCell;

use arbitrary::{Arbitrary, Unstructured};
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, Register,
    RflagsBits, UsedRegister,
};
use umbra::machine::complete::Completer;
use umbra::machine::memory::Ram;
use vm_memory::GuestAddress;

use crate::cpu::{Cpu, State};
use crate::host_cpu::{self, CODE, DATA, DATA_BYTES, HostCpu, STATUS_FLAGS};
use crate::{request, show};

/// Guest memory.
const RAM: u64 = 4 << 20;

/// An instruction, and the state before it.
#[derive(Debug, Arbitrary)]
struct Case {
    /// The guest's CPU is in this state; else in 64-bit mode with all enabled, as this process.
    state: Option<(State, u8)>,
    code: Code,
    values: [Value; 6],
    flags: u16,
    mxcsr: u16,
    /// How vector registers and memory are filled.
    fill: [u64; 2],
    floats: u8,
}

/// Bytes of an instruction. In most, the opcode is where it belongs.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Code {
    Any([u8; 15]),
    Legacy { prefix: u8, rex: u8, map: u8, opcode: u8, modrm: u8, rest: [u8; 6] },
    Vex2 { p: u8, opcode: u8, modrm: u8, rest: [u8; 6] },
    Vex3 { map: u8, rxb: u8, p: u8, opcode: u8, modrm: u8, rest: [u8; 6] },
    Evex { map: u8, rxb: u8, p: [u8; 2], opcode: u8, modrm: u8, rest: [u8; 6] },
}

/// The value of a register.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Value {
    Any(u64),
    Small(u8),
    Data(u16),
    Aligned(u8),
    Float(f64),
}

impl Value {
    fn get(self) -> u64 {
        match self {
            Self::Any(value) => value,
            Self::Small(value) => value.into(),
            Self::Data(at) => DATA.start + u64::from(at) % (DATA.end - DATA.start),
            Self::Aligned(at) => DATA.start + u64::from(at) * 64,
            Self::Float(value) => value.to_bits(),
        }
    }
}

impl Code {
    fn bytes(self) -> [u8; 15] {
        let mut bytes = [0; 15];
        let mut at = 0;
        let mut add = |more: &[u8]| {
            bytes[at..at + more.len()].copy_from_slice(more);
            at += more.len();
        };
        match self {
            Self::Any(bytes) => return bytes,
            Self::Legacy { prefix, rex, map, opcode, modrm, rest } => {
                let prefixes: [&[u8]; 8] =
                    [&[], &[], &[0x66], &[0xf2], &[0xf3], &[0x66, 0xf2], &[0x67], &[0xf0]];
                add(prefixes[usize::from(prefix % 8)]);
                if rex & 0x80 != 0 {
                    add(&[0x40 | rex & 0xf]);
                }
                let maps: [&[u8]; 4] = [&[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a], &[0x0f, 0x38]];
                add(maps[usize::from(map % 4)]);
                add(&[opcode, modrm]);
                add(&rest);
            }
            Self::Vex2 { p, opcode, modrm, rest } => {
                add(&[0xc5, p, opcode, modrm]);
                add(&rest);
            }
            Self::Vex3 { map, rxb, p, opcode, modrm, rest } => {
                add(&[0xc4, rxb & 0xe0 | (map % 4), p, opcode, modrm]);
                add(&rest);
            }
            Self::Evex { map, rxb, p: [p1, p2], opcode, modrm, rest } => {
                add(&[0x62, rxb & 0xf0 | (map % 4), p1 | 4, p2, opcode, modrm]);
                add(&rest);
            }
        }
        bytes
    }
}

/// What is made once.
struct Machine {
    ram: Ram,
    completer: Completer,
}

impl Machine {
    fn new() -> Self {
        let ram = Ram::new(RAM).expect("there is host memory");
        Self { ram, completer: Completer::default() }
    }
}

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

/// Whether instructions are compared with this machine's CPU. Otherwise they are only completed.
pub fn is_compared() -> bool {
    HostCpu::get().is_some()
}

/// Completes the instruction that the bytes describe.
pub fn run(data: &[u8]) {
    let Ok(case) = Case::arbitrary_take_rest(Unstructured::new(data)) else { return };
    show(&case);
    MACHINE.with_borrow_mut(|machine| complete(&case, machine.get_or_insert_with(Machine::new)));
}

/// Completes the instruction, and checks the result. Returns whether that was compared with the
/// CPU's.
fn complete(case: &Case, Machine { ram, completer }: &mut Machine) -> bool {
    let bytes = case.code.bytes();
    let instruction = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
    let len = if instruction.is_invalid() { 15 } else { instruction.len() };
    let mut cpu = case.cpu();
    let mut before = case.memory();
    // After it comes a return, which is never completed.
    let mut code = bytes[..len].to_vec();
    code.resize(32, 0xc3);
    for (at, bytes) in [(CODE, &code), (DATA.start, &before)] {
        ram.write(GuestAddress(at), bytes).expect("it is RAM");
    }
    if let Some((state, rights)) = &case.state {
        page_tables(ram, *rights);
        cpu.set(state);
    }
    let (regs, area) = (cpu.regs, cpu.area.clone());
    let done = request(|| completer.complete(&mut cpu, ram, &bytes[..len]));
    let mut after = vec![0; DATA_BYTES];
    ram.read(GuestAddress(DATA.start), &mut after).expect("it is RAM");
    let mut compared = false;
    if done.is_err() {
        assert_eq!((cpu.regs, after == before), (regs, true), "changed, but not completed");
    } else if let (false, None, true) = (cpu.interrupted, case.state, is_plain(&instruction, &regs))
        && let Some(host) = HostCpu::get()
    {
        let (from, flags) = (host_cpu::registers(&regs), regs.rflags);
        // SAFETY: it changes nothing else, as was checked. It was completed without an exception.
        let expected = unsafe { host.execute(&code[..len], from, flags, &area, &mut before) };
        assert_eq!(host_cpu::registers(&cpu.regs), expected.registers, "{instruction:?}");
        let defined = STATUS_FLAGS & !undefined(&instruction);
        let flags = [cpu.regs.rflags & defined, expected.flags & defined];
        assert_eq!(flags[0], flags[1], "flags of {instruction:?}");
        assert!(after == before, "memory of {instruction:?}");
        let (ours, theirs) = (host.normal(&cpu.area), host.normal(&expected.area));
        let differs = (0..4096).find(|at| ours.0[*at] != theirs.0[*at]);
        assert_eq!(differs, None, "extended state of {instruction:?}");
        compared = true;
    }
    // A store may have been anywhere.
    if done.is_ok() && !cpu.interrupted && !compared {
        let _ = ram.discard(&(0..RAM));
    }
    compared
}

impl Case {
    fn cpu(&self) -> Cpu {
        let mut cpu = Cpu::default();
        let [a, b, c, d, e, f] = self.values.map(Value::get);
        (cpu.regs.rax, cpu.regs.rbx, cpu.regs.rcx, cpu.regs.rdx) = (a, b, c, d);
        (cpu.regs.rsi, cpu.regs.rdi, cpu.regs.rbp) = (e, f, a ^ b);
        (cpu.regs.r8, cpu.regs.r9, cpu.regs.r10, cpu.regs.r11) = (b, a, !c, d << 1);
        (cpu.regs.r12, cpu.regs.r13, cpu.regs.r14, cpu.regs.r15) = (e, b, !a, f);
        cpu.regs.rip = CODE;
        cpu.regs.rflags = u64::from(self.flags) & STATUS_FLAGS | 2;
        let area = &mut cpu.area.0;
        // An underflow that is unmasked is known to be raised in other cases.
        area[24..28].copy_from_slice(&u32::from(self.mxcsr | 0x800).to_le_bytes());
        let components = HostCpu::get().map_or(3, |host| host.components);
        area[512..520].copy_from_slice(&components.to_le_bytes());
        let mut values = self.values();
        for number in [1, 2, 5, 6, 7].into_iter().filter(|number| components >> number & 1 != 0) {
            for place in area[host_cpu::component(number)].chunks_exact_mut(8) {
                place.copy_from_slice(&values().to_le_bytes());
            }
        }
        cpu.xcr0 = components;
        cpu
    }

    /// Numbers that follow from [`Case::fill`]: some are floats.
    fn values(&self) -> impl FnMut() -> u64 {
        const FLOATS: [u64; 8] = [
            0x3ff0_0000_0000_0000,
            0x7ff0_0000_7f80_0000,
            0x0000_0001_0000_0001,
            0xfff8_0000_ffc0_0001,
            0x8000_0000_8000_0000,
            0x4330_0000_4b00_0000,
            0x7ff0_0000_0000_0001,
            0x3f80_0000_c2c8_0000,
        ];
        let ([mut state, more], floats) = (self.fill, self.floats);
        let mut count = 0u32;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(more | 1);
            count = count.wrapping_add(1);
            let is_float = floats >> (count % 8) & 1 != 0;
            if is_float { FLOATS[(state >> 61) as usize] } else { state ^ state >> 31 }
        }
    }

    fn memory(&self) -> Vec<u8> {
        let (mut values, mut memory) = (self.values(), vec![0; DATA_BYTES]);
        // The rest is the same again.
        let (first, rest) = memory.split_at_mut(512);
        for place in first.chunks_exact_mut(8) {
            place.copy_from_slice(&values().rotate_left(7).to_le_bytes());
        }
        rest.chunks_exact_mut(512).for_each(|part| part.copy_from_slice(first));
        memory
    }
}

/// Page tables that map the first 4 MiB one to one, and some of it with fewer rights.
fn page_tables(ram: &Ram, rights: u8) {
    let put = |at: u64, value: u64| {
        ram.write(GuestAddress(at), &value.to_le_bytes()).expect("it is RAM");
    };
    put(0x1000, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x87);
    put(0x3008, 0x4007);
    for page in 0..512 {
        let bits = if page < 2 { 7 } else { u64::from(rights) & 7 };
        put(0x4000 + 8 * page, (0x20_0000 + page * 4096) | bits);
    }
}

/// The instructions that are completed in software and compute something.
fn is_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Popcnt
            | M::Lzcnt
            | M::Tzcnt
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Adcx
            | M::Adox
            | M::Crc32
            | M::Movbe
            | M::Cmpxchg16b
    )
}

/// Whether this process may execute the instruction: it computes, and touches nothing but general,
/// vector and mask registers, and memory that is for it.
fn is_plain(instruction: &Instruction, regs: &kvm_bindings::kvm_regs) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let vector = |used: &UsedRegister| {
        let register = used.register();
        register.is_vector_register() || register.is_k()
    };
    let allowed = |used: &UsedRegister| {
        let full = used.register().full_register();
        let is_data = [Register::DS, Register::SS, Register::ES].contains(&full);
        vector(used) || is_data || full.is_gpr64() && full != Register::RSP
    };
    let used = info.used_registers();
    if instruction.is_privileged()
        || instruction.flow_control() != FlowControl::Next
        || !used.iter().all(allowed)
        || !(is_integer(instruction.mnemonic()) || used.iter().any(vector))
    {
        return false;
    }
    let value = |register: Register| {
        let values = host_cpu::registers(regs);
        let order = [0, 2, 3, 1, 15, 6, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14];
        let place = *order.get(register.full_register().number())?;
        let value = values.get(place).copied()?;
        Some(if register.is_gpr32() { value & 0xffff_ffff } else { value })
    };
    info.used_memory().iter().all(|memory| {
        let address = memory.virtual_address(0, |register, _, _| match register {
            Register::DS | Register::SS | Register::ES => Some(0),
            register if register.is_gpr() => value(register),
            _ => None,
        });
        let bytes = memory.memory_size().size().max(1) as u64;
        address.is_some_and(|at| DATA.contains(&at) && DATA.end - at >= bytes)
    })
}

/// The status flags that the instruction leaves undefined.
fn undefined(instruction: &Instruction) -> u64 {
    let bits = instruction.rflags_undefined();
    let pairs = [
        (RflagsBits::OF, 1 << 11),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::CF, 1),
    ];
    pairs.iter().filter(|(flag, _)| bits & flag != 0).map(|(_, bit)| bit).sum()
}

#[cfg(test)]
mod tests {
    use umbra_skip::skip;

    use super::*;

    #[test]
    fn instructions_are_compared_where_they_can_be() {
        if !is_compared() {
            skip!("this machine's CPU lacks instructions that are completed");
        }
        let cases: [(&[u8], bool); 9] = [
            (&[0xf3, 0x48, 0x0f, 0xb8, 0xc1], true), // popcnt rax, rcx
            (&[0xf3, 0x0f, 0xb8, 0x43, 0x08], true), // popcnt eax, [rbx + 8]
            (&[0x48, 0x0f, 0x38, 0xf1, 0x03], true), // movbe [rbx], rax
            (&[0x0f, 0x58, 0xca], true),             // addps xmm1, xmm2
            (&[0xc5, 0xed, 0xfc, 0xda], true),       // vpaddb ymm3, ymm2, ymm2
            (&[0xf3, 0x0f, 0xb8, 0x05, 0xf8, 0xff, 0x0f, 0], true), // popcnt eax, [rip + 0xffff8]
            (&[0xf3, 0x0f, 0xb8, 0x01], false),      // popcnt eax, [rcx]
            (&[0xf3, 0x48, 0x0f, 0xb8, 0xc4], false), // popcnt rax, rsp
            (&[0x0f, 0xae, 0x13], false),            // ldmxcsr [rbx]
        ];
        for (bytes, expected) in cases {
            let mut code = [0; 15];
            code[..bytes.len()].copy_from_slice(bytes);
            let case = Case {
                state: None,
                code: Code::Any(code),
                values: [7, DATA.start, 0x3_0000, 1, 2, 3].map(Value::Any),
                flags: 0,
                mxcsr: 0x1f80,
                fill: [1, 2],
                floats: 0,
            };
            assert_eq!(complete(&case, &mut Machine::new()), expected, "{bytes:x?}");
        }
    }
}
