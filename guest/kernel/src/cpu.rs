//! Per-CPU data: number and task, segments, the interrupt table.

use core::arch::{asm, global_asm};
use core::ptr::addr_of_mut;

use crate::layout::{DIRECT_MAP, IMAGE_MAP};

/// The vectors of CPU exceptions. Those of interrupts follow.
pub const VECTORS: usize = 32;
const CODE: u16 = 0x08;
const TSS: u16 = 0x10;
/// Bytes of the stack on which exceptions run.
pub const FAULT_STACK: usize = 16 << 10;
/// The vector of the interrupt that wakes an idle CPU.
pub const WAKE: u8 = VECTORS as u8;

global_asm!("cpu_current:", "mov rax, gs:[0]", "ret");

#[repr(C, packed)]
struct TaskState {
    reserved0: u32,
    rsp: [u64; 3],
    reserved1: u64,
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Per-CPU data. The `gs` segment begins here.
#[repr(C)]
struct PerCpu {
    /// The CPU and task that run now, as the ABI encodes them.
    current: u64,
    gdt: [u64; 4],
    task: TaskState,
}

/// Most CPUs that this kernel starts.
pub const CPUS: usize = 16;
const NEW: PerCpu = PerCpu {
    current: 0,
    gdt: [0, 0x00af_9b00_0000_ffff, 0, 0],
    task: TaskState {
        reserved0: 0,
        rsp: [0; 3],
        reserved1: 0,
        ist: [0; 7],
        reserved2: 0,
        reserved3: 0,
        io_map: size_of::<TaskState>() as u16,
    },
};
static mut PER_CPU: [PerCpu; CPUS] = [NEW; CPUS];
static mut IDT: [[u64; 2]; VECTORS + 1] = [[0; 2]; VECTORS + 1];
#[repr(align(16))]
struct Stack(#[allow(dead_code, reason = "only its address is used")] [u8; FAULT_STACK]);
static mut STACK: Stack = Stack([0; FAULT_STACK]);

unsafe extern "C" {
    /// The CPU and task that run now, as the ABI encodes them. Two instructions, since it runs for
    /// every allocator event.
    pub safe fn cpu_current() -> u64;
}

fn per_cpu(cpu: usize) -> *mut PerCpu {
    assert!(cpu < CPUS);
    // SAFETY: the index was checked; no reference is made.
    unsafe { addr_of_mut!(PER_CPU).cast::<PerCpu>().add(cpu) }
}

/// Makes this CPU number `cpu`, for [`cpu_current`].
pub fn set_number(cpu: usize) {
    const IA32_GS_BASE: u32 = 0xc000_0101;
    let at = per_cpu(cpu);
    // SAFETY: this CPU's own data; nothing used `gs` before.
    unsafe {
        (*at).current = (cpu as u64) << 16;
        let at = at as u64;
        asm!("wrmsr",
             in("ecx") IA32_GS_BASE, in("eax") at as u32, in("edx") (at >> 32) as u32,
             options(nostack));
    }
}

/// This CPU's number.
pub fn number() -> usize {
    (cpu_current() >> 16) as u16 as usize
}

/// Sets the task that runs on this CPU.
pub fn set_task(id: u32) {
    let current = cpu_current() & 0xffff_ffff | u64::from(id) << 32;
    // SAFETY: this CPU's own data.
    unsafe { asm!("mov gs:[0], {}", in(reg) current, options(nostack, preserves_flags)) };
}

/// Sets up the interrupt table, and this CPU, the first. `entries` has 16 bytes of code for each
/// vector. Exceptions run on a stack of their own, so that one that comes from a broken stack is
/// still reported.
pub fn init(entries: u64) {
    // SAFETY: runs once, at start, on the only CPU; the tables live as long as the kernel.
    unsafe {
        // Its address in the direct map is below those of all threads' stacks, so the chain of
        // frames rises from here to the interrupted code.
        let stack = addr_of_mut!(STACK) as u64 - IMAGE_MAP + DIRECT_MAP;
        umbra_guest::stack_alloc(
            stack & !0xfff,
            (FAULT_STACK as u64 + (stack & 0xfff)).next_multiple_of(4096),
        );
        for (vector, entry) in (*addr_of_mut!(IDT)).iter_mut().enumerate() {
            let stub = entries + 16 * vector as u64;
            // An interrupt gate with the first alternate stack.
            let low = stub & 0xffff
                | u64::from(CODE) << 16
                | 1 << 32
                | 0x8e << 40
                | (stub >> 16 & 0xffff) << 48;
            *entry = [low, stub >> 32];
        }
        load_tables(0, stack + FAULT_STACK as u64);
    }
}

/// Loads segments and the interrupt table on CPU `cpu`, which runs this.
///
/// # Safety
/// `fault_stack` is the end of a stack of [`FAULT_STACK`] bytes for this CPU's exceptions, and
/// [`init`] has run.
pub unsafe fn load_tables(cpu: usize, fault_stack: u64) {
    let at = per_cpu(cpu);
    // SAFETY: this CPU's own data, which live as long as the kernel.
    unsafe {
        (*at).task.ist[0] = fault_stack;
        let task = &raw const (*at).task as u64;
        let gdt = &mut (*at).gdt;
        gdt[2] = (task & 0xff_ffff) << 16
            | (task >> 24 & 0xff) << 56
            | 0x89 << 40
            | (size_of::<TaskState>() as u64 - 1);
        gdt[3] = task >> 32;
        let gdt = Pointer { limit: size_of_val(gdt) as u16 - 1, base: gdt.as_ptr() as u64 };
        let idt =
            Pointer { limit: (16 * (VECTORS + 1) - 1) as u16, base: addr_of_mut!(IDT) as u64 };
        asm!(
            "lgdt [{gdt}]",
            "push {code}", "lea {scratch}, [rip + 3f]", "push {scratch}", "retfq", "3:",
            "mov ds, {zero:e}", "mov es, {zero:e}", "mov ss, {zero:e}",
            "ltr {tss:x}",
            "lidt [{idt}]",
            gdt = in(reg) &raw const gdt, idt = in(reg) &raw const idt,
            code = in(reg) u64::from(CODE), scratch = out(reg) _, zero = in(reg) 0u64,
            tss = in(reg) TSS,
        );
    }
}

/// Waits for an interrupt, unless `ready` returns true. Interrupts are on only here.
pub fn idle_unless(ready: impl Fn() -> bool) {
    // SAFETY: the only interrupt is the one that wakes an idle CPU; `sti` lets it in after the
    // `hlt` has begun.
    unsafe {
        if !ready() {
            asm!("sti", "hlt", "cli", options(nostack));
            umbra_guest::tick();
        }
    }
}
