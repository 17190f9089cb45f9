//! Guests of several CPUs that misbehave all at once.

use std::time::Duration;

use iced_x86::code_asm::*;
use umbra_shadow::abi::{self, Access, CallNumber, DOORBELL_PORT, ExitReason, PORT, RecordKind};
use umbra_shadow::codes::{PAGE_BUSY, PAGE_BYTES, SLAB_FREE};
use umbra_tests::program::Umbra;

use super::guest::{BYTE_WINDOW, CODE, FREE, Guest, PAGE_WINDOW, Row};
use super::{PROGRAM, quiet, ring0_is_emulated, run};

pub const ALL: &[(&str, fn())] = &[
    ("all_cpus_hammer_calls_ring", || all_cpus_hammer_calls("--notify ring")),
    ("all_cpus_hammer_calls_sync", || all_cpus_hammer_calls("--notify sync")),
    ("all_cpus_hammer_calls_full", || all_cpus_hammer_calls("--shadow full")),
    ("wild_rings_of_running_cpus", wild_rings_of_running_cpus),
    ("a_doorbell_that_never_stops", a_doorbell_that_never_stops),
    ("one_cpu_triple_faults", one_cpu_triple_faults),
    ("one_cpu_exits", one_cpu_exits),
    ("one_cpu_resets", one_cpu_resets),
    ("all_cpus_halt", all_cpus_halt),
    ("cpus_that_nobody_starts", cpus_that_nobody_starts),
    ("all_cpus_spin", all_cpus_spin),
    ("ctrl_c_while_all_cpus_spin", ctrl_c_while_all_cpus_spin),
    ("all_cpus_find_at_once", all_cpus_find_at_once),
    ("a_chunk_that_all_cpus_touch_at_once", a_chunk_that_all_cpus_touch_at_once),
    ("live_shadow_while_pages_are_given_back", || live_shadow("", 1)),
    ("live_shadow_at_the_limit", || live_shadow("--shadow-limit 1M", 2)),
    ("another_cpus_tampering", another_cpus_tampering),
    ("instructions_of_all_cpus_count", instructions_of_all_cpus_count),
];

/// Words that all CPUs of a test share, in memory that is zero at the start.
const SHARED: u64 = FREE + (1 << 20);
/// Arrivals at a barrier.
const ARRIVED: u64 = SHARED;
/// The number of CPUs that are done.
const DONE: u64 = SHARED + 64;
/// The number of errors.
const WRONG: u64 = SHARED + 128;

/// Waits until `cpus` CPUs have come to the barrier.
fn barrier(g: &mut Guest, cpus: u32) -> Result<(), IcedError> {
    let a = &mut g.asm;
    let mut again = a.create_label();
    a.mov(rax, ARRIVED)?;
    a.lock().inc(dword_ptr(rax))?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(dword_ptr(rax), cpus)?;
    a.jb(again)
}

/// Counts this CPU as done. The first (`r15` is 0) then waits for all and ends the run; the others
/// halt.
fn all_done(g: &mut Guest, cpus: u32) -> Result<(), IcedError> {
    let a = &mut g.asm;
    let mut again = a.create_label();
    let mut stop = a.create_label();
    a.mov(rax, DONE)?;
    a.lock().inc(dword_ptr(rax))?;
    a.test(r15, r15)?;
    a.jnz(stop)?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(dword_ptr(rax), cpus)?;
    a.jb(again)?;
    a.mov(rbx, WRONG)?;
    a.mov(rbx, qword_ptr(rbx))?;
    g.done_unless_rbx()?;
    g.asm.set_label(&mut stop)?;
    g.halt()
}

/// Calls of every kind with good and bad values, on every CPU. Some of them stop all others.
fn all_cpus_hammer_calls(mode: &str) {
    let wild = [0, 1, 0x1000, FREE, PAGE_WINDOW, BYTE_WINDOW, 1 << 63, u64::MAX - 7];
    let mut rows: Vec<Row> = Vec::new();
    for number in (0..16).filter(|number| *number != u64::from(CallNumber::Exit)) {
        for (i, value) in wild.into_iter().enumerate() {
            let next = wild[(i + 3) % wild.len()];
            rows.push([number, value, next, value & 7, next]);
        }
    }
    for cpu in 0..4 {
        rows.push([CallNumber::RingSetup.into(), FREE + cpu * 0x1000, 0x1000, cpu, 0]);
        rows.push([CallNumber::RingDrain.into(), cpu, 0, 0, 0]);
        rows.push([CallNumber::Report.into(), FREE + 8 * cpu, 4, Access::Write.into(), CODE + cpu]);
    }
    let guest = Guest::new(|g| {
        g.region()?;
        g.start_others()?;
        barrier(g, 4)?;
        g.calls(&rows)?;
        all_done(g, 4)
    });
    let run = run(guest, &format!("--cpus 4 --keep-going {mode}"));
    run.expect(1);
    assert_eq!(run.outcome(), "done");
    assert!(run.figure("/exits/hypercall") >= 4 * rows.len() as u64);
    assert!(run.figure("/events/refused") > 4 * 16);
}

/// All CPUs write to all rings, also to the headers, and drain them at the same time; the collector
/// reads them meanwhile.
fn wild_rings_of_running_cpus() {
    let guest = Guest::new(|g| {
        g.region()?;
        for cpu in 0..4 {
            g.call(CallNumber::RingSetup, [FREE + cpu * 0x1000, 0x1000, cpu, 0])?;
        }
        g.start_others()?;
        barrier(g, 4)?;
        let a = &mut g.asm;
        let mut again = a.create_label();
        a.mov(r12, 300u64)?;
        a.set_label(&mut again)?;
        // Stores a number that looks random to one word of the rings. One word in eight is the
        // first of a header or a record.
        a.imul_3(rbx, r12, 0x41c6_4e6d)?;
        a.add(rbx, r15)?;
        a.mov(rcx, rbx)?;
        a.shr(rcx, 7)?;
        a.and(rcx, 0x7ff)?;
        a.mov(rax, FREE)?;
        a.mov(qword_ptr(rax + rcx * 8), rbx)?;
        // And a count, up to twice as many records as there are, to the CPU's own header.
        a.mov(rcx, r15)?;
        a.shl(rcx, 12)?;
        a.and(ebx, 0x7f)?;
        a.mov(qword_ptr(rax + rcx), rbx)?;
        a.mov(edx, u32::from(DOORBELL_PORT))?;
        a.out(dx, al)?;
        a.mov(rdi, r15)?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(eax, u32::from(CallNumber::RingDrain))?;
        a.out(dx, eax)?;
        a.dec(r12)?;
        a.jnz(again)?;
        all_done(g, 4)
    });
    let run = quiet(guest, "--cpus 4 --keep-going");
    run.expect(0);
    assert_eq!((run.outcome(), run.figure("/events/ring_drains")), ("done", 4 * 300 + 1));
}

/// All CPUs ring the doorbell as often as they can, for a ring in which there is one record.
fn a_doorbell_that_never_stops() {
    const RINGS: u64 = 25_000;
    let guest = Guest::new(|g| {
        g.region()?;
        g.call(CallNumber::RingSetup, [FREE, 0x1000, 0, 0])?;
        g.asm.mov(rax, FREE)?;
        g.asm.mov(byte_ptr(rax + 64), u32::from(u8::from(RecordKind::Freed)))?;
        g.asm.mov(qword_ptr(rax), 1)?;
        g.start_others()?;
        barrier(g, 4)?;
        let a = &mut g.asm;
        let mut again = a.create_label();
        a.mov(r12, RINGS)?;
        a.mov(edx, u32::from(DOORBELL_PORT))?;
        a.set_label(&mut again)?;
        a.out(dx, al)?;
        a.dec(r12)?;
        a.jnz(again)?;
        all_done(g, 4)
    });
    let run = run(guest, "--cpus 4");
    run.expect(0);
    let figure = |name| run.figure(name);
    assert_eq!((run.outcome(), figure("/events/frees")), ("done", 1));
    assert!(figure("/events/collected") <= 1);
    // They are no exits to Umbra.
    assert!(figure("/exits/total") < RINGS);
}

/// All CPUs but the second make calls for ever; the second does `what`.
fn others_go_on(what: impl FnOnce(&mut Guest) -> Result<(), IcedError>) -> Guest {
    Guest::new(|g| {
        g.region()?;
        g.start_others()?;
        barrier(g, 4)?;
        let mut go_on = g.asm.create_label();
        g.asm.cmp(r15, 1)?;
        g.asm.jne(go_on)?;
        what(g)?;
        g.asm.set_label(&mut go_on)?;
        g.call(CallNumber::Hello, [abi::VERSION.into(), 0, 0, 0])?;
        g.asm.jmp(go_on)
    })
}

fn one_cpu_triple_faults() {
    let guest = others_go_on(|g| {
        let nothing = g.data(&[0; 16]);
        g.asm.mov(rax, nothing)?;
        g.asm.lidt(ptr(rax))?;
        g.asm.ud2()
    });
    let run = quiet(guest, "--cpus 4");
    run.expect(3);
    assert_eq!(run.outcome(), "triple-fault");
}

fn one_cpu_exits() {
    let run = quiet(
        others_go_on(|g| g.call(CallNumber::Exit, [ExitReason::Panic.into(), 0, 0, 0])),
        "--cpus 4",
    );
    run.expect(3);
    assert_eq!(run.outcome(), "panic");
}

fn one_cpu_resets() {
    let guest = others_go_on(|g| {
        g.asm.mov(eax, 0xfe)?;
        g.asm.out(0x64, al)
    });
    let run = quiet(guest, "--cpus 4");
    run.expect(0);
    assert_eq!(run.outcome(), "reset");
}

/// Nothing can wake them, but the host cannot know that.
fn all_cpus_halt() {
    let guest = Guest::new(|g| {
        g.start_others()?;
        g.halt()
    });
    // Nothing can wake them: their interrupts are off.
    let run = quiet(guest, "--cpus 4");
    run.expect(0);
    assert_eq!(run.outcome(), "halted");
}

fn cpus_that_nobody_starts() {
    let run = quiet(Guest::new(Guest::done), "--cpus 64");
    run.expect(0);
    assert_eq!((run.outcome(), run.figure("/guest/cpus")), ("done", 64));
}

/// Each CPU reports once, from an address of its own, and never ends.
fn spinning() -> Guest {
    Guest::new(|g| {
        g.region()?;
        g.start_others()?;
        report_as_oneself(g)?;
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        g.asm.pause()?;
        g.asm.jmp(again)
    })
}

/// A report of an access from an address that depends on the CPU's number.
fn report_as_oneself(g: &mut Guest) -> Result<(), IcedError> {
    let a = &mut g.asm;
    a.mov(r8, r15)?;
    a.mov(rax, CODE)?;
    a.add(r8, rax)?;
    a.mov(rdi, FREE)?;
    a.mov(esi, 1)?;
    a.xor(ecx, ecx)?;
    a.mov(edx, u32::from(PORT))?;
    a.mov(eax, u32::from(CallNumber::Report))?;
    a.out(dx, eax)
}

fn ctrl_c_while_all_cpus_spin() {
    let umbra = Umbra::new(PROGRAM, "run")
        .file(&spinning().elf())
        .args("--memory 16M --cpus 4 --keep-going");
    let mut started = umbra.args("--timeout 60s").collect().start();
    for cpu in 0..4 {
        started.wait_for("stderr", &format!("CPU: {cpu} "));
    }
    started.signal(libc::SIGINT);
    let run = started.wait();
    run.expect(130);
    assert_eq!((run.outcome(), run.findings.len()), ("interrupted", 4));
    assert!(!run.stderr.contains("left behind"), "{}", run.stderr);
}

fn all_cpus_spin() {
    let run = quiet(spinning(), "--cpus 4 --keep-going --timeout 1s");
    run.expect(4);
    assert!(run.time < Duration::from_secs(20), "{:?}", run.time);
    assert!(!run.stderr.contains("left behind"), "{}", run.stderr);
}

/// The first finding ends the run: no other is printed, though all CPUs are about to report.
fn all_cpus_find_at_once() {
    let guest = || {
        Guest::new(|g| {
            g.region()?;
            g.start_others()?;
            barrier(g, 4)?;
            report_as_oneself(g)?;
            all_done(g, 4)
        })
    };
    let first = quiet(guest(), "--cpus 4");
    first.expect(1);
    assert_eq!((first.outcome(), first.findings.len()), ("finding-limit", 1));
    let run = quiet(guest(), "--cpus 4 --keep-going");
    run.expect(1);
    let mut cpus: Vec<_> = run.findings.iter().map(|finding| finding["cpu"].as_u64()).collect();
    cpus.sort_unstable();
    assert_eq!(cpus, [Some(0), Some(1), Some(2), Some(3)], "each names the CPU");
}

fn a_chunk_that_all_cpus_touch_at_once() {
    const CHUNKS: u64 = 8;
    let guest = Guest::new(|g| {
        g.region()?;
        g.start_others()?;
        for chunk in 0..CHUNKS {
            barrier(g, 4 * (chunk as u32 + 1))?;
            let a = &mut g.asm;
            // Each CPU's own eight bytes; they all must be there afterwards.
            a.mov(rbx, BYTE_WINDOW + chunk * (256 << 10))?;
            a.mov(rax, u64::from_ne_bytes([SLAB_FREE; 8]))?;
            a.mov(qword_ptr(rbx + r15 * 8), rax)?;
        }
        barrier(g, 4 * (CHUNKS as u32 + 1))?;
        for chunk in 0..CHUNKS {
            for cpu in 0..4 {
                let a = &mut g.asm;
                let mut good = a.create_label();
                a.mov(rbx, BYTE_WINDOW + chunk * (256 << 10) + 8 * cpu)?;
                a.mov(rax, u64::from_ne_bytes([SLAB_FREE; 8]))?;
                a.cmp(qword_ptr(rbx), rax)?;
                a.je(good)?;
                a.mov(rcx, WRONG)?;
                a.lock().inc(qword_ptr(rcx))?;
                a.set_label(&mut good)?;
            }
        }
        all_done(g, 4)
    });
    let run = quiet(guest, "--cpus 4");
    run.expect(0);
    assert_eq!((run.outcome(), run.figure("/exits/shadow_fault")), ("done", CHUNKS));
}

/// Three CPUs promote pages, fill their byte shadow, read it back, demote them, and begin anew,
/// each with `chunks` pages in as many chunks of its own. Meanwhile the first makes the VMM reclaim
/// unused shadow; at the limit the VMM reclaims whole chunks as well.
fn live_shadow(arguments: &str, chunks: u32) {
    const ROUNDS: u64 = 200;
    let cpus = 4;
    let guest = Guest::new(|g| {
        g.region()?;
        g.call(CallNumber::RingSetup, [FREE, 0x1000, 0, 0])?;
        g.start_others()?;
        barrier(g, cpus)?;
        let a = &mut g.asm;
        let mut promoter = a.create_label();
        let mut first = a.create_label();
        a.test(r15, r15)?;
        a.jnz(promoter)?;
        // The first: drain after drain, until the others are done, with pauses for them.
        let mut breath = a.create_label();
        a.set_label(&mut first)?;
        a.mov(ecx, 100)?;
        a.set_label(&mut breath)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jnz(breath)?;
        a.xor(edi, edi)?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(eax, u32::from(CallNumber::RingDrain))?;
        a.out(dx, eax)?;
        a.mov(rax, DONE)?;
        a.cmp(dword_ptr(rax), cpus - 1)?;
        a.jb(first)?;
        let mut end = a.create_label();
        a.jmp(end)?;

        // The others, in chunk `chunks * r15 + r12 % chunks`, where `chunks` is 1 or 2.
        a.set_label(&mut promoter)?;
        let mut round = a.create_label();
        a.mov(r12, ROUNDS)?;
        a.set_label(&mut round)?;
        a.imul_3(rcx, r15, chunks as i32)?;
        a.mov(rbx, r12)?;
        a.and(ebx, chunks - 1)?;
        a.add(rbx, rcx)?;
        a.shl(rbx, 9)?;
        // rbx: page, rbp: its page shadow, rdi: its byte shadow.
        a.mov(rbp, PAGE_WINDOW)?;
        a.add(rbp, rbx)?;
        a.mov(rdi, BYTE_WINDOW)?;
        a.shl(rbx, 9)?;
        a.add(rdi, rbx)?;
        a.mov(byte_ptr(rbp), u32::from(PAGE_BUSY))?;
        a.mov(rax, u64::from_ne_bytes([SLAB_FREE; 8]))?;
        a.xor(ecx, ecx)?;
        let mut fill = a.create_label();
        a.set_label(&mut fill)?;
        a.mov(qword_ptr(rdi + rcx * 8), rax)?;
        a.inc(ecx)?;
        a.cmp(ecx, 64)?;
        a.jb(fill)?;
        a.mov(byte_ptr(rbp), u32::from(PAGE_BYTES))?;
        // Give the VMM time to take it.
        let mut wait = a.create_label();
        a.mov(ecx, 50)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jnz(wait)?;
        let mut look = a.create_label();
        let mut good = a.create_label();
        a.set_label(&mut look)?;
        a.cmp(qword_ptr(rdi + rcx * 8), rax)?;
        a.je(good)?;
        a.mov(rsi, WRONG)?;
        a.lock().inc(qword_ptr(rsi))?;
        a.set_label(&mut good)?;
        a.inc(ecx)?;
        a.cmp(ecx, 64)?;
        a.jb(look)?;
        // Leaves it unused for a varying time, so that the next promotion meets any step of the
        // VMM.
        a.mov(byte_ptr(rbp), 0)?;
        let mut unused = a.create_label();
        a.mov(ecx, r12d)?;
        a.and(ecx, 63)?;
        a.inc(ecx)?;
        a.set_label(&mut unused)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jnz(unused)?;
        a.dec(r12)?;
        a.jnz(round)?;
        a.set_label(&mut end)?;
        all_done(g, cpus)
    });
    let run = quiet(guest, &format!("--cpus {cpus} {arguments}"));
    run.expect(0);
    assert_eq!(run.outcome(), "done");
    assert!(
        run.figure("/shadow/released_bytes") > 0,
        "nothing was given back, so nothing was tried"
    );
}

/// In `sync` mode, by a CPU that is not the first.
fn another_cpus_tampering() {
    let guest = Guest::new(|g| {
        g.region()?;
        g.start_others()?;
        barrier(g, 2)?;
        let mut innocent = g.asm.create_label();
        g.asm.test(r15, r15)?;
        g.asm.jz(innocent)?;
        g.asm.mov(rbx, PAGE_WINDOW)?;
        g.asm.mov(byte_ptr(rbx), 1)?;
        g.asm.set_label(&mut innocent)?;
        all_done(g, 2)
    });
    let run = quiet(guest, "--cpus 2 --notify sync --keep-going");
    run.expect(1);
    assert_eq!(run.findings.len(), 1);
    assert_eq!(
        (&run.findings[0]["kind"], &run.findings[0]["cpu"]),
        (&"shadow-tampering".into(), &1.into())
    );
}

fn instructions_of_all_cpus_count() {
    const EACH: u64 = 100_000;
    let guest = Guest::new(|g| {
        g.start_others()?;
        let mut end = g.asm.create_label();
        let mut again = g.asm.create_label();
        g.asm.test(r15, r15)?;
        g.asm.jz(end)?;
        g.asm.mov(ecx, EACH as u32)?;
        g.asm.set_label(&mut again)?;
        g.asm.dec(ecx)?;
        g.asm.jnz(again)?;
        g.asm.set_label(&mut end)?;
        all_done(g, 3)
    });
    let run = quiet(guest, "--cpus 3");
    run.expect(0);
    // Null where the host runs ring 0 itself.
    let instructions = run.stats["guest"]["instructions"].as_u64();
    assert_eq!(instructions.is_some(), ring0_is_emulated());
    assert!(instructions.is_none_or(|count| count > 2 * 2 * EACH), "{instructions:?}");
}
