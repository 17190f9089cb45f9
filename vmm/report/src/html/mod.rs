//! A run as one page for a browser, without network, script or font.
//!
//! `maud` escapes all text, and `escape` escapes characters that could hide or reorder text of a
//! guest, its ELF or a file. Only the drawings (`chart`, `map`, `shadow`) are written as strings;
//! they hold numbers and words of their own. Should anything slip through, a content security
//! policy in the page forbids scripts and any request.

mod chart;
mod escape;
mod finding;
mod map;
mod shadow;

#[cfg(test)]
pub(super) mod tests;

use std::io::{self, Write};
use std::path::Path;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use self::escape::{Block, Line, grouped, seconds, size};
use self::finding::fact;
use super::source::Sources;
use super::{Names, RunSummary, SourceRoots};

const STYLE: &str = include_str!("style.css");
/// Most bytes of a finding on the page. Of a larger one the stacks are left out.
pub const FINDING_MAX: usize = 512 << 10;
/// The number of findings that are open at first.
const OPEN: usize = 3;

/// The contents of a page.
pub struct Page<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Its file, if it has one: sources that are newer are remarked on.
    pub file: Option<&'a Path>,
    /// The folders that source files may come from.
    pub roots: &'a SourceRoots,
    /// The run.
    pub run: &'a RunSummary<'a>,
    /// The kind of names of functions.
    pub names: Names,
    /// The expectations of the run, if it had any.
    pub verdicts: Vec<Verdict>,
}

/// One expectation of a run.
pub struct Verdict {
    /// Its subject.
    pub name: String,
    /// The expected result, in words.
    pub expected: String,
    /// The result, in words.
    pub found: String,
    /// Whether they are equal.
    pub good: bool,
}

/// Writes the page.
///
/// # Errors
/// An error of `out`.
pub fn write(out: &mut dyn Write, page: &Page) -> io::Result<()> {
    out.write_all(page.start().as_bytes())?;
    let findings = page.run.findings;
    let mut sources = Sources::new(page.roots, page.file);
    for (i, found) in findings.iter().enumerate() {
        let open = i < OPEN && findings.distinct() <= OPEN;
        // One by one, since a thousand of them would need much memory.
        let part = finding::draw(i + 1, found, open, page.names, &mut sources).into_string();
        if part.len() <= FINDING_MAX {
            out.write_all(part.as_bytes())?;
        } else {
            out.write_all(
                finding::draw_briefly(i + 1, found, page.names).into_string().as_bytes(),
            )?;
        }
    }
    out.write_all(page.end(&sources.remarks()).as_bytes())
}

/// The page around its findings, which are written one by one.
const START: &str = "<section id=\"findings\" aria-labelledby=\"h-findings\">";
const END: &str = "</section>";

impl Page<'_> {
    /// Everything before the first finding. The elements that stay open are closed by
    /// [`Self::end`].
    fn start(&self) -> String {
        let findings = self.run.findings;
        let part = html! {
            (DOCTYPE)
            (PreEscaped("<html lang=\"en\">"))
            head { (self.head()) }
            (PreEscaped("<body>"))
            (self.navigation())
            (PreEscaped("<main id=\"top\">"))
            (self.summary())
            (PreEscaped(START))
            h2 #h-findings { "Findings" }
            @if self.run.shadow.is_none() {
                p { "The guest ran unchecked: without a shadow nothing can be found." }
            } @else if findings.is_empty() {
                p { "None. All accesses and frees of the guest were in order." }
            }
        };
        part.into_string()
    }

    /// Everything after the last finding. `remarks`: why lines of source files are missing.
    fn end(&self, remarks: &[String]) -> String {
        let findings = self.run.findings;
        let part = html! {
            @if findings.dropped() > 0 {
                p.note {
                    (grouped(findings.dropped())) " more of other kinds: only the first "
                    (grouped(findings.distinct() as u64)) " different ones are kept."
                }
            }
            @for remark in remarks { p.note { (Line(remark)) } }
            (PreEscaped(END))
            (self.verdicts())
            (self.memory())
            (self.figures())
            (self.console())
            (PreEscaped("</main>"))
            footer { "Written by Umbra " (env!("CARGO_PKG_VERSION")) "." }
            (PreEscaped("</body></html>\n"))
        };
        part.into_string()
    }

    fn console_text(&self) -> Option<&[u8]> {
        self.run.picture.map(|p| p.console.as_slice()).filter(|text| !text.is_empty())
    }

    fn head(&self) -> Markup {
        const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
                              base-uri 'none'; form-action 'none'";
        html! {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width,initial-scale=1";
            meta http-equiv="Content-Security-Policy" content=(POLICY);
            meta name="referrer" content="no-referrer";
            meta name="color-scheme" content="light dark";
            link rel="icon" href="data:,";
            title { (Line(self.kernel)) " – " (self.verdict()) " – Umbra" }
            style { (PreEscaped(STYLE)) }
        }
    }

    fn navigation(&self) -> Markup {
        let parts = [
            ("findings", "Findings", true),
            ("scenarios", "Scenarios", !self.verdicts.is_empty()),
            ("memory", "Memory", true),
            ("figures", "Figures", true),
            ("console", "Console", self.console_text().is_some()),
        ];
        html! {
            nav aria-label="Sections" {
                a.home href="#top" { "Umbra" }
                @for (id, name, _) in parts.iter().filter(|part| part.2) {
                    a href={ "#" (id) } { (name) }
                }
            }
        }
    }

    /// The run in a few words.
    fn verdict(&self) -> String {
        match self.run.findings.distinct() {
            _ if self.run.shadow.is_none() => "unchecked".into(),
            0 => "no findings".into(),
            1 => "1 finding".into(),
            n => format!("{} findings", grouped(n as u64)),
        }
    }

    fn summary(&self) -> Markup {
        let run = self.run;
        let class = match (run.status, run.shadow) {
            (0, None) => "plain",
            (0, Some(_)) => "good",
            _ => "bad",
        };
        html! {
            header class=(class) {
                h1 { (capitalized(&self.verdict())) }
                p.outcome { (Line(capitalized(&run.outcome) + ".")) }
                (self.tiles())
                (self.facts())
            }
        }
    }

    fn tiles(&self) -> Markup {
        let run = self.run;
        let tile = |value: String, name: &str, more: String| {
            html! { div { b { (value) } span { (name) } small { (more) } } }
        };
        let different = run.findings.distinct() as u64;
        html! {
            div.tiles {
                (tile(
                    grouped(different),
                    if different == 1 { "finding" } else { "different findings" },
                    format!("{} in all", grouped(run.findings.total())),
                ))
                (tile(
                    size(run.shadow.map_or(0, |shadow| shadow.peak_bytes)),
                    "shadow, at its peak",
                    format!("⅛ of memory is {}", size(run.memory_bytes / 8)),
                ))
                (tile(
                    grouped(run.allocations),
                    "allocations",
                    format!("{} frees", grouped(run.frees)),
                ))
                (tile(seconds(run.seconds), "run time", format!("{} exits", grouped(run.exits))))
            }
        }
    }

    fn facts(&self) -> Markup {
        let run = self.run;
        let shadow = run.shadow.map(|shadow| {
            let limit = shadow.limit_bytes.map(|limit| format!(", at most {}", size(limit)));
            format!("{}, {}{}", shadow.mode, shadow.notify, limit.unwrap_or_default())
        });
        let stop = match run.stop_at {
            Some(1) => "at the first finding".into(),
            Some(n) => format!("after {n} findings"),
            None => "goes on after findings".into(),
        };
        let time = run.timeout.map_or("no time limit".into(), |limit| {
            format!("time limit {}", humantime::format_duration(limit))
        });
        html! {
            dl.facts {
                (fact("Kernel", html! {
                    code { (Line(self.kernel)) } " "
                    span.dim { "(" (size(run.kernel_bytes)) ")" }
                }))
                (fact("Command line", match run.cmdline.trim() {
                    "" => html! { span.dim { "empty" } },
                    text => html! { code { (Line(text)) } },
                }))
                (fact("Guest memory", html! { (size(run.memory_bytes)) }))
                (fact("Shadow", html! { (shadow.unwrap_or_else(|| "off".into())) }))
                (fact("Stops", html! { (stop) ", " (time) }))
            }
        }
    }

    fn verdicts(&self) -> Markup {
        let good = self.verdicts.iter().filter(|verdict| verdict.good).count();
        html! {
            @if !self.verdicts.is_empty() {
                section #scenarios aria-labelledby="h-scenarios" {
                    h2 #h-scenarios { "Scenarios" }
                    p { (good) " of " (self.verdicts.len()) " came as expected." }
                    div.scroll.index tabindex="0" role="region" aria-label="List of scenarios" {
                        table.list {
                            tr {
                                @for name in ["scenario", "verdict", "expected", "found"] {
                                    th scope="col" { (name) }
                                }
                            }
                            @for verdict in &self.verdicts { (row(verdict)) }
                        }
                    }
                }
            }
        }
    }

    fn memory(&self) -> Markup {
        let picture = self.run.picture;
        let mut chart = String::new();
        chart::draw(&mut chart, picture.map_or(&[], |picture| &picture.samples));
        let map = picture.and_then(|picture| picture.pages.as_ref()).map(|pages| {
            let mut map = String::new();
            map::draw(&mut map, pages);
            map
        });
        html! {
            section #memory aria-labelledby="h-memory" {
                h2 #h-memory { "Memory" }
                @if !chart.is_empty() {
                    h3 { "The shadow over time" }
                    (PreEscaped(chart))
                }
                @if let Some(map) = map {
                    h3 { "The guest’s pages at the end" }
                    (PreEscaped(map))
                } @else {
                    p { "There was no shadow, so nothing is known about the guest’s memory." }
                }
            }
        }
    }

    /// All figures.
    fn figures(&self) -> Markup {
        let figures = self.run.figures.as_object();
        html! {
            section #figures aria-labelledby="h-figures" {
                h2 #h-figures { "Figures" }
                div.groups {
                    @if let Some(figures) = figures {
                        (group("run", figures.iter().filter(|(_, value)| !value.is_object())))
                        @for (name, value) in figures {
                            @if let Value::Object(values) = value { (group(name, values.iter())) }
                        }
                    }
                }
            }
        }
    }

    fn console(&self) -> Markup {
        let text = self.console_text().map(String::from_utf8_lossy);
        html! {
            @if let Some(text) = text {
                section #console aria-labelledby="h-console" {
                    h2 #h-console { "Console" }
                    details {
                        summary {
                            "The end of what the guest wrote, " (size(text.len() as u64))
                        }
                        pre.scroll tabindex="0" { (Block(text)) }
                    }
                }
            }
        }
    }
}

fn capitalized(text: &str) -> String {
    let mut text = text.to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

fn row(verdict: &Verdict) -> Markup {
    let word = if verdict.good { "ok" } else { "failed" };
    html! {
        tr {
            td { code { (Line(&verdict.name)) } }
            td class=(word) { (word) }
            td { (Line(&verdict.expected)) }
            td { (Line(&verdict.found)) }
        }
    }
}

fn group<'a>(name: &str, values: impl Iterator<Item = (&'a String, &'a Value)>) -> Markup {
    html! {
        table.figures {
            caption { (Line(name)) }
            @for (name, value) in values { (figure(name, value)) }
        }
    }
}

/// One line of the figures. The unit is the end of the name.
fn figure(name: &str, value: &Value) -> Markup {
    if let Value::Object(more) = value {
        return html! {
            @for (key, value) in more { (figure(&format!("{name} {key}"), value)) }
        };
    }
    let (label, text) = match (name.strip_suffix("_bytes"), name.strip_suffix("seconds"), value) {
        (Some(label), _, Value::Number(n)) => {
            (label, n.as_u64().map_or_else(|| n.to_string(), size))
        }
        (_, Some(label), Value::Number(n)) => (
            if label.is_empty() { "time" } else { label },
            n.as_f64().map_or_else(|| n.to_string(), seconds),
        ),
        (_, _, Value::Number(n)) => (name, n.as_u64().map_or_else(|| n.to_string(), grouped)),
        (_, _, Value::Null) => (name, "not counted".into()),
        (_, _, Value::String(text)) => (name, text.clone()),
        (_, _, other) => (name, other.to_string()),
    };
    let label = label.trim_end_matches('_').replace('_', " ");
    html! { tr { th scope="row" { (Line(label)) } td { (Line(text)) } } }
}
