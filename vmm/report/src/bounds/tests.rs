use std::path::Path;

use super::super::finding::tests::finding;
use super::super::frame::StackVariable;
use super::super::html::tests::run;
use super::super::text::TextStyle;
use super::super::{Findings, Names, Object, Picture, Previous, Variable};
use super::super::{html, json, sarif, text};
use super::*;

/// Most bytes of a finding in each format.
const TEXT: usize = text::REPORT_MAX + 1024;
const JSON: usize = json::LINE_MAX;
const SARIF: usize = 64 << 10;
const HTML: usize = html::FINDING_MAX + 1024;

fn name(i: usize, bytes: usize) -> Arc<str> {
    // Worst for JSON and HTML, and not only ASCII.
    format!("{i}\"&<é\\").repeat(bytes / 8).into()
}

/// A stack of as many functions as there can be, each with as many inlined ones, with names of so
/// many bytes.
fn stack(functions: usize, inlined: usize, bytes: usize) -> Vec<Frame> {
    let group = |i: usize| {
        let text = Some(name(i, bytes));
        let function = Frame {
            ip: 0x1000 + i as u64,
            symbol: text.clone(),
            linkage: text.clone(),
            file: text.clone(),
            path: text.clone(),
            module: text,
            line: Some(u32::MAX),
            ..Frame::default()
        };
        let inner = Frame { inlined: true, ..function.clone() };
        std::iter::repeat_n(inner, inlined).chain([function])
    };
    (0..functions).flat_map(group).collect()
}

/// The worst finding.
fn worst(inlined: usize, bytes: usize) -> Finding {
    let text = || name(0, bytes).to_string();
    let task = Task { id: u32::MAX, name: text() };
    let frames = || stack(10, inlined, bytes);
    let track = || Track { task: task.clone(), cpu: None, micros: None, frames: frames() };
    let variable = StackVariable { offset: 1, size: 1, name: text(), line: None };
    Finding {
        ip: 0x1000,
        task: task.clone(),
        frames: stack(32, inlined, bytes),
        object: Some(Object {
            start: 0,
            size: 1,
            cache: Some(text()),
            cache_size: 1,
            offset: i64::MIN,
        }),
        variable: Some(Variable {
            name: text(),
            module: Some(text()),
            file: Some(text().into()),
            line: Some(1),
            ..Variable::default()
        }),
        stack_frame: Some(StackFrame {
            offset: 1,
            current: true,
            function: Some(text()),
            variables: vec![variable; 64],
        }),
        allocated: Some(track()),
        freed: Some(track()),
        related_work: vec![track(), track()],
        previous: Some(Previous { start: 0, size: 1, allocated: Some(track()), freed: track() }),
        notes: vec![text(); 20],
        ..finding()
    }
}

fn formats(findings: &Findings) -> [usize; 4] {
    let (finding, _) = findings.get(0).expect("one");
    let size = |write: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        out.len()
    };
    let picture = Picture::default();
    let run = run("stopped", findings, &picture);
    let log = sarif::Log { kernel: "k", root: Some(Path::new("/")), run: &run };
    [
        text::to_string(finding, TextStyle { color: true, names: Names::Linkage }).len(),
        size(&|out| json::write(out, finding).expect("a Vec takes everything")),
        size(&|out| sarif::write(out, &log).expect("a Vec takes everything")),
        html::tests::render(&run, "k", Vec::new()).len(),
    ]
}

#[test]
fn a_finding_is_bounded_in_each_format() {
    for (inlined, bytes) in [(0, 1 << 17), (64, 8), (64, 1000), (64, 1 << 13)] {
        let mut findings = Findings::default();
        findings.add(worst(inlined, bytes));
        let sizes = formats(&findings);
        let limits = [TEXT, JSON, SARIF, HTML + (120 << 10)];
        for (size, limit) in sizes.iter().zip(limits) {
            assert!(*size <= limit, "{inlined} {bytes}: {sizes:?}");
        }
        let kept = findings.get(0).expect("one").0;
        let paths = kept.frames.iter().filter_map(|frame| frame.path.as_deref());
        assert!(paths.map(str::len).sum::<usize>() <= PATH_BYTES);
        assert!(kept.culprit().is_some(), "the place itself is kept");
    }
}

#[test]
fn what_is_left_out_is_said_once() {
    let mut findings = Findings::default();
    findings.add(worst(64, 8));
    let finding = findings.get(0).expect("one").0;
    let all: usize = 92 * 65;
    let stacks = [&finding.allocated, &finding.freed].into_iter().flatten();
    let frames = stacks.map(|track| track.frames.len()).sum::<usize>() + finding.frames.len();
    assert!(frames >= 52 + INLINED_MAX, "all functions, and some inlined ones: {frames}");
    let said = format!("{} of their functions are left out", all - 92 - INLINED_MAX);
    assert_eq!(finding.notes.iter().filter(|note| note.contains(&said)).count(), 1, "{finding:?}");
}

#[test]
fn an_ordinary_finding_is_not_changed() {
    assert_eq!(finding().bounded(), finding());
    let mut stacks = finding();
    stacks.frames = stack(32, 2, 40);
    stacks.frames.iter_mut().for_each(|frame| frame.path = None);
    assert_eq!(stacks.clone().bounded(), stacks);
}

#[test]
fn lines_are_whole_or_left_out() {
    let mut out = Vec::new();
    let mut lines = BoundedLines::new(&mut out, 10);
    write!(lines, "12").and_then(|()| write!(lines, "34\n567\n")).expect("a Vec takes everything");
    writeln!(lines, "8").and_then(|()| writeln!(lines, "\n")).expect("a Vec takes everything");
    writeln!(lines.finish().expect("a Vec takes everything"), "end").expect("it does");
    assert_eq!(out, b"1234\n567\n(3 more lines are left out)\nend\n");
}
