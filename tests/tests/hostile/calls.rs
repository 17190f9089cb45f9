//! Hypercalls with wild values, rings with garbage, floods of reports, names with escape sequences.

use umbra_shadow::abi::{
    Access, CallNumber, ExitReason, GuestFlags, NameKind, RECORD_BYTES, RECORD_NAME_MAX, RecordKind,
};
use umbra_shadow::codes::{PAGE_BYTES, SLAB_FREE};

use super::guest::{BYTE_WINDOW, CODE, FREE, Guest, PAGE_WINDOW, RAM, Row, VIRTUAL_BYTES};
use super::{OUTPUT, quiet, run};

pub const ALL: &[(&str, fn())] = &[
    ("wild_calls_ring", || wild_calls("--notify ring")),
    ("wild_calls_sync", || wild_calls("--notify sync")),
    ("wild_calls_full", || wild_calls("--shadow full --notify sync")),
    ("wild_calls_off", || wild_calls("--shadow off")),
    ("unknown_calls", unknown_calls),
    ("wild_exit_reasons", wild_exit_reasons),
    ("exits_with_wild_values", exits_with_wild_values),
    ("a_flood_of_reports", a_flood_of_reports),
    ("equal_reports_are_one", equal_reports_are_one),
    ("garbage_in_the_ring", garbage_in_the_ring),
    ("rings_in_bad_places", rings_in_bad_places),
    ("a_ring_over_the_code", a_ring_over_the_code),
    ("wild_names", wild_names),
    ("too_many_names", too_many_names),
    ("wild_frame_pointers", wild_frame_pointers),
    ("a_region_that_lies", a_region_that_lies),
    ("sync_calls_at_every_edge", sync_calls_at_every_edge),
    ("virtual_memory_in_bad_places", virtual_memory_in_bad_places),
    ("virtual_memory_without_end", virtual_memory_without_end),
];

/// A xorshift generator (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A value that is mostly at some edge.
    fn wild(&mut self) -> u64 {
        const EDGES: [u64; 20] = [
            0,
            1,
            2,
            8,
            64,
            65,
            128,
            0xfff,
            0x1000,
            CODE,
            FREE,
            RAM - 1,
            RAM,
            PAGE_WINDOW,
            0xffff_ffff,
            1 << 47,
            1 << 63,
            0xffff_8000_0000_0000,
            u64::MAX - 4095,
            u64::MAX,
        ];
        let r = self.next();
        match r % 8 {
            0..=4 => EDGES[(r >> 8) as usize % EDGES.len()],
            5 => self.next(),
            6 => self.next() % (2 * RAM),
            _ => {
                EDGES[(r >> 8) as usize % EDGES.len()].wrapping_add((r >> 40) % 17).wrapping_sub(8)
            }
        }
    }
}

/// Every call with wild values in all arguments, before and after regions and a ring exist.
fn wild_calls(mode: &str) {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..100 {
        for number in 0..=20 {
            let mut row = [number, random.wild(), random.wild(), random.wild(), random.wild()];
            if number == u64::from(CallNumber::Exit) {
                row[1] = row[1].max(u64::from(ExitReason::Fault) + 1);
            }
            // One whose compiler checks inline is refused in some modes.
            if number == u64::from(CallNumber::Hello) {
                row[2] &= !GuestFlags::INLINE.bits();
            }
            // Rings over code or tables would end the run early; they have a test of their own.
            if number == u64::from(CallNumber::RingSetup) {
                row[1] = row[1].max(FREE);
            }
            rows.push(row);
        }
        if round == 50 {
            rows.push([CallNumber::RegionAdd.into(), 0, RAM, 0, 0]);
            rows.push([CallNumber::RingSetup.into(), FREE, 64 * 65, 0, 0]);
        }
    }
    let made = rows.len() as u64;
    let guest = Guest::new(|g| {
        g.calls(&rows)?;
        g.done()
    });
    let run = run(guest, &format!("--keep-going {mode}"));
    assert_eq!(run.outcome(), "done", "{}", run.tail());
    assert_eq!(run.figure("/exits/hypercall"), made + 1);
    let refused = run.figure("/events/refused");
    assert!(refused > made / 2, "{refused} of {made} refused");
    // Every report is a finding, whatever its values.
    let findings = run.figure("/findings");
    assert_eq!(findings > 0, mode != "--shadow off");
    assert_eq!(run.findings.len() as u64, findings);
    run.expect(i32::from(findings > 0));
    // Refused calls are logged a few times, and findings are bounded.
    let refusals = run.stderr.lines().filter(|line| line.contains("refused")).count();
    assert!((1..=20).contains(&refusals), "{refusals} lines about refused calls");
    assert!(run.stderr.len() < OUTPUT + 4096 * run.findings.len(), "{} bytes", run.stderr.len());
}

fn unknown_calls() {
    let rows: Vec<Row> = (19..24)
        .chain([0, 255, 0x8000_0000, 0xffff_ffff])
        .map(|number| [number, 1, 2, 3, 4])
        .collect();
    let made = rows.len() as u64;
    let guest = Guest::new(|g| {
        g.calls(&rows)?;
        // The last result is that of an unknown call.
        g.asm.mov(iced_x86::code_asm::rbx, rax_of(umbra_shadow::abi::ERR_CALL))?;
        g.asm.sub(iced_x86::code_asm::rbx, iced_x86::code_asm::rax)?;
        g.done_unless_rbx()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert_eq!((run.outcome(), run.figure("/events/refused")), ("done", made));
}

/// A result as the guest sees it in `rax`.
fn rax_of(result: u64) -> u64 {
    result
}

fn wild_exit_reasons() {
    let reasons = [3, 4, 0xff, 1 << 32, 1 << 63, u64::MAX];
    let rows: Vec<Row> =
        reasons.iter().map(|r| [CallNumber::Exit.into(), *r, *r, *r, *r]).collect();
    let guest = Guest::new(|g| {
        g.calls(&rows)?;
        g.done()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert_eq!(
        run.figure("/events/refused"),
        reasons.len() as u64,
        "and the guest went on after each"
    );
}

fn exits_with_wild_values() {
    for (arguments, outcome, status) in [
        ([ExitReason::Done.into(), 1, 0, 0], "failed", 3),
        ([ExitReason::Done.into(), u64::MAX, u64::MAX, u64::MAX], "failed", 3),
        ([ExitReason::Panic.into(), u64::MAX, 0, 0], "panic", 3),
        ([ExitReason::Fault.into(), u64::MAX, u64::MAX, u64::MAX], "fault", 3),
        ([ExitReason::Fault.into(), 14 | 2 << 32, CODE, 0], "fault", 3),
    ] {
        let run = quiet(Guest::new(|g| g.call(CallNumber::Exit, arguments)), "");
        run.expect(status);
        assert_eq!(run.outcome(), outcome, "{arguments:x?}");
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    }
}

/// Reports from ever new places: all are counted, and a limited number is kept and printed.
fn a_flood_of_reports() {
    const FLOOD: u64 = 20_000;
    let guest = Guest::new(|g| {
        use iced_x86::code_asm::*;
        g.region()?;
        let a = &mut g.asm;
        let mut next = a.create_label();
        a.mov(r12, FLOOD)?;
        a.mov(rsi, 8u64)?;
        a.mov(edx, u32::from(umbra_shadow::abi::PORT))?;
        a.set_label(&mut next)?;
        a.mov(rdi, r12)?;
        a.mov(r8, r12)?;
        a.mov(rcx, r12)?;
        a.shl(rcx, 32)?;
        a.mov(eax, u32::from(CallNumber::Report))?;
        a.out(dx, eax)?;
        a.dec(r12)?;
        a.jnz(next)?;
        g.done()
    });
    let run = run(guest, "--keep-going");
    run.expect(1);
    assert_eq!(run.outcome(), "done", "{}", run.tail());
    assert_eq!((run.figure("/findings"), run.figure("/findings_total")), (1000, FLOOD));
    assert_eq!(run.findings.len(), 1000);
    assert!(run.stderr.len() < 4 << 20, "{} bytes", run.stderr.len());
    assert!(run.stderr.contains("19000 more of other kinds"), "{}", run.tail());
}

fn equal_reports_are_one() {
    let rows: Vec<Row> = (0..500)
        .map(|i| [CallNumber::Report.into(), FREE + i, 1, Access::Write.into(), CODE])
        .collect();
    let guest = Guest::new(|g| {
        g.region()?;
        g.calls(&rows)?;
        g.done()
    });
    let run = quiet(guest, "--keep-going");
    run.expect(1);
    assert_eq!((run.figure("/findings"), run.figure("/findings_total")), (1, 500));
    assert_eq!(
        run.stderr.matches("BUG: KASAN").count(),
        2,
        "once, and in the line that counts: {}",
        run.tail()
    );
    assert!(run.stderr.contains("499 more of: BUG: KASAN: "), "{}", run.tail());
}

/// A ring full of random bytes with a count beyond its end, drained again and again.
fn garbage_in_the_ring() {
    const RECORDS: u64 = 2000;
    let mut random = Random(99);
    let mut garbage: Vec<u8> = (0..RECORDS * 8).flat_map(|_| random.next().to_le_bytes()).collect();
    // Some records look almost good: right kinds, addresses inside of memory, wild depths.
    for record in garbage.as_chunks_mut::<{ RECORD_BYTES as usize }>().0.iter_mut().step_by(2) {
        record[0] = 1 + (record[2] & 1);
        record[11..16].fill(0);
        record[18..20].fill(0);
    }
    for record in garbage.as_chunks_mut::<{ RECORD_BYTES as usize }>().0.iter_mut().step_by(51) {
        record[0] = RecordKind::Cache.into();
        record[1] %= 64;
    }
    // Names are taken, and not counted.
    let named = |records: &[[u8; RECORD_BYTES as usize]]| {
        let named = |r: &&[u8; RECORD_BYTES as usize]| {
            r[0] == u8::from(RecordKind::Cache) && usize::from(r[1]) <= RECORD_NAME_MAX
        };
        records.iter().filter(named).count() as u64
    };
    let records = garbage.as_chunks().0;
    let names = 4 * named(records) + named(&records[..3]);
    assert!(names > 0);
    let guest = Guest::new(|g| {
        use iced_x86::code_asm::*;
        g.region()?;
        let mut ring = vec![0; 64];
        ring.extend(&garbage);
        let ring = g.data(&ring);
        g.call(CallNumber::RingSetup, [ring, 64 * (RECORDS + 1), 0, u64::MAX])?;
        for count in [u64::MAX, 1 << 63, RECORDS + 1, RECORDS, 3, 0] {
            g.asm.mov(rax, count)?;
            g.asm.mov(rbx, ring)?;
            g.asm.mov(qword_ptr(rbx), rax)?;
            g.call(CallNumber::RingDrain, [0; 4])?;
        }
        // Also with a report of an address that was in some record.
        g.report(FREE, 1, 0, CODE)?;
        g.done()
    });
    let run = quiet(guest, "--keep-going");
    run.expect(1);
    assert_eq!(run.outcome(), "done");
    let events = run.figure("/events/allocations")
        + run.figure("/events/frees")
        + run.figure("/events/refused");
    assert_eq!(
        events + names,
        4 * RECORDS + 3,
        "each record was taken or refused, and none behind the ring's end"
    );
    assert!(run.figure("/events/refused") + 2 * names >= 4 * RECORDS / 2);
}

fn rings_in_bad_places() {
    let ring = |va, bytes, cpu| [CallNumber::RingSetup.into(), va, bytes, cpu, 0];
    let wrong: Vec<Row> = vec![
        ring(0, 0, 0),
        ring(FREE, 64, 0),
        ring(FREE + 8, 128, 0),
        ring(RAM, 128, 0),
        ring(RAM - 64, 128, 0),
        ring(PAGE_WINDOW, 128, 0),
        ring(u64::MAX - 63, 128, 0),
        ring(1 << 63, 128, 0),
        ring(FREE, 64 * ((1 << 16) + 2), 0),
        ring(FREE, 128, 64),
        ring(FREE, 128, 0xffff),
        ring(FREE, 128, 1 << 40),
        [CallNumber::RingDrain.into(), 1 << 16, 0, 0, 0],
        // No ring is there.
        [CallNumber::RingDrain.into(), 0, 0, 0, 0],
        [CallNumber::RingDrain.into(), 63, 0, 0, 0],
        [CallNumber::RingDrain.into(), 0xffff, 0, 0, 0],
    ];
    let guest = Guest::new(|g| {
        g.region()?;
        g.calls(&wrong)?;
        g.done()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert_eq!(run.figure("/events/refused"), wrong.len() as u64);
}

/// The VMM resets a ring's count, also where the guest put the ring over its code or page tables.
fn a_ring_over_the_code() {
    for at in [CODE, 0x9000, 0] {
        let guest = Guest::new(|g| {
            g.region()?;
            g.call(CallNumber::RingSetup, [at, 64 * 1000, 0, 0])?;
            g.call(CallNumber::RingDrain, [0; 4])?;
            g.call(CallNumber::RingDrain, [0; 4])?;
            g.done()
        });
        let run = quiet(guest, "--timeout 3s");
        let outcome = run.outcome();
        assert!(
            ["done", "triple-fault", "stuck", "unknown-instruction"].contains(&outcome),
            "{at:#x}: {outcome}"
        );
    }
}

/// Names with escape sequences, line ends or bytes that are no text reach neither the terminal nor
/// the JSON raw.
fn wild_names() {
    let bad =
        b"\x1b[31mEVIL\x1b]0;title\x07\n=====\r\nBUG: KASAN: forged in f+0x0/0x1\n\xff\xfe\x80"
            .as_slice();
    assert!(bad.len() <= 64 + 12);
    let guest = Guest::new(|g| {
        g.region()?;
        let at = g.data(bad);
        for (kind, id) in [(u64::from(NameKind::Task), 7), (NameKind::Cache.into(), 9)] {
            g.call(CallNumber::Name, [kind, at, 64 | id << 32, 40])?;
            // Too long, not in memory, wrapping, of an unknown kind.
            g.call(CallNumber::Name, [kind, at, 65 | id << 32, 40])?;
            g.call(CallNumber::Name, [kind, at, 0xffff_ffff | id << 32, 40])?;
            g.call(CallNumber::Name, [kind, RAM - 8, 64 | id << 32, 40])?;
            g.call(CallNumber::Name, [kind, u64::MAX - 8, 64 | id << 32, 40])?;
        }
        g.call(CallNumber::Name, [2, at, 8, 0])?;
        g.call(CallNumber::Allocated, [FREE, 40, 9 | 7 << 32, 0])?;
        g.call(CallNumber::Poison, [FREE, 40, SLAB_FREE.into(), 0])?;
        g.report(FREE + 8, 8, u64::from(Access::Write) | 7 << 32, CODE)?;
        g.done()
    });
    let run = quiet(guest, "--keep-going --notify sync");
    run.expect(1);
    assert_eq!(run.figure("/events/refused"), 9);
    let [finding] = run.findings.as_slice() else { panic!("{:?}", run.findings) };
    let task = finding["task"]["name"].as_str().expect("a name");
    let cache = finding["object"]["cache"].as_str().expect("a name");
    assert!(task.contains("EVIL") && cache.contains("EVIL"), "{task:?} {cache:?}");
    assert!(run.stderr.contains("EVIL"));
    let forged =
        run.stderr.lines().filter(|line| line.trim_start().starts_with("BUG: KASAN: forged"));
    assert_eq!(forged.count(), 0, "{}", run.stderr);
    for bad in ['\x07', '\r', '\u{85}', '\u{9b}'] {
        assert!(!run.stderr.contains(bad), "{bad:?}");
    }
}

/// Names for more tasks and caches than any table should hold.
fn too_many_names() {
    const NAMES: u64 = 100_000;
    let guest = Guest::new(|g| {
        use iced_x86::code_asm::*;
        g.region()?;
        let at = g.data(&[b'x'; 64]);
        let a = &mut g.asm;
        for kind in [NameKind::Task, NameKind::Cache] {
            let mut next = a.create_label();
            a.mov(r12, if kind == NameKind::Task { NAMES } else { 0xffff })?;
            a.mov(edx, u32::from(umbra_shadow::abi::PORT))?;
            a.set_label(&mut next)?;
            a.mov(rdi, u64::from(kind))?;
            a.mov(rsi, at)?;
            a.mov(rcx, r12)?;
            a.shl(rcx, 32)?;
            a.or(rcx, 64)?;
            a.mov(eax, u32::from(CallNumber::Name))?;
            a.out(dx, eax)?;
            a.dec(r12)?;
            a.jnz(next)?;
        }
        g.done()
    });
    let run = quiet(guest, "");
    run.expect(0);
    assert_eq!(run.outcome(), "done");
    assert!(run.figure("/host/vmm_overhead_bytes") < 32 << 20, "{}", run.stats);
}

/// Reports with frame pointers that lead in a circle, nowhere, or on for ever.
fn wild_frame_pointers() {
    use iced_x86::code_asm::*;
    let starts =
        [FREE, FREE + 1, 1, RAM - 8, RAM, PAGE_WINDOW, 1 << 47, 1 << 63, u64::MAX - 7, u64::MAX];
    let guest = Guest::new(|g| {
        g.region()?;
        // A frame that is its own caller; below it a chain of 10,000 frames.
        let chain: Vec<u8> = (0..10_000u64)
            .flat_map(|i| [(FREE + 64 + 16 * (i + 1)), CODE + i])
            .flat_map(u64::to_le_bytes)
            .collect();
        let source = g.data(&chain);
        let a = &mut g.asm;
        a.mov(rbx, FREE)?;
        a.mov(qword_ptr(rbx), rbx)?;
        a.mov(qword_ptr(rbx + 8), rbx)?;
        a.mov(rsi, source)?;
        a.lea(rdi, qword_ptr(rbx + 64))?;
        a.mov(ecx, 20_000)?;
        a.cld()?;
        a.rep().movsq()?;
        for (i, start) in (0..).zip(starts.into_iter().chain([FREE + 64])) {
            g.asm.mov(rbp, start)?;
            g.report(FREE + i, 1, 0, CODE + 0x10_0000 + i)?;
        }
        g.asm.xor(ebp, ebp)?;
        g.done()
    });
    let run = run(guest, "--keep-going");
    run.expect(1);
    assert_eq!(run.outcome(), "done", "{}", run.tail());
    assert_eq!(run.findings.len(), starts.len() + 1);
    let depth = |finding: &serde_json::Value| finding["frames"].as_array().map_or(0, Vec::len);
    assert!(
        run.findings.iter().all(|f| (1..=32).contains(&depth(f))),
        "{:?}",
        run.findings.iter().map(depth)
    );
    assert!(depth(&run.findings[0]) < 4, "a circle is left at once: {}", run.findings[0]["frames"]);
    let notes = run.findings[0]["notes"].to_string();
    assert!(notes.contains("the stack breaks off"), "{notes}");
    assert_eq!(depth(&run.findings[starts.len()]), 32);
    assert!(run.stderr.len() < OUTPUT + 4096 * starts.len());
}

/// A region that differs from the guest's page tables, and one that maps memory a second time.
fn a_region_that_lies() {
    for mode in ["--notify sync", "--notify ring", "--shadow full"] {
        let guest = Guest::new(|g| {
            g.call(CallNumber::RegionAdd, [0xffff_8000_0000_0000, 8 << 20, 8 << 20, 0])?;
            g.call(CallNumber::RegionAdd, [0, 0x1000, RAM - 0x1000, 0])?;
            g.call(CallNumber::RegionAdd, [u64::MAX - 0xfff, 0x1000, 0, 0])?;
            g.call(CallNumber::RegionAdd, [0x10_0000, RAM, 0, 0])?;
            for address in
                [0, 0xff8, 0xffff_8000_0000_0000, 0xffff_8000_007f_fff8, u64::MAX - 8, 0x10_0000]
            {
                g.call(CallNumber::Allocated, [address, 8, 0, 0])?;
                g.call(CallNumber::Poison, [address, 8, SLAB_FREE.into(), 0])?;
                g.call(CallNumber::RingSetup, [address & !63, 128, 0, 0])?;
                g.report(address, 16, 0, address)?;
            }
            g.call(CallNumber::RingDrain, [0; 4])?;
            g.done()
        });
        let run = quiet(guest, &format!("--keep-going {mode}"));
        run.expect(1);
        assert_eq!((run.outcome(), run.findings.len()), ("done", 6), "{mode}");
    }
}

/// In sync mode: ranges that start or end at edges of pages, chunks and memory; the VMM's shadow is
/// right each time.
fn sync_calls_at_every_edge() {
    const EDGES: [u64; 8] = [0, 1, 8, 0x1000, 2 << 20, (2 << 20) + 7, RAM - 8, RAM];
    let mut rows: Vec<Row> = Vec::new();
    for start in EDGES {
        for end in EDGES {
            let len = end.wrapping_sub(start);
            rows.push([CallNumber::Poison.into(), start, len, SLAB_FREE.into(), 0]);
            rows.push([CallNumber::Unpoison.into(), start, len, 0, 0]);
            rows.push([CallNumber::Allocated.into(), start, len, 0, 0]);
            rows.push([CallNumber::Freed.into(), start, 0, 0, 0]);
        }
    }
    rows.push([CallNumber::Poison.into(), 0, RAM, SLAB_FREE.into(), 0]);
    rows.push([CallNumber::Unpoison.into(), 0, RAM, 0, 0]);
    // The shadow is clean again: a report finds nothing wrong there, but counts.
    rows.push([CallNumber::Report.into(), FREE, 8, 0, CODE]);
    let guest = Guest::new(|g| {
        g.region()?;
        g.calls(&rows)?;
        g.done()
    });
    let run = quiet(guest, "--keep-going --notify sync");
    run.expect(1);
    assert_eq!(run.outcome(), "done");
    let [finding] = run.findings.as_slice() else { panic!("{:?}", run.findings) };
    for row in finding["shadow"]["rows"].as_array().expect("rows") {
        assert_eq!(row["bytes"], ["00"; 16].join(" "));
    }
}

/// Ranges that are misaligned, empty, wrapping, overlapping or too large; then too many.
fn virtual_memory_in_bad_places() {
    const VA: u64 = 0xffff_c900_0000_0000;
    let add = |va, bytes| [CallNumber::VirtualAdd.into(), va, bytes, 0, 0];
    let all = VIRTUAL_BYTES;
    let wrong: Vec<Row> = vec![
        add(VA + 8, 0x1000),
        add(VA, 0x1001),
        add(VA, 0),
        add(u64::MAX - 0xfff, 0x2000),
        add(VA, u64::MAX - 0xfff),
        add(0, 0x1000),
        add(RAM - 0x1000, 0x2000),
        add(VA, all + 0x1000),
        add(VA + 0x1000, all),
        add(VA, 1 << 46),
    ];
    // 64 is the limit, with the region of all memory; each page takes the keys of a unit.
    let good = (0..64).map(|i| add(VA + (i << 32), 0x1000));
    let rows: Vec<Row> = wrong.iter().copied().chain(good).collect();
    for mode in ["--notify ring", "--notify sync", "--shadow full"] {
        let guest = Guest::new(|g| {
            g.region()?;
            g.calls(&rows)?;
            g.done()
        });
        let run = quiet(guest, mode);
        run.expect(0);
        assert_eq!(run.figure("/events/refused"), wrong.len() as u64 + 1, "{mode}");
        let page_bytes = if mode == "--shadow full" { 0 } else { (1 + 63) * 4096 };
        assert_eq!(run.figure("/shadow/page_bytes"), page_bytes, "{mode}");
    }
}

/// All the virtual memory that can have shadow, and its byte shadow up to the default limit.
fn virtual_memory_without_end() {
    use iced_x86::code_asm::*;
    const VA: u64 = 0xffff_c900_0000_0000;
    const CHUNK: u64 = 256 << 10;
    for (args, limit) in
        [("", (2 << 20) + (32 << 20)), ("--shadow full --shadow-limit 4M", 4 << 20)]
    {
        let guest = Guest::new(|g| {
            g.region()?;
            // Before the call it has no shadow.
            for gpa in [PAGE_WINDOW + RAM / 4096, BYTE_WINDOW + RAM / 8] {
                g.asm.mov(rbx, gpa)?;
                g.asm.mov(byte_ptr(rbx), u32::from(PAGE_BYTES))?;
            }
            g.call(CallNumber::VirtualAdd, [VA, VIRTUAL_BYTES, 0, 0])?;
            let a = &mut g.asm;
            let mut next = a.create_label();
            // A byte-checked page in each chunk, so that none can be reclaimed.
            a.mov(rbx, PAGE_WINDOW + RAM / 4096)?;
            a.mov(rdi, BYTE_WINDOW + RAM / 8)?;
            a.mov(ecx, (VIRTUAL_BYTES / 8 / CHUNK) as u32)?;
            a.set_label(&mut next)?;
            if args.is_empty() {
                a.mov(byte_ptr(rbx), u32::from(PAGE_BYTES))?;
            }
            a.mov(byte_ptr(rdi), 1)?;
            a.add(rbx, 512)?;
            a.add(rdi, CHUNK as i32)?;
            a.dec(ecx)?;
            a.jnz(next)?;
            g.done()
        });
        let run = quiet(guest, args);
        run.expect(2);
        assert_eq!(run.outcome(), "shadow-limit", "{args}: {}", run.tail());
        assert_eq!(run.figure("/shadow/byte_mapped_bytes"), limit, "{args}");
        assert_eq!(
            run.figure("/shadow/page_bytes"),
            if args.is_empty() { 4096 + VIRTUAL_BYTES / 4096 } else { 0 }
        );
        assert!(run.stderr.contains("--shadow-limit"), "{}", run.stderr);
    }
}
