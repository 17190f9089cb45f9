//! The `xsave` family, compared with this machine's CPU, as far as ring 3 has it.

use std::arch::asm;

use proptest::prelude::*;
use umbra_skip::{need_cpu, skip};

use super::super::state;
use super::*;

/// Where the guest's area is, across pages.
const AREA: u64 = 0x2fc0;

/// Executes `$save` on this CPU with the extended state `state`, into `to`, for the components in
/// `mask`.
macro_rules! on_host {
    ($save:literal, $state:expr, $to:expr, $mask:expr) => {{
        let mut host = XsaveArea::default();
        // SAFETY: the state of x87, SSE and AVX is put back; the areas are large enough, and their
        // headers are in order. No x87 exception is pending.
        unsafe {
            asm!(
                "xsave64 [{host}]",
                "xrstor64 [{state}]",
                "mov eax, {mask:e}",
                concat!($save, " [{to}]"),
                "mov eax, 7",
                "xrstor64 [{host}]",
                host = in(reg) &raw mut host, state = in(reg) &raw const *$state,
                to = in(reg) &raw mut *$to, mask = in(reg) $mask as u32,
                inout("eax") 7 => _, in("edx") 0,
            );
        }
    }};
}

/// An extended state as KVM gives it.
fn area() -> impl Strategy<Value = Box<XsaveArea>> {
    let parts = (0u8..8, any::<[[u8; 16]; 32]>(), 0u32..0x1_0000, any::<u8>());
    parts.prop_map(|(components, vectors, mxcsr, tags)| {
        let mut area = Box::new(XsaveArea::default());
        // As this CPU has it: the mask of MXCSR.
        on_host!("xsave64", &XsaveArea::default(), &mut *area, 7);
        area.0[160..416].copy_from_slice(vectors[..16].as_flattened());
        area.0[576..832].copy_from_slice(vectors[16..].as_flattened());
        area.0[4] = tags;
        area.0[32..42].copy_from_slice(&vectors[0][..10]);
        area.0[512] = components;
        let mxcsr = if mxcsr & 0x8000 == 0 { mxcsr } else { 0x1f80 };
        area.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        state::fill_in(&mut area);
        area.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        // KVM gives 0x1f80 where neither SSE nor AVX is in use.
        if components & 6 == 0 {
            area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        }
        area
    })
}

fn saving_cpu(area: &XsaveArea) -> FakeCpu {
    let mut c = FakeCpu { area: *area, ..cpu() };
    c.sregs.cr4 = CR4_OSXSAVE | CR4_OSFXSR;
    c.regs.rbx = AREA;
    c
}

#[test]
fn saves_write_what_the_cpu_writes() {
    need_cpu!("avx", "xsavec", "xsaveopt");
    let ram = ram();
    let masks = (0u32..16, 0u8..8);
    proptest!(ProptestConfig::with_cases(64), |(state in area(), (mask, old_header) in masks)| {
        let mut before = XsaveArea([0xa5; 4096]);
        before.0[512..576].fill(0);
        before.0[512] = old_header;
        let reference = || {
            let mut expected = [before; 3];
            on_host!("xsave64", &*state, &mut expected[0], mask);
            on_host!("xsaveopt64", &XsaveArea(state.0), &mut expected[1], mask);
            on_host!("xsavec64", &*state, &mut expected[2], mask);
            expected
        };
        let instructions = [
            [0x48, 0x0f, 0xae, 0x23], // xsave64 [rbx]
            [0x48, 0x0f, 0xae, 0x33], // xsaveopt64 [rbx]
            [0x48, 0x0f, 0xc7, 0x23], // xsavec64 [rbx]
        ];
        for (i, bytes) in instructions.into_iter().enumerate() {
            let mut c = saving_cpu(&state);
            c.regs.rax = mask.into();
            ram.write(GuestAddress(AREA), &before.0).unwrap();
            prop_assert_eq!(run_in(&mut c, &ram, &bytes).is_ok(), true);
            let mut got = XsaveArea::default();
            ram.read(GuestAddress(AREA), &mut got.0).unwrap();
            let differ = || -> Vec<_> {
                let expected = &reference()[i];
                let bytes = (0..4096).filter(|at| got.0[*at] != expected.0[*at]);
                bytes.map(|at| (at, got.0[at], expected.0[at])).collect()
            };
            // If the host switches to another thread between the two instructions of the reference,
            // more may count as in use afterwards. That does not happen each time.
            let same = (0..5).any(|_| differ().is_empty());
            prop_assert!(same, "{bytes:x?} mask {mask} in use {}: {:x?}", state.0[512], differ());
            prop_assert_eq!((c.injected, c.regs.rip), (None, RIP + 4));
        }
    });
}

#[test]
fn restores_load_what_the_cpu_loads() {
    need_cpu!("avx", "xsavec", "xsaveopt");
    let ram = ram();
    let masks = (0u32..8, 0u32..8, any::<bool>());
    let areas = (area(), area());
    proptest!(ProptestConfig::with_cases(64), |((old, new) in areas, of in masks)| {
        let (saved, mask, compact) = of;
        let mut image = XsaveArea::default();
        image.0[24..32].copy_from_slice(&new.0[24..32]);
        if compact {
            on_host!("xsavec64", &*new, &mut image, saved);
        } else {
            on_host!("xsave64", &*new, &mut image, saved);
        }
        // The CPU's state after loading that over the old one.
        let mut expected = XsaveArea::default();
        let (mut host, mut loaded) = (XsaveArea::default(), image);
        // SAFETY: as for `on_host`.
        unsafe {
            asm!(
                "xsave64 [{host}]", "xrstor64 [{old}]", "mov eax, {mask:e}", "xrstor64 [{loaded}]",
                "mov eax, 7", "xsave64 [{expected}]", "xrstor64 [{host}]",
                host = in(reg) &raw mut host, old = in(reg) &raw const *old,
                loaded = in(reg) &raw mut loaded, expected = in(reg) &raw mut expected,
                mask = in(reg) mask,
                inout("eax") 7 => _, in("edx") 0,
            );
        }
        let mut c = saving_cpu(&old);
        c.regs.rax = mask.into();
        ram.write(GuestAddress(AREA), &image.0).unwrap();
        let xrstor64 = [0x48, 0x0f, 0xae, 0x2b]; // [rbx]
        prop_assert_eq!(run_in(&mut c, &ram, &xrstor64).is_ok(), true);
        prop_assert_eq!((c.injected, c.regs.rip), (None, RIP + 4));
        let values = |area: &XsaveArea| [&area.0[..512], &area.0[576..832]].concat();
        let (got, expected) = (values(&c.area), values(&expected));
        let differ: Vec<_> = (0..got.len()).filter(|i| got[*i] != expected[*i]).collect();
        prop_assert!(differ.is_empty(), "saved {saved} mask {mask} compact {compact}: {differ:x?}");
    });
}

#[test]
fn bad_areas_and_states_are_the_guests_exceptions() {
    const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x23];
    const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2b];
    const XRSTORS: [u8; 4] = [0x48, 0x0f, 0xc7, 0x1b];
    let ram = ram();
    type Case<'a> = (&'a str, [u8; 4], fn(&mut FakeCpu, &mut XsaveArea), (u8, Option<u32>));
    let protection = (13, Some(0));
    let cases: [Case; 14] = [
        ("no OSXSAVE", XSAVE, |c, _| c.sregs.cr4 = 0, (6, None)),
        ("TS", XRSTOR, |c, _| c.sregs.cr0 = CR0_TS, (7, None)),
        ("unaligned", XSAVE, |c, _| c.regs.rbx += 16, protection),
        ("unaligned restore", XRSTOR, |c, _| c.regs.rbx += 16, protection),
        ("a component that is off", XRSTOR, |_, a| a.0[513] = 2, protection),
        ("a reserved part", XRSTOR, |_, a| a.0[530] = 1, protection),
        ("a format without its bit", XRSTOR, |_, a| a.0[520] = 1, protection),
        (
            "a compact component that is off",
            XRSTOR,
            |_, a| a.0[520..528].copy_from_slice(&[8, 0, 0, 0, 0, 0, 0, 0x80]),
            protection,
        ),
        (
            "a component that is not in its format",
            XRSTOR,
            |_, a| (a.0[512], a.0[527]) = (1, 0x80),
            protection,
        ),
        (
            "a reserved part of a compact one",
            XRSTOR,
            |_, a| (a.0[527], a.0[575]) = (0x80, 1),
            protection,
        ),
        ("xrstors of the standard format", XRSTORS, |_, _| {}, protection),
        ("xrstors in ring 3", XRSTORS, |c, a| (c.sregs.ss.dpl, a.0[527]) = (3, 0x80), protection),
        ("reserved bits of MXCSR", XRSTOR, |_, a| (a.0[512], a.0[27]) = (2, 0x80), protection),
        (
            "reserved bits of MXCSR, compact",
            XRSTOR,
            |_, a| (a.0[512], a.0[520], a.0[527], a.0[27]) = (2, 2, 0x80, 0x80),
            protection,
        ),
    ];
    for (what, bytes, setting, expected) in cases {
        let mut image = XsaveArea::default();
        let mut c = saving_cpu(&cpu().area);
        let before = c.area.0;
        c.regs.rax = 7;
        setting(&mut c, &mut image);
        ram.write(GuestAddress(AREA), &image.0).unwrap();
        run_in(&mut c, &ram, &bytes).unwrap();
        assert_eq!((c.injected, c.regs.rip), (Some(expected), RIP), "{what}");
        assert_eq!(c.area.0, before, "{what}");
    }
    // In the middle of an area, which is not written at all.
    let mut c = saving_cpu(&cpu().area);
    let last = map(&mut c, &ram, 0, 2);
    ram.write(GuestAddress(last + 8 * 3), &0u64.to_le_bytes()).unwrap();
    ram.write(GuestAddress(AREA), &[0x77; 64]).unwrap();
    c.regs.rax = 7;
    run_in(&mut c, &ram, &XSAVE).unwrap();
    assert_eq!((c.injected, c.sregs.cr2), (Some((14, Some(2))), 0x3000));
    let mut start = [0; 64];
    ram.read(GuestAddress(AREA), &mut start).unwrap();
    assert_eq!(start, [0x77; 64]);
    // Components of the supervisor: saved as never used, not restored.
    let mut c = saving_cpu(&cpu().area);
    c.msrs.borrow_mut().insert(0xda0, 1 << 11);
    c.regs.rax = u64::from(u32::MAX);
    ram.write(GuestAddress(AREA), &[0; 576]).unwrap();
    match run_in(&mut c, &ram, &[0x48, 0x0f, 0xc7, 0x2b]) {
        Ok(_) => assert_eq!(ram.read_u64(GuestAddress(AREA + 520)).unwrap(), 1 << 63 | 0x807),
        // This CPU has no such component, so there is no telling its size.
        Err(error) => assert!(matches!(error, CompleteError::Unknown { .. }), "{error}"),
    }
}

#[test]
fn fxsave_and_mxcsr() {
    let ram = ram();
    let mut state = cpu().area;
    state.0[160..176].copy_from_slice(&[9; 16]);
    state.0[28..32].copy_from_slice(&0x2_ffffu32.to_le_bytes());
    state.0[512] = 3;
    let mut c = saving_cpu(&state);
    c.regs.rbx = AREA + 16;
    ram.write(GuestAddress(AREA), &[0x55; 1024]).unwrap();
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x03]).unwrap(); // fxsave [rbx]
    let mut saved = [0; 512];
    ram.read(GuestAddress(AREA + 16), &mut saved).unwrap();
    assert_eq!((&saved[..416], &saved[416..]), (&state.0[..416], &[0x55; 96][..]));
    // Other values come back by fxrstor.
    saved[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
    saved[176..192].copy_from_slice(&[3; 16]);
    ram.write(GuestAddress(AREA + 16), &saved).unwrap();
    run_in(&mut c, &ram, &[0x48, 0x0f, 0xae, 0x0b]).unwrap(); // fxrstor64 [rbx]
    assert_eq!((c.injected, &c.area.0[160..192]), (None, &saved[160..192]));
    assert_eq!(state::mxcsr(&c.area), 0x9fc0);
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x1b]).unwrap(); // stmxcsr [rbx]
    assert_eq!(ram.read_u64(GuestAddress(AREA + 16)).unwrap() as u32, 0x9fc0);
    ram.write(GuestAddress(AREA + 16), &0x1f81u32.to_le_bytes()).unwrap();
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x13]).unwrap(); // ldmxcsr [rbx]
    assert_eq!((c.injected, state::mxcsr(&c.area)), (None, 0x1f81));
    ram.write(GuestAddress(AREA + 16), &0x8000_0000u32.to_le_bytes()).unwrap();
    for bytes in [&[0x0f, 0xae, 0x13][..], &[0xc5, 0xf8, 0xae, 0x13]] {
        run_in(&mut c, &ram, bytes).unwrap();
        assert_eq!((c.injected, state::mxcsr(&c.area)), (Some((13, Some(0))), 0x1f81));
    }
    c.regs.rbx += 8;
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x03]).unwrap();
    assert_eq!(c.injected, Some((13, Some(0))), "unaligned");
    c.sregs.cr0 = CR0_TS;
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x03]).unwrap();
    assert_eq!(c.injected, Some((7, None)));
    c.sregs.cr4 = 0;
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x13]).unwrap();
    assert_eq!(c.injected, Some((6, None)));
}

#[test]
fn protection_keys() {
    let mut c = saving_cpu(&cpu().area);
    c.regs.rax = 0x5555_5554;
    run(&mut c, &[0x0f, 0x01, 0xef]).unwrap(); // wrpkru
    assert_eq!(c.injected, Some((6, None)), "without CR4.PKE");
    c.sregs.cr4 |= CR4_PKE;
    match run(&mut c, &[0x0f, 0x01, 0xef]) {
        Ok(_) => {}
        Err(error) => {
            assert!(matches!(error, CompleteError::Unknown { .. }), "{error}");
            skip!("this machine's CPU lacks them");
        }
    }
    (c.regs.rax, c.regs.rdx) = (1, 2);
    run(&mut c, &[0x0f, 0x01, 0xee]).unwrap(); // rdpkru
    assert_eq!((c.injected, c.regs.rax, c.regs.rdx), (None, 0x5555_5554, 0));
    c.regs.rcx = 1;
    run(&mut c, &[0x0f, 0x01, 0xee]).unwrap();
    assert_eq!(c.injected, Some((13, Some(0))));
}
