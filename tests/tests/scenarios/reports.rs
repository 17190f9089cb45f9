//! The contents of findings: names, lines, variables, and notes where the kernel's file lacks them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use umbra::kernel::test_kernel;
use umbra::provenance::QuarantineSize;
use umbra::report::Names;
use umbra::report::text::{self, TextStyle};
use umbra::shadow::Notify;

use super::{Outcome, PER_PAGE, RING, boot_file, named};

/// Every finding names its function and line, and the stacks of its object.
pub fn findings_are_symbolized() {
    for (finding, _) in RING.get().report.findings.iter() {
        let text = umbra::report::text::to_string(finding, Default::default());
        let named = finding
            .frames
            .iter()
            .any(|f| f.symbol.as_ref().is_some_and(|s| s.contains(&finding.task.name)));
        assert!(named, "no frame of the scenario:\n{text}");
        let culprit = finding.culprit().unwrap_or_else(|| panic!("nobody did it:\n{text}"));
        assert!(culprit.symbol.is_some() && culprit.size > 0, "{text}");
        assert!(
            finding.frames.iter().any(|f| f.file.is_some() && f.line.is_some()),
            "no lines:\n{text}"
        );
        assert!(finding.notes.is_empty(), "{text}");
        if finding.kind == "global-out-of-bounds" {
            let variable =
                finding.variable.as_ref().unwrap_or_else(|| panic!("which variable?\n{text}"));
            let file = variable.file.as_deref().unwrap_or_default();
            assert!(
                file == "guest/kernel/src/scenarios/stack.rs" && variable.line > Some(0),
                "{text}"
            );
            // A scenario that reads before a variable hits the one that the linker put there.
            assert!(variable.name.starts_with("umbra_kernel::scenarios::stack::"), "{text}");
            assert_eq!(variable.size, 10, "{text}");
        }
        if finding.kind == "stack-out-of-bounds" && finding.task.name.starts_with("kasan_stack") {
            let frame =
                finding.stack_frame.as_ref().unwrap_or_else(|| panic!("which frame?\n{text}"));
            assert!(frame.current && frame.variables.iter().any(|v| v.name == "array"), "{text}");
        }
        if finding.task.name == "other_stack_oob" {
            let frame =
                finding.stack_frame.as_ref().unwrap_or_else(|| panic!("which frame?\n{text}"));
            assert!(!frame.current && text.contains("the stack of another task"), "{text}");
        }
        if finding.kind == "slab-use-after-free" || finding.kind == "double-free" {
            let freed = finding.freed.as_ref().unwrap_or_else(|| panic!("who freed it?\n{text}"));
            let by =
                if finding.task.name == "queued_work_uaf" { "worker" } else { &finding.task.name };
            assert_eq!(freed.task.name, by, "{text}");
            assert!(!freed.frames.is_empty(), "{text}");
        }
    }
}

/// Linux's own script, from Debian's sources, finds the source lines of a report's frames.
pub fn decode_stacktrace_knows_the_frames() {
    let style = TextStyle { names: Names::Linkage, ..TextStyle::default() };
    // One finding of each kind: the script starts some programs for each frame that it has not
    // seen.
    let mut kinds = BTreeSet::new();
    let chosen: Vec<_> =
        RING.get().report.findings.iter().filter(|(f, _)| kinds.insert(f.kind)).collect();
    assert!(chosen.len() >= 12, "{kinds:?}");
    let text: String = chosen.iter().map(|(finding, _)| text::to_string(finding, style)).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let kernel = folder.path().join("vmlinux");
    std::fs::write(&kernel, test_kernel().expect("checked before")).expect("it can be written");
    let report = folder.path().join("report.txt");
    std::fs::write(&report, &text).expect("it can be written");
    let output = Command::new("bash")
        .arg(decode_stacktrace())
        .arg(&kernel)
        .arg("/nowhere")
        .stdin(std::fs::File::open(&report).expect("just written"))
        .output()
        .expect("bash runs");
    let decoded = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(decoded.lines().count(), text.lines().count(), "{decoded}");
    // Those that have a line in Umbra's own report.
    let known: BTreeSet<_> = chosen
        .iter()
        .flat_map(|(f, _)| {
            f.frames.iter().chain(f.allocated.iter().chain(&f.freed).flat_map(|e| &e.frames))
        })
        .filter(|frame| !frame.inlined)
        .filter_map(|frame| {
            let (name, _) = (frame.name(Names::Linkage)?, frame.line?);
            Some(format!("{name}+{:#x}/{:#x}", frame.offset, frame.size))
        })
        .collect();
    let mut decoded_frames = 0;
    for (before, after) in text.lines().zip(decoded.lines()) {
        let Some(place) = before.split_whitespace().last().filter(|word| word.contains("+0x"))
        else {
            assert_eq!(before.trim(), after.trim());
            continue;
        };
        if !known.contains(place) {
            continue;
        }
        // The lines may differ: the script looks up the return address, not the call. And one of
        // the functions inlined there may have no line.
        let mut lines = after.split(".rs:").skip(1);
        let has_line = lines.any(|line| line.starts_with(|c: char| c.is_ascii_digit()));
        assert!(has_line, "{before} became {after}");
        assert!(!after.contains("+0x"), "{before} became {after}");
        decoded_frames += 1;
    }
    assert!(decoded_frames > 3 * chosen.len(), "{decoded_frames} frames\n{decoded}");
}

/// The script, if `cargo xtask linux` has run.
pub fn decode_stacktrace() -> PathBuf {
    umbra_tests::linux::kernel("source/linux-source-6.1/scripts/decode_stacktrace.sh")
}

/// The ranges of a section's header and of its bytes in an ELF file.
fn section(elf: &[u8], name: &str) -> (usize, std::ops::Range<usize>) {
    let u64_at =
        |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes")) as usize;
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    let header = |i: usize| u64_at(40) + 64 * i;
    let names = u64_at(header(u16_at(62)) + 24);
    let wanted = format!("{name}\0");
    let is_it =
        |at: &usize| elf[names + (u64_at(*at) & 0xffff_ffff)..].starts_with(wanted.as_bytes());
    let at = (0..u16_at(60)).map(header).find(is_it).unwrap_or_else(|| panic!("no section {name}"));
    (at, u64_at(at + 24)..u64_at(at + 24) + u64_at(at + 32))
}

/// The notes on each finding of a kernel, and the finding as text.
fn told(kernel: Vec<u8>) -> Vec<(String, String)> {
    let chosen = named("kmalloc_uaf,kasan_global_oob_right");
    let kernel: Arc<[u8]> = kernel.into();
    let Outcome { report, .. } =
        boot_file(kernel.into(), QuarantineSize::Auto, PER_PAGE, Notify::Ring, &chosen, "");
    let findings = report.findings.iter();
    let told: Vec<_> = findings
        .map(|(f, _)| (f.notes.join("\n"), text::to_string(f, TextStyle::default())))
        .collect();
    assert_eq!(told.len(), 2, "nothing is lost");
    for (note, text) in &told {
        assert!(
            !note.is_empty() && note.lines().all(|note| text.contains(&format!("Note: {note}"))),
            "{text}"
        );
    }
    told
}

/// Without symbols and debug information frames are addresses, and the report says why.
pub fn a_stripped_kernel_has_addresses() {
    let mut kernel = test_kernel().expect("checked before").to_vec();
    for name in [".symtab", ".debug_info"] {
        let (header, _) = section(&kernel, name);
        // Neither its type nor its name is known any more.
        kernel[header..header + 8].fill(0);
    }
    for (note, text) in told(kernel) {
        assert!(note.contains("stripped") && note.contains("no debug information"), "{text}");
        assert!(
            text.contains("-free in <no symbol>") || text.contains("-bounds in <no symbol>"),
            "{text}"
        );
        assert!(text.contains("Call Trace:\n <TASK>\n 0xffffffff80"), "{text}");
    }
}

/// Debug information that is garbage, or behind the end of the file: frames have names and no
/// lines.
pub fn damaged_debug_information_is_told() {
    let whole = test_kernel().expect("checked before");
    let (header, range) = section(whole, ".debug_info");
    let mut garbage = whole.to_vec();
    garbage[range].fill(0xff);
    let mut short = whole.to_vec();
    short[header + 32..header + 40].copy_from_slice(&(whole.len() as u64).to_le_bytes());
    for (kernel, part) in
        [(garbage, "cannot be read"), (short, "ends inside its section .debug_info")]
    {
        for (note, text) in told(kernel) {
            assert!(note.contains(part), "{text}");
            assert!(
                text.contains(" in umbra_kernel::scenarios::") && !text.contains("\n    at "),
                "{text}"
            );
        }
    }
}

/// A file that ends behind the loaded segments.
pub fn a_truncated_file_is_told() {
    let whole = test_kernel().expect("checked before");
    let (_, debug) = section(whole, ".debug_info");
    for (note, text) in told(whole[..debug.start + debug.len() / 2].to_vec()) {
        assert!(note.contains("no complete 64-bit ELF"), "{text}");
    }
}
