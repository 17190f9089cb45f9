//! The files are real: this test program itself, and a small kernel-like program that `cc` (Rust's
//! linker, so it is there) makes from the sources below.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol};

use super::answers::{Answers, CORRUPT};
use super::*;
use crate::bounds::SHOWN_PATH_MAX;

type Elf<'a> = ElfFile64<'a, LittleEndian>;

const C_SOURCE: &str = "\
volatile char table[40] = {1};
static inline __attribute__((always_inline)) void innermost(int i) { table[i] = 1; }
static inline __attribute__((always_inline)) void middle(int i) { innermost(i); }
__attribute__((noinline)) void store(int i) {
    middle(i);
}
__attribute__((noinline, noreturn)) void stop(void) { for (;;) { __asm__ volatile(\"hlt\"); } }
__attribute__((noinline)) void leave(int i) {
    table[i] = 2;
    stop();
}
__attribute__((noinline)) void next(int i) { table[i] = 3; }
void _start(void) { store(3); leave(4); next(5); }
";

/// Assembles or compiles `source`, linked where kernels are.
fn build(name: &str, source: &str, flags: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join(name), folder.path().join("kernel.elf"));
    std::fs::write(&input, source).unwrap();
    let made = Command::new("cc")
        .args(["-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie", "-mcmodel=kernel"])
        .args(["-fno-asynchronous-unwind-tables", "-Wl,--build-id=none"])
        .arg("-Wl,-Ttext-segment=0xffffffff80000000")
        .args(flags)
        .arg("-o")
        .args([&output, &input])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    std::fs::read(output).unwrap()
}

/// The C kernel, made once.
fn kernel() -> Vec<u8> {
    static KERNEL: OnceLock<Vec<u8>> = OnceLock::new();
    KERNEL
        .get_or_init(|| build("kernel.c", C_SOURCE, &["-g", "-O1", "-fno-toplevel-reorder"]))
        .clone()
}

/// The symbols of a file on disk, as kernels are.
fn from_disk(bytes: Vec<u8>) -> Symbols {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
    Symbols::lazy(move || Contents::disk(file))
}

/// Start and size of a symbol whose name contains `part`.
fn symbol(bytes: &[u8], part: &str) -> (u64, u64) {
    let elf = Elf::parse(bytes).unwrap();
    let found = elf.symbols().find(|s| s.size() > 0 && s.name().unwrap().contains(part)).unwrap();
    (found.address(), found.size())
}

/// The frames of the first address of a function at which something is inlined.
fn inlined(symbols: &Symbols, (start, size): (u64, u64)) -> Vec<Frame> {
    let mut frames = (start..start + size).map(|ip| symbols.frames(ip, Position::Instruction));
    frames.find(|frames| frames.len() > 1).unwrap()
}

fn brief(frame: &Frame) -> (&str, Option<&str>, Option<u32>, bool) {
    (frame.symbol.as_deref().unwrap(), frame.file.as_deref(), frame.line, frame.inlined)
}

#[test]
fn a_c_kernel_has_names_lines_and_inlined_functions() {
    let bytes = kernel();
    let store = symbol(&bytes, "store");
    let symbols = Symbols::from_elf(bytes);
    let frames = inlined(&symbols, store);
    assert_eq!(
        frames.iter().map(brief).collect::<Vec<_>>(),
        [
            ("innermost", Some("kernel.c"), Some(2), true),
            ("middle", Some("kernel.c"), Some(3), true),
            ("store", Some("kernel.c"), Some(5), false),
        ]
    );
    assert_eq!((frames[2].size, frames[2].linkage.as_deref()), (store.1, None));
    assert!(Path::new(frames[2].path.as_deref().unwrap()).is_absolute());
    assert_eq!(symbols.notes(), [""; 0]);
    let entry = symbols.lookup(store.0 + store.1 - 1).unwrap();
    assert_eq!((&*entry.name, entry.start, entry.size), ("store", store.0, store.1));
    assert_eq!(symbols.lookup(0xffff_8000_0000_0000), None);
    assert_eq!(symbols.frames(7, Position::Return), [Frame::unknown(7)]);
    assert_eq!(symbols.frames(0, Position::Return), [Frame::unknown(0)]);
}

#[test]
fn what_was_parsed_is_dropped_after_many_lookups_and_parsed_anew() {
    let bytes = kernel();
    let (start, size) = symbol(&bytes, "store");
    let symbols = from_disk(bytes.clone());
    let opened_with = |n: u64| {
        // Other addresses have no lines, but each is a lookup.
        (0..n).for_each(|i| drop(symbols.frames(i, Position::Instruction)));
        symbols.access.borrow().answers().and_then(Answers::lookups).expect("it is open")
    };
    assert_eq!(u64::from(opened_with(20)), 20);
    assert!(opened_with(500) < 480);
    for ip in start..start + size {
        let fresh = Symbols::from_elf(bytes.clone()).frames(ip, Position::Return);
        assert_eq!(symbols.frames(ip, Position::Return), fresh);
    }
    assert_eq!(symbols.notes(), [""; 0]);
}

#[test]
fn a_return_address_belongs_to_the_caller() {
    let bytes = kernel();
    let (start, size) = symbol(&bytes, "leave");
    let after = start + size;
    let symbols = from_disk(bytes);
    // `leave` ends with a call that does not return, so its return address is past its end.
    let frames = symbols.stack(&[after]);
    assert_eq!(brief(&frames[0]), ("leave", Some("kernel.c"), Some(10), false));
    assert_eq!((frames[0].ip, frames[0].offset, frames[0].size), (after, size, size));
    let instruction = symbols.frames(after, Position::Instruction);
    assert_ne!(instruction[0].symbol.as_deref(), Some("leave"));
}

#[test]
fn a_variable_is_found_from_behind_too() {
    let bytes = kernel();
    let (start, size) = symbol(&bytes, "table");
    let symbols = from_disk(bytes);
    let table = Variable { name: "table".into(), start, size: 40, ..Variable::default() };
    assert_eq!(size, 40);
    assert_eq!(symbols.lookup_data(start), Some(table.clone()));
    assert_eq!(symbols.lookup_data(start + 39), Some(table));
    assert_eq!(symbols.lookup_data(0x1000), None);
}

#[test]
fn a_variable_is_found_where_it_is_declared() {
    let source = C_SOURCE.replace(
        "(void) { store(3);",
        "(void) { static volatile long inner = 3; inner++; store(3);",
    );
    for dwarf in ["-gdwarf-4", "-gdwarf-5"] {
        let bytes = build("kernel.c", &source, &[dwarf, "-O1", "-fno-toplevel-reorder"]);
        let symbols = |bytes: &[u8]| Symbols::from_elf(bytes.to_vec());
        for (name, line) in [("table", 1), ("inner", 13)] {
            let start = symbol(&bytes, name).0;
            let declared = |start| {
                let mut variable = Variable { start, ..Variable::default() };
                symbols(&bytes).declare(&mut variable);
                (variable.file.as_deref().map(str::to_owned), variable.line)
            };
            assert_eq!(declared(start), (Some("kernel.c".into()), Some(line)), "{dwarf} {name}");
            assert_eq!(declared(start + 1), (None, None));
        }
        // Without debug information the compiler's own description stays.
        let mut known = Variable { file: Some("a.c".into()), line: Some(5), ..Variable::default() };
        symbols(&bytes).declare(&mut known);
        assert_eq!((known.file.as_deref(), known.line), (Some("a.c"), Some(5)));
    }
    let stripped = Symbols::from_elf(build("kernel.c", C_SOURCE, &["-s", "-O1"]));
    let mut variable = Variable { start: 0xffff_ffff_8000_0000, ..Variable::default() };
    stripped.declare(&mut variable);
    assert_eq!(variable.file, None);
}

#[inline(always)]
fn marker_inlined(x: &mut Vec<u64>) {
    x.push(std::hint::black_box(7));
}

#[inline(never)]
fn marker_outer(x: &mut Vec<u64>) -> usize {
    marker_inlined(x);
    x.len()
}

#[test]
fn a_rust_program_has_names_lines_and_inlined_functions() {
    assert_eq!(marker_outer(&mut vec![]), 1);
    let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let outer = symbol(&bytes, "marker_outer");
    let begun = Instant::now();
    let symbols = from_disk(bytes);
    let frames = inlined(&symbols, outer);
    let names: Vec<_> = frames.iter().map(|frame| frame.symbol.as_deref().unwrap()).collect();
    assert!(names[names.len() - 2].ends_with("marker_inlined"), "{names:?}");
    let last = frames.last().unwrap();
    assert_eq!(last.symbol.as_deref(), Some("umbra_report::symbols::tests::marker_outer"));
    assert!(
        last.linkage.as_deref().unwrap().starts_with("_R")
            || last.linkage.as_deref().unwrap().starts_with("_ZN")
    );
    assert_eq!(last.file.as_deref(), Some("vmm/report/src/symbols/tests.rs"));
    assert_eq!((last.inlined, last.size), (false, outer.1));
    assert_eq!(symbols.notes(), [""; 0]);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn what_a_file_lacks_is_said() {
    let notes = |bytes: Vec<u8>| {
        let symbols = from_disk(bytes);
        assert_eq!(symbols.frames(0x1234, Position::Return), [Frame::unknown(0x1234)]);
        symbols.notes().join("\n")
    };
    let whole = kernel();
    assert!(notes(vec![]).starts_with("the kernel's file is no complete 64-bit ELF: "));
    assert!(
        notes(whole[..whole.len() - 1].to_vec()).contains("no complete"),
        "{}",
        notes(whole.clone())
    );
    let stripped = notes(build("kernel.c", C_SOURCE, &["-s", "-O1"]));
    assert!(stripped.contains("has no symbol table (it is stripped)"), "{stripped}");
    assert!(stripped.contains("has no debug information"), "{stripped}");
    let compressed = notes(build(
        "kernel.c",
        C_SOURCE,
        &["-g", "-gz", "-O1", "-Wl,--compress-debug-sections=zlib"],
    ));
    assert!(
        compressed.contains("section .debug_") && compressed.contains("is compressed"),
        "{compressed}"
    );
    let lost = Symbols::lazy(|| Err::<Vec<u8>, _>(io::Error::from(io::ErrorKind::NotFound)));
    assert_eq!(lost.lookup(1), None);
    assert_eq!(lost.frames(1, Position::Return).len(), 1);
    assert_eq!(lost.notes(), ["the kernel's file cannot be read: entity not found"]);
}

#[test]
fn debug_information_names_functions_without_a_symbol_table() {
    let mut bytes = kernel();
    let (start, size) = symbol(&bytes, "leave");
    let headers = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let symtab = Elf::parse(&*bytes)
        .unwrap()
        .sections()
        .find(|s| s.name() == Ok(".symtab"))
        .unwrap()
        .index()
        .0;
    bytes[headers + 64 * symtab + 4] = 0; // sh_type = SHT_NULL
    let symbols = from_disk(bytes);
    assert_eq!(symbols.lookup(start), None);
    let frames = symbols.frames(start + 4, Position::Instruction);
    assert_eq!(brief(&frames[0]), ("leave", Some("kernel.c"), Some(9), false));
    assert_eq!((frames[0].offset, frames[0].size), (4, size));
    assert_eq!(
        symbols.notes(),
        ["the kernel has no symbol table (it is stripped): frames have addresses only"]
    );
}

/// The lookup returns, with one frame at least, and without a panic inside.
fn survives(bytes: Vec<u8>, addresses: &[u64]) {
    let symbols = from_disk(bytes);
    for address in addresses {
        for position in [Position::Instruction, Position::Return] {
            let frames = symbols.frames(*address, position);
            assert!(frames.last().is_some_and(|frame| !frame.inlined && frame.ip == *address));
        }
        if let Some(mut variable) = symbols.lookup_data(*address) {
            symbols.declare(&mut variable);
        }
    }
    let notes = symbols.notes();
    assert!(notes.len() <= NOTES_MAX && !notes.iter().any(|note| note == CORRUPT), "{notes:?}");
}

#[test]
fn damaged_files_are_survived() {
    let whole = kernel();
    let (store, table) = (symbol(&whole, "store"), symbol(&whole, "table").0);
    let addresses =
        [store.0, store.0 + store.1 / 2, store.0 + store.1, table, table + 60, 0, u64::MAX];
    for end in (0..whole.len()).step_by(101) {
        survives(whole[..end].to_vec(), &addresses);
    }
    // A fixed sequence, so that a failure can be repeated; most flips are where the debug
    // information is.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let elf = Elf::parse(&*whole).unwrap();
    let debug: Vec<_> =
        elf.sections().filter(|s| s.name().is_ok_and(|n| n.starts_with(".debug_"))).collect();
    for round in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..=random(3) {
            let (start, size) = match round % 4 {
                0 => (0, bytes.len() as u64),
                _ => debug[random(debug.len())].file_range().unwrap(),
            };
            bytes[start as usize + random(size as usize)] = [0, 0xff, random(256) as u8][random(3)];
        }
        survives(bytes, &addresses);
    }
}

/// An ELF with debug information by hand: `lines` go into `.debug_line`, `units` into
/// `.debug_info`. Abbreviations: 1 a unit, 2 a function, both with low_pc and high_pc; 3 an inlined
/// function; 4 a unit with the line table at 0.
fn by_hand(units: &str, lines: &str) -> Vec<u8> {
    let source = format!(
        "
        .globl _start
        .text
        _start: nop
        .skip 4096, 0x90
        end:
        .section .debug_abbrev,\"\",@progbits
        .byte 1, 0x11, 1, 0x11, 1, 0x12, 7, 0, 0
        .byte 2, 0x2e, 1, 0x11, 1, 0x12, 7, 0, 0
        .byte 3, 0x1d, 1, 0, 0
        .byte 4, 0x11, 0, 0x11, 1, 0x12, 7, 0x10, 0x17, 0, 0
        .byte 0
        .section .debug_info,\"\",@progbits
        {units}
        .section .debug_line,\"\",@progbits
        {lines}
        "
    );
    build("kernel.s", &source, &[])
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let bytes = by_hand(
        "
        .long 2f - 1f
        1: .short 4
        .long 0
        .byte 8
        .byte 1
        .quad _start, end - _start
        .byte 2
        .quad _start, end - _start
        .rept 1000000
        .byte 3
        .endr
        2:
        ",
        "",
    );
    let start = symbol_any(&bytes, "_start");
    let symbols = from_disk(bytes);
    let frames = symbols.frames(start + 1, Position::Return);
    assert_eq!(frames.last().unwrap().symbol.as_deref(), Some("_start"));
    let note = format!("the debug information of {start:#x} cannot be read: it is nested too deep");
    assert_eq!(symbols.notes(), [note]);
}

/// A unit that has the only line table.
const UNIT: &str = "
    .long 24 + 4
    .short 4
    .long 0
    .byte 8
    .byte 4
    .quad _start, end - _start
    .long 0
    ";

/// A line table with one file; see there.
fn line_table(file: &str, rows: &str) -> String {
    include_str!("../../tests/dwarf/line_table.s").replace("FILE", file).replace("ROWS", rows)
}

#[test]
fn shared_line_tables_do_not_take_unbounded_work() {
    // 3,000 units with one line table of 200,000 rows for other addresses.
    let rows = ".byte 0, 9, 2; .quad 0x1000; .rept 200000; .byte 0x20; .endr";
    let units = format!(".rept 3000\n{UNIT}\n.endr");
    let bytes = by_hand(&units, &line_table(".asciz \"a.c\"", rows));
    let start = symbol_any(&bytes, "_start");
    let symbols = from_disk(bytes);
    let begun = Instant::now();
    assert_eq!(symbols.frames(start, Position::Instruction).len(), 1);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(
        symbols.notes(),
        ["the debug information takes too long to read: frames may have no source lines"]
    );
}

/// One path of a megabyte, which each frame would have.
#[test]
fn long_paths_are_not_kept() {
    let rows = ".byte 0, 9, 2; .quad _start; .byte 1, 2; .uleb128 4096";
    for (length, kept) in [("200", true), ("3000", true), ("1000000", false)] {
        let file = format!(".fill {length}, 1, 0x61; .asciz \".c\"");
        let bytes = by_hand(UNIT, &line_table(&file, rows));
        let start = symbol_any(&bytes, "_start");
        let frames = from_disk(bytes).frames(start, Position::Instruction);
        let (path, file) = (&frames[0].path, frames[0].file.as_deref().expect("a file"));
        assert_eq!(path.is_some(), kept, "{length}");
        assert!(file.len() <= SHOWN_PATH_MAX && file.ends_with("a.c"), "{length}: {file}");
        assert_eq!(file.contains('…'), length != "200", "{length}: {file}");
    }
}

fn symbol_any(bytes: &[u8], name: &str) -> u64 {
    let elf = Elf::parse(bytes).unwrap();
    elf.symbols().find(|symbol| symbol.name() == Ok(name)).unwrap().address()
}

#[test]
fn inlined_functions_of_an_address_are_bounded() {
    let mut source =
        "volatile int x;\n#define F static inline __attribute__((always_inline)) void\n\
                      F f0(void) { x = 1; }\n"
            .to_owned();
    for i in 1..DEPTH_MAX + 10 {
        source += &format!("F f{i}(void) {{ f{}(); }}\n", i - 1);
    }
    source += &format!("void _start(void) {{ f{}(); for (;;); }}\n", DEPTH_MAX + 9);
    let bytes = build("kernel.c", &source, &["-g", "-O1"]);
    let start = symbol(&bytes, "_start");
    let frames = inlined(&Symbols::from_elf(bytes), start);
    assert_eq!(frames.len(), DEPTH_MAX);
    let names = |frame: &Frame| frame.symbol.as_deref().map(str::to_owned);
    assert_eq!((names(&frames[0]), names(&frames[DEPTH_MAX - 1])), named("f0", "_start"));
}

fn named(first: &str, last: &str) -> (Option<String>, Option<String>) {
    (Some(first.to_owned()), Some(last.to_owned()))
}

#[test]
fn what_is_kept_is_bounded() {
    let symbols = Symbols::from_elf(kernel());
    for i in 0..2 * CACHED_MAX as u64 {
        symbols.frames(i, Position::Instruction);
    }
    let kept: usize = symbols.cached.borrow().values().map(Vec::len).sum();
    assert_eq!((kept, symbols.cached_frames.get()), (CACHED_MAX, CACHED_MAX));
    for i in 0..100 {
        symbols.share(&format!("{i}{}", "x".repeat(SHARED_MAX / 64)));
    }
    let bytes: usize = symbols.shared.borrow().iter().map(|text| text.len()).sum();
    assert!(bytes == symbols.shared_bytes.get() && bytes <= SHARED_MAX);
    assert_eq!(symbols.shared.borrow().len(), 63);
}

#[test]
fn symbols_can_move_to_another_thread() {
    fn moves<T: Send>(_: T) {}
    moves(Symbols::from_elf(vec![]));
}
