//! A finding as a KASAN report, for people and for the tools that read such reports.
//!
//! Order and wording are those of Linux 6.1 (`mm/kasan/report.c`), with the `Free of addr` line of
//! newer kernels. Two rules keep syzkaller's parser and `scripts/decode_stacktrace.sh` working: a
//! function of the ELF is a line of its own with one leading blank and `func+0xoff/0xsize` last;
//! and additions to it (its source line, the functions inlined into it) are on lines below it that
//! hold no such text.
//!
//! Names from the guest pass [`printable`], so that a guest cannot forge a
//! report or control a terminal.

use std::borrow::Cow;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::bounds::BoundedLines;
use super::frame::StackFrame;
use super::headline::place;
use super::printable::printable;
use super::{AccessKind, Finding, Findings, Frame, Names, Object, ShadowDump, Task, Track};

/// The options of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextStyle {
    /// With escape sequences for colours.
    pub color: bool,
    /// The kind of names of functions.
    pub names: Names,
}

const SEPARATOR: &str = "==================================================================";
const UNKNOWN_TASK: &str = "unknown";

const HEADLINE: Style = AnsiColor::Red.on_default().bold();
const HEADING: Style = AnsiColor::Cyan.on_default();
const CARET: Style = AnsiColor::Red.on_default().bold();
const ASIDE: Style = Style::new().dimmed();

/// Most bytes of a report, but for its last lines.
pub const REPORT_MAX: usize = 64 << 10;

/// Writes `finding` as a KASAN report. Of one longer than [`REPORT_MAX`], lines are left out, and
/// one line says how many.
///
/// # Errors
/// An error of `out`.
pub fn write(out: &mut dyn Write, finding: &Finding, style: TextStyle) -> io::Result<()> {
    let mut lines = BoundedLines::new(out, REPORT_MAX);
    ReportWriter { out: &mut lines, style }.finding(finding)?;
    ReportWriter { out: lines.finish()?, style }.end(finding)
}

/// Writes the lines of a stack.
pub(super) fn write_frames(
    out: &mut dyn Write,
    frames: &[Frame],
    style: TextStyle,
) -> io::Result<()> {
    ReportWriter { out, style }.frames(frames)
}

/// `finding` as a KASAN report.
pub fn to_string(finding: &Finding, style: TextStyle) -> String {
    let mut text = Vec::new();
    // Writing to a Vec cannot fail.
    let _ = write(&mut text, finding, style);
    String::from_utf8_lossy(&text).into_owned()
}

/// Writes one line for each finding that was seen more than once, and one for those that were only
/// counted; nothing if there are none.
///
/// # Errors
/// An error of `out`.
pub fn write_repeats(out: &mut dyn Write, findings: &Findings, style: TextStyle) -> io::Result<()> {
    for (finding, seen) in findings.iter().filter(|(_, seen)| *seen > 1) {
        writeln!(out, "{} more of: {}", seen - 1, finding.headline(style.names))?;
    }
    if findings.dropped() > 0 {
        let (kept, dropped) = (findings.distinct(), findings.dropped());
        writeln!(
            out,
            "{dropped} more of other kinds: only the first {kept} different ones are kept"
        )?;
    }
    Ok(())
}

struct ReportWriter<'a> {
    out: &'a mut dyn Write,
    style: TextStyle,
}

impl ReportWriter<'_> {
    fn paint(&self, style: Style) -> Style {
        if self.style.color { style } else { Style::new() }
    }

    fn finding(&mut self, finding: &Finding) -> io::Result<()> {
        let task = &finding.task;
        writeln!(self.out, "{SEPARATOR}")?;
        let style = self.paint(HEADLINE);
        writeln!(self.out, "{style}{}{style:#}", finding.headline(self.style.names))?;
        write!(self.out, "{} of ", finding.access)?;
        if finding.access != AccessKind::Free {
            write!(self.out, "size {} at ", finding.size)?;
        }
        writeln!(self.out, "addr {:016x} by task {}/{}\n", finding.address, name(task), task.id)?;

        writeln!(self.out, "CPU: {} PID: {} Comm: {}", finding.cpu, task.id, name(task))?;
        writeln!(self.out, "Hardware name: Umbra")?;
        self.heading("Call Trace:")?;
        writeln!(self.out, " <TASK>")?;
        self.frames(&finding.frames)?;
        writeln!(self.out, " </TASK>\n")?;

        if let Some(event) = &finding.allocated {
            self.event("Allocated", event)?;
        }
        if let Some(event) = &finding.freed {
            self.event("Freed", event)?;
        }
        let whens = ["Last", "Second to last"];
        for (when, event) in whens.iter().zip(&finding.related_work) {
            self.heading(&format!("{when} potentially related work creation:"))?;
            self.frames(&event.frames)?;
            writeln!(self.out)?;
        }
        if let Some(previous) = &finding.previous {
            let (size, start) = (previous.size, previous.start);
            writeln!(
                self.out,
                "Before, the address belonged to an object of {size} bytes at {start:016x}"
            )?;
            if let Some(event) = &previous.allocated {
                self.event("Previously allocated", event)?;
            }
            self.event("Previously freed", &previous.freed)?;
        }
        if let Some(object) = &finding.object {
            self.object(finding, object)?;
        }
        if let Some(variable) = &finding.variable {
            let offset = i128::from(finding.shadow.first_bad) - i128::from(variable.start);
            let sign = if offset < 0 { '-' } else { '+' };
            let (name, offset) = (printable(&variable.name), offset.unsigned_abs());
            writeln!(self.out, "The buggy address belongs to the variable:")?;
            writeln!(self.out, " {name}{sign}{offset:#x}/{:#x}", variable.size)?;
            // On a line of its own: parsers take the last word of the one above.
            let place =
                source(variable.file.as_deref(), variable.line).map(|place| format!(" at {place}"));
            let module = || Some(format!(" of {}", printable(variable.module.as_deref()?)));
            let place = place.or_else(module).unwrap_or_default();
            let aside = self.paint(ASIDE);
            writeln!(self.out, "{aside}    {} bytes{place}{aside:#}\n", variable.size)?;
        }
        if let Some(frame) = &finding.stack_frame {
            self.stack_frame(task, frame)?;
        }
        self.shadow(&finding.shadow)?;
        for note in &finding.notes {
            let style = self.paint(ASIDE);
            writeln!(self.out, "{style}Note: {}{style:#}", printable(note))?;
        }
        Ok(())
    }

    /// The lines that no report lacks.
    fn end(&mut self, finding: &Finding) -> io::Result<()> {
        let style = self.paint(ASIDE);
        writeln!(self.out, "{style}Fingerprint: {}{style:#}", finding.fingerprint())?;
        writeln!(self.out, "{SEPARATOR}")
    }

    fn heading(&mut self, text: &str) -> io::Result<()> {
        let style = self.paint(HEADING);
        writeln!(self.out, "{style}{text}{style:#}")
    }

    fn event(&mut self, what: &str, event: &Track) -> io::Result<()> {
        // Tools know these words without CPU and time.
        let rest = match self.style.names {
            Names::Demangled => event.place_and_time(),
            Names::Linkage => String::new(),
        };
        self.heading(&format!("{what} by task {}{rest}:", event.task.id))?;
        self.frames(&event.frames)?;
        writeln!(self.out)
    }

    /// A function of the ELF first, then what was inlined into it, innermost first as in the stack,
    /// then the function's own line. Parsers want the function near the heading, and inlined frames
    /// can be many.
    fn frames(&mut self, frames: &[Frame]) -> io::Result<()> {
        if frames.is_empty() {
            return writeln!(self.out, "(stack is not available)");
        }
        let aside = self.paint(ASIDE);
        for group in frames.split_inclusive(|frame| !frame.inlined) {
            for frame in group.iter().filter(|frame| !frame.inlined) {
                match place(frame, self.style.names) {
                    Some(place) => writeln!(self.out, " {place}")?,
                    None => writeln!(self.out, " {:#018x}", frame.ip)?,
                }
            }
            for frame in group {
                let source = source(frame.file.as_deref(), frame.line);
                if frame.inlined {
                    let symbol = frame.symbol.as_deref().unwrap_or("a function");
                    let source = source.map(|s| format!(" at {s}")).unwrap_or_default();
                    writeln!(
                        self.out,
                        "{aside}    inlined: {}{source}{aside:#}",
                        printable(symbol)
                    )?;
                } else if let Some(source) = source {
                    writeln!(self.out, "{aside}    at {source}{aside:#}")?;
                }
            }
        }
        Ok(())
    }

    fn object(&mut self, finding: &Finding, object: &Object) -> io::Result<()> {
        let end = object.start.saturating_add(object.size);
        writeln!(self.out, "The buggy address belongs to the object at {:016x}", object.start)?;
        if let Some(cache) = &object.cache {
            let (cache, size) = (printable(cache), object.cache_size);
            writeln!(self.out, " which belongs to the cache {cache} of size {size}")?;
        }
        let state = if finding.freed.is_some() { "freed" } else { "allocated" };
        let (size, start) = (object.size, object.start);
        let region = format!("{state} {size}-byte region [{start:016x}, {end:016x})");
        let place = relation(i128::from(object.offset), object.size);
        writeln!(self.out, "The buggy address is located {place} of\n {region}")?;
        if finding.address != finding.shadow.first_bad {
            let place =
                relation(i128::from(finding.address) - i128::from(object.start), object.size);
            writeln!(self.out, " (the access begins {place} of it)")?;
        }
        writeln!(self.out)
    }

    fn stack_frame(&mut self, task: &Task, frame: &StackFrame) -> io::Result<()> {
        if frame.current {
            let name = name(task);
            writeln!(self.out, "The buggy address belongs to stack of task {name}/{}", task.id)?;
        } else {
            writeln!(self.out, "The buggy address belongs to the stack of another task")?;
        }
        if let Some(function) = &frame.function {
            writeln!(self.out, " and is located at offset {} in frame:", frame.offset)?;
            writeln!(self.out, " {}", printable(function))?;
        } else {
            writeln!(self.out, " and is located at offset {} in its frame", frame.offset)?;
        }
        let objects = if frame.variables.len() == 1 { "object" } else { "objects" };
        writeln!(self.out, "\nThis frame has {} {objects}:", frame.variables.len())?;
        for variable in &frame.variables {
            let end = variable.offset.saturating_add(variable.size);
            let line = variable.line.map(|line| format!(" (line {line})")).unwrap_or_default();
            writeln!(
                self.out,
                " [{}, {end}) '{}'{line}",
                variable.offset,
                printable(&variable.name)
            )?;
        }
        writeln!(self.out)
    }

    fn shadow(&mut self, dump: &ShadowDump) -> io::Result<()> {
        if dump.rows.is_empty() {
            return writeln!(self.out, "Memory state around the buggy address: it has no shadow");
        }
        let caret = dump.caret();
        self.heading("Memory state around the buggy address:")?;
        for (i, row) in dump.rows.iter().enumerate() {
            match caret {
                Some((at, column)) if at == i => {
                    let indent = ">ffff888000000000: ".len() + 3 * column;
                    let style = self.paint(CARET);
                    writeln!(self.out, ">{:016x}: {}", row.address, row.to_hex())?;
                    writeln!(self.out, "{:indent$}{style}^{style:#}", "")?;
                }
                _ => writeln!(self.out, " {:016x}: {}", row.address, row.to_hex())?,
            }
        }
        Ok(())
    }
}

/// The position of `offset` relative to an object of `size` bytes.
pub(super) fn relation(offset: i128, size: u64) -> String {
    let size = i128::from(size);
    if offset < 0 {
        format!("{} bytes to the left", -offset)
    } else if offset >= size {
        format!("{} bytes to the right", offset - size)
    } else {
        format!("{offset} bytes inside")
    }
}

fn name(task: &Task) -> Cow<'_, str> {
    if task.name.is_empty() { UNKNOWN_TASK.into() } else { printable(&task.name) }
}

fn source(file: Option<&str>, line: Option<u32>) -> Option<String> {
    let file = printable(file?);
    Some(match line {
        Some(line) => format!("{file}:{line}"),
        None => file.into_owned(),
    })
}

#[cfg(test)]
mod tests;
