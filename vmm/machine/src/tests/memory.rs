//! Memory: exits for what is not there, memslots, and what the host refuses.

use super::*;

#[test]
fn mmio_reads_and_writes_are_exits() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov ebx, 0x40000000",
        "mov dword ptr [rbx + 4], 0x12345678",
        "mov rcx, [rbx + 8]",
        "movzx edx, byte ptr [rbx + 3]",
        "hlt",
    );
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let mut completer = Completer::default();
    let exit = next(&machine, &mut vcpu, &mut completer);
    let VmExit::MmioWrite { gpa: GuestAddress(0x4000_0004), data } = exit else {
        panic!("{exit:?}")
    };
    assert_eq!(data.as_slice(), 0x1234_5678u32.to_le_bytes());
    let exit = next(&machine, &mut vcpu, &mut completer);
    assert_eq!(exit, VmExit::MmioRead { gpa: GuestAddress(0x4000_0008), len: 8 });
    vcpu.complete_read(&[1, 2, 3]);
    let exit = next(&machine, &mut vcpu, &mut completer);
    assert_eq!(exit, VmExit::MmioRead { gpa: GuestAddress(0x4000_0003), len: 1 });
    vcpu.complete_read(&[0xaa; 16]);
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rcx, regs.rdx), (0x03_0201, 0xaa));
}

#[test]
fn memslots_come_go_and_can_be_read_only() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov ebx, 0x40000000",
        "mov rcx, [rbx]",
        "mov byte ptr [rbx + 1], 9",
        "mov rcx, [rbx]",
        "hlt",
        "mov byte ptr [rbx + 1], 7",
        "mov rcx, [rbx]",
        "hlt",
        "mov rcx, [rbx]",
    );
    let memory = vm_memory::MmapRegion::<()>::new(8192).unwrap();
    // SAFETY: inside the mapping, which nobody else uses.
    unsafe { memory.as_ptr().write_bytes(0x11, 8192) };
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let mut completer = Completer::default();
    let gpa = GuestAddress(0x4000_0000);
    let map = |gpa: GuestAddress, len, readonly| {
        // SAFETY: `memory` lives longer than the machine, and is for the guest.
        unsafe { machine.map(gpa, memory.as_ptr(), len, readonly) }
    };
    assert!(matches!(map(GuestAddress(gpa.0 + 1), 4096, false), Err(MapError::Unaligned { .. })));
    assert!(matches!(map(gpa, 0, false), Err(MapError::Unaligned { .. })));
    assert!(
        matches!(map(GuestAddress(0x1000), 4096, false), Err(MapError::Kvm { .. })),
        "overlaps RAM"
    );
    let memslot = map(gpa, 4096, true).unwrap();
    let exit = next(&machine, &mut vcpu, &mut completer);
    let VmExit::MmioWrite { gpa: GuestAddress(0x4000_0001), data } = exit else {
        panic!("{exit:?}")
    };
    assert_eq!(data.as_slice(), [9]);
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rcx, 0x1111_1111_1111_1111, "the write had no effect");
    let number = format!("{memslot:?}");
    machine.unmap(memslot).unwrap();
    let memslot = map(gpa, 4096, false).unwrap();
    assert_eq!(format!("{memslot:?}"), number, "the number is used again");
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rcx, 0x1111_1111_1111_0711);
    machine.unmap(memslot).unwrap();
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::MmioRead { gpa, len: 8 });
    drop(vcpu);
}

#[test]
fn memory_that_the_host_cannot_touch() {
    let kvm = need!(Kvm::open());
    let code = guest!("mov ebx, 0x40000000", "mov rcx, [rbx]", "hlt");
    // SAFETY: a new mapping.
    let memory = unsafe {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_NONE, flags, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    for (machine, mut vcpu) in [raw_guest(&kvm, code).unwrap(), user_guest(&kvm, code)] {
        let gpa = GuestAddress(0x4000_0000);
        // SAFETY: the mapping stays until after the loop.
        let _memslot = unsafe { machine.map(gpa, memory.cast(), 4096, false) }.unwrap();
        // Which of them depends on host and ring; none is a crash or a silent success.
        match vcpu.run() {
            Ok(VmExit::MmioRead { gpa: at, .. }) => assert_eq!(at, gpa),
            Ok(VmExit::MemoryFault { gpa: at, .. }) => assert_eq!(at.0 & !4095, gpa.0),
            Err(vcpu::VcpuError::HostMemory { id: 0 }) => {}
            other => panic!("{other:?}"),
        }
    }
    // SAFETY: no machine has it any more.
    unsafe { libc::munmap(memory, 4096) };
}
