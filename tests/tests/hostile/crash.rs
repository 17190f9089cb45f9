//! Guests that jump to unmapped memory, never end, crash, or use instructions that the CPU lacks;
//! and floods of output and of accesses.

use std::time::Duration;

use iced_x86::code_asm::*;
use umbra_shadow::abi::Access;
use umbra_tests::program::Run;

use super::guest::{BYTE_WINDOW, CODE, FREE, Guest, PAGE_WINDOW};
use super::{OUTPUT, quiet, ring0_is_emulated, run};

pub const ALL: &[(&str, fn())] = &[
    ("jumps_into_nothing", jumps_into_nothing),
    ("jumps_into_the_windows", jumps_into_the_windows),
    ("an_endless_loop", || endless("loop", |a, _| a.nop())),
    ("an_endless_vmcall", || endless("vmcall", |a, _| a.vmcall())),
    ("endless_port_writes", || endless("out", |a, _| a.out(0x80, al))),
    ("endless_hypercalls", endless_hypercalls),
    ("findings_outlive_the_time_limit", findings_outlive_the_time_limit),
    ("a_triple_fault", a_triple_fault),
    ("an_idt_that_leads_nowhere", an_idt_that_leads_nowhere),
    ("page_tables_that_vanish", page_tables_that_vanish),
    ("a_halt", a_halt),
    ("resets", resets),
    ("an_unknown_instruction", an_unknown_instruction),
    ("no_instruction_at_all", no_instruction_at_all),
    ("a_flood_on_the_console", a_flood_on_the_console),
    ("hammering_ports", hammering_ports),
    ("hammering_mmio", hammering_mmio),
];

/// All outcomes of a guest whose instructions cannot be fetched.
const CRASHES: [&str; 3] = ["triple-fault", "stuck", "unknown-instruction"];

fn jumps_into_nothing() {
    // Not mapped, not canonical, mapped with nothing behind, the hole below 4 GiB, all of memory
    // zero.
    for target in [0x7f_ffff_f000, 1 << 63, 0x3000_0000, 0xfee0_0000, u64::MAX] {
        let guest = Guest::new(|g| {
            g.region()?;
            g.report(FREE, 1, u64::from(Access::Write), CODE)?;
            g.asm.mov(rax, target)?;
            g.asm.jmp(rax)
        });
        let run = quiet(guest, "--keep-going --timeout 5s");
        run.expect(3);
        assert!(CRASHES.contains(&run.outcome()), "{target:#x}: {}", run.outcome());
        assert_eq!(run.findings.len(), 1, "what was found before is told");
        assert!(run.stderr.contains(place(&run)), "{}", run.tail());
    }
}

/// Where the guest was, as the outcome says it. KVM for AMD resets a CPU that triple-faults before
/// anybody can ask, and there is a note of that.
fn place(run: &Run) -> &'static str {
    if run.stderr.contains("Note: the CPU was reset") { "an unknown place" } else { "rip 0x" }
}

fn jumps_into_the_windows() {
    for mode in ["--notify ring", "--notify sync", "--shadow full"] {
        for target in [PAGE_WINDOW, BYTE_WINDOW, BYTE_WINDOW + 0x1234] {
            let guest = Guest::new(|g| {
                g.region()?;
                g.asm.mov(rax, target)?;
                g.asm.jmp(rax)
            });
            let run = run(guest, &format!("--keep-going --timeout 1s {mode}"));
            // Shadow that reads as zero is code, too: `add [rax], al`, a store to the window.
            let outcome = run.outcome();
            let tampered = run.findings.iter().all(|finding| finding["kind"] == "shadow-tampering");
            assert!(
                CRASHES.contains(&outcome) || outcome == "time-limit",
                "{mode} {target:#x}: {outcome}"
            );
            assert!(tampered, "{:?}", run.findings);
            assert!(run.stderr.len() < 4 << 20, "{} bytes", run.stderr.len());
        }
    }
}

type Body = fn(&mut CodeAssembler, ()) -> Result<(), IcedError>;

/// `body` for ever: the time limit ends it, on time.
fn endless(what: &str, body: Body) {
    let guest = Guest::new(|g| {
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        body(&mut g.asm, ())?;
        g.asm.jmp(again)
    });
    let run = quiet(guest, "--timeout 2s");
    // A host may know `vmcall` and refuse it.
    if what == "vmcall" && run.code() == Some(3) {
        return;
    }
    run.expect(4);
    assert_eq!(run.outcome(), "time-limit");
    assert!(run.stderr.contains("time limit of 2s"), "{}", run.stderr);
    assert!(run.time < Duration::from_secs(3), "{:?}", run.time);
}

fn endless_hypercalls() {
    let guest = Guest::new(|g| {
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        g.call(0xdeadu32, [1, 2, 3, 4])?;
        g.asm.jmp(again)
    });
    let run = quiet(guest, "--timeout 2s");
    run.expect(4);
    assert!(run.figure("/events/refused") > 100);
}

fn findings_outlive_the_time_limit() {
    let guest = Guest::new(|g| {
        g.region()?;
        g.report(FREE, 1, u64::from(Access::Write), CODE)?;
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        g.asm.jmp(again)
    });
    let run = quiet(guest, "--keep-going --timeout 2s");
    run.expect(4);
    assert_eq!(run.findings.len(), 1);
    assert!(
        run.stderr.contains("BUG: KASAN") && run.stderr.contains("1 finding;"),
        "{}",
        run.stderr
    );
}

fn a_triple_fault() {
    let guest = Guest::new(|g| {
        let table = g.data(&[0; 16]);
        g.asm.mov(rax, table)?;
        g.asm.lidt(ptr(rax))?;
        g.asm.ud2()
    });
    let run = quiet(guest, "");
    run.expect(3);
    assert_eq!(run.outcome(), "triple-fault");
    // Registers and stack of one CPU, the outcome, and the note of a reset.
    let place = place(&run);
    let notes = usize::from(place != "rip 0x");
    assert_eq!(run.stderr.lines().count(), 9 + notes, "{}", run.stderr);
    assert!(run.stderr.contains(&format!("triple-faulted at {place}")), "{}", run.stderr);
}

/// Handlers that fault themselves, because their stack is not in memory.
fn an_idt_that_leads_nowhere() {
    let guest = Guest::new(|g| {
        // All handlers are at 0x300000, in boot code segment 0x10.
        let gate = 0x10u64 << 16 | 0x8e00 << 32 | 0x30 << 48;
        let gates: Vec<u8> = (0..256).flat_map(|_| [gate, 0]).flat_map(u64::to_le_bytes).collect();
        let gates = g.data(&gates);
        let mut pointer = 0xfffu16.to_le_bytes().to_vec();
        pointer.extend(gates.to_le_bytes());
        let pointer = g.data(&pointer);
        g.asm.mov(rax, pointer)?;
        g.asm.lidt(ptr(rax))?;
        g.asm.mov(rsp, 0x7f_0000_0000u64)?;
        g.asm.int3()
    });
    let run = quiet(guest, "--timeout 2s");
    assert!(CRASHES.contains(&run.outcome()), "{}", run.outcome());
    run.expect(3);
}

fn page_tables_that_vanish() {
    for root in [FREE, 0x4000_0000, 0xf_ffff_f000] {
        let guest = Guest::new(|g| {
            g.region()?;
            g.asm.mov(rax, root)?;
            g.asm.mov(cr3, rax)?;
            g.done()
        });
        let run = quiet(guest, "--timeout 3s");
        run.expect(3);
        assert!(CRASHES.contains(&run.outcome()), "{root:#x}: {}", run.outcome());
    }
}

fn a_halt() {
    let run = quiet(Guest::new(|g| g.asm.hlt()), "");
    run.expect(0);
    assert_eq!(run.outcome(), "halted");
}

fn resets() {
    for (port, value, word) in
        [(0x64u32, 0xfe, "reset"), (0xcf9, 6, "reset"), (0x604, 0x2000, "power-off")]
    {
        let guest = Guest::new(|g| {
            g.asm.mov(edx, port)?;
            g.asm.mov(eax, value)?;
            g.asm.out(dx, ax)
        });
        let run = quiet(guest, "");
        run.expect(0);
        assert_eq!(run.outcome(), word, "port {port:#x}");
    }
}

fn an_unknown_instruction() {
    let run = quiet(Guest::new(|g| g.asm.getsec()), "--timeout 3s");
    run.expect(3);
    if ring0_is_emulated() {
        assert_eq!(run.outcome(), "unknown-instruction");
        for part in ["getsec", "0f 37", "rip 0x1000"] {
            assert!(run.stderr.contains(part), "no {part:?}: {}", run.stderr);
        }
    } else {
        // Safer mode is off at the start, so hardware raises an exception, for which there is no
        // handler.
        assert_eq!(run.outcome(), "triple-fault");
    }
}

fn no_instruction_at_all() {
    let guest = Guest::new(|g| {
        g.asm.nop()?;
        g.asm.db(&[0x06, 0x0f, 0xff, 0xff, 0xff])
    });
    let run = quiet(guest, "--timeout 3s");
    run.expect(3);
    assert!(CRASHES.contains(&run.outcome()), "{}", run.outcome());
}

/// Two hundred thousand bytes without an end of line: all are printed, and none is kept.
fn a_flood_on_the_console() {
    const BYTES: u32 = 200_000;
    let guest = Guest::new(|g| {
        let source = g.data(&[b'x'; 4000]);
        let a = &mut g.asm;
        a.mov(edx, 0x3f8)?;
        a.cld()?;
        a.mov(ebx, BYTES / 4000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsi, source)?;
        a.mov(ecx, 4000)?;
        a.rep().outsb()?;
        a.dec(ebx)?;
        a.jnz(again)?;
        g.done()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert_eq!(run.stdout.len(), BYTES as usize);
    assert!(run.stdout.iter().all(|b| *b == b'x'));
}

/// All ports but those that reset, written and read in all widths.
fn hammering_ports() {
    let guest = Guest::new(|g| {
        let a = &mut g.asm;
        a.mov(ebx, 0xffff)?;
        let (mut again, mut skip) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        for port in [0x64, 0xcf9, 0xcf8, 0x604, 0x603, 0xb5e] {
            a.cmp(ebx, port)?;
            a.je(skip)?;
        }
        a.mov(edx, ebx)?;
        a.xor(eax, eax)?;
        a.out(dx, al)?;
        a.in_(al, dx)?;
        a.in_(eax, dx)?;
        a.set_label(&mut skip)?;
        // A step of 7, which reaches most of them and ends.
        a.sub(ebx, 7)?;
        a.ja(again)?;
        // The hypercall's port takes accesses of 32 bits only.
        a.mov(edx, 0xb5e)?;
        a.mov(eax, 11)?;
        a.xor(edi, edi)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.in_(eax, dx)?;
        g.done()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert_eq!(run.figure("/exits/hypercall"), 1);
    assert!(run.figure("/exits/io") > 20_000);
    assert!(run.stderr.len() < OUTPUT / 8);
}

fn hammering_mmio() {
    let guest = Guest::new(|g| {
        let a = &mut g.asm;
        a.mov(r12d, 10_000)?;
        a.mov(rbx, 0xc000_0000u64)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(al, byte_ptr(rbx + 3))?;
        a.lock().add(dword_ptr(rbx + 4), 1)?;
        a.add(rbx, 0x1235)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        g.done()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert!(run.figure("/exits/mmio") >= 30_000, "{}", run.stats);
    assert!(run.stderr.lines().count() < 40, "{}", run.tail());
}
