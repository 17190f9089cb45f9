//! A guest that executes in ring 0 instructions that some hosts' KVM refuses. The results must be
//! those of the same code on this machine's CPU.

use vm_memory::GuestAddress;

use super::*;

/// Addresses of the guest's input and output.
const INPUT: u64 = 0x18_0000;
const OUTPUT: u64 = 0x18_1000;
/// Bytes of the output that are results. The rest is not compared.
const RESULTS: usize = 0x400;

/// Address of the guest's function: `fn(input: rdi, output: rsi)`, both aligned to 64. It changes
/// rax, rcx, rdx and r8 to r11, and vector registers.
const FUNCTION: usize = 0x80;

fn code() -> &'static [u8] {
    guest!(
        // SSE, exceptions of it, and xsave with x87, SSE and AVX.
        "mov rax, cr4",
        "or eax, 0x40600",
        "mov cr4, rax",
        "xor ecx, ecx",
        "xor edx, edx",
        "mov eax, 7",
        "xsetbv",
        "xgetbv",
        "mov r15, rax",
        "mov edi, 0x180000",
        "mov esi, 0x181000",
        "call 4f",
        "hlt",
        ".org 220b + 0x80",
        "4:",
        // Integers.
        "mov r8, [rdi]",
        "mov r9, [rdi + 8]",
        "popcnt rax, r8",
        "mov [rsi], rax",
        "popcnt eax, dword ptr [rdi + 3]",
        "mov [rsi + 8], rax",
        "mov eax, 1",
        "crc32 rax, r8",
        "crc32 eax, byte ptr [rdi + 5]",
        "mov [rsi + 16], rax",
        "andn rax, r8, r9",
        "mov [rsi + 24], rax",
        "bextr rax, r8, r9",
        "mov [rsi + 32], rax",
        "blsr rax, [rdi]",
        "mov [rsi + 40], rax",
        "mov rdx, r9",
        "mulx rcx, rax, r8",
        "mov [rsi + 48], rax",
        "mov [rsi + 56], rcx",
        "pdep rax, r8, r9",
        "pext rcx, r8, [rdi + 8]",
        "mov [rsi + 64], rax",
        "mov [rsi + 72], rcx",
        "rorx rax, r8, 19",
        "sarx rcx, r8, r9",
        "mov [rsi + 80], rax",
        "mov [rsi + 88], rcx",
        "stc",
        "mov rax, r8",
        "adcx rax, r9",
        "adox rax, r9",
        "mov [rsi + 96], rax",
        "mov rax, [rdi + 32]",
        "mov rdx, [rdi + 40]",
        "mov [rsi + 112], rax",
        "mov [rsi + 120], rdx",
        "mov r10, rbx",
        "mov rbx, r8",
        "mov rcx, r9",
        "lock cmpxchg16b [rsi + 112]",
        "mov rbx, r10",
        "setz [rsi + 128]",
        // SSE.
        "movups xmm0, [rdi + 16]",
        "movups xmm1, [rdi + 33]",
        "movaps xmm2, xmm0",
        "addps xmm2, [rdi + 48]",
        "mulps xmm2, xmm2",
        "movups [rsi + 144], xmm2",
        "movdqu xmm3, [rdi]",
        "pshufb xmm3, xmm1",
        "pxor xmm3, xmm0",
        "psllq xmm3, 5",
        "movdqu [rsi + 161], xmm3",
        "pcmpeqb xmm3, xmm0",
        "pmovmskb eax, xmm3",
        "movmskps ecx, xmm1",
        "mov [rsi + 184], eax",
        "mov [rsi + 188], ecx",
        "cvtsi2sd xmm4, r8",
        "sqrtsd xmm4, xmm4",
        "movsd [rsi + 192], xmm4",
        "cvttsd2si rax, xmm4",
        "mov [rsi + 200], rax",
        "ptest xmm1, xmm0",
        "setc [rsi + 208]",
        "setz [rsi + 209]",
        "movd [rsi + 212], xmm1",
        "pextrq [rsi + 216], xmm1, 1",
        "aesenc xmm1, xmm0",
        "pclmulqdq xmm1, xmm0, 1",
        "movups [rsi + 224], xmm1",
        // AVX.
        "vmovdqu ymm5, [rdi + 1]",
        "vpaddd ymm6, ymm5, [rdi + 7]",
        "vpermq ymm6, ymm6, 0x1b",
        "vfmadd213ps ymm5, ymm5, ymm6",
        "vmovups [rsi + 241], ymm5",
        "vextracti128 [rsi + 288], ymm6, 1",
        "vpmovmskb eax, ymm6",
        "mov [rsi + 304], eax",
        // MXCSR: flush to zero, and back.
        "stmxcsr [rsi + 308]",
        "or dword ptr [rsi + 308], 0x8000",
        "ldmxcsr [rsi + 308]",
        "stmxcsr [rsi + 312]",
        "xor dword ptr [rsi + 308], 0x8000",
        "ldmxcsr [rsi + 308]",
        "stmxcsr [rsi + 308]",
        // Round trips through memory, in all formats.
        "mov eax, 7",
        "xor edx, edx",
        "xsave64 [rsi + 0x400]",
        "vzeroall",
        "xrstor64 [rsi + 0x400]",
        "vmovdqu [rsi + 320], ymm5",
        "xsavec64 [rsi + 0x800]",
        "vzeroall",
        "vmovdqu [rsi + 352], ymm5",
        "xrstor64 [rsi + 0x800]",
        "vmovdqu [rsi + 384], ymm5",
        "xsaveopt64 [rsi + 0x400]",
        "vzeroall",
        "xrstor64 [rsi + 0x400]",
        "vmovdqu [rsi + 416], ymm6",
        "fxsave64 [rsi + 0xc00]",
        "pxor xmm0, xmm0",
        "fxrstor64 [rsi + 0xc00]",
        "movups [rsi + 448], xmm0",
        "vzeroupper",
        "ret",
    )
}

/// The output of this machine's CPU.
fn by_the_cpu(input: &[u8; 4096]) -> Box<[u8; 4096]> {
    #[repr(C, align(64))]
    struct Aligned([u8; 4096]);
    let (input, mut output) = (Aligned(*input), Box::new(Aligned([0; 4096])));
    // SAFETY: a new mapping, of nobody else's memory, filled while it is writable and then only
    // executed. The function changes what `clobber_abi` says, and the two buffers.
    unsafe {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        let memory = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED);
        memory.cast::<u8>().copy_from_nonoverlapping(code().as_ptr(), code().len());
        assert_eq!(libc::mprotect(memory, 4096, libc::PROT_READ | libc::PROT_EXEC), 0);
        std::arch::asm!(
            "call {}",
            in(reg) memory.cast::<u8>().add(FUNCTION),
            in("rdi") &raw const input, in("rsi") &raw mut *output,
            clobber_abi("sysv64"),
        );
        libc::munmap(memory, 4096);
    }
    Box::new(output.0)
}

#[test]
fn a_guest_in_ring_0_gets_what_the_cpu_computes() {
    let kvm = need!(Kvm::open());
    need_cpu!("popcnt", "sse4.2", "bmi1", "bmi2", "adx", "movbe", "cmpxchg16b", "aes", "pclmulqdq");
    need_cpu!("avx2", "fma", "xsave", "xsavec", "xsaveopt");
    // Numbers without a pattern; as floats they are ordinary.
    let mut input = [0; 4096];
    for (i, four) in input.chunks_exact_mut(4).enumerate() {
        let value = (i as f32 + 1.25) * 1.7 * if i % 3 == 0 { -1.0 } else { 1.0 };
        four.copy_from_slice(&value.to_bits().wrapping_add(i as u32 * 77).to_le_bytes());
    }
    let expected = by_the_cpu(&input);
    let (machine, mut vcpu) = raw_guest(&kvm, code()).unwrap();
    machine.ram().write(GuestAddress(INPUT), &input).unwrap();
    let mut completer = Completer::default();
    let exit = next(&machine, &mut vcpu, &mut completer);
    assert_eq!(exit, VmExit::Hlt, "{:x?}, completed {:?}", vcpu.regs(), completer.counts());
    assert_eq!(vcpu.regs().unwrap().r15, 7, "XCR0");
    let mut output = [0; RESULTS];
    machine.ram().read(GuestAddress(OUTPUT), &mut output).unwrap();
    let differ: Vec<_> = (0..RESULTS).filter(|i| output[*i] != expected[*i]).collect();
    assert!(differ.is_empty(), "bytes {differ:?}\n{output:02x?}\n{expected:02x?}");
    assert_eq!(output[320..352], output[384..416], "the same register, by two formats");
    assert!(output[352..384].iter().all(|b| *b == 0), "cleared in between");
    let counts = completer.counts();
    eprintln!("completed: {counts:?}");
    if stats::emulates_ring0(&kvm).unwrap() {
        for mnemonic in
            ["popcnt", "addps", "vpermq", "xsave64", "xrstor64", "ldmxcsr", "cmpxchg16b"]
        {
            assert!(counts.contains_key(mnemonic), "{mnemonic}");
        }
    } else {
        skip_part!("completed", "hardware runs ring 0 here, and completes nothing for it");
    }
}

#[test]
fn faults_of_completed_instructions_reach_the_guest() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov rax, cr4",
        "or eax, 0x600",
        "mov cr4, rax",
        "mov ebx, 0x180008",
        "xor r12d, r12d",
        "pxor xmm0, xmm0",
        "addps xmm0, [rbx]", // #GP: unaligned
        "shl rbx, 20",
        "popcnt rax, [rbx]", // #PF: not mapped
        "push 0x1d80",       // divide by zero unmasked
        "ldmxcsr [rsp]",
        "pop rax",
        "mov eax, 1",
        "cvtsi2ss xmm1, eax",
        "divss xmm1, xmm0", // #XM
        "stmxcsr [rsp - 8]",
        "mov r14d, [rsp - 8]",
        "hlt",
        ".org 220b + 0x100",
        "mov r9, cr2",
        "shl r12, 8",
        "or r12, 13",
        "add rsp, 8",
        "add qword ptr [rsp], 3", // the length of addps
        "iretq",
        ".org 220b + 0x140",
        "mov r9, cr2",
        "shl r12, 8",
        "or r12, 14",
        "pop r13",
        "add qword ptr [rsp], 5", // the length of popcnt
        "iretq",
        ".org 220b + 0x180",
        "shl r12, 8",
        "or r12, 19",
        "add qword ptr [rsp], 4", // the length of divss
        "iretq",
    );
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let base = layout::KERNEL_START;
    for (vector, handler) in [(13, base + 0x100), (14, base + 0x140), (19, base + 0x180)] {
        let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | handler >> 16 << 48;
        machine.ram().write(GuestAddress(0x3000 + 16 * vector), &gate.to_le_bytes()).unwrap();
    }
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.idt.base, sregs.idt.limit) = (0x3000, 0xfff);
    vcpu.set_sregs(&sregs).unwrap();
    let mut completer = Completer::default();
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
    let regs = vcpu.regs().unwrap();
    assert_eq!(regs.r12, 13 << 16 | 14 << 8 | 19, "the vectors, in order");
    assert_eq!((regs.r9, regs.r13), (0x180008 << 20, 0), "cr2 and the page fault's error code");
    assert_eq!(regs.r14 & 0x3f, 4, "MXCSR names the exception");
}
