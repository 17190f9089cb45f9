//! Completion on registers and memory without a vCPU.

mod integer;
mod state;
mod system;

use std::cell::RefCell;
use std::collections::BTreeMap;

use vm_memory::GuestAddress;

use super::*;
use crate::layout;

/// Where instructions are.
pub(super) const RIP: u64 = 0x10_0000;

#[derive(Default)]
pub(super) struct FakeCpu {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    msrs: RefCell<BTreeMap<u32, u64>>,
    pub xcr0: u64,
    pub area: XsaveArea,
    pub injected: Option<(u8, Option<u32>)>,
    interrupt: Option<u8>,
    pub stepped: bool,
    shadowed: bool,
    /// How often control registers were set.
    sregs_set: u32,
}

impl Cpu for FakeCpu {
    fn regs(&self) -> Result<kvm_regs, VcpuError> {
        Ok(self.regs)
    }
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError> {
        self.regs = *regs;
        Ok(())
    }
    fn sregs(&self) -> Result<kvm_sregs, VcpuError> {
        Ok(self.sregs)
    }
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError> {
        self.sregs = *sregs;
        self.sregs_set += 1;
        Ok(())
    }
    fn msr(&self, index: u32) -> Result<u64, VcpuError> {
        Ok(self.msrs.borrow().get(&index).copied().unwrap_or(0))
    }
    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError> {
        self.msrs.borrow_mut().insert(index, value);
        Ok(())
    }
    fn xcr0(&self) -> Result<u64, VcpuError> {
        Ok(self.xcr0)
    }
    fn set_xcr0(&mut self, value: u64) -> Result<(), VcpuError> {
        if value & 1 == 0 {
            return Err(VcpuError::NoMsr { index: 0 });
        }
        self.xcr0 = value;
        Ok(())
    }
    fn xsave(&self) -> Result<Box<XsaveArea>, VcpuError> {
        Ok(Box::new(self.area))
    }
    fn set_xsave(&mut self, area: &XsaveArea) -> Result<(), VcpuError> {
        self.area = *area;
        Ok(())
    }
    fn inject_exception(&mut self, vector: u8, error: Option<u32>) -> Result<(), VcpuError> {
        self.injected = Some((vector, error));
        Ok(())
    }
    fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.interrupt = Some(vector);
        Ok(())
    }
    fn inject_single_step(&mut self) -> Result<(), VcpuError> {
        self.stepped = true;
        Ok(())
    }
    fn end_interrupt_shadow(&mut self) -> Result<(), VcpuError> {
        self.shadowed = false;
        Ok(())
    }
}

/// A CPU in 64-bit mode without paging (which does not exist, but keeps the tests short).
pub(super) fn cpu() -> FakeCpu {
    let mut cpu = FakeCpu { xcr0: 7, ..Default::default() };
    cpu.sregs.efer = EFER_LMA;
    cpu.sregs.cs.l = 1;
    cpu.regs.rip = RIP;
    // As at reset.
    cpu.area.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    cpu.area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    cpu
}

pub(super) fn ram() -> Ram {
    Ram::new(layout::MIN_MEMORY).unwrap()
}

fn run(cpu: &mut FakeCpu, bytes: &[u8]) -> Result<&'static str, CompleteError> {
    run_in(cpu, &ram(), bytes)
}

/// Completes `bytes` at [`RIP`].
pub(super) fn run_in(
    cpu: &mut FakeCpu,
    ram: &Ram,
    bytes: &[u8],
) -> Result<&'static str, CompleteError> {
    cpu.regs.rip = RIP;
    cpu.injected = None;
    Completer::default().complete(cpu, ram, bytes)
}

/// Page tables for `cpu`: the first 2 MiB are mapped at `base`, 4 KiB each, with `rights` beside
/// present. Returns where the last-level table is.
fn map(cpu: &mut FakeCpu, ram: &Ram, base: u64, rights: u64) -> u64 {
    const TABLES: u64 = 0x18_0000;
    cpu.sregs.cr0 |= 1 << 31 | CR0_WP;
    cpu.sregs.cr3 = TABLES;
    let put = |gpa: u64, value: u64| ram.write(GuestAddress(gpa), &value.to_le_bytes()).unwrap();
    for level in 0..3 {
        let index = base >> (39 - 9 * level) & 0x1ff;
        put(TABLES + 4096 * level + 8 * index, (TABLES + 4096 * (level + 1)) | 7);
    }
    let last = TABLES + 3 * 4096;
    for page in 0..512 {
        put(last + 8 * page, page << 12 | 1 | rights);
    }
    last
}

#[test]
fn what_is_not_known_is_named() {
    let mut c = cpu();
    let error = run(&mut c, &[0x0f, 0xa2, 0xc1, 0x90]).unwrap_err();
    assert_eq!(error.to_string(), "the host cannot execute cpuid (0f a2) at rip 0x100000");
    let error = run(&mut c, &[0x06, 0x06]).unwrap_err();
    assert!(error.to_string().contains("an invalid instruction (06 06)"), "{error}");
    c.regs.rip = 0x1234_5678_9abc;
    let error = Completer::default().complete(&mut c, &ram(), &[]);
    assert!(matches!(error, Err(CompleteError::Fetch { .. })));
    assert_eq!(c.regs.rip, 0x1234_5678_9abc);
}

#[test]
fn instructions_that_kvm_gave_in_part_are_read_from_memory() {
    let (mut c, ram) = (cpu(), ram());
    ram.write(GuestAddress(0x10_1010), &[0xff, 1, 0xff, 0xff]).unwrap();
    (c.regs.rbx, c.regs.rsi) = (0x10_0000, 0x400);
    c.sregs.gs.base = 0x10;
    let mut completer = Completer::default();
    let bytes = [0x65, 0xf3, 0x0f, 0xb8, 0x04, 0xb3]; // popcnt eax, gs:[rbx + 4 * rsi]
    ram.write(GuestAddress(RIP), &bytes).unwrap();
    for given in [0, 1, 5] {
        c.regs.rip = RIP;
        completer.complete(&mut c, &ram, &bytes[..given]).unwrap();
        assert_eq!((c.regs.rax, c.regs.rip), (25, RIP + 6));
    }
    assert_eq!(completer.counts().get("popcnt"), Some(&3));
}

#[test]
fn memory_faults_are_the_guests() {
    const POPCNT: [u8; 4] = [0xf3, 0x0f, 0xb8, 0x03]; // popcnt eax, [rbx]
    const MOVBE: [u8; 4] = [0x0f, 0x38, 0xf1, 0x03]; // movbe [rbx], eax
    const USER: u64 = 4;
    const WRITE: u64 = 2;
    let ram = ram();
    let base = 0xffff_8000_0000_0000u64;
    let kernel = |rights| {
        let mut c = cpu();
        map(&mut c, &ram, base, rights);
        c.regs.rbx = base + 0x5000;
        c
    };
    // (what, its setting, instruction, expected page-fault error code)
    type Case<'a> = (&'a str, u64, fn(&mut FakeCpu), &'a [u8], Option<u32>);
    let cases: &[Case] = &[
        ("read", 0, |_| {}, &POPCNT, None),
        ("write", WRITE, |_| {}, &MOVBE, None),
        ("write protected", 0, |_| {}, &MOVBE, Some(3)),
        ("write protected without CR0.WP", 0, |c| c.sregs.cr0 &= !CR0_WP, &MOVBE, None),
        ("user page", USER, |_| {}, &POPCNT, None),
        ("user page under SMAP", USER, |c| c.sregs.cr4 |= CR4_SMAP, &POPCNT, Some(1)),
        (
            "written user page under SMAP",
            USER | WRITE,
            |c| c.sregs.cr4 |= CR4_SMAP,
            &MOVBE,
            Some(3),
        ),
        (
            "user page under SMAP with AC",
            USER,
            |c| (c.sregs.cr4, c.regs.rflags) = (CR4_SMAP, RFLAGS_AC),
            &POPCNT,
            None,
        ),
        ("kernel page from ring 3", 0, |c| c.sregs.ss.dpl = 3, &POPCNT, Some(5)),
        ("user page from ring 3", USER, |c| c.sregs.ss.dpl = 3, &POPCNT, None),
        (
            "write protected from ring 3 without CR0.WP",
            USER,
            |c| (c.sregs.ss.dpl, c.sregs.cr0) = (3, c.sregs.cr0 & !CR0_WP),
            &MOVBE,
            Some(7),
        ),
        ("unmapped", 0, |c| c.regs.rbx += 1 << 30, &POPCNT, Some(0)),
        ("write to unmapped", 0, |c| c.regs.rbx += 1 << 30, &MOVBE, Some(2)),
    ];
    for (what, rights, setting, bytes, expected) in cases {
        let mut c = kernel(*rights);
        setting(&mut c);
        run_in(&mut c, &ram, bytes).unwrap();
        match expected {
            None => assert_eq!((c.injected, c.regs.rip), (None, RIP + 4), "{what}"),
            Some(code) => {
                assert_eq!((c.injected, c.regs.rip), (Some((14, Some(*code))), RIP), "{what}");
                assert_eq!(c.sregs.cr2, c.regs.rbx, "{what}");
            }
        }
    }
    // Not canonical: #GP, or #SS relative to the stack.
    let mut c = kernel(0);
    c.regs.rbx = 1 << 62;
    run_in(&mut c, &ram, &POPCNT).unwrap();
    assert_eq!(c.injected, Some((13, Some(0))));
    c.regs.rbp = 1 << 62;
    run_in(&mut c, &ram, &[0xf3, 0x0f, 0xb8, 0x45, 0]).unwrap(); // popcnt eax, [rbp]
    assert_eq!(c.injected, Some((12, Some(0))));
    // Mapped, but not RAM: neither a value nor a fault.
    let mut c = cpu();
    c.regs.rbx = 0x4000_0000;
    for bytes in [POPCNT, MOVBE] {
        let error = run_in(&mut c, &ram, &bytes).unwrap_err();
        assert!(
            matches!(error, CompleteError::Operand { source: WalkError::NotRam { .. }, .. }),
            "{error}"
        );
        assert_eq!((c.regs.rip, c.injected), (RIP, None));
    }
}

#[test]
fn an_operand_across_pages_is_written_whole_or_not_at_all() {
    const MOVBE: [u8; 5] = [0x48, 0x0f, 0x38, 0xf1, 0x03]; // movbe [rbx], rax
    let (mut c, ram) = (cpu(), ram());
    let last = map(&mut c, &ram, 0, 2);
    (c.regs.rbx, c.regs.rax) = (0x5ffc, 0x0102_0304_0506_0708);
    let number = || ram.read_u64(GuestAddress(0x5ffc)).unwrap();
    let entry = |page: u64| ram.read_u64(GuestAddress(last + 8 * page)).unwrap();
    ram.write(GuestAddress(last + 8 * 6), &(6u64 << 12 | 1).to_le_bytes()).unwrap();
    run_in(&mut c, &ram, &MOVBE).unwrap();
    assert_eq!((c.injected, c.sregs.cr2, number()), (Some((14, Some(3))), 0x6000, 0));
    assert_eq!(entry(5) & 0x60, 0, "nothing happened to the first page");
    ram.write(GuestAddress(last + 8 * 6), &(6u64 << 12 | 3).to_le_bytes()).unwrap();
    run_in(&mut c, &ram, &MOVBE).unwrap();
    assert_eq!((c.injected, number()), (None, 0x0807_0605_0403_0201));
    assert_eq!((entry(5) & 0x60, entry(6) & 0x60), (0x60, 0x60), "accessed and dirty");
}
