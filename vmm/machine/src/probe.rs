//! Finds out by small guests what a host's KVM can do.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::Kvm;
use super::stats::{StatsError, raw_guest};
use super::vcpu::VmExit;

/// The probe needs a few hundred instructions.
const LIMIT: Duration = Duration::from_secs(5);
/// Port for its result.
const RESULT: u16 = 0x80;

/// Goes to ring 3 and makes a system call, whose entry reports the ring it runs in. The code is at
/// 1 MiB ([`super::layout::KERNEL_START`]) and starts in the boot state.
fn system_call() -> &'static [u8] {
    let (start, end): (*const u8, *const u8);
    // SAFETY: two address calculations; the code goes to a section of its own and is not executed
    // here.
    unsafe {
        std::arch::asm!(
            "lea {0}, [rip + 220f]",
            "lea {1}, [rip + 221f]",
            ".pushsection .rodata.probe, \"a\"",
            "220:",
            // The first 2 MiB for ring 3: the PML4, the page-directory-pointer table, the first
            // directory.
            "or byte ptr [0x9000], 4",
            "or byte ptr [0xa000], 4",
            "or byte ptr [0xb000], 4",
            "mov rax, cr3",
            "mov cr3, rax",
            "lgdt [rip + 230f]",
            // EFER: system calls.
            "mov ecx, 0xc0000080",
            "rdmsr",
            "or eax, 1",
            "wrmsr",
            // STAR: code segment 0x10 for ring 0.
            "inc ecx",
            "xor eax, eax",
            "mov edx, 0x10",
            "wrmsr",
            // LSTAR: the entry.
            "inc ecx",
            "lea rax, [rip + 222f]",
            "xor edx, edx",
            "wrmsr",
            // ss, rsp, rflags, cs, rip.
            "push 0x2b",
            "push 0x5000",
            "push 2",
            "push 0x23",
            "lea rax, [rip + 223f]",
            "push rax",
            "iretq",
            "223:",
            "syscall",
            "ud2",
            "222:",
            "mov eax, cs",
            "and eax, 3",
            "out 0x80, al",
            "hlt",
            ".balign 8",
            "231:",
            ".quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
            ".quad 0x00affb000000ffff, 0x00cff3000000ffff",
            "230:",
            ".short 47",
            ".quad 0x100000 + (231b - 220b)",
            "221:",
            ".popsection",
            out(reg) start,
            out(reg) end,
        );
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}

/// Whether programs in ring 3 can call the guest's kernel. On some hosts that run ring 3 natively
/// and emulate ring 0, `syscall` stays in ring 3.
///
/// # Errors
/// KVM refuses the probe's machine.
pub fn runs_programs(kvm: &Kvm) -> Result<bool, StatsError> {
    let (_machine, mut vcpu) = raw_guest(kvm, system_call())?;
    let (kicker, begin) = (vcpu.kicker(), Instant::now());
    let (ended, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            // Until the other end is dropped.
            if wait.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        let result = loop {
            match vcpu.run() {
                Ok(VmExit::Interrupted) if begin.elapsed() < LIMIT => {}
                Ok(VmExit::IoOut { port: RESULT, data }) => break Ok(data.value() == 0),
                // A triple fault, most likely: from ring 3 the port cannot be reached.
                Ok(_) => break Ok(false),
                Err(error) => break Err(error.into()),
            }
        };
        drop(ended);
        result
    })
}
