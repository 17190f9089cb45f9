//! One finding: what it is, its stacks with the source, and the shadow.

use std::fmt::Write;

use super::super::text::{self, TextStyle};
use super::super::{AccessKind, Finding, Frame, Names, Track, Variable};
use super::escape::{Block, Esc, grouped};
use super::shadow;
use super::source::Sources;

/// Writes the finding that is number `n` of all, from 1. `open`: to be seen at once.
pub fn write(
    out: &mut String,
    n: usize,
    (finding, seen): (&Finding, u64),
    open: bool,
    names: Names,
    sources: &mut Sources,
) {
    let open = if open { " open" } else { "" };
    let culprit = finding.culprit().and_then(|frame| frame.name(names));
    let _ = write!(
        out,
        "<article class=finding><details{open}><summary><h3><span class=n>{n}</span> <span class=kind>{}</span> <span class=in>in</span> \
         <code>{}</code></h3><span class=what>{}{}</span></summary><div class=body id='finding-{n}'>",
        Esc(finding.kind),
        Esc(culprit.unwrap_or("a function without a name")),
        access(finding),
        if seen > 1 { format!(" · seen {}×", grouped(seen)) } else { String::new() }
    );
    facts(out, finding);
    out.push_str("<h4>Shadow around the address</h4>");
    shadow::draw(out, finding);
    stack(out, "Call trace", &finding.frames, finding.culprit(), names, sources);
    for (what, event) in [("Allocated", &finding.allocated), ("Freed", &finding.freed)] {
        if let Some(event) = event {
            stack(out, &by(what, event), &event.frames, None, names, sources);
        }
    }
    for (when, event) in ["Last", "Second to last"].iter().zip(&finding.related_work) {
        let heading = by(&format!("{when} potentially related work, made"), event);
        stack(out, &heading, &event.frames, None, names, sources);
    }
    if let Some(previous) = &finding.previous {
        let _ = write!(
            out,
            "<p class=note>Before, the address belonged to an object of {} bytes at <code>{:#x}</code>.</p>",
            grouped(previous.size),
            previous.start
        );
        let events = [
            ("Previously allocated", previous.allocated.as_ref()),
            ("Previously freed", Some(&previous.freed)),
        ];
        for (what, event) in events {
            if let Some(event) = event {
                stack(out, &by(what, event), &event.frames, None, names, sources);
            }
        }
    }
    for note in &finding.notes {
        let _ = write!(out, "<p class=note>Note: {}.</p>", Esc(note));
    }
    let report = text::to_string(finding, TextStyle { color: false, names });
    let _ = write!(
        out,
        "<details class=text><summary>The report as text</summary><pre class=scroll tabindex=0>{}</pre></details></div></details></article>",
        Block(report)
    );
}

fn access(finding: &Finding) -> String {
    match finding.access {
        AccessKind::Free => "free".into(),
        // A size that wrapped was meant to be small.
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
    match event.task.name.as_str() {
        "" => format!("{what} by task {}", event.task.id),
        name => format!("{what} by task {name} ({})", event.task.id),
    }
}

/// Where an offset lies, seen from something of `size` bytes.
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

/// Where a variable is declared, if that is known.
fn declared(variable: &Variable) -> String {
    let Some(file) = &variable.file else { return String::new() };
    let line = variable.line.map(|line| format!(":{line}")).unwrap_or_default();
    format!(", declared at <code>{}{line}</code>", Esc(file))
}

fn facts(out: &mut String, finding: &Finding) {
    out.push_str("<dl class=facts>");
    let mut fact = |name: &str, value: std::fmt::Arguments| {
        let _ = write!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    };
    fact("Address", format_args!("<code>{:#x}</code>", finding.address));
    if finding.shadow.first_bad != finding.address && !finding.shadow.rows.is_empty() {
        fact("First bad", format_args!("<code>{:#x}</code>", finding.shadow.first_bad));
    }
    let task = if finding.task.name.is_empty() { "unknown" } else { &finding.task.name };
    fact(
        "Task",
        format_args!(
            "{} <span class=dim>({}), CPU {}</span>",
            Esc(task),
            finding.task.id,
            finding.cpu
        ),
    );
    if let Some(object) = &finding.object {
        let place = relation(object.offset.into(), object.size);
        let cache = match &object.cache {
            Some(cache) => {
                format!(
                    ", of cache {} <span class=dim>({} bytes)</span>",
                    Esc(cache),
                    object.cache_size
                )
            }
            None => String::new(),
        };
        fact(
            "Object",
            format_args!(
                "{place} {} bytes at <code>{:#x}</code>{cache}",
                grouped(object.size),
                object.start
            ),
        );
    }
    if let Some(variable) = &finding.variable {
        let place = relation(
            i128::from(finding.shadow.first_bad) - i128::from(variable.start),
            variable.size,
        );
        fact(
            "Variable",
            format_args!(
                "{place} <code>{}</code>, {} bytes at <code>{:#x}</code>{}",
                Esc(&variable.name),
                grouped(variable.size),
                variable.start,
                declared(variable)
            ),
        );
    }
    out.push_str("</dl>");
}

fn stack(
    out: &mut String,
    heading: &str,
    frames: &[Frame],
    open: Option<&Frame>,
    names: Names,
    sources: &mut Sources,
) {
    let _ = write!(out, "<h4>{}</h4>", Esc(heading));
    if frames.is_empty() {
        out.push_str("<p class=note>The stack is not available.</p>");
        return;
    }
    out.push_str("<ol class=stack>");
    for frame in frames {
        let mut line = String::new();
        match frame.name(names) {
            Some(name) => {
                let _ = write!(line, "<code class=fn>{}</code>", Esc(name));
            }
            None => {
                let _ = write!(line, "<code class=fn>{:#018x}</code>", frame.ip);
            }
        }
        if frame.inlined {
            line.push_str(" <span class=tag>inlined</span>");
        } else if frame.symbol.is_some() {
            let _ = write!(line, "<span class=dim>+{:#x}/{:#x}</span>", frame.offset, frame.size);
        }
        if let Some(file) = &frame.file {
            let number = frame.line.map(|line| format!(":{line}")).unwrap_or_default();
            let _ = write!(line, " <span class=file>{}{number}</span>", Esc(file));
        }
        let excerpt = frame
            .path
            .as_deref()
            .zip(frame.line)
            .and_then(|(path, line)| Some((line, sources.excerpt(path, line)?)));
        let Some((at, excerpt)) = excerpt else {
            let _ = write!(out, "<li><div class=frame>{line}</div>");
            continue;
        };
        let is_open = if open.is_some_and(|open| std::ptr::eq(open, frame)) { " open" } else { "" };
        let _ = write!(
            out,
            "<li><details{is_open}><summary class=frame>{line}</summary><pre class='src scroll' tabindex=0>"
        );
        for (number, text) in (excerpt.first..).zip(&excerpt.lines) {
            let tag = if number == at { "mark" } else { "span" };
            let _ = write!(out, "<{tag}><i>{number}</i>{}\n</{tag}>", Block(text));
        }
        out.push_str("</pre>");
        if excerpt.changed {
            out.push_str("<p class=note>The file was changed after the kernel was built: these may be other lines.</p>");
        }
        out.push_str("</details>");
    }
    out.push_str("</ol>");
}
