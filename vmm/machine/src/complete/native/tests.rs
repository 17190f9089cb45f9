//! The host's CPU at work for a guest that does not exist, and all that must not reach it.

use std::arch::asm;
use std::cell::RefCell;
use std::collections::BTreeSet;

use iced_x86::{Decoder, DecoderOptions, EncodingKind, Mnemonic, Register};
use proptest::prelude::*;
use umbra_skip::{need_cpu, skip_part};
use vm_memory::GuestAddress;

use super::super::tests::{FakeCpu, RIP, cpu, ram, run_in};
use super::super::{CompleteError, Completer, Cpu, RFLAGS_CF, RFLAGS_ZF};
use super::*;
use crate::complete::{CR0_EM, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE};
use crate::memory::Ram;
use crate::vcpu::XsaveArea;

/// Where the memory operand is.
const DATA: u64 = 0x3000;

/// A guest that has enabled SSE and AVX. Its memory operand is at rbx.
fn vector_cpu() -> FakeCpu {
    let mut c = cpu();
    c.sregs.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    c.regs.rbx = DATA;
    c
}

fn set_xmm(area: &mut XsaveArea, number: usize, value: u128) {
    area.0[160 + 16 * number..][..16].copy_from_slice(&value.to_le_bytes());
    area.0[512] |= 2;
}

fn xmm(area: &XsaveArea, number: usize) -> u128 {
    area.0[160 + 16 * number..][..16].iter().rev().fold(0, |n, b| n << 8 | u128::from(*b))
}

fn floats(values: [f32; 4]) -> u128 {
    values.iter().rev().fold(0, |n, v| n << 32 | u128::from(v.to_bits()))
}

fn host_mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
    value
}

#[test]
fn arithmetic_of_registers_and_memory() {
    let (mut c, ram) = (vector_cpu(), ram());
    set_xmm(&mut c.area, 1, floats([1.0, 2.0, 3.0, 4.0]));
    set_xmm(&mut c.area, 2, floats([0.5, 0.25, 1.0, 8.0]));
    run_in(&mut c, &ram, &[0x0f, 0x58, 0xca]).unwrap(); // addps xmm1, xmm2
    let sum = floats([1.5, 2.25, 4.0, 12.0]);
    assert_eq!((xmm(&c.area, 1), c.regs.rip, c.injected), (sum, RIP + 3, None));
    // The operand is found through rip, gs, an index and 32-bit addresses.
    ram.write(GuestAddress(DATA), &floats([1.0; 4]).to_le_bytes()).unwrap();
    (c.regs.rsi, c.sregs.gs.base) = (0x10, 0x1000);
    let forms: [&[u8]; 4] = [
        &[0x0f, 0x58, 0x0d, 0xf9, 0x2f, 0xf0, 0xff], // addps xmm1, [rip - 0xfd007]
        &[0x65, 0x0f, 0x58, 0x0d, 0xf8, 0x1f, 0xf0, 0xff], // addps xmm1, gs:[rip - 0xfe008]
        &[0x0f, 0x58, 0x8c, 0x73, 0xe0, 0xff, 0xff, 0xff], // addps xmm1, [rbx + 2 * rsi - 32]
        &[0x67, 0x0f, 0x58, 0x0b],                   // addps xmm1, [ebx]
    ];
    for (i, bytes) in forms.into_iter().enumerate() {
        run_in(&mut c, &ram, bytes).unwrap();
        let more = 1.0 + i as f32;
        let expected = floats([1.5 + more, 2.25 + more, 4.0 + more, 12.0 + more]);
        assert_eq!((xmm(&c.area, 1), c.injected), (expected, None), "{bytes:x?}");
    }
    assert_eq!(xmm(&c.area, 2), floats([0.5, 0.25, 1.0, 8.0]), "untouched");
}

#[test]
fn general_registers_and_flags() {
    let (mut c, ram) = (vector_cpu(), ram());
    set_xmm(&mut c.area, 3, 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00);
    (c.regs.rax, c.regs.rdx, c.regs.rdi, c.regs.rsp) = (u64::MAX, 7, 0xd1d1, 0x5959);
    run_in(&mut c, &ram, &[0x66, 0x0f, 0x7e, 0xd8]).unwrap(); // movd eax, xmm3
    assert_eq!((c.regs.rax, c.regs.rdx, c.regs.rdi, c.regs.rsp), (0xddee_ff00, 7, 0xd1d1, 0x5959));
    run_in(&mut c, &ram, &[0x66, 0x49, 0x0f, 0x6e, 0xe7]).unwrap(); // movq xmm4, r15
    assert_eq!(xmm(&c.area, 4), 0);
    c.regs.rflags = 0;
    run_in(&mut c, &ram, &[0x66, 0x0f, 0x38, 0x17, 0xe4]).unwrap(); // ptest xmm4, xmm4
    assert_eq!(c.regs.rflags & (RFLAGS_ZF | RFLAGS_CF), RFLAGS_ZF | RFLAGS_CF);
    run_in(&mut c, &ram, &[0x66, 0x0f, 0x38, 0x17, 0xdb]).unwrap(); // ptest xmm3, xmm3
    assert_eq!(c.regs.rflags & RFLAGS_ZF, 0);
    // Implicit operands: rax and rdx are lengths, rcx is the result.
    (c.regs.rax, c.regs.rdx, c.regs.rcx) = (3, 16, 99);
    set_xmm(&mut c.area, 0, u128::from(u32::from_le_bytes(*b"abc\0")));
    set_xmm(&mut c.area, 1, u128::from(u64::from_le_bytes(*b"xyzabcxx")));
    // pcmpestri xmm0, xmm1, 0xc
    run_in(&mut c, &ram, &[0x66, 0x0f, 0x3a, 0x61, 0xc1, 0x0c]).unwrap();
    assert_eq!((c.regs.rcx, c.regs.rflags & RFLAGS_CF), (3, RFLAGS_CF));
}

#[test]
fn ymm_registers() {
    need_cpu!("avx2");
    let (mut c, ram) = (vector_cpu(), ram());
    let numbers: Vec<u8> = (1..=32).collect();
    ram.write(GuestAddress(DATA + 1), &numbers).unwrap();
    c.regs.rbx += 1;
    run_in(&mut c, &ram, &[0xc5, 0xfe, 0x6f, 0x13]).unwrap(); // vmovdqu ymm2, [rbx]
    run_in(&mut c, &ram, &[0xc5, 0xed, 0xfc, 0xda]).unwrap(); // vpaddb ymm3, ymm2, ymm2
    c.regs.rbx += 0xfe0; // across a page
    run_in(&mut c, &ram, &[0xc5, 0xfe, 0x7f, 0x1b]).unwrap(); // vmovdqu [rbx], ymm3
    let mut doubled = [0; 32];
    ram.read(GuestAddress(DATA + 0xfe1), &mut doubled).unwrap();
    assert!(doubled.iter().zip(&numbers).all(|(d, n)| *d == 2 * n), "{doubled:?}");
    assert_eq!(c.area.0[512] & 6, 6);
    assert_eq!(c.area.0[576 + 3 * 16..][..16], doubled[16..], "the upper half of ymm3");
    run_in(&mut c, &ram, &[0xc5, 0xf8, 0x77]).unwrap(); // vzeroupper
    assert!(c.area.0[576..576 + 256].iter().all(|b| *b == 0) || c.area.0[512] & 4 == 0);
    assert_eq!(c.injected, None);
}

#[test]
fn zmm_and_opmask_registers() {
    need_cpu!("avx512f", "avx512vl");
    let (mut c, ram) = (vector_cpu(), ram());
    c.xcr0 = 0xe7;
    let numbers: Vec<u8> = (1..=16u32).flat_map(u32::to_le_bytes).collect();
    ram.write(GuestAddress(DATA), &numbers).unwrap();
    let run = |c: &mut FakeCpu, bytes: &[u8]| run_in(c, &ram, bytes).unwrap();
    // The last instruction's result, as numbers.
    let stored = |c: &mut FakeCpu, store: &[u8]| {
        c.regs.rbx += 0xfe0; // across a page
        run(c, store);
        c.regs.rbx -= 0xfe0;
        let mut bytes = [0; 64];
        ram.read(GuestAddress(DATA + 0xfe0), &mut bytes).unwrap();
        bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>()
    };
    run(&mut c, &[0x62, 0xf1, 0x7e, 0x48, 0x6f, 0x13]); // vmovdqu32 zmm2, [rbx]
    run(&mut c, &[0x62, 0xe1, 0x6d, 0x48, 0xfe, 0xca]); // vpaddd zmm17, zmm2, zmm2
    let doubled = stored(&mut c, &[0x62, 0xe1, 0x7e, 0x48, 0x7f, 0x0b]); // vmovdqu32 [rbx], zmm17
    assert_eq!(doubled, (1..=16).map(|n| 2 * n).collect::<Vec<_>>());
    assert_eq!(c.area.0[512] & 0xc6, 0xc6);
    run(&mut c, &[0x62, 0xf1, 0x6d, 0x58, 0xfe, 0x1b]); // vpaddd zmm3, zmm2, [rbx]{1to16}
    let sums = stored(&mut c, &[0x62, 0xf1, 0x7e, 0x48, 0x7f, 0x1b]); // vmovdqu32 [rbx], zmm3
    assert_eq!(sums, (1..=16).map(|n| n + 1).collect::<Vec<_>>());
    c.regs.rax = 0b101;
    run(&mut c, &[0xc5, 0xf8, 0x92, 0xc8]); // kmovw k1, eax
    run(&mut c, &[0x62, 0xf1, 0x6d, 0xc9, 0xfe, 0xda]); // vpaddd zmm3{k1}{z}, zmm2, zmm2
    let masked = stored(&mut c, &[0x62, 0xf1, 0x7e, 0x48, 0x7f, 0x1b]); // vmovdqu32 [rbx], zmm3
    assert_eq!(masked[..4], [2, 0, 6, 0]);
    assert!(masked[4..].iter().all(|n| *n == 0));
    // vpcmpeqd k2, zmm2, zmm17; kmovw ecx, k2: none is equal to its double.
    run(&mut c, &[0x62, 0xb1, 0x6d, 0x48, 0x76, 0xd1]);
    run(&mut c, &[0xc5, 0xf8, 0x93, 0xca]);
    assert_eq!(c.regs.rcx, 0);
    // vpermi2d ymm8, ymm6, ymm7, which Linux's BLAKE2s uses.
    run(&mut c, &[0x62, 0x72, 0x4d, 0x28, 0x76, 0xc7]);
    assert_eq!(c.injected, None);

    run(&mut c, &[0x62, 0xf1, 0x7d, 0x48, 0x6f, 0x13]); // vmovdqa32 zmm2, [rbx]
    assert_eq!(c.injected, None);
    c.regs.rbx += 32;
    run(&mut c, &[0x62, 0xf1, 0x7d, 0x48, 0x6f, 0x13]);
    assert_eq!(c.injected, Some((13, Some(0))), "unaligned");
    (c.injected, c.xcr0) = (None, 7);
    run(&mut c, &[0x62, 0xf1, 0x6d, 0x48, 0xfe, 0xd2]);
    assert_eq!(c.injected, Some((6, None)), "not enabled");
    (c.injected, c.xcr0) = (None, 7);
    run(&mut c, &[0xc5, 0xf8, 0x92, 0xc8]); // kmovw k1, eax
    assert_eq!(c.injected, Some((6, None)), "a VEX prefix, but not of AVX");
}

#[test]
fn what_the_guest_has_not_enabled_is_its_exception() {
    const ADDPS: &[u8] = &[0x0f, 0x58, 0xca];
    const VADDPS: &[u8] = &[0xc5, 0xf0, 0x58, 0xca];
    type Case<'a> = (&'a [u8], fn(&mut FakeCpu), Option<u8>);
    let cases: [Case; 9] = [
        (ADDPS, |c| c.sregs.cr4 = CR4_OSFXSR, None),
        (ADDPS, |c| c.sregs.cr4 = 0, Some(6)),
        (ADDPS, |c| c.sregs.cr0 = CR0_EM, Some(6)),
        (ADDPS, |c| c.sregs.cr0 = CR0_TS, Some(7)),
        (VADDPS, |c| c.sregs.cr4 = CR4_OSXSAVE, None),
        (VADDPS, |c| c.sregs.cr4 = CR4_OSFXSR, Some(6)),
        (VADDPS, |c| c.xcr0 = 3, Some(6)),
        (VADDPS, |c| c.xcr0 = 1, Some(6)),
        (VADDPS, |c| c.sregs.cr0 = CR0_TS, Some(7)),
    ];
    for (i, (bytes, setting, vector)) in cases.into_iter().enumerate() {
        let mut c = vector_cpu();
        setting(&mut c);
        run_in(&mut c, &ram(), bytes).unwrap();
        let expected = (
            vector.map(|v| (v, None)),
            RIP + if vector.is_some() { 0 } else { bytes.len() as u64 },
        );
        assert_eq!((c.injected, c.regs.rip), expected, "case {i}");
    }
}

#[test]
fn unaligned_operands() {
    let ram = ram();
    let at = |offset: u64, bytes: &[u8]| {
        let mut c = vector_cpu();
        c.regs.rbx = DATA + offset;
        run_in(&mut c, &ram, bytes).unwrap();
        c.injected
    };
    let fault = Some((13, Some(0)));
    let addps: &[u8] = &[0x0f, 0x58, 0x0b];
    let movaps_store: &[u8] = &[0x0f, 0x29, 0x0b];
    let movups: &[u8] = &[0x0f, 0x10, 0x0b];
    let addss: &[u8] = &[0xf3, 0x0f, 0x58, 0x0b];
    let pcmpistri: &[u8] = &[0x66, 0x0f, 0x3a, 0x63, 0x0b, 0];
    let vaddps: &[u8] = &[0xc5, 0xf4, 0x58, 0x0b];
    let vmovaps: &[u8] = &[0xc5, 0xfc, 0x28, 0x0b];
    for (bytes, offset, expected) in [
        (addps, 0, None),
        (addps, 8, fault),
        (movaps_store, 16, None),
        (movaps_store, 1, fault),
        (movups, 1, None),
        (addss, 1, None),
        (pcmpistri, 1, None),
        (vaddps, 1, None),
        (vmovaps, 32, None),
        (vmovaps, 16, fault),
    ] {
        assert_eq!(at(offset, bytes), expected, "{bytes:x?} at {offset}");
    }
}

#[test]
fn floating_point_exceptions() {
    let ram = ram();
    let divided = |mxcsr: u32, by: f32, cr4: u64| {
        let mut c = vector_cpu();
        c.sregs.cr4 = cr4;
        state::set_mxcsr(&mut c.area, mxcsr);
        set_xmm(&mut c.area, 1, floats([1.0; 4]));
        set_xmm(&mut c.area, 2, floats([by; 4]));
        run_in(&mut c, &ram, &[0x0f, 0x5e, 0xca]).unwrap(); // divps xmm1, xmm2
        let computed = xmm(&c.area, 1) != floats([1.0; 4]);
        assert_eq!(c.regs.rip == RIP, c.injected.is_some());
        (c.injected.map(|i| i.0), computed, state::mxcsr(&c.area))
    };
    let all = CR4_OSFXSR | CR4_OSXMMEXCPT;
    let before = host_mxcsr();
    assert_eq!(divided(0x1f80, 2.0, all), (None, true, 0x1f80));
    assert_eq!(divided(0x1f80, 3.0, all), (None, true, 0x1fa0), "inexact");
    assert_eq!(divided(0x1f80, 0.0, all), (None, true, 0x1f84), "divide by zero");
    assert_eq!(divided(0x1d81, 0.0, all), (Some(19), false, 0x1d85), "divide by zero, unmasked");
    assert_eq!(divided(0x1d80, 0.0, CR4_OSFXSR), (Some(6), false, 0x1d84), "without OSXMMEXCPT");
    assert_eq!(divided(0x0f80, 3.0, all), (Some(19), false, 0x0fa0), "inexact, unmasked");
    assert_eq!(divided(0x7f80, 3.0, all).2, 0x7fa0, "the rounding mode stays the guest's");
    assert_eq!(host_mxcsr(), before);
}

#[test]
fn what_does_not_go_to_the_host() {
    let refused: [(&str, &[u8]); 15] = [
        ("maskmovdqu", &[0x66, 0x0f, 0xf7, 0xc1]),
        ("maskmovq", &[0x0f, 0xf7, 0xc1]),
        ("vmaskmovps", &[0xc4, 0xe2, 0x75, 0x2c, 0x03]),
        ("vpmaskmovd", &[0xc4, 0xe2, 0x75, 0x8e, 0x03]),
        ("vpgatherdd", &[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x23]),
        ("vpaddd", &[0x62, 0xf1, 0x6d, 0x49, 0xfe, 0x1b]), // zmm3{k1}, zmm2, [rbx]
        ("movd", &[0x66, 0x0f, 0x6e, 0xc4]),               // from esp
        ("movq", &[0x66, 0x48, 0x0f, 0x7e, 0xc4]),         // to rsp
        ("paddb", &[0x0f, 0xfc, 0xc1]),                    // MMX
        ("fadd", &[0xd8, 0xc1]),
        ("vmread", &[0x0f, 0x78, 0xc1]),
        ("syscall", &[0x0f, 0x05]),
        ("call", &[0xff, 0xd0]),
        ("mov", &[0x0f, 0x22, 0xd8]), // cr3
        ("add", &[0x01, 0xc8]),
    ];
    for (name, bytes) in refused {
        let mut c = vector_cpu();
        let before = c.regs;
        let error = run_in(&mut c, &ram(), bytes).unwrap_err();
        assert!(
            matches!(&error, CompleteError::Unknown { mnemonic, .. } if mnemonic == name),
            "{error}"
        );
        assert_eq!((c.regs, c.injected), (before, None), "{name}");
    }
    // 32-bit code.
    let mut c = vector_cpu();
    (c.sregs.cs.l, c.sregs.cs.db) = (0, 1);
    assert!(matches!(
        run_in(&mut c, &ram(), &[0x0f, 0x58, 0xca]),
        Err(CompleteError::Unknown { .. })
    ));
}

/// Checks, independently of [`class`], that the instruction touches only what it may.
fn check(bytes: &[u8], plan: &Plan) {
    let moved = Decoder::with_ip(64, &plan.bytes, 0, DecoderOptions::NONE).decode();
    assert_eq!(moved.len(), plan.bytes.len(), "{bytes:x?}");
    let evex = moved.encoding() == EncodingKind::EVEX;
    assert!(
        evex || matches!(moved.encoding(), EncodingKind::Legacy | EncodingKind::VEX),
        "{bytes:x?}"
    );
    assert!(plan.len == 0 || !moved.has_op_mask(), "{bytes:x?}");
    let text = format!("{:?}", moved.code());
    for part in
        ["_mmm", "_mm_", "_sti", "vm32", "vm64", "rel", "moffs", "m80", "Xsave", "Fxsave", "mxcsr"]
    {
        assert!(!text.contains(part), "{bytes:x?}: {text}");
    }
    assert_eq!(moved.memory_index(), Register::None, "{bytes:x?}");
    assert_eq!(moved.memory_displacement64(), 0, "{bytes:x?}");
    assert_eq!(moved.segment_prefix(), Register::None, "{bytes:x?}");
    assert!([Register::None, plan.pointer].contains(&moved.memory_base()), "{bytes:x?}");
    assert!(plan.len <= 64);
}

/// Runs `bytes` and checks that memory outside the operand is as before. If the instruction is
/// accepted, it returns whether this CPU has it.
fn harmless(ram: &Ram, completer: &mut Completer, bytes: &[u8], c: &mut FakeCpu) -> Option<bool> {
    let instruction = Decoder::with_ip(64, bytes, RIP, DecoderOptions::NONE).decode();
    let plan = class::plan(&instruction)?;
    check(bytes, &plan);
    c.regs.rip = RIP;
    let (rsp, mxcsr) = (c.regs.rsp, host_mxcsr());
    let _ = completer.complete(c, ram, bytes);
    assert_eq!((c.regs.rsp, host_mxcsr()), (rsp, mxcsr), "{bytes:x?}");
    Some(plan.supported)
}

/// Every opcode in every map, with every prefix that selects an instruction: accepted ones run on
/// this CPU (a signal would end the test), and their results go to the guest.
#[test]
fn every_allowed_opcode_runs() {
    let ram = ram();
    let mut completer = Completer::default();
    let (mut seen, mut ran) = (BTreeSet::<Mnemonic>::new(), BTreeSet::new());
    let mut run = |bytes: &[u8]| {
        let mut c = vector_cpu();
        c.xcr0 = 0xe7;
        for register in 0..16 {
            set_xmm(&mut c.area, register, 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210 << register);
        }
        if let Some(supported) = harmless(&ram, &mut completer, bytes, &mut c) {
            let mnemonic =
                Decoder::with_ip(64, bytes, RIP, DecoderOptions::NONE).decode().mnemonic();
            seen.insert(mnemonic);
            if supported {
                ran.insert(mnemonic);
            }
        }
    };
    for opcode in 0..=255 {
        // Registers only; memory at rbx.
        for modrm in (0xc1..=0xff).step_by(8).chain((0x03..=0x3b).step_by(8)) {
            for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3], &[0x66, 0xf2]] {
                for rex in [&[][..], &[0x48]] {
                    for map in [&[0x0f][..], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                        run(&[prefix, rex, map, &[opcode, modrm, 0x05, 0, 0, 0, 0]].concat());
                    }
                }
            }
            for map in 1..=3 {
                for last in 0..=0xff_u8 {
                    // W, vvvv = xmm0 or xmm1, L and pp.
                    if matches!(last >> 3 & 0xf, 0xf | 0xe) {
                        run(&[0xc4, 0xe0 | map, last, opcode, modrm, 0x05, 0, 0, 0, 0]);
                    }
                }
                // W and pp; then 128, 256 and 512 bits, the first and last with one number for all,
                // with a mask k1, and zeroes where it has none.
                for (w, pp) in (0..2).flat_map(|w| (0..4).map(move |pp| (w, pp))) {
                    for last in [0x08, 0x28, 0x48, 0x18, 0x58, 0x49, 0xc9] {
                        run(&[
                            0x62,
                            0xf0 | map,
                            w << 7 | 0x74 | pp,
                            last,
                            opcode,
                            modrm,
                            0x05,
                            0,
                            0,
                            0,
                            0,
                        ]);
                    }
                }
            }
        }
    }
    let lacking = seen.difference(&ran).count();
    if lacking > 0 {
        let all = seen.len();
        skip_part!("others", "this machine's CPU lacks {lacking} of {all} mnemonics let through");
    }
    for expected in
        [Mnemonic::Addps, Mnemonic::Pshufb, Mnemonic::Movd, Mnemonic::Vpaddb, Mnemonic::Aesenc]
    {
        assert!(seen.contains(&expected), "{expected:?}");
    }
    for expected in [Mnemonic::Vpermi2d, Mnemonic::Vprord, Mnemonic::Kmovw, Mnemonic::Vpternlogd] {
        assert!(seen.contains(&expected), "{expected:?}");
    }
}

#[test]
fn random_bytes_do_no_harm() {
    let ram = ram();
    let completer = RefCell::new(Completer::default());
    let opcode = prop_oneof![
        Just(vec![]),
        Just(vec![0x0f]),
        Just(vec![0x0f, 0x38]),
        Just(vec![0x0f, 0x3a]),
        Just(vec![0xc4]),
        Just(vec![0xc5]),
        Just(vec![0x66, 0x0f]),
        Just(vec![0xf3, 0x0f]),
        Just(vec![0x62])
    ];
    let strategy = (
        opcode,
        proptest::collection::vec(any::<u8>(), 1..15),
        any::<[u64; 4]>(),
        any::<[u8; 4]>(),
    );
    proptest!(ProptestConfig::with_cases(20_000), |((start, rest, numbers, modes) in strategy)| {
        let bytes = [start, rest].concat();
        let mut completer = completer.borrow_mut();
        let mut c = vector_cpu();
        [c.regs.rax, c.regs.rbx, c.regs.rcx, c.regs.rdi] = numbers;
        c.area.0[24..28].copy_from_slice(&(numbers[0] as u32 & 0xffff).to_le_bytes());
        c.sregs.cs.l = u8::from(modes[0] % 8 != 0);
        c.xcr0 = if modes[0] % 2 == 0 { 7 } else { 0xe7 };
        c.sregs.ss.dpl = if modes[1] % 4 == 0 { 3 } else { 0 };
        c.sregs.cr4 ^= u64::from(modes[2]) << 11 | u64::from(modes[3]) << 16;
        harmless(&ram, &mut completer, &bytes, &mut c);
        c.regs.rip = RIP;
        let _ = completer.complete(&mut c, &ram, &bytes[..bytes.len().min(15)]);
    });
}

#[test]
fn those_that_follow_are_done_at_once() {
    let (mut c, ram) = (vector_cpu(), ram());
    let code = [
        &[0x0f, 0x58, 0xca][..], // addps xmm1, xmm2
        &[0x0f, 0x58, 0xca],
        &[0x0f, 0x29, 0x0b],       // movaps [rbx], xmm1
        &[0x66, 0x0f, 0xef, 0xc9], // pxor xmm1, xmm1
        &[0x0f, 0x29, 0x0e],       // movaps [rsi], xmm1: unaligned
    ]
    .concat();
    ram.write(GuestAddress(RIP), &code).unwrap();
    set_xmm(&mut c.area, 2, floats([1.0; 4]));
    c.regs.rsi = 1;
    let mut completer = Completer::default();
    completer.complete(&mut c, &ram, &code[..3]).unwrap();
    assert_eq!((c.regs.rip, c.injected), (RIP + 13, None));
    assert_eq!(xmm(&c.area, 1), 0);
    let mut stored = [0; 16];
    ram.read(GuestAddress(DATA), &mut stored).unwrap();
    assert_eq!(u128::from_le_bytes(stored), floats([2.0; 4]));
    let counts: Vec<_> = completer.counts().iter().map(|(n, c)| (*n, *c)).collect();
    assert_eq!(counts, [("addps", 2), ("movaps", 1), ("pxor", 1)]);
    completer.complete(&mut c, &ram, &code[13..]).unwrap();
    assert_eq!((c.regs.rip, c.injected), (RIP + 13, Some((13, Some(0)))));
    // Not in single steps.
    let mut c = vector_cpu();
    c.regs.rflags |= 1 << 8;
    completer.complete(&mut c, &ram, &code[..3]).unwrap();
    assert_eq!((c.regs.rip, c.stepped), (RIP + 3, true));
    assert!(c.xsave().is_ok());
}
