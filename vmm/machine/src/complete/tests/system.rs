//! Exceptions, flags and system registers.

use super::*;

#[test]
fn exceptions() {
    let mut c = cpu();
    run(&mut c, &[0xcc]).unwrap();
    assert_eq!((c.injected, c.regs.rip), (Some((3, None)), RIP + 1));
    run(&mut c, &[0xf1]).unwrap();
    assert_eq!((c.injected, c.regs.rip), (Some((1, None)), RIP + 1));
    for undefined in [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0]] {
        run(&mut c, undefined).unwrap();
        assert_eq!((c.injected, c.regs.rip), (Some((6, None)), RIP), "{undefined:x?}");
    }
    run(&mut c, &[0xcd, 0x80]).unwrap();
    assert_eq!((c.interrupt, c.injected, c.regs.rip), (Some(0x80), None, RIP + 2));
    c.sregs.ss.dpl = 3;
    assert!(matches!(run(&mut c, &[0xcd, 0x80]), Err(CompleteError::Unknown { .. })));
}

#[test]
fn what_only_ring_0_may_do() {
    let privileged: [(&[u8], u8); 7] = [
        (&[0x0f, 0x01, 0xcb], 6),              // stac
        (&[0x0f, 0x01, 0xca], 6),              // clac
        (&[0x0f, 0x01, 0xc8], 6),              // monitor
        (&[0x0f, 0x01, 0xd1], 13),             // xsetbv
        (&[0x0f, 0x01, 0xf8], 13),             // swapgs
        (&[0xf3, 0x0f, 0x09], 13),             // wbnoinvd
        (&[0x66, 0x0f, 0x38, 0x82, 0x03], 13), // invpcid rax, [rbx]
    ];
    for (bytes, vector) in privileged {
        let mut c = cpu();
        (c.sregs.ss.dpl, c.sregs.cr4, c.regs.rax) = (3, CR4_OSXSAVE, 1);
        run(&mut c, bytes).unwrap();
        assert_eq!(c.injected.map(|(v, _)| v), Some(vector), "{bytes:x?}");
        assert_eq!((c.regs.rip, c.xcr0, c.sregs_set), (RIP, 7, 0), "{bytes:x?}");
    }
}

#[test]
fn flags_and_system_registers() {
    let mut c = cpu();
    run(&mut c, &[0x0f, 0x01, 0xcb]).unwrap(); // stac
    assert_eq!((c.regs.rflags, c.regs.rip), (RFLAGS_AC, RIP + 3));
    run(&mut c, &[0x0f, 0x01, 0xca]).unwrap(); // clac
    assert_eq!(c.regs.rflags, 0);
    run(&mut c, &[0x0f, 0x01, 0xd0]).unwrap(); // xgetbv without OSXSAVE
    assert_eq!(c.injected, Some((6, None)));
    c.sregs.cr4 = CR4_OSXSAVE;
    c.xcr0 = 0x2_0000_0007;
    run(&mut c, &[0x0f, 0x01, 0xd0]).unwrap();
    assert_eq!((c.regs.rax, c.regs.rdx), (7, 2));
    (c.regs.rax, c.regs.rdx) = (3, 0);
    run(&mut c, &[0x0f, 0x01, 0xd1]).unwrap(); // xsetbv
    assert_eq!((c.xcr0, c.injected), (3, None));
    c.regs.rax = 2;
    run(&mut c, &[0x0f, 0x01, 0xd1]).unwrap(); // without x87, which KVM refuses
    assert_eq!((c.xcr0, c.injected), (3, Some((13, Some(0)))));
    c.regs.rcx = 1;
    for bytes in [[0x0f, 0x01, 0xd0], [0x0f, 0x01, 0xd1]] {
        run(&mut c, &bytes).unwrap();
        assert_eq!(c.injected, Some((13, Some(0))), "no such register");
    }
    c.sregs.gs.base = 1;
    c.msrs.borrow_mut().insert(0xc000_0102, 2);
    run(&mut c, &[0x0f, 0x01, 0xf8]).unwrap(); // swapgs
    assert_eq!((c.sregs.gs.base, c.msrs.borrow()[&0xc000_0102]), (2, 1));
    c.msrs.borrow_mut().extend([(0x10, 0x7_0000_0009), (0xc000_0103, 5)]);
    run(&mut c, &[0x0f, 0x01, 0xf9]).unwrap(); // rdtscp
    assert_eq!((c.regs.rax, c.regs.rdx, c.regs.rcx), (9, 7, 5));
    run(&mut c, &[0xf3, 0x0f, 0xc7, 0xfb]).unwrap(); // rdpid rbx
    assert_eq!(c.regs.rbx, 5);
}

#[test]
fn segment_bases() {
    let mut c = cpu();
    (c.sregs.fs.base, c.sregs.gs.base, c.regs.rax) = (0x1_2345_6789, 0xabcd, u64::MAX);
    run(&mut c, &[0xf3, 0x48, 0x0f, 0xae, 0xc0]).unwrap(); // rdfsbase rax
    assert_eq!(c.injected, Some((6, None)), "without CR4.FSGSBASE");
    c.sregs.cr4 = CR4_FSGSBASE;
    run(&mut c, &[0xf3, 0x48, 0x0f, 0xae, 0xc0]).unwrap();
    assert_eq!(c.regs.rax, 0x1_2345_6789);
    run(&mut c, &[0xf3, 0x0f, 0xae, 0xc0]).unwrap(); // rdfsbase eax
    assert_eq!(c.regs.rax, 0x2345_6789);
    run(&mut c, &[0xf3, 0x48, 0x0f, 0xae, 0xc8]).unwrap(); // rdgsbase rax
    assert_eq!(c.regs.rax, 0xabcd);
    c.regs.rbx = 0xffff_8000_0000_1234;
    run(&mut c, &[0xf3, 0x48, 0x0f, 0xae, 0xd3]).unwrap(); // wrfsbase rbx
    run(&mut c, &[0xf3, 0x0f, 0xae, 0xdb]).unwrap(); // wrgsbase ebx
    assert_eq!((c.sregs.fs.base, c.sregs.gs.base), (0xffff_8000_0000_1234, 0x1234));
    c.regs.rbx = 1 << 60;
    run(&mut c, &[0xf3, 0x48, 0x0f, 0xae, 0xd3]).unwrap();
    assert_eq!((c.injected, c.sregs.fs.base), (Some((13, Some(0))), 0xffff_8000_0000_1234));
}

#[test]
fn instructions_without_effect_are_passed() {
    let skipped: [&[u8]; 29] = [
        &[0x9b],                         // fwait
        &[0x0f, 0xae, 0xe8],             // lfence
        &[0x0f, 0xae, 0xf0],             // mfence
        &[0x0f, 0xae, 0xf8],             // sfence
        &[0x0f, 0x01, 0xe8],             // serialize
        &[0x0f, 0x01, 0xc8],             // monitor
        &[0x0f, 0x01, 0xc9],             // mwait
        &[0x0f, 0xae, 0x3b],             // clflush [rbx]
        &[0x66, 0x0f, 0xae, 0x3b],       // clflushopt [rbx]
        &[0x66, 0x0f, 0xae, 0x33],       // clwb [rbx]
        &[0x0f, 0x18, 0x0b],             // prefetcht0 [rbx]
        &[0xf3, 0x0f, 0x09],             // wbnoinvd
        &[0xf3, 0x90],                   // pause
        &[0x0f, 0x1f, 0x03],             // nop [rbx]
        &[0x66, 0x0f, 0xae, 0xf1],       // tpause ecx
        &[0xf3, 0x0f, 0x1e, 0xfa],       // endbr64
        &[0xf3, 0x0f, 0x1e, 0xfb],       // endbr32
        &[0xf3, 0x0f, 0x1e, 0xc8],       // rdsspd eax
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8], // rdsspq rax
        &[0x0f, 0x18, 0x03],             // prefetchnta [rbx]
        &[0x0f, 0x18, 0x13],             // prefetcht1 [rbx]
        &[0x0f, 0x18, 0x1b],             // prefetcht2 [rbx]
        &[0x0f, 0x0d, 0x03],             // prefetch [rbx]
        &[0x0f, 0x0d, 0x0b],             // prefetchw [rbx]
        &[0x0f, 0x0d, 0x13],             // prefetchwt1 [rbx]
        &[0x0f, 0x18, 0x3d, 0, 0, 0, 0], // prefetchit0 [rip]
        &[0x0f, 0x18, 0x35, 0, 0, 0, 0], // prefetchit1 [rip]
        &[0x0f, 0x1c, 0x03],             // cldemote [rbx]
        &[0x90],                         // nop
    ];
    for bytes in skipped {
        let mut c = cpu();
        c.regs.rbx = 0x4000_0000; // no RAM, as of a device
        let before = kvm_regs { rip: RIP + bytes.len() as u64, ..c.regs };
        run(&mut c, bytes).unwrap();
        assert_eq!((c.regs, c.injected, c.sregs_set), (before, None, 0), "{bytes:x?}");
    }
    let mut c = cpu();
    run(&mut c, &[0x0f, 0x00, 0xe8]).unwrap(); // verw ax
    assert_eq!((c.regs.rflags, c.regs.rip), (RFLAGS_ZF, RIP + 3));
    // A line that is not mapped.
    let ram = ram();
    map(&mut c, &ram, 0, 0);
    c.regs.rbx = 0x4000_0000;
    run_in(&mut c, &ram, &[0x0f, 0xae, 0x3b]).unwrap();
    assert_eq!(c.injected, Some((14, Some(0))));
}

#[test]
fn random_numbers() {
    let mut seen = std::collections::BTreeSet::new();
    for bytes in [[0x48, 0x0f, 0xc7, 0xf0], [0x48, 0x0f, 0xc7, 0xf8]] {
        let mut c = cpu();
        c.regs.rflags = RFLAGS_STATUS;
        run(&mut c, &bytes).unwrap(); // rdrand rax, rdseed rax
        assert_eq!(c.regs.rflags, RFLAGS_CF);
        seen.insert(c.regs.rax);
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn invpcid_flushes_everything_or_faults() {
    const INVPCID: [u8; 5] = [0x66, 0x0f, 0x38, 0x82, 0x03]; // invpcid rax, [rbx]
    let ram = ram();
    let flushed = |kind, pcid: u64, address: u64| {
        let mut c = cpu();
        (c.regs.rax, c.regs.rbx, c.sregs.cr4) = (kind, 0x2000, CR4_PGE);
        ram.write(GuestAddress(0x2000), &pcid.to_le_bytes()).unwrap();
        ram.write(GuestAddress(0x2008), &address.to_le_bytes()).unwrap();
        run_in(&mut c, &ram, &INVPCID).unwrap();
        assert_eq!(c.sregs.cr4, CR4_PGE);
        (c.injected, c.sregs_set)
    };
    for kind in 0..4 {
        assert_eq!(flushed(kind, 0xfff, 0x1000), (None, 2), "{kind}");
    }
    let refused = (Some((13, Some(0))), 0);
    assert_eq!(flushed(4, 0, 0), refused);
    assert_eq!(flushed(0, 0x1000, 0), refused);
    assert_eq!(flushed(0, 0, 1 << 60), refused);
    assert_eq!(flushed(2, u64::MAX, u64::MAX), (None, 2), "the descriptor is not looked at");
}

#[test]
fn single_steps_and_interrupt_shadows_end() {
    for (bytes, steps) in
        [(&[0x0f, 0x01, 0xca][..], true), (&[0xcc], false), (&[0xcd, 0x80], false)]
    {
        let mut c = cpu();
        (c.regs.rflags, c.shadowed) = (RFLAGS_TF | RFLAGS_RF, true);
        run(&mut c, bytes).unwrap(); // clac, int3, int 0x80
        assert_eq!((c.stepped, c.shadowed, c.regs.rflags), (steps, false, RFLAGS_TF), "{bytes:x?}");
    }
    // A fault is no completed instruction.
    let mut c = cpu();
    (c.regs.rflags, c.shadowed) = (RFLAGS_TF, true);
    run(&mut c, &[0x0f, 0x0b]).unwrap();
    assert_eq!((c.stepped, c.shadowed), (false, true));
}
