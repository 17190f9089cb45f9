//! Decides which instructions the host's CPU may execute for the guest.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};

use super::super::enabled::Enabled;

/// Most bytes of an instruction and the `ret` behind it.
pub(super) const MAX_CODE: usize = 16;

/// The plan to execute an instruction.
#[derive(Debug)]
pub(super) struct Plan {
    /// The instruction, its memory operand at [`Plan::pointer`].
    pub bytes: Vec<u8>,
    /// A register that the instruction itself does not use.
    pub pointer: Register,
    /// The state that must be enabled for it.
    pub enabled: Enabled,
    /// The registers that it may touch.
    pub registers: Registers,
    /// Whether the host's CPU has it.
    pub supported: bool,
    /// Bytes of the memory operand; 0: there is none.
    pub len: usize,
    /// The alignment of its address.
    pub align: u64,
    /// Whether it is read.
    pub reads: bool,
    /// Whether it is written.
    pub writes: bool,
}

/// The vector registers that an instruction may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Registers {
    /// xmm0 to xmm15.
    Xmm,
    /// ymm0 to ymm15; the upper parts of zmm0 to zmm15 are cleared.
    Ymm,
    /// zmm0 to zmm31, and the opmask registers.
    Zmm,
}

/// Longest memory operand, in bytes.
pub(super) const MAX_OPERAND: usize = 64;

/// The plan to execute an instruction; `None` if the host may not.
pub(super) fn plan(instruction: &Instruction) -> Option<Plan> {
    if !is_plain(instruction) {
        return None;
    }
    let features = instruction.cpuid_features();
    let avx512 =
        instruction.encoding() == EncodingKind::EVEX || features.iter().any(|f| is_avx512(*f));
    let enabled = match instruction.encoding() {
        EncodingKind::Legacy => Enabled::Sse,
        EncodingKind::VEX | EncodingKind::EVEX if avx512 => Enabled::Avx512,
        EncodingKind::VEX => Enabled::Avx,
        _ => return None,
    };
    let supported = features.iter().map(|f| support(*f)).collect::<Option<Vec<_>>>()?;
    let mut moved = *instruction;
    let memory = moved.op_kinds().filter(|kind| *kind == OpKind::Memory).count();
    if moved
        .op_kinds()
        .any(|kind| !matches!(kind, OpKind::Register | OpKind::Memory | OpKind::Immediate8))
        || memory > 1
    {
        return None;
    }
    let len = if memory == 1 { moved.memory_size().size() } else { 0 };
    if memory == 1 && !(1..=MAX_OPERAND).contains(&len) {
        return None;
    }
    // A mask makes it access only parts of the operand, and not fault for the others.
    if memory == 1 && instruction.has_op_mask() {
        return None;
    }
    let pointer = move_operand(&mut moved)?;
    let access = check(&moved, pointer, memory, avx512)?;
    let bytes = encode(&moved)?;
    Some(Plan {
        bytes,
        pointer,
        enabled,
        registers: match enabled {
            Enabled::Sse => Registers::Xmm,
            Enabled::Avx => Registers::Ymm,
            Enabled::Avx512 => Registers::Zmm,
        },
        supported: supported.into_iter().all(|s| s),
        len,
        align: if must_be_aligned(instruction, enabled) { len as u64 } else { 1 },
        reads: matches!(access, OpAccess::Read | OpAccess::ReadWrite),
        writes: matches!(access, OpAccess::Write | OpAccess::ReadWrite),
    })
}

/// No jumps, no privilege, no stack, and not among the exceptions of the classes below.
fn is_plain(instruction: &Instruction) -> bool {
    !instruction.is_invalid()
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_privileged()
        && !instruction.is_stack_instruction()
        && !instruction.is_save_restore_instruction()
        && !instruction.is_vsib()
        && !instruction.has_lock_prefix()
        && !matches!(
            instruction.mnemonic(),
            // They access the control register, which is the host's here.
            Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
            // Half MMX, whatever the operand.
            | Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd
            // Access only parts of the operand, and do not fault for the others.
            | Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
            | Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu
        )
}

/// Whether the host's CPU has a feature; `None` if instructions of that feature are not accepted.
fn support(feature: CpuidFeature) -> Option<bool> {
    macro_rules! has {
        ($name:tt) => {
            std::is_x86_feature_detected!($name)
        };
    }
    Some(match feature {
        CpuidFeature::SSE => has!("sse"),
        CpuidFeature::SSE2 => has!("sse2"),
        CpuidFeature::SSE3 => has!("sse3"),
        CpuidFeature::SSSE3 => has!("ssse3"),
        CpuidFeature::SSE4_1 => has!("sse4.1"),
        CpuidFeature::SSE4_2 => has!("sse4.2"),
        CpuidFeature::SSE4A => has!("sse4a"),
        CpuidFeature::AES => has!("aes"),
        CpuidFeature::PCLMULQDQ => has!("pclmulqdq"),
        CpuidFeature::SHA => has!("sha"),
        CpuidFeature::GFNI => has!("gfni"),
        CpuidFeature::AVX => has!("avx"),
        CpuidFeature::AVX2 => has!("avx2"),
        CpuidFeature::FMA => has!("fma"),
        CpuidFeature::F16C => has!("f16c"),
        CpuidFeature::VAES => has!("vaes"),
        CpuidFeature::VPCLMULQDQ => has!("vpclmulqdq"),
        CpuidFeature::AVX512F => has!("avx512f"),
        CpuidFeature::AVX512VL => has!("avx512vl"),
        CpuidFeature::AVX512BW => has!("avx512bw"),
        CpuidFeature::AVX512DQ => has!("avx512dq"),
        CpuidFeature::AVX512CD => has!("avx512cd"),
        CpuidFeature::AVX512_IFMA => has!("avx512ifma"),
        CpuidFeature::AVX512_VBMI => has!("avx512vbmi"),
        CpuidFeature::AVX512_VBMI2 => has!("avx512vbmi2"),
        CpuidFeature::AVX512_VNNI => has!("avx512vnni"),
        CpuidFeature::AVX512_BITALG => has!("avx512bitalg"),
        CpuidFeature::AVX512_VPOPCNTDQ => has!("avx512vpopcntdq"),
        CpuidFeature::AVX512_BF16 => has!("avx512bf16"),
        _ => return None,
    })
}

/// Whether a feature belongs to AVX-512.
fn is_avx512(feature: CpuidFeature) -> bool {
    matches!(
        feature,
        CpuidFeature::AVX512F
            | CpuidFeature::AVX512VL
            | CpuidFeature::AVX512BW
            | CpuidFeature::AVX512DQ
            | CpuidFeature::AVX512CD
    )
}

/// Moves the memory operand, if there is one, to the address in a register that nothing else uses.
fn move_operand(instruction: &mut Instruction) -> Option<Register> {
    // The guest's address is not the host's.
    instruction.set_segment_prefix(Register::None);
    instruction.set_memory_base(Register::None);
    instruction.set_memory_index(Register::None);
    instruction.set_memory_index_scale(1);
    instruction.set_memory_displacement64(0);
    instruction.set_memory_displ_size(0);
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
    let used =
        |r: &Register| info.used_registers().iter().any(|u| u.register().full_register() == *r);
    let pointer =
        [Register::RDI, Register::RSI, Register::R8, Register::R9, Register::R10, Register::R11]
            .into_iter()
            .find(|r| !used(r))?;
    instruction.set_memory_base(pointer);
    Some(pointer)
}

/// Checks the registers and memory of the moved instruction, also the implicit ones. Returns how it
/// accesses memory.
fn check(
    instruction: &Instruction,
    pointer: Register,
    memory: usize,
    avx512: bool,
) -> Option<OpAccess> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let allowed = |r: Register| {
        r.is_gpr() && r.full_register() != Register::RSP
            || r.is_vector_register() && (avx512 || is_low(r))
            || r.is_k() && avx512
    };
    if !info.used_registers().iter().all(|used| allowed(used.register())) {
        return None;
    }
    match (info.used_memory(), memory) {
        ([], 0) => Some(OpAccess::None),
        ([used], 1)
            if used.base() == pointer
                && used.index() == Register::None
                && used.displacement() == 0 =>
        {
            match used.access() {
                access @ (OpAccess::Read | OpAccess::Write | OpAccess::ReadWrite) => Some(access),
                _ => None,
            }
        }
        _ => None,
    }
}

/// xmm0 to xmm15, ymm0 to ymm15, and zmm0 to zmm15 whose upper parts instructions with a VEX prefix
/// clear.
fn is_low(register: Register) -> bool {
    register.number() < 16
}

/// The instruction's bytes, which decode to itself.
fn encode(instruction: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::try_new(64).ok()?;
    encoder.encode(instruction, 0).ok()?;
    let bytes = encoder.take_buffer();
    let again = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
    let same = again.len() == bytes.len()
        && bytes.len() < MAX_CODE
        && again.code() == instruction.code()
        && again.code() != Code::INVALID
        && again.segment_prefix() == Register::None
        && again.op_mask() == instruction.op_mask()
        && again.zeroing_masking() == instruction.zeroing_masking()
        && again.is_broadcast() == instruction.is_broadcast()
        && again.rounding_control() == instruction.rounding_control()
        && again.suppress_all_exceptions() == instruction.suppress_all_exceptions()
        && again.op_kinds().eq(instruction.op_kinds())
        && (0..again.op_count()).all(|i| match again.op_kind(i) {
            OpKind::Register => again.op_register(i) == instruction.op_register(i),
            OpKind::Memory => {
                again.memory_base() == instruction.memory_base()
                    && again.memory_index() == Register::None
                    && again.memory_displacement64() == 0
            }
            _ => again.immediate8() == instruction.immediate8() || again.op_count() > 3,
        });
    same.then_some(bytes)
}

/// Whether an unaligned memory operand is a #GP (Intel SDM volume 1, 14.9, and volume 2, 2.4).
fn must_be_aligned(instruction: &Instruction, enabled: Enabled) -> bool {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    if enabled != Enabled::Sse {
        return matches!(
            mnemonic,
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovdqa32
                | M::Vmovdqa64
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        );
    }
    instruction.memory_size().size() == 16
        && !matches!(
            mnemonic,
            M::Movups
                | M::Movupd
                | M::Movdqu
                | M::Lddqu
                | M::Pcmpestri
                | M::Pcmpestrm
                | M::Pcmpistri
                | M::Pcmpistrm
        )
}
