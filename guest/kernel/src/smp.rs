//! The other CPUs: the kernel finds them in the MP table, starts them through the local APIC, and
//! gives them work.
//!
//! Each starts in real mode at a page of low memory ([`TRAMPOLINE`]), goes straight to long mode,
//! and waits for work. A waiting CPU is halted; an interrupt wakes it.

use core::arch::{asm, global_asm};
use core::ptr::{addr_of_mut, copy_nonoverlapping, read_unaligned, write_unaligned};
use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use umbra_guest::Offer;
use umbra_guest::codes::PAGE_SIZE;

use crate::layout::DIRECT_MAP;
use crate::{apic, boot, cpu, page, println, thread};

/// Two pages of low memory that neither the kernel nor its boot loader uses: code, and a top-level
/// page table that maps the code one to one.
const TRAMPOLINE: u64 = 0x9_0000;
/// A CPU's stacks, in one block of pages: first the one for its work, then the one for exceptions.
const STACK_ORDER: usize = 3;
/// Pages of another CPU's ring, as a power of two. The ring is small, so that it is drained while
/// all CPUs are busy.
const RING_ORDER: usize = 0;
/// How long a CPU may take to start, in loops of a few instructions.
const PATIENCE: u32 = 4 << 20;

global_asm!(
    ".section .rodata.trampoline, \"a\"",
    ".code16",
    "ap_start:",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    // Long mode at once (Intel SDM volume 3, 10.8.5): page tables, PAE, LME, then protection and
    // paging.
    "mov eax, dword ptr ds:[192]",
    "mov cr3, eax",
    // PAE, and global pages.
    "mov eax, 0xa0",
    "mov cr4, eax",
    "mov ecx, 0xc0000080",
    "xor edx, edx",
    // Long mode, and the no-execute bit.
    "mov eax, 0x900",
    "wrmsr",
    "lgdtd ds:[208]",
    "mov eax, 0x80010011",
    "mov cr0, eax",
    // A far jump with a 32-bit offset.
    ".byte 0x66, 0xea",
    ".long {at} + ap_long - ap_start",
    ".word 8",
    ".code64",
    "ap_long:",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov rsp, [rip + ap_stack]",
    "xor ebp, ebp",
    "movabs rax, offset ap_high",
    "jmp rax",
    // The code above has these offsets as numbers, because the assembler takes no difference of
    // symbols there.
    ".globl ap_start, ap_tables, ap_stack, ap_end",
    ".org ap_start + 192",
    "ap_tables: .quad 0",
    "ap_stack: .quad 0",
    ".org ap_start + 208",
    "ap_gdt_pointer: .word 15",
    ".long {at} + 216",
    ".org ap_start + 216",
    "ap_gdt: .quad 0, 0x00af9b000000ffff",
    "ap_end:",
    ".text",
    "ap_high:",
    "call {main}",
    "ud2",
    at = const TRAMPOLINE,
    main = sym ap_main,
);

unsafe extern "C" {
    static ap_start: u8;
    static ap_tables: u8;
    static ap_stack: u8;
    static ap_end: u8;
}

/// The APIC ids of all CPUs; the first one runs now. Without an MP table there is one CPU, and its
/// id does not matter.
#[derive(Clone, Copy)]
pub struct Cpus {
    ids: [u8; cpu::CPUS],
    count: usize,
}

/// Looks for the MP table (MultiProcessor Specification 1.4, chapter 4), on machines that have a
/// local APIC.
pub fn find() -> Cpus {
    const APIC: u32 = 1 << 9;
    let mut cpus = Cpus { ids: [0; cpu::CPUS], count: 1 };
    if core::arch::x86_64::__cpuid(1).edx & APIC == 0 {
        return cpus;
    }
    let byte = |gpa: u64| {
        // SAFETY: low memory, which is mapped and always there.
        unsafe { ((DIRECT_MAP + gpa) as *const u8).read_volatile() }
    };
    // SAFETY: as above.
    let word = |gpa: u64| unsafe { read_unaligned((DIRECT_MAP + gpa) as *const u32) };
    let Some(pointer) =
        (0xf_0000..0x10_0000).step_by(16).find(|&at| word(at) == u32::from_le_bytes(*b"_MP_"))
    else {
        return cpus;
    };
    let table = u64::from(word(pointer + 4));
    if table >= 0x10_0000 || word(table) != u32::from_le_bytes(*b"PCMP") {
        return cpus;
    }
    let mut at = table + 44;
    for _ in 0..word(table + 32) >> 16 {
        // A processor has the longest entry, and all of them come first.
        if at + 20 > 0x10_0000 || byte(at) != 0 {
            break;
        }
        let (id, flags) = (byte(at + 1), byte(at + 3));
        at += 20;
        if flags & 2 != 0 {
            cpus.ids[0] = id;
        } else if flags & 1 != 0 && cpus.count < cpu::CPUS {
            cpus.ids[cpus.count] = id;
            cpus.count += 1;
        }
    }
    cpus
}

impl Cpus {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }
}

/// The number of the CPU that starts now. It sets [`STARTED`] when it runs.
static STARTING: AtomicUsize = AtomicUsize::new(0);
static STARTED: AtomicBool = AtomicBool::new(false);
static mut IDS: [u8; cpu::CPUS] = [0; cpu::CPUS];
/// How many CPUs run.
static RUNNING: AtomicUsize = AtomicUsize::new(1);
static TASKS: [AtomicU32; cpu::CPUS] = [const { AtomicU32::new(0) }; cpu::CPUS];

/// How many CPUs run; their numbers are below this.
pub fn running() -> usize {
    RUNNING.load(Acquire)
}

/// A task's name for each CPU.
const NAMES: [&str; cpu::CPUS] = [
    "cpu0", "cpu1", "cpu2", "cpu3", "cpu4", "cpu5", "cpu6", "cpu7", "cpu8", "cpu9", "cpu10",
    "cpu11", "cpu12", "cpu13", "cpu14", "cpu15",
];

/// Starts all CPUs. Called with checks on, after the allocators were set up.
pub fn start(cpus: &Cpus, offer: &Offer) {
    if cpus.count == 1 {
        return;
    }
    // SAFETY: only this CPU runs. Nothing else uses the trampoline's pages.
    unsafe {
        (*addr_of_mut!(IDS)) = cpus.ids;
        let bytes = (&raw const ap_end) as usize - (&raw const ap_start) as usize;
        copy_nonoverlapping(&raw const ap_start, (DIRECT_MAP + TRAMPOLINE) as *mut u8, bytes);
        let tables = TRAMPOLINE + PAGE_SIZE;
        boot::copy_tables((DIRECT_MAP + tables) as *mut u64);
        set_parameter(&raw const ap_tables, tables);
    }
    apic::enable();
    for number in 1..cpus.count {
        if !start_one(number, cpus.ids[number], offer) {
            println!("CPU {number} does not start");
            return;
        }
    }
}

/// Writes a word into the trampoline's copy.
///
/// # Safety
/// `at` is one of its words.
unsafe fn set_parameter(at: *const u8, value: u64) {
    let copy = DIRECT_MAP + TRAMPOLINE + (at as u64 - (&raw const ap_start) as u64);
    // SAFETY: the caller's promise; the copy is there.
    unsafe { write_unaligned(copy as *mut u64, value) };
}

fn start_one(number: usize, id: u8, offer: &Offer) -> bool {
    let Some(ring) = page::take(RING_ORDER) else { return false };
    let Some(stacks) = page::take(STACK_ORDER) else { return false };
    let (ring_bytes, stack_bytes) = (PAGE_SIZE << RING_ORDER, PAGE_SIZE << STACK_ORDER);
    umbra_guest::unpoison(ring, ring_bytes);
    // SAFETY: the pages were taken for the ring; it is the CPU's alone.
    let rings = unsafe {
        let ring = ring as *mut u8;
        ring.write_bytes(0, 64);
        umbra_guest::add_cpu(
            offer,
            number as u16,
            &boot::text(),
            core::slice::from_raw_parts_mut(ring, ring_bytes as usize),
        )
    };
    if !rings {
        println!("Umbra refused a ring for CPU {number}");
    }
    umbra_guest::stack_alloc(stacks, stack_bytes);
    TASKS[number].store(thread::new_task(NAMES[number]), Relaxed);
    // SAFETY: only this CPU uses the trampoline, since the last one has left it.
    unsafe { set_parameter(&raw const ap_stack, stacks + stack_bytes - cpu::FAULT_STACK as u64) };
    STARTED.store(false, Relaxed);
    STARTING.store(number, Release);
    // A virtual CPU needs neither the pauses nor the second startup interrupt of the specification.
    apic::send(id, apic::INIT);
    apic::send(id, apic::STARTUP | (TRAMPOLINE / PAGE_SIZE) as u32);
    for _ in 0..PATIENCE {
        if STARTED.load(Acquire) {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

/// The first Rust code of another CPU, on its own stack.
extern "C" fn ap_main() -> ! {
    let number = STARTING.load(Acquire);
    boot::use_tables();
    cpu::set_number(number);
    let stack: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack)) };
    let end = stack.next_multiple_of(PAGE_SIZE << STACK_ORDER);
    // SAFETY: the upper part of this CPU's block of pages, which is aligned to its size.
    unsafe { cpu::load_tables(number, end) };
    cpu::set_task(TASKS[number].load(Relaxed));
    apic::enable();
    RUNNING.store(number + 1, Release);
    STARTED.store(true, Release);
    let mut done = 0;
    loop {
        cpu::idle_unless(|| ROUND.load(Acquire) != done);
        let round = ROUND.load(Acquire);
        if round != done {
            done = round;
            // SAFETY: the round was announced after its work was set.
            unsafe { (*addr_of_mut!(WORK))(number) };
            if LEFT.fetch_sub(1, Release) == 1 {
                wake(0);
            }
        }
    }
}

/// The work of this round for all CPUs, and how many of the others still have to do it.
static mut WORK: fn(usize) = |_| {};
static ROUND: AtomicUsize = AtomicUsize::new(0);
static LEFT: AtomicUsize = AtomicUsize::new(0);

/// Sends an interrupt to a CPU.
pub fn send(number: usize, command: u32) {
    // SAFETY: set before any other CPU was started.
    let id = unsafe { (*addr_of_mut!(IDS))[number] };
    apic::send(id, command);
}

fn wake(number: usize) {
    send(number, apic::FIXED | u32::from(cpu::WAKE));
}

/// Runs `work` on all CPUs, with the CPU's number. Returns when all are done.
pub fn on_all(work: fn(usize)) {
    let others = running() - 1;
    // SAFETY: the others wait for the next round.
    unsafe { *addr_of_mut!(WORK) = work };
    LEFT.store(others, Relaxed);
    ROUND.fetch_add(1, Release);
    (1..=others).for_each(wake);
    work(0);
    while LEFT.load(Acquire) != 0 {
        cpu::idle_unless(|| LEFT.load(Acquire) == 0);
    }
}
