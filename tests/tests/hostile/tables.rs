//! Page tables of the check shadow for regions that do not fit, and tables full of garbage.

use umbra_shadow::abi::{CallNumber, GuestFlags, VERSION};

use super::guest::{CHECK_WINDOWS, Guest, RAM, Row};
use super::quiet;

pub const ALL: &[(&str, fn())] = &[
    ("tables_for_bad_regions", tables_for_bad_regions),
    ("tables_for_many_regions", tables_for_many_regions),
    ("tables_of_other_modes", tables_of_other_modes),
    ("slots_of_all_kinds", slots_of_all_kinds),
    ("tables_full_of_garbage", tables_full_of_garbage),
];

const DIRECT: u64 = 0xffff_8000_0000_0000;
/// Slots of the top-level table: the first and the last of the check shadow, and one of a window.
const SLOTS: [u64; 3] = [472, 503, 499];

fn region(va: u64, bytes: u64, gpa: u64) -> Row {
    [CallNumber::RegionAdd.into(), va, bytes, gpa, 0]
}

fn top_level(slot: u64) -> Row {
    [CallNumber::TopLevel.into(), slot, 0, 0, 0]
}

fn virtual_add(va: u64, bytes: u64) -> Row {
    [CallNumber::VirtualAdd.into(), va, bytes, 0, 0]
}

/// Makes these calls, and returns how many were refused.
#[track_caller]
fn refused(rows: &[Row], args: &str) -> u64 {
    let guest = Guest::new(|g| {
        g.calls(rows)?;
        g.done()
    });
    let run = quiet(guest, args);
    run.expect(0);
    run.figure("/events/refused")
}

/// Each is refused when it is to go into the tables, whether they are there before it or not.
fn tables_for_bad_regions() {
    for bad in [
        // Not congruent to its memory modulo 16 MiB; in the lower half; in the windows' place.
        region(DIRECT + 0x1000, 0x1000, 0),
        region(0, RAM, 0),
        region(0xffff_ec00_0000_0000, RAM, 0),
        region(0xffff_f400_0000_0000 - 0x1000, 0x1000, RAM - 0x1000),
    ] {
        // Neither does a second try succeed without it.
        assert_eq!(refused(&[bad, top_level(SLOTS[0]), top_level(SLOTS[0])], ""), 2, "{bad:x?}");
        let good = region(DIRECT, RAM, 0);
        assert_eq!(refused(&[good, top_level(SLOTS[0]), bad], ""), 1, "{bad:x?}");
    }
    // Other memory in the same 16 MiB.
    let rows =
        [region(DIRECT, 0x1000, 0), top_level(SLOTS[0]), virtual_add(DIRECT + RAM / 2, 4096)];
    assert_eq!(refused(&rows, ""), 1);
    // What was refused is no region, and another one may be there.
    let good = region(DIRECT, RAM, 0);
    let rows = [top_level(SLOTS[0]), region(DIRECT, 0x1000, 0x1000), good];
    assert_eq!(refused(&rows, ""), 1);
}

/// As many as there may be, each in tables of its own; and aliases, which share them.
fn tables_for_many_regions() {
    let far = (0..64).map(|i| region(DIRECT + (i << 36), RAM, 0));
    let near = (0..64).map(|i| region(DIRECT + (i << 24), RAM, 0));
    let keys = (0..63).map(|i| virtual_add(DIRECT + (i << 36), 0x1000));
    let all: [Vec<Row>; 3] = [far.collect(), near.collect(), keys.collect()];
    for regions in all {
        let [before, after] = [true, false].map(|before| {
            let tables = [top_level(SLOTS[0])];
            let parts = if before { [&tables, &regions[..]] } else { [&regions[..], &tables] };
            parts.concat()
        });
        assert_eq!(refused(&before, ""), 0);
        assert_eq!(refused(&after, "--shadow full"), 0);
    }
}

/// Where the guest does not write the shadow, or there is none. A guest that says at once that its
/// compiler checks inline ends there, with a sentence.
fn tables_of_other_modes() {
    for mode in ["--notify sync", "--shadow off", "--shadow full --notify sync"] {
        assert_eq!(refused(&[region(DIRECT, RAM, 0), top_level(SLOTS[0])], mode), 1, "{mode}");
    }
    let hello = [CallNumber::Hello.into(), VERSION.into(), GuestFlags::INLINE.bits(), 0, 0];
    let guest = Guest::new(|g| {
        g.calls(&[hello])?;
        g.done()
    });
    let run = quiet(guest, "--notify sync");
    run.expect(2);
    assert_eq!(run.outcome(), "inline-in-sync");
    assert!(run.stderr.contains("checks inline"), "{}", run.stderr);
}

fn slots_of_all_kinds() {
    let all: Vec<Row> =
        (0..512).chain(SLOTS).chain([512, 1 << 16, u64::MAX]).map(top_level).collect();
    assert_eq!(refused(&all, ""), 3);
    assert_eq!(refused(&all, "--shadow full"), 3);
}

/// The guest writes garbage to all tables and entries, and to some patterns, which do not change.
/// Then the VMM goes through the tables for another region.
fn tables_full_of_garbage() {
    use iced_x86::code_asm::*;
    for garbage in [0, 1, 0x23, 0x000f_ffff_ffff_f023, u64::MAX, CHECK_WINDOWS | 0x23] {
        let guest = Guest::new(|g| {
            g.calls(&[region(DIRECT, RAM, 0), top_level(SLOTS[0])])?;
            let a = &mut g.asm;
            a.mov(rdi, CHECK_WINDOWS)?;
            for page in [0, 1, 255] {
                a.mov(byte_ptr(rdi + page * 4096), 1)?;
            }
            // Tables, and behind them entries.
            a.mov(rax, garbage)?;
            for (from, bytes) in [(1 << 20, 256 << 12), (4 << 20, 1 << 20)] {
                a.mov(rdi, CHECK_WINDOWS + from)?;
                a.mov(ecx, bytes / 8u32)?;
                a.rep().stosq()?;
            }
            g.calls(&[
                virtual_add(DIRECT + (1 << 40), 64 << 20),
                virtual_add(DIRECT + (2 << 40), 64 << 20),
                top_level(SLOTS[1]),
            ])?;
            g.done()
        });
        quiet(guest, "").expect(0);
    }
}
