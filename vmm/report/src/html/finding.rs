//! One finding: its description, its stacks with the source, and the shadow.

use maud::{Markup, PreEscaped, html};

use super::super::text::{self, TextStyle};
use super::super::{AccessKind, Finding, Frame, Names, Object, Track, Variable};
use super::escape::{Block, Line, grouped};
use super::shadow;
use crate::source::{Excerpt, Sources};

/// Finding number `n` of all, from 1. `open`: shown in full at first.
pub fn draw(
    n: usize,
    (finding, seen): (&Finding, u64),
    open: bool,
    names: Names,
    sources: &mut Sources,
) -> Markup {
    let function = finding.function();
    let report = text::to_string(finding, TextStyle { color: false, names });
    let body = html! {
        (facts(finding))
        h4 { "Shadow around the address" }
        (PreEscaped(shadow::draw(finding)))
        (stack("Call trace", &finding.frames, function, names, sources))
        (history(finding, names, sources))
        @for note in &finding.notes { p.note { "Note: " (Line(note)) "." } }
        details.text {
            summary { "The report as text" }
            pre.scroll tabindex="0" { (Block(report)) }
        }
    };
    article(n, finding, seen, open, names, &body)
}

/// As [`draw`], without what may be large.
pub fn draw_briefly(n: usize, (finding, seen): (&Finding, u64), names: Names) -> Markup {
    let body = html! {
        (facts(finding))
        h4 { "Shadow around the address" }
        (PreEscaped(shadow::draw(finding)))
        p.note { "Note: the finding is too large for this page: its stacks are left out." }
    };
    article(n, finding, seen, false, names, &body)
}

fn article(
    n: usize,
    finding: &Finding,
    seen: u64,
    open: bool,
    names: Names,
    body: &Markup,
) -> Markup {
    let name = finding.function().and_then(|frame| frame.name(names));
    html! {
        article.finding {
            details open[open] {
                summary {
                    h3 {
                        span.n { (n) } " " span.kind { (Line(finding.kind)) } " "
                        span.in { "in" } " "
                        code { (Line(name.unwrap_or("a function without a name"))) }
                    }
                    span.what {
                        (access(finding))
                        @if seen > 1 { " · seen " (grouped(seen)) "×" }
                    }
                }
                div.body id={ "finding-" (n) } { (body) }
            }
        }
    }
}

/// The stacks of allocation and free, of this object and of the one before it.
fn history(finding: &Finding, names: Names, sources: &mut Sources) -> Markup {
    let mut track = |heading: String, track: &Track| {
        stack(&by(&heading, track), &track.frames, None, names, sources)
    };
    html! {
        @if let Some(event) = &finding.allocated { (track("Allocated".into(), event)) }
        @if let Some(event) = &finding.freed { (track("Freed".into(), event)) }
        @for (when, event) in ["Last", "Second to last"].iter().zip(&finding.related_work) {
            (track(format!("{when} potentially related work, made"), event))
        }
        @if let Some(previous) = &finding.previous {
            p.note {
                "Before, the address belonged to an object of " (grouped(previous.size))
                " bytes at " (code(previous.start)) "."
            }
            @if let Some(event) = &previous.allocated {
                (track("Previously allocated".into(), event))
            }
            (track("Previously freed".into(), &previous.freed))
        }
    }
}

fn code(address: u64) -> Markup {
    html! { code { (format!("{address:#x}")) } }
}

fn access(finding: &Finding) -> String {
    match finding.access {
        AccessKind::Free => "free".into(),
        // A huge size is a small one that wrapped.
        access if finding.size > i64::MAX as u64 => {
            format!(
                "{} of −{} bytes",
                access.to_string().to_lowercase(),
                grouped(finding.size.wrapping_neg())
            )
        }
        access => {
            let bytes = if finding.size == 1 { "byte" } else { "bytes" };
            format!("{} of {} {bytes}", access.to_string().to_lowercase(), grouped(finding.size))
        }
    }
}

fn by(what: &str, event: &Track) -> String {
    let rest = event.place_and_time();
    match event.task.name.as_str() {
        "" => format!("{what} by task {}{rest}", event.task.id),
        name => format!("{what} by task {name} ({}){rest}", event.task.id),
    }
}

/// The position of an offset relative to something of `size` bytes.
fn relation(offset: i128, size: u64) -> String {
    let (size, bytes) =
        (i128::from(size), |n: i128| if n == 1 { "1 byte".into() } else { format!("{n} bytes") });
    match offset {
        o if o < 0 => format!("{} before", bytes(-o)),
        o if o == size => "just behind the end of".into(),
        o if o >= size => format!("{} behind the end of", bytes(o - size)),
        o => format!("{} into", bytes(o)),
    }
}

fn facts(finding: &Finding) -> Markup {
    let first_bad = finding.shadow.first_bad;
    let task = if finding.task.name.is_empty() { "unknown" } else { &finding.task.name };
    html! {
        dl.facts {
            (fact("Address", code(finding.address)))
            @if first_bad != finding.address && !finding.shadow.rows.is_empty() {
                (fact("First bad", code(first_bad)))
            }
            (fact("Task", html! {
                (Line(task)) " "
                span.dim { "(" (finding.task.id) "), CPU " (finding.cpu) }
            }))
            @if let Some(object) = &finding.object { (fact("Object", object_fact(object))) }
            @if let Some(variable) = &finding.variable {
                (fact("Variable", variable_fact(variable, first_bad)))
            }
            (fact("Fingerprint", html! { code { (finding.fingerprint().to_string()) } }))
        }
    }
}

/// A name and its value.
pub fn fact(name: &str, value: Markup) -> Markup {
    html! { div { dt { (name) } dd { (value) } } }
}

fn object_fact(object: &Object) -> Markup {
    html! {
        (relation(object.offset.into(), object.size)) " " (grouped(object.size)) " bytes at "
        (code(object.start))
        @if let Some(cache) = &object.cache {
            ", of cache " (Line(cache)) " " span.dim { "(" (object.cache_size) " bytes)" }
        }
    }
}

fn variable_fact(variable: &Variable, first_bad: u64) -> Markup {
    let offset = i128::from(first_bad) - i128::from(variable.start);
    html! {
        (relation(offset, variable.size)) " " code { (Line(&variable.name)) } ", "
        (grouped(variable.size)) " bytes at " (code(variable.start))
        @if let Some(file) = &variable.file {
            ", declared at "
            code { (Line(file)) @if let Some(line) = variable.line { ":" (line) } }
        }
    }
}

fn stack(
    heading: &str,
    frames: &[Frame],
    open: Option<&Frame>,
    names: Names,
    sources: &mut Sources,
) -> Markup {
    html! {
        h4 { (Line(heading)) }
        @if frames.is_empty() {
            p.note { "The stack is not available." }
        } @else {
            ol.stack {
                @for frame in frames {
                    li {
                        (frame_item(
                            frame,
                            open.is_some_and(|open| std::ptr::eq(open, frame)),
                            names,
                            sources,
                        ))
                    }
                }
            }
        }
    }
}

/// A frame, with its source lines if they are known.
fn frame_item(frame: &Frame, open: bool, names: Names, sources: &mut Sources) -> Markup {
    let place = frame.path.as_deref().zip(frame.line);
    let file = frame.file.as_deref();
    let excerpt = place.and_then(|(path, line)| Some((line, sources.excerpt(path, file, line)?)));
    html! {
        @if let Some((line, excerpt)) = excerpt {
            details open[open] {
                summary.frame { (frame_line(frame, names)) }
                (lines(line, &excerpt))
            }
        } @else {
            div.frame { (frame_line(frame, names)) }
        }
    }
}

fn frame_line(frame: &Frame, names: Names) -> Markup {
    html! {
        code.fn {
            @match frame.name(names) {
                Some(name) => (Line(name)),
                None => (format!("{:#018x}", frame.ip)),
            }
        }
        @if frame.inlined {
            " " span.tag { "inlined" }
        } @else if frame.symbol.is_some() {
            span.dim { (format!("+{:#x}/{:#x}", frame.offset, frame.size)) }
        }
        @if let Some(file) = &frame.file {
            " " span.file { (Line(file)) @if let Some(line) = frame.line { ":" (line) } }
        }
    }
}

fn lines(at: u32, excerpt: &Excerpt) -> Markup {
    html! {
        pre.src.scroll tabindex="0" {
            @for (number, text) in (excerpt.first..).zip(&excerpt.lines) {
                @if number == at {
                    mark { i { (number) } (Block(text)) "\n" }
                } @else {
                    span { i { (number) } (Block(text)) "\n" }
                }
            }
        }
        @if excerpt.changed {
            p.note {
                "The file was changed after the kernel was built: these may be other lines."
            }
        }
    }
}
