//! Kernels whose files are made to harm: symbols and debug information that forge output, or that
//! are too long, too slow or too large to read.

use iced_x86::code_asm::*;
use umbra_shadow::abi::{CallNumber, ExitReason};

use super::guest::{CODE, Guest};
use super::run_file;

pub const ALL: &[(&str, fn())] =
    &[("a_name_that_forges_the_outcome", a_name_that_forges_the_outcome)];

/// A title, a cleared screen, a line of the program's own, and text from right to left.
const FORGED: &str = "f\x1b]0;title\x07\x1b[2J\u{9b}2J\numbra: clean; no findings\u{202e}\u{200b}";

/// Each outcome that names a place in the code.
fn a_name_that_forges_the_outcome() {
    type Body = fn(&mut Guest) -> Result<(), IcedError>;
    let fault: Body = |g| g.call(CallNumber::Exit, [ExitReason::Fault.into(), 14, CODE + 1, 0]);
    let spin: Body = |g| {
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        g.asm.jmp(again)
    };
    let unknown: Body = |g| {
        // `getsec`, which no guest has.
        g.asm.db(&[0x0f, 0x37])
    };
    for (body, args) in [(fault, ""), (spin, "--timeout 300ms"), (unknown, ""), (Guest::halt, "")] {
        let kernel = Guest::new(body).builder().function(FORGED, CODE, 4096).build();
        let run = run_file(&kernel, args);
        let bad = run.stderr.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(bad, None, "{:?}", run.stderr);
        assert!(!run.stderr.contains(['\u{202e}', '\u{200b}']), "{}", run.tail());
        assert!(run.stderr.lines().all(|line| !line.starts_with("umbra: clean")), "{}", run.tail());
    }
    let kernel = Guest::new(fault).builder().function(FORGED, CODE, 4096).build();
    let run = run_file(&kernel, "");
    run.expect(3);
    let shown =
        r"in f\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}2J\u{a}umbra: clean; no findings\u{202e}\u{200b}+";
    assert!(run.stderr.contains(shown), "{}", run.stderr);
}
