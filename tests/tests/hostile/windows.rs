//! Guests that misuse the shadow windows: touch all of them, exceed the limit, tamper, access
//! across their ends.

use iced_x86::code_asm::*;
use umbra_shadow::abi::{self, Access, CallNumber, GuestFlags};
use umbra_shadow::codes::{FREE_PAGE, PAGE_BYTES, SLAB_FREE, SLAB_FREE_TRACK};

use super::guest::{
    BYTE_WINDOW, BYTE_WINDOW_BYTES, CODE, FREE, Guest, PAGE_WINDOW, PAGE_WINDOW_BYTES, RAM,
};
use super::{quiet, run};

pub const ALL: &[(&str, fn())] = &[
    ("every_chunk_over_the_limit", every_chunk_over_the_limit),
    ("every_chunk_unused", every_chunk_unused),
    ("every_chunk_without_limit", every_chunk_without_limit),
    ("a_limit_below_a_chunk", a_limit_below_a_chunk),
    ("the_limit_binds_calls_too", the_limit_binds_calls_too),
    ("a_limit_below_a_full_shadow", a_limit_below_a_full_shadow),
    ("tampering_with_bytes", || tampering(BYTE_WINDOW + 0x123)),
    ("tampering_with_pages", || tampering(PAGE_WINDOW + 0x123)),
    ("tampering_with_full_shadow", tampering_with_full_shadow),
    ("tampering_again_and_again", tampering_again_and_again),
    ("straddling_window_ends_ring", || straddling("--notify ring")),
    ("straddling_window_ends_sync", || straddling("--notify sync")),
    ("straddling_window_ends_full", || straddling("--shadow full")),
    ("stores_of_every_kind", stores_of_every_kind),
    ("garbage_in_the_shadow", garbage_in_the_shadow),
    ("all_memory_is_free", || all_memory_is_unused(FREE_PAGE)),
    ("all_memory_is_in_quarantine", || all_memory_is_unused(SLAB_FREE_TRACK)),
];

/// A guest that lets the host discard unused pages, and marks all pages as unused: its code, its
/// stack, its page tables.
fn all_memory_is_unused(code: u8) {
    let guest = Guest::new(|g| {
        let unused = (GuestFlags::FREE_PAGES_UNUSED | GuestFlags::QUARANTINE_UNUSED).bits();
        g.call(CallNumber::Hello, [abi::VERSION.into(), unused, 0, 0])?;
        g.region()?;
        g.report(FREE, 1, u64::from(Access::Write), CODE)?;
        let a = &mut g.asm;
        a.mov(rdi, PAGE_WINDOW)?;
        a.mov(ecx, (RAM >> 12) as u32)?;
        a.mov(eax, u32::from(code))?;
        a.cld()?;
        a.rep().stosb()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        g.call(u32::from(CallNumber::Hello) + 99, [0; 4])?;
        g.asm.jmp(again)
    });
    let run = quiet(guest, "--keep-going --timeout 20s");
    run.expect(3);
    assert_eq!(run.findings.len(), 1, "what was found before is kept");
    assert!(run.figure("/guest/released_bytes") > 0, "{}", run.tail());
}

const CHUNK: u64 = 256 << 10;
const CHUNKS: u64 = BYTE_WINDOW_BYTES / CHUNK;

/// Reports once, then stores to each chunk. With `used` it first marks a page of the chunk as
/// byte-checked.
fn touch_every_chunk(used: bool) -> Guest {
    Guest::new(|g| {
        g.region()?;
        g.report(FREE, 1, u64::from(Access::Write), CODE)?;
        for chunk in 0..CHUNKS {
            if used {
                g.asm.mov(rbx, PAGE_WINDOW + chunk * 512)?;
                g.asm.mov(byte_ptr(rbx), u32::from(PAGE_BYTES))?;
            }
            g.asm.mov(rbx, BYTE_WINDOW + chunk * CHUNK + 8)?;
            g.asm.mov(byte_ptr(rbx), u32::from(SLAB_FREE))?;
        }
        g.done()
    })
}

fn every_chunk_over_the_limit() {
    let run = quiet(touch_every_chunk(true), "--keep-going --shadow-limit 1M");
    run.expect(2);
    assert_eq!(run.outcome(), "shadow-limit");
    assert_eq!(run.figure("/shadow/byte_mapped_bytes"), 1 << 20);
    assert_eq!(run.findings.len(), 1, "what was found before is kept");
    assert!(
        run.stderr.contains("--shadow-limit") && run.stderr.contains("BUG: KASAN"),
        "{}",
        run.stderr
    );
}

/// Unused chunks make room for others.
fn every_chunk_unused() {
    let run = quiet(touch_every_chunk(false), "--keep-going --shadow-limit 1M");
    run.expect(1);
    assert_eq!((run.outcome(), run.figure("/shadow/faults")), ("done", CHUNKS));
    assert!(run.figure("/shadow/byte_mapped_bytes") <= 1 << 20);
    assert!(run.figure("/shadow/released_bytes") >= 4 * 4096);
}

fn every_chunk_without_limit() {
    let run = quiet(touch_every_chunk(true), "--keep-going");
    run.expect(1);
    assert_eq!((run.outcome(), run.figure("/shadow/faults")), ("done", CHUNKS));
    assert_eq!(run.figure("/shadow/byte_mapped_bytes"), BYTE_WINDOW_BYTES);
    assert_eq!(run.figure("/shadow/byte_peak_resident_bytes"), CHUNKS * 4096);
    assert_eq!(run.figure("/shadow/byte_used_peak_bytes"), CHUNKS * 512);
}

fn a_limit_below_a_chunk() {
    for limit in ["0", "1", "255K"] {
        let run = quiet(touch_every_chunk(true), &format!("--keep-going --shadow-limit {limit}"));
        run.expect(2);
        assert_eq!((run.outcome(), run.figure("/shadow/byte_mapped_bytes")), ("shadow-limit", 0));
    }
}

fn the_limit_binds_calls_too() {
    let guest = Guest::new(|g| {
        g.region()?;
        for chunk in 0..CHUNKS {
            g.call(CallNumber::Poison, [chunk * (2 << 20) + 8, 8, SLAB_FREE.into(), 0])?;
        }
        g.done()
    });
    let run = quiet(guest, "--notify sync --shadow-limit 1M");
    run.expect(2);
    assert_eq!((run.outcome(), run.figure("/exits/hypercall")), ("shadow-limit", 1 + 5));
}

fn a_limit_below_a_full_shadow() {
    let run = run(touch_every_chunk(false), "--shadow full --shadow-limit 1M");
    run.expect_refusal(&["over the limit"]);
}

/// Reads, stores, and reads again: `rbx` is the difference.
fn store_at(g: &mut Guest, at: u64) -> Result<(), IcedError> {
    let a = &mut g.asm;
    a.mov(r13, at)?;
    a.mov(r14, qword_ptr(r13))?;
    a.mov(rax, 0x4242_4242_4242_4242u64)?;
    a.mov(qword_ptr(r13), rax)?;
    a.mov(byte_ptr(r13), 0x77)?;
    a.mov(rbx, qword_ptr(r13))?;
    a.xor(rbx, r14)
}

/// In sync mode the guest's own stores change nothing and are found.
fn tampering(at: u64) {
    let guest = Guest::new(|g| {
        g.region()?;
        // The chunk is mapped: its page is byte-checked.
        g.call(CallNumber::Poison, [0x123_000, 8, SLAB_FREE.into(), 0])?;
        store_at(g, at)?;
        g.done_unless_rbx()
    });
    let run = quiet(guest, "--keep-going --notify sync");
    assert_eq!(run.outcome(), "done", "the shadow has changed");
    run.expect(1);
    let found: Vec<_> = run
        .findings
        .iter()
        .map(|f| (f["kind"].as_str(), f["access"].as_str(), f["size"].as_u64()))
        .collect();
    let tampering = |size| (Some("shadow-tampering"), Some("write"), Some(size));
    assert_eq!(found, [tampering(8), tampering(1)]);
    assert!(run.stderr.contains("BUG: KASAN: shadow-tampering in"), "{}", run.stderr);
}

fn tampering_with_full_shadow() {
    let guest = Guest::new(|g| {
        g.region()?;
        store_at(g, BYTE_WINDOW + 0x123)?;
        g.done_unless_rbx()
    });
    let run = quiet(guest, "--keep-going --notify sync --shadow full");
    run.expect(1);
    assert_eq!((run.outcome(), run.findings.len()), ("done", 2));
    assert_eq!(run.findings[0]["kind"], "shadow-tampering");
}

fn tampering_again_and_again() {
    let guest = Guest::new(|g| {
        g.region()?;
        let a = &mut g.asm;
        a.mov(rbx, BYTE_WINDOW)?;
        a.mov(r12d, 10_000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(byte_ptr(rbx), 1)?;
        a.add(rbx, 199)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        g.done()
    });
    let run = quiet(guest, "--keep-going --notify sync");
    run.expect(1);
    assert_eq!((run.figure("/findings"), run.figure("/findings_total")), (1, 10_000));
}

/// Loads and stores that begin before a window or end behind it.
fn straddling(mode: &str) {
    let ends = [
        PAGE_WINDOW,
        PAGE_WINDOW + PAGE_WINDOW_BYTES,
        BYTE_WINDOW,
        BYTE_WINDOW + BYTE_WINDOW_BYTES,
        BYTE_WINDOW + CHUNK,
        BYTE_WINDOW + BYTE_WINDOW_BYTES - 8,
    ];
    let guest = Guest::new(|g| {
        g.region()?;
        for end in ends {
            for before in [1, 4, 7] {
                g.asm.mov(rbx, end - before)?;
                g.asm.mov(rax, qword_ptr(rbx))?;
                g.asm.mov(qword_ptr(rbx), rax)?;
                g.asm.mov(dword_ptr(rbx), eax)?;
                g.asm.mov(byte_ptr(rbx + 7), al)?;
            }
        }
        g.done()
    });
    let run = quiet(guest, &format!("--keep-going {mode}"));
    assert_eq!(run.outcome(), "done", "{}", run.tail());
    let tampered = run.findings.iter().all(|finding| finding["kind"] == "shadow-tampering");
    assert!(tampered && run.findings.is_empty() == (mode != "--notify sync"), "{:?}", run.findings);
}

/// String stores, locked read-modify-writes and exchanges that start in chunks that are not mapped:
/// nothing is lost.
fn stores_of_every_kind() {
    let guest = Guest::new(|g| {
        g.region()?;
        let a = &mut g.asm;
        a.cld()?;
        // 16 bytes across the first chunk boundary, both chunks new.
        a.mov(rdi, BYTE_WINDOW + CHUNK - 8)?;
        a.mov(eax, 0x5a)?;
        a.mov(ecx, 16)?;
        a.rep().stosb()?;
        // Locked, in a third chunk.
        a.mov(rbx, BYTE_WINDOW + 3 * CHUNK)?;
        a.lock().add(qword_ptr(rbx), 5)?;
        a.lock().add(qword_ptr(rbx), 6)?;
        a.mov(rax, 0x33u64)?;
        a.mov(r14, BYTE_WINDOW + 4 * CHUNK)?;
        a.xchg(qword_ptr(r14), rax)?;
        // A load from a new chunk reads as zero.
        a.mov(r15, BYTE_WINDOW + 5 * CHUNK)?;
        a.mov(r15, qword_ptr(r15))?;
        // The sum of all values, less the expected one.
        a.mov(r13, BYTE_WINDOW + CHUNK)?;
        a.movzx(esi, byte_ptr(r13 - 8))?;
        a.movzx(edi, byte_ptr(r13 + 7))?;
        a.mov(rbx, qword_ptr(rbx))?;
        a.add(rbx, qword_ptr(r14))?;
        a.add(rbx, r15)?;
        a.add(rbx, rsi)?;
        a.add(rbx, rdi)?;
        a.add(rbx, rax)?;
        a.sub(rbx, 11 + 0x33 + 2 * 0x5a)?;
        g.done_unless_rbx()
    });
    let run = quiet(guest, "--keep-going");
    assert_eq!(run.outcome(), "done", "a store was lost: {}", run.tail());
    run.expect(0);
    assert_eq!(run.figure("/shadow/faults"), 5);
}

/// Shadow values without a meaning: reports and releases handle them.
fn garbage_in_the_shadow() {
    let guest = Guest::new(|g| {
        g.region()?;
        g.call(CallNumber::RingSetup, [FREE, 128, 0, 0])?;
        for (page, value) in
            [(0x900u64, 3u32), (0x901, 0x7f), (0x902, 2), (0x903, 1), (0x904, 0x80), (0x905, 0xff)]
        {
            g.asm.mov(rbx, PAGE_WINDOW + page)?;
            g.asm.mov(byte_ptr(rbx), value)?;
            g.asm.mov(rbx, BYTE_WINDOW + page * 512)?;
            g.asm.mov(byte_ptr(rbx), 0x55)?;
            g.call(CallNumber::RingDrain, [0; 4])?;
            g.report(page << 12, 8, 0, CODE + page)?;
            g.report((page << 12) + 4095, 8, 1, CODE + page + 0x1000)?;
        }
        g.done()
    });
    let run = quiet(guest, "--keep-going");
    run.expect(1);
    assert_eq!((run.outcome(), run.findings.len()), ("done", 12), "{}", run.tail());
}
