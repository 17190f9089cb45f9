//! Tests of the machine with real guests, and helpers for the other tests.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use umbra_skip::{need, need_cpu, skip_part};
use umbra_testkit::elf::ElfBuilder;
use umbra_testkit::guest;
use vm_memory::GuestAddress;

use super::complete::Completer;
use super::devices::{DeviceEvent, Devices};
use super::loader::Boot;
use super::stats::{self, VcpuStats, raw_guest};
use super::vcpu::{Data, Vcpu, VmExit};
use super::*;

mod completion;
mod memory;

/// Time limit of a kick on a busy machine. The test is only that it ends.
const PATIENCE: Duration = Duration::from_secs(30);

/// An ELF executable: segments of (gpa, gva, bytes, bytes in memory).
pub(super) fn elf(entry: u64, segments: &[(u64, u64, &[u8], u64)]) -> Vec<u8> {
    let add = |elf: ElfBuilder, (gpa, gva, bytes, memory): &(u64, u64, &[u8], u64)| {
        elf.segment(*gpa, *bytes).with(|segment| {
            (segment.gva, segment.memory_size) = (*gva, Some(*memory));
        })
    };
    segments.iter().fold(ElfBuilder::new(entry), add).build()
}

/// Runs until an exit that is neither an interruption nor an instruction to complete.
fn next(machine: &Machine, vcpu: &mut Vcpu, completer: &mut Completer) -> VmExit {
    loop {
        match vcpu.run().unwrap() {
            VmExit::Interrupted => {}
            VmExit::EmulationFailed { bytes, len } => {
                completer.complete(vcpu, machine.ram(), &bytes[..usize::from(len)]).unwrap();
            }
            exit => return exit,
        }
    }
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_kernel_boots_prints_its_command_line_and_switches_off() {
    let kvm = need!(Kvm::open());
    let start = Instant::now();
    let code = guest!(
        "mov ebx, [rsi + 0x228]", // boot_params: command line
        "2: mov al, [rbx]",
        "test al, al",
        "jz 3f",
        "mov edx, 0x3f8",
        "out dx, al",
        "inc rbx",
        "jmp 2b",
        "3: mov edx, 0x604",
        "mov eax, 0x2000",
        "out dx, ax",
    );
    let image = elf(0x20_0000, &[(0x20_0000, 0xffff_ffff_8020_0000, code, 4096)]);
    let config = MachineConfig { memory_bytes: 4 << 20, ..Default::default() };
    let mut machine = Machine::new(&kvm, config).unwrap();
    machine.load(&Boot::new(&image, "hello from the guest\n")).unwrap();
    let mut vcpu = machine.create_vcpu(0).unwrap();
    let console = Screen::default();
    let mut devices = Devices::new(Box::new(console.clone()), machine.irq_line(4));
    let mut first = None;
    loop {
        match vcpu.run().unwrap() {
            VmExit::IoOut { port, data } => {
                first.get_or_insert_with(|| start.elapsed());
                if devices.io_out(port, data.as_slice()) == DeviceEvent::PowerOff {
                    break;
                }
            }
            VmExit::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(*console.0.lock().unwrap(), b"hello from the guest\n");
    eprintln!("from Machine::new to the first port write: {:?}", first.unwrap());
}

#[test]
fn a_hypercall_reads_and_writes_registers() {
    let mut kvm = need!(Kvm::open());
    let code = guest!(
        "mov rdi, 0x1122334455667788",
        "mov eax, 5",
        "mov edx, 0xb5e",
        "out dx, eax",
        "mov rdi, rax",
        "out dx, eax",
        "hlt",
    );
    for sync_regs in [kvm.sync_regs, false] {
        kvm.sync_regs = sync_regs;
        let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
        let mut completer = Completer::default();
        let exit = next(&machine, &mut vcpu, &mut completer);
        let VmExit::IoOut { port: 0xb5e, data } = exit else { panic!("{exit:?}") };
        assert_eq!(data.value(), 5);
        assert_eq!(vcpu.regs().unwrap().rdi, 0x1122_3344_5566_7788);
        let regs = kvm_regs { rax: 0xfeed_0000_0000_beef, ..vcpu.regs().unwrap() };
        vcpu.set_regs(&regs).unwrap();
        assert!(matches!(next(&machine, &mut vcpu, &mut completer), VmExit::IoOut { .. }));
        assert_eq!(vcpu.regs().unwrap().rdi, 0xfeed_0000_0000_beef);
        assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
    }
}

#[test]
fn cpuid_has_the_extra_leaves_beside_kvms_own() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov eax, 0x40000100",
        "cpuid",
        "mov esi, eax",
        "mov edi, ebx",
        "mov eax, 0x40000000",
        "cpuid",
        "hlt",
    );
    let leaf = CpuidLeaf { function: 0x4000_0100, eax: 0x4000_0103, ebx: 77, ecx: 1, edx: 2 };
    let config =
        MachineConfig { memory_bytes: 4 << 20, extra_cpuid: vec![leaf], ..Default::default() };
    let mut machine = Machine::new(&kvm, config).unwrap();
    machine.load(&Boot::new(&elf(1 << 20, &[(1 << 20, 0, code, 4096)]), "")).unwrap();
    let mut vcpu = machine.create_vcpu(0).unwrap();
    assert_eq!(next(&machine, &mut vcpu, &mut Completer::default()), VmExit::Hlt);
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rsi, regs.rdi), (0x4000_0103, 77));
    assert_eq!(regs.rbx as u32, u32::from_le_bytes(*b"KVMK"));
}

/// Only some hosts make it an exit.
#[test]
fn a_lowered_task_priority_goes_on() {
    let kvm = need!(Kvm::open());
    let code = guest!("mov eax, 15", "mov cr8, rax", "xor eax, eax", "mov cr8, rax", "hlt");
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let mut completer = Completer::default();
    let exit = match next(&machine, &mut vcpu, &mut completer) {
        VmExit::TaskPriority => next(&machine, &mut vcpu, &mut completer),
        exit => exit,
    };
    assert_eq!(exit, VmExit::Hlt);
}

/// Where the CPU has SVM or VMX, the guest sees neither, and setting `EFER.SVME` is an exception,
/// for which it has no handler.
#[test]
fn a_guest_has_no_virtualisation() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov eax, 0x80000001",
        "cpuid",
        "mov esi, ecx",
        "mov eax, 1",
        "cpuid",
        "mov edi, ecx",
        "out 0x80, al",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x1000",
        "wrmsr",
        "hlt",
    );
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let mut completer = Completer::default();
    let exit = next(&machine, &mut vcpu, &mut completer);
    assert!(matches!(exit, VmExit::IoOut { port: 0x80, .. }), "{exit:?}");
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rsi & 1 << 2, regs.rdi & 1 << 5), (0, 0), "SVM, VMX");
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Shutdown);
}

#[test]
fn instructions_are_completed_or_run_by_the_hardware() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov ecx, 0xff",
        "popcnt rax, rcx",
        "popcnt ebx, dword ptr [rip + 9f]",
        "fwait",
        "lfence",
        "int3", // to 0x100
        "out 0x80, al",
        "int 0x41", // to 0x180
        "out 0x80, al",
        "ud2", // to 0x200
        "9: .long 0x10101",
        ".org 220b + 0x100",
        "mov r8, [rsp]",
        "iretq",
        ".org 220b + 0x180",
        "mov r9, [rsp]",
        "iretq",
        ".org 220b + 0x200",
        "mov r10, [rsp]",
        "hlt",
    );
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let base = layout::KERNEL_START;
    for (vector, handler) in [(3, base + 0x100), (0x41, base + 0x180), (6, base + 0x200)] {
        let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | handler >> 16 << 48;
        machine.ram().write(GuestAddress(0x3000 + 16 * vector), &gate.to_le_bytes()).unwrap();
    }
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.idt.base, sregs.idt.limit) = (0x3000, 0xfff);
    vcpu.set_sregs(&sregs).unwrap();
    let mut completer = Completer::default();
    let at = |offset: u64| base + offset;
    let find = |bytes: &[u8]| code.windows(bytes.len()).position(|w| w == bytes).unwrap() as u64;
    assert!(matches!(next(&machine, &mut vcpu, &mut completer), VmExit::IoOut { port: 0x80, .. }));
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rax, regs.rbx), (8, 3));
    assert_eq!(regs.r8, at(find(&[0xcc]) + 1));
    assert!(matches!(next(&machine, &mut vcpu, &mut completer), VmExit::IoOut { port: 0x80, .. }));
    assert_eq!(vcpu.regs().unwrap().r9, at(find(&[0xcd, 0x41]) + 2));
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
    assert_eq!(vcpu.regs().unwrap().r10, at(find(&[0x0f, 0x0b])));
    let emulated = stats::emulates_ring0(&kvm).unwrap();
    eprintln!("ring 0 emulated: {emulated}; completed: {:?}", completer.counts());
    let popcnts = completer.counts().get("popcnt").copied();
    assert_eq!(popcnts, emulated.then_some(2), "hardware does it itself");
}

#[test]
fn string_port_accesses_come_one_by_one() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov rdi, 0x180000",
        "mov ecx, 5",
        "mov edx, 0x1234",
        "rep insw",
        "mov rsi, 0x180000",
        "mov ecx, 5",
        "rep outsw",
        "hlt",
    );
    let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
    let mut completer = Completer::default();
    for i in 1..=5u8 {
        let exit = next(&machine, &mut vcpu, &mut completer);
        assert_eq!(exit, VmExit::IoIn { port: 0x1234, len: 2 });
        vcpu.complete_read(&[i, 0x80 | i]);
    }
    for i in 1..=5u8 {
        let exit = next(&machine, &mut vcpu, &mut completer);
        let VmExit::IoOut { port: 0x1234, data } = exit else { panic!("{exit:?}") };
        assert_eq!(data.as_slice(), [i, 0x80 | i]);
    }
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::Hlt);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let kvm = need!(Kvm::open());
    // No IDT: a page fault cannot be delivered, nor can the double fault.
    let (machine, mut vcpu) = raw_guest(&kvm, guest!("mov rax, [0x7fffffff0000]")).unwrap();
    assert_eq!(next(&machine, &mut vcpu, &mut Completer::default()), VmExit::Shutdown);
}

#[test]
fn a_busy_guest_is_kicked_out() {
    let kvm = need!(Kvm::open());
    let (_machine, mut vcpu) = raw_guest(&kvm, guest!("2: jmp 2b")).unwrap();
    let kicker = vcpu.kicker();
    // Before the first run: not lost.
    kicker.kick();
    assert_eq!(vcpu.run().unwrap(), VmExit::Interrupted);
    const KICKS: u32 = 200;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        // A signal may interrupt it without a kick.
        while !stopped.load(Ordering::SeqCst) {
            assert_eq!(vcpu.run().unwrap(), VmExit::Interrupted);
        }
        vcpu
    });
    let (start, mut longest) = (Instant::now(), Duration::ZERO);
    for i in 0..KICKS {
        // Different distances from the last entry, to meet the moments around it.
        std::thread::sleep(Duration::from_micros(u64::from(i % 50)));
        let kick = Instant::now();
        assert!(kicker.kick_and_wait(PATIENCE), "kick {i}");
        longest = longest.max(kick.elapsed());
    }
    eprintln!("{KICKS} kicks in {:?}, the longest {longest:?}", start.elapsed());
    stop.store(true, Ordering::SeqCst);
    kicker.kick();
    let vcpu = thread.join().unwrap();
    assert_eq!(vcpu.regs().unwrap().rip, layout::KERNEL_START);
    assert!(!kicker.kick_and_wait(Duration::from_millis(20)), "nobody runs it any more");
}

#[test]
fn a_guest_in_vmcall_is_kicked_out() {
    let kvm = need!(Kvm::open());
    // Where KVM emulates ring 0, this instruction is emulated again and again, and KVM_RUN does not
    // return.
    let (_machine, mut vcpu) = raw_guest(&kvm, guest!("2: vmcall", "jmp 2b")).unwrap();
    let kicker = vcpu.kicker();
    let thread = std::thread::spawn(move || vcpu.run().unwrap());
    std::thread::sleep(Duration::from_millis(20));
    assert!(kicker.kick_and_wait(PATIENCE));
    assert_eq!(thread.join().unwrap(), VmExit::Interrupted);
}

#[test]
fn statistics_repeat_exactly() {
    let kvm = need!(Kvm::open());
    let emulated = stats::emulates_ring0(&kvm).unwrap();
    let count = || {
        let code = guest!("mov ecx, 5000", "2: dec ecx", "jnz 2b", "hlt");
        let (machine, mut vcpu) = raw_guest(&kvm, code).unwrap();
        let stats = VcpuStats::open(&vcpu).unwrap();
        assert!(stats.exits().is_some() && stats.get("no such counter").is_none());
        assert_eq!(next(&machine, &mut vcpu, &mut Completer::default()), VmExit::Hlt);
        stats.instructions_emulated()
    };
    let (a, b) = (count(), count());
    eprintln!("ring 0 emulated: {emulated}, instructions of a loop of 10,000: {a:?} {b:?}");
    if emulated {
        assert_eq!(a, b);
        assert!((10_000..10_100).contains(&a.unwrap()));
    } else {
        skip_part!("instructions", "KVM does not count them where it runs ring 0 by hardware");
    }
}

#[test]
fn a_missing_device_is_said_clearly() {
    let dir = tempfile::tempdir().unwrap();
    let error = Kvm::open_path(&dir.path().join("kvm")).unwrap_err();
    assert!(matches!(error, MachineError::NoDevice(_)), "{error}");
    let error = Kvm::open_path(Path::new("/dev/null")).unwrap_err();
    assert!(matches!(error, MachineError::NotKvm(_)), "{error}");
}

#[test]
fn with_interrupt_controller() {
    let kvm = need!(Kvm::open());
    let config = MachineConfig { memory_bytes: 4 << 20, irqchip: true, ..Default::default() };
    let mut machine = Machine::new(&kvm, config).unwrap();
    // The timer's port 0x61 is KVM's: no exit.
    let code = guest!("in al, 0x61", "mov ebx, eax", "out 0x80, al");
    machine.load(&Boot::new(&elf(1 << 20, &[(1 << 20, 0, code, 4096)]), "")).unwrap();
    let mut vcpu = machine.create_vcpu(0).unwrap();
    machine.irq_line(4).unwrap().pulse().unwrap();
    let exit = next(&machine, &mut vcpu, &mut Completer::default());
    assert!(matches!(exit, VmExit::IoOut { port: 0x80, .. }), "{exit:?}");
}

/// A guest of several CPUs: the first starts the second through its local APIC, and both print
/// their number.
#[test]
fn a_second_cpu_starts() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        // Real-mode code of the second CPU: mov ax, 1; out 0x80, al; cli; hlt
        "mov dword ptr [0x10000], 0xe60001b8",
        "mov dword ptr [0x10004], 0xf4fa80",
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff", // software enable
        "mov dword ptr [rbx + 0x310], 0x1000000", // to APIC 1:
        "mov dword ptr [rbx + 0x300], 0x4500", // INIT
        "mov dword ptr [rbx + 0x310], 0x1000000",
        "mov dword ptr [rbx + 0x300], 0x4610", // SIPI, vector 0x10
        "mov eax, 1",
        "cpuid",
        "shr ebx, 24",
        "mov eax, ebx",
        "out 0x80, al",
        "cli",
        "hlt",
    );
    let config = MachineConfig { memory_bytes: 4 << 20, cpus: 2, ..Default::default() };
    let error = Machine::new(&kvm, config.clone()).unwrap_err();
    assert!(matches!(error, MachineError::NoIrqchip(2)), "{error}");
    let config = MachineConfig { irqchip: true, ..config };
    let mut machine = Machine::new(&kvm, config).unwrap();
    machine.load(&Boot::new(&elf(1 << 20, &[(1 << 20, 0, code, 4096)]), "")).unwrap();
    assert!(machine.create_vcpu(2).is_err());
    let vcpus = [1, 0].map(|id| machine.create_vcpu(id).unwrap());
    let kickers = vcpus.each_ref().map(Vcpu::kicker);
    let stop = AtomicBool::new(false);
    let (tell, told) = mpsc::channel();
    let mut said = std::thread::scope(|scope| {
        for mut vcpu in vcpus {
            let (tell, stop) = (tell.clone(), &stop);
            scope.spawn(move || {
                loop {
                    match vcpu.run().unwrap() {
                        VmExit::IoOut { port: 0x80, data } => {
                            tell.send((vcpu.id(), data.value())).unwrap()
                        }
                        // The kicker waits until a run has seen the kick.
                        VmExit::Interrupted if stop.load(Ordering::SeqCst) => break,
                        VmExit::Interrupted => {}
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        let said: Vec<_> = std::iter::from_fn(|| told.recv_timeout(Duration::from_secs(10)).ok())
            .take(2)
            .collect();
        // Both halt, or wait to be started: in the kernel, either way.
        stop.store(true, Ordering::SeqCst);
        assert!(kickers.iter().all(|kicker| kicker.kick_and_wait(PATIENCE)));
        said
    });
    said.sort_unstable();
    assert_eq!(said, [(0, 0), (1, 1)]);
}

/// `raw_guest` in ring 3, with all of the boot mapping open to it.
fn user_guest(kvm: &Kvm, code: &[u8]) -> (Machine, Vcpu) {
    let (machine, mut vcpu) = raw_guest(kvm, code).unwrap();
    for table in 0..2 + layout::BOOT_PDS {
        for entry in 0..512 {
            let gpa = GuestAddress(layout::BOOT_PML4 + table * layout::PAGE + 8 * entry);
            let value = machine.ram().read_u64(gpa).unwrap();
            machine.ram().write(gpa, &(value | 4).to_le_bytes()).unwrap();
        }
    }
    let mut sregs = vcpu.sregs().unwrap();
    for segment in
        [&mut sregs.cs, &mut sregs.ss, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs]
    {
        (segment.dpl, segment.selector) = (3, segment.selector | 3);
    }
    sregs.cr4 |= 1 << 9; // OSFXSR: SSE may be used
    vcpu.set_sregs(&sregs).unwrap();
    (machine, vcpu)
}

#[test]
fn ring_3_exits_like_ring_0() {
    let kvm = need!(Kvm::open());
    let code = guest!(
        "mov ebx, 0x40000000",
        "mov rcx, [rbx]",
        "mov [rbx + 8], rcx",
        "movaps xmm0, [rbx]",
        "addps xmm0, [rbx]",
    );
    let (machine, mut vcpu) = user_guest(&kvm, code);
    let mut completer = Completer::default();
    let gpa = GuestAddress(0x4000_0000);
    assert_eq!(next(&machine, &mut vcpu, &mut completer), VmExit::MmioRead { gpa, len: 8 });
    vcpu.complete_read(&[5; 8]);
    let write = VmExit::MmioWrite { gpa: GuestAddress(0x4000_0008), data: Data::new(&[5; 8]) };
    assert_eq!(next(&machine, &mut vcpu, &mut completer), write);
    // KVM's emulator knows plain SSE moves, and gives them out in halves.
    for half in [gpa, GuestAddress(0x4000_0008)] {
        assert_eq!(
            next(&machine, &mut vcpu, &mut completer),
            VmExit::MmioRead { gpa: half, len: 8 }
        );
    }
    let exit = vcpu.run().unwrap();
    let VmExit::EmulationFailed { bytes, len } = exit else { panic!("{exit:?}") };
    let error =
        completer.complete(&mut vcpu, machine.ram(), &bytes[..usize::from(len)]).unwrap_err();
    // Such an instruction is completed in RAM only.
    let text = error.to_string();
    assert!(
        text.starts_with("addps (0f 58 03) at rip") && text.contains("which is not RAM"),
        "{error}"
    );
}

#[test]
fn machines_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn moved<T: Send>() {}
    shared::<Machine>();
    shared::<super::kick::Kicker>();
    moved::<Vcpu>();
    moved::<Devices>();
}
