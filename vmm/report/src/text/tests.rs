use super::super::finding::tests::finding;
use super::super::{Distinct, Previous, Row, Variable, frame};
use super::*;

const PLAIN: TextStyle = TextStyle { color: false, names: Names::Demangled };
const FOR_TOOLS: TextStyle = TextStyle { color: false, names: Names::Linkage };

const GOLDEN: &str = "\
==================================================================
BUG: KASAN: slab-out-of-bounds in kernel::kmalloc_oob_right+0x1d/0x80
Write of size 1 at addr ffff800000201073 by task kmalloc_oob_right/12

CPU: 0 PID: 12 Comm: kmalloc_oob_right
Hardware name: Umbra
Call Trace:
 <TASK>
 kernel::kmalloc_oob_right+0x1d/0x80
    inlined: core::ptr::write_volatile::<u8> at library/core/src/ptr/mod.rs:2201
    at kernel/src/oob.rs:21
 thread_main+0x44/0x60
    at kernel/src/thread.rs:7
 </TASK>

Allocated by task 12 on cpu 1 at 2.034567s:
 kmalloc+0x10/0x90
    at kernel/src/slab.rs:50
 thread_main+0x44/0x60
    at kernel/src/thread.rs:7

The buggy address belongs to the object at ffff800000201000
 which belongs to the cache kmalloc-128 of size 128
The buggy address is located 0 bytes to the right of
 allocated 115-byte region [ffff800000201000, ffff800000201073)

Memory state around the buggy address:
 ffff800000200f00: fb fb fb fb fb fb fb fb fb fb fb fb fb fb fb fb
 ffff800000200f80: fb fb fb fb fb fb fb fb fb fb fb fb fb fb fb fb
>ffff800000201000: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 03 fc
                                                             ^
 ffff800000201080: fc fc fc fc fc fc fc fc fc fc fc fc fc fc fc fc
 ffff800000201100: fc fc fc fc fc fc fc fc fc fc fc fc fc fc fc fc
Fingerprint: d9b81c7c09687433
==================================================================
";

#[test]
fn reads_like_a_kasan_report() {
    assert_eq!(to_string(&finding(), PLAIN), GOLDEN);
}

#[test]
fn the_caret_points_at_the_byte() {
    for column in 0..16 {
        let mut one = finding();
        one.shadow.first_bad = 0xffff_8000_0020_1000 + 8 * column + 7;
        for (i, byte) in one.shadow.rows[2].bytes.iter_mut().enumerate() {
            *byte = if i as u64 == column { 0xfd } else { 0 };
        }
        let text = to_string(&one, PLAIN);
        let lines: Vec<_> = text.lines().collect();
        let at = lines.iter().position(|line| line.starts_with('>')).unwrap();
        assert_eq!(lines[at + 1].find('^'), lines[at].find("fd"), "{text}");
    }
}

#[test]
fn a_free_has_no_size() {
    let mut one = finding();
    (one.kind, one.access, one.size) = ("double-free", AccessKind::Free, 0);
    (one.freed, one.allocated) = (one.allocated.take(), None);
    one.freed.as_mut().unwrap().frames.clear();
    let text = to_string(&one, PLAIN);
    assert!(text.contains(
        "in kernel::kmalloc_oob_right+0x1d/0x80\nFree of addr ffff800000201073 by task kmal"
    ));
    assert!(
        text.contains(
            "\nFreed by task 12 on cpu 1 at 2.034567s:\n(stack is not available)\n\nThe buggy"
        ),
        "{text}"
    );
    assert!(!text.contains("Allocated by"));
}

#[test]
fn related_work_and_what_was_there_before_are_told() {
    let mut one = finding();
    let mut event = one.allocated.clone().unwrap();
    (one.allocated, one.freed) = (None, Some(event.clone()));
    (event.cpu, event.micros) = (None, None);
    one.related_work = vec![event.clone(), event.clone()];
    one.previous =
        Some(Previous { start: 0x1000, size: 64, allocated: Some(event.clone()), freed: event });
    let text = to_string(&one, PLAIN);
    let stack = " kmalloc+0x10/0x90\n    at kernel/src/slab.rs:50\n \
                 thread_main+0x44/0x60\n    at kernel/src/thread.rs:7\n\n";
    let expected = format!(
        "Freed by task 12 on cpu 1 at 2.034567s:\n{stack}\
         Last potentially related work creation:\n{stack}\
         Second to last potentially related work creation:\n{stack}\
         Before, the address belonged to an object of 64 bytes at 0000000000001000\n\
         Previously allocated by task 12:\n{stack}Previously freed by task 12:\n{stack}\
         The buggy address"
    );
    assert!(text.contains(&expected), "{text}");
}

#[test]
fn tells_where_the_address_lies() {
    let located = |offset: i64, begins: i64| {
        let mut one = finding();
        let object = one.object.as_mut().unwrap();
        object.offset = offset;
        one.shadow.first_bad = object.start.wrapping_add_signed(offset);
        one.address = object.start.wrapping_add_signed(begins);
        let text = to_string(&one, PLAIN);
        let from = text.find("is located ").unwrap();
        text[from..]
            .split("\n\n")
            .next()
            .unwrap()
            .replace("[ffff800000201000, ffff800000201073)", "R")
    };
    for (offset, place) in [
        (-1, "1 bytes to the left of"),
        (0, "0 bytes inside of"),
        (114, "114 bytes inside of"),
        (120, "5 bytes to the right of"),
    ] {
        let expected = format!("is located {place}\n allocated 115-byte region R");
        assert_eq!(located(offset, offset), expected);
    }
    assert_eq!(
        located(115, 112),
        "is located 0 bytes to the right of\n allocated 115-byte region R\n \
         (the access begins 112 bytes inside of it)"
    );
}

#[test]
fn what_is_missing_is_left_out_and_said() {
    let mut one = finding();
    (one.allocated, one.object, one.task.name) = (None, None, String::new());
    one.frames = vec![Frame::unknown(one.ip)];
    one.shadow.rows.clear();
    one.notes = vec!["the kernel has no symbols".into()];
    one.variable = Some(Variable {
        name: "TABLE".into(),
        start: one.address - 0x14,
        size: 0x40,
        module: Some("a.c".into()),
        file: Some("src/a.c".into()),
        line: Some(7),
    });
    assert_eq!(
        to_string(&one, PLAIN),
        "\
==================================================================
BUG: KASAN: slab-out-of-bounds in <no symbol>
Write of size 1 at addr ffff800000201073 by task unknown/12

CPU: 0 PID: 12 Comm: unknown
Hardware name: Umbra
Call Trace:
 <TASK>
 0xffffffff8000101d
 </TASK>

The buggy address belongs to the variable:
 TABLE+0x14/0x40
    64 bytes at src/a.c:7

Memory state around the buggy address: it has no shadow
Note: the kernel has no symbols
Fingerprint: 3829faf42b3fe18f
==================================================================
"
    );
}

#[test]
fn a_variable_without_a_place_has_its_module() {
    let mut one = finding();
    let module = Some("a.c".into());
    one.variable = Some(Variable {
        name: "T".into(),
        start: one.address,
        size: 4,
        module,
        ..Variable::default()
    });
    assert!(
        to_string(&one, PLAIN)
            .contains("variable:\n T+0x0/0x4\n    4 bytes of a.c\n\nMemory state")
    );
}

#[test]
fn a_stack_finding_names_the_variables() {
    let mut one = finding();
    let variables = frame::parse(b"2 32 10 8 array:12 64 1 3 x\ny").unwrap();
    let function = Some("f+0x0/0x90".into());
    one.stack_frame = Some(StackFrame { offset: 42, current: true, function, variables });
    let text = to_string(&one, PLAIN);
    let expected = "\
The buggy address belongs to stack of task kmalloc_oob_right/12
 and is located at offset 42 in frame:
 f+0x0/0x90

This frame has 2 objects:
 [32, 42) 'array' (line 12)
 [64, 65) 'x\\u{a}y'

Memory state";
    assert!(text.contains(expected), "{text}");
    one.stack_frame.as_mut().unwrap().current = false;
    let text = to_string(&one, PLAIN);
    let expected = "The buggy address belongs to the stack of another task\n and is located at";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn a_guest_cannot_forge_lines() {
    let mut one = finding();
    one.task.name = "x\n==\x1b[2J".into();
    one.object.as_mut().unwrap().cache = Some("c\rd".into());
    one.frames[0].symbol = Some("f\ng".into());
    let text = to_string(&one, PLAIN);
    assert_eq!(text.lines().count(), GOLDEN.lines().count());
    for shown in [r"by task x\u{a}==\u{1b}[2J/12", r"cache c\u{d}d of", r"inlined: f\u{a}g at"] {
        assert!(text.contains(shown), "{text}");
    }
}

#[test]
fn colours_change_nothing_else() {
    let coloured = to_string(&finding(), TextStyle { color: true, ..PLAIN });
    assert!(coloured.contains("\x1b[1m\x1b[31mBUG: KASAN: "), "{coloured:?}");
    assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), GOLDEN);
}

#[test]
fn repeats_are_one_line_each() {
    let mut findings = Findings::new(Distinct::Bugs, 1);
    for _ in 0..3 {
        findings.add(finding());
    }
    findings.add(Finding { access: AccessKind::Read, ..finding() });
    let mut out = Vec::new();
    write_repeats(&mut out, &findings, PLAIN).unwrap();
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "2 more of: BUG: KASAN: slab-out-of-bounds in kernel::kmalloc_oob_right+0x1d/0x80\n\
         1 more of other kinds: only the first 1 different ones are kept\n"
    );
}

/// The tools' own expressions: of syzkaller's `pkg/report/linux.go` (titles, stack frames, lines to
/// symbolize), and of `scripts/decode_stacktrace.sh`, which looks the last word up in the ELF.
mod tools {
    use regex::Regex;

    use super::*;

    const FUNC: &str = r"([a-zA-Z0-9_]+)(?:\.|\+)";
    const STACK_STARTS: &str = "Call Trace|Allocated by task [0-9]+:|Freed by task [0-9]+:";
    const STACK_FRAME: &str = concat!(
        r"^ *(?:\[<?(?:[0-9a-f]+)>?\] ?){0,2}[ \t]+(?:[0-9]+:)?",
        r"([a-zA-Z0-9_.]+)\+0x([0-9a-f]+)/0x([0-9a-f]+)"
    );
    const SYMBOLIZE: &str =
        r"(?:\[<(?:[0-9a-f]+)>\])?[ \t]+(?:[0-9]+:)?([a-zA-Z0-9_.]+)\+0x([0-9a-f]+)/0x([0-9a-f]+)";
    const DECODE_STACKTRACE: &str = r"[^+ ]+\+0x[0-9a-f]+/0x[0-9a-f]+";

    fn re(pattern: &str) -> Regex {
        Regex::new(pattern).unwrap()
    }

    #[test]
    fn syzkaller_finds_the_title() {
        let text = to_string(&finding(), FOR_TOOLS);
        let access =
            format!(r"BUG: KASAN: ([a-z\-]+) in {FUNC}(?:.*\n)+?.*(Read|Write) of size (?:[0-9]+)");
        let found = re(&access).captures(&text).unwrap();
        assert_eq!(
            (&found[1], &found[2], &found[3]),
            ("slab-out-of-bounds", "_RNvCs1_6kernel17kmalloc_oob_right", "Write")
        );
        for kind in ["double-free", "invalid-free"] {
            let text =
                to_string(&Finding { kind, access: AccessKind::Free, ..finding() }, FOR_TOOLS);
            let free = format!(
                "BUG: KASAN: (?:double-free or invalid-free|double-free|invalid-free) in {FUNC}"
            );
            assert_eq!(
                &re(&free).captures(&text).unwrap()[1],
                "_RNvCs1_6kernel17kmalloc_oob_right"
            );
            assert!(!re(&access).is_match(&text), "{text}");
        }
    }

    #[test]
    fn syzkaller_finds_the_frames_of_each_stack() {
        let mut one = finding();
        one.freed = one.allocated.clone();
        // It looks for a first frame in fewer lines than there are inlined frames.
        let inlined = vec![one.frames[0].clone(); 20];
        one.frames.splice(0..1, inlined);
        let text = to_string(&one, FOR_TOOLS);
        let lines: Vec<_> = text.lines().collect();
        let starts = (0..lines.len()).filter(|i| re(STACK_STARTS).is_match(lines[*i]));
        let stacks: Vec<_> = starts.collect();
        assert_eq!(stacks.len(), 3);
        for start in stacks {
            let next = &lines[start + 1..start + 16];
            assert!(next.iter().any(|line| re(STACK_FRAME).is_match(line)), "{text}");
        }
        let frame = re(&format!("^ *{FUNC}"));
        let names = |pattern: &Regex| -> Vec<String> {
            let found = lines.iter().filter_map(|line| pattern.captures(line));
            found.map(|c| c[1].to_string()).collect()
        };
        let expected = [
            "_RNvCs1_6kernel17kmalloc_oob_right",
            "thread_main",
            "kmalloc",
            "thread_main",
            "kmalloc",
            "thread_main",
        ];
        assert_eq!(names(&re(STACK_FRAME)), expected);
        // syzkaller's other expression, for names, matches more. It must match no additional line.
        assert_eq!(names(&frame), expected);
        // The headline is symbolized too.
        assert_eq!(names(&re(SYMBOLIZE))[1..], expected);
    }

    #[test]
    fn decode_stacktrace_finds_the_symbol_last_on_the_line() {
        let text = to_string(&finding(), FOR_TOOLS);
        let hits: Vec<_> =
            text.lines().filter(|line| re(DECODE_STACKTRACE).is_match(line)).collect();
        assert_eq!(hits.len(), 5, "{text}");
        for line in hits {
            let last = line.split_whitespace().last().unwrap();
            let whole = re(r"^[A-Za-z0-9_.$]+\+0x[0-9a-f]+/0x[0-9a-f]+$");
            assert!(whole.is_match(last), "{line:?}");
        }
    }

    #[test]
    fn no_row_is_taken_for_a_frame() {
        let mut one = finding();
        one.shadow.rows = vec![Row { address: 0, bytes: [0xff; 16] }];
        let text = to_string(&one, FOR_TOOLS);
        let from = text.find("Memory state").unwrap();
        assert!(
            text[from..]
                .lines()
                .all(|l| !re(STACK_FRAME).is_match(l) && !re(SYMBOLIZE).is_match(l))
        );
    }
}
