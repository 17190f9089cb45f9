//! Kernel threads of the first CPU. They are cooperative; each has its own stack, and is a task
//! with a name in reports.

use core::arch::global_asm;
use core::ptr::addr_of_mut;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use umbra_guest::codes::{FREE_PAGE, PAGE_SIZE, STACK_LEFT};

use crate::{boot, cpu, page};

/// A stack is `1 << STACK_ORDER` pages.
const STACK_ORDER: usize = 2;
const STACK_BYTES: u64 = PAGE_SIZE << STACK_ORDER;
/// Bytes at the start of a stack that are a guard page, in threads that have one.
const GUARD_BYTES: u64 = PAGE_SIZE;
/// Most threads at a time, with the one that boots.
const THREADS: usize = 16;

#[derive(Clone, Copy)]
struct Thread {
    rsp: u64,
    stack: u64,
    /// Bytes of `stack` that are not mapped, so that an overflow faults.
    guard: u64,
    entry: Option<fn()>,
    /// Task id; names in reports.
    id: u32,
    state: State,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Unused,
    Ready,
    Done,
}

static mut TABLE: [Thread; THREADS] =
    [Thread { rsp: 0, stack: 0, guard: 0, entry: None, id: 0, state: State::Unused }; THREADS];
static RUNNING: AtomicUsize = AtomicUsize::new(0);
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

global_asm!(
    // Saves the callee-saved registers, switches stacks, restores them. rdi: the address to save
    // rsp at; rsi: the new rsp.
    ".globl switch_stacks",
    "switch_stacks:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rdi], rsp",
    "mov rsp, rsi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    // A new thread begins here, with rbp 0, which ends its chain of frames.
    "start_thread:",
    "call {main}",
    "ud2",
    // A thread goes on here, at the top of its stack, after the stack has overflowed.
    "end_thread:",
    "call {exit}",
    "ud2",
    main = sym thread_main,
    exit = sym thread_exit,
);

unsafe extern "C" {
    fn switch_stacks(keep: *mut u64, to: u64);
    fn start_thread();
    fn end_thread();
}

fn table() -> &'static mut [Thread; THREADS] {
    // SAFETY: only the first CPU has threads, which are cooperative: no two users at a time, and no
    // reference is kept across a switch.
    unsafe { &mut *addr_of_mut!(TABLE) }
}

/// Makes the code that runs now the first thread.
pub fn init() {
    table()[0].state = State::Ready;
    umbra_guest::name_task(0, "kernel");
}

extern "C" fn thread_main() -> ! {
    let me = RUNNING.load(Relaxed);
    if let Some(entry) = table()[me].entry {
        entry();
    }
    exit()
}

extern "C" fn thread_exit() -> ! {
    exit()
}

/// Ends the thread that runs. [`join`] frees its stack.
pub fn exit() -> ! {
    table()[RUNNING.load(Relaxed)].state = State::Done;
    loop {
        yield_now();
    }
}

/// A task id, for a thread or for another CPU.
pub fn new_task(name: &str) -> u32 {
    let id = NEXT_ID.fetch_add(1, Relaxed);
    umbra_guest::name_task(id, name);
    id
}

/// Starts a thread; it first runs at the next [`yield_now`]. `None` when the table or memory is
/// full.
pub fn spawn(name: &str, entry: fn()) -> Option<usize> {
    spawn_with(name, entry, 0)
}

fn spawn_with(name: &str, entry: fn(), guard: u64) -> Option<usize> {
    let slot = table().iter().position(|t| t.state == State::Unused)?;
    let start = page::take(STACK_ORDER)?;
    umbra_guest::stack_alloc(start + guard, STACK_BYTES - guard);
    if guard != 0 {
        umbra_guest::poison(start, guard, STACK_LEFT);
        boot::set_mapped(start, false);
    }
    let id = new_task(name);
    // From the top: a word for alignment, the return address, six saved registers.
    let top = start + STACK_BYTES - 8;
    // SAFETY: the stack is this thread's own.
    unsafe { ((top - 8) as *mut u64).write(start_thread as *const () as u64) };
    table()[slot] =
        Thread { rsp: top - 56, stack: start, guard, entry: Some(entry), id, state: State::Ready };
    Some(slot)
}

/// Lets the next thread run.
pub fn yield_now() {
    let me = RUNNING.load(Relaxed);
    let next =
        (1..=THREADS).map(|i| (me + i) % THREADS).find(|&i| table()[i].state == State::Ready);
    let Some(next) = next.filter(|&next| next != me) else { return };
    RUNNING.store(next, Relaxed);
    cpu::set_task(table()[next].id);
    let (keep, to) = (&raw mut table()[me].rsp, table()[next].rsp);
    // SAFETY: `to` is the stack of a thread that waits in this function, or has not begun.
    unsafe { switch_stacks(keep, to) };
}

/// Waits for a thread to end, and frees its stack.
pub fn join(slot: usize) {
    while table()[slot].state == State::Ready {
        yield_now();
    }
    let thread = &mut table()[slot];
    thread.state = State::Unused;
    let (start, guard) = (thread.stack, thread.guard);
    umbra_guest::stack_free(start + guard, STACK_BYTES - guard);
    if guard != 0 {
        boot::set_mapped(start, true);
    }
    umbra_guest::poison(start, STACK_BYTES, FREE_PAGE);
    page::give(start);
}

/// If a fault at `address` means that the stack of the thread that runs has overflowed into its
/// guard page: the instruction and stack pointer where the thread goes on.
pub fn overflowed(address: u64) -> Option<(u64, u64)> {
    let thread = &table()[RUNNING.load(Relaxed)];
    let in_guard = address.checked_sub(thread.stack).is_some_and(|offset| offset < thread.guard);
    in_guard.then_some((end_thread as *const () as u64, thread.stack + STACK_BYTES))
}

/// Runs `entry` to its end in a new thread.
pub fn run(name: &str, entry: fn()) {
    run_with(name, entry, 0);
}

/// Runs `work` on the caller's stack, as a task named `name`.
pub fn run_named_task(name: &str, work: impl FnOnce()) {
    cpu::set_task(new_task(name));
    work();
    cpu::set_task(table()[RUNNING.load(Relaxed)].id);
}

/// [`run`], with an unmapped page below the thread's stack. A touch of that page ends the thread.
pub fn run_guarded(name: &str, entry: fn()) {
    run_with(name, entry, GUARD_BYTES);
}

fn run_with(name: &str, entry: fn(), guard: u64) {
    match spawn_with(name, entry, guard) {
        Some(slot) => join(slot),
        None => crate::println!("cannot start {name}: no thread or no memory left"),
    }
}
