//! A run as one page for a browser, which needs nothing else: no network, no script, no font.
//!
//! Everything in it that a guest, its ELF or a file could have written goes through `escape`.
//! Should that fail, a content security policy in the page forbids scripts and any request.

mod chart;
mod escape;
mod file;
mod finding;
mod map;
mod shadow;
mod source;

#[cfg(test)]
mod tests;

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use serde_json::Value;

use self::escape::{Block, Esc, grouped, seconds, size};
pub use self::file::Target;
use self::source::Sources;
use super::{Names, RunSummary};

const STYLE: &str = include_str!("style.css");
/// So many findings are open at first.
const OPEN: usize = 3;

/// What a page is about.
pub struct Page<'a> {
    /// What the kernel is called.
    pub kernel: &'a str,
    /// Its file, if it has one: source files are looked for near it.
    pub file: Option<&'a Path>,
    /// The run.
    pub run: &'a RunSummary<'a>,
    /// Which names functions go by.
    pub names: Names,
    /// What was expected, where something was.
    pub verdicts: Vec<Verdict>,
}

/// One expectation of a run.
pub struct Verdict {
    /// What it is about.
    pub name: String,
    /// What was expected, in words.
    pub expected: String,
    /// What was found, in words.
    pub found: String,
    /// Whether that is the same.
    pub good: bool,
}

/// Writes the page.
///
/// # Errors
/// What `out` says.
pub fn write(out: &mut dyn Write, page: &Page) -> io::Result<()> {
    let findings = page.run.findings;
    let mut part = String::new();
    page.head(&mut part);
    page.summary(&mut part);
    part.push_str(
        "<section id=findings aria-labelledby=h-findings><h2 id=h-findings>Findings</h2>",
    );
    if page.run.shadow.is_none() {
        part.push_str("<p>The guest ran unchecked: without a shadow nothing can be found.</p>");
    } else if findings.is_empty() {
        part.push_str("<p>None. Whatever the guest accessed and told of was in order.</p>");
    }
    let mut sources = Sources::new(page.file);
    for (i, found) in findings.iter().enumerate() {
        finding::write(
            &mut part,
            i + 1,
            found,
            i < OPEN && findings.distinct() <= OPEN,
            page.names,
            &mut sources,
        );
        // A thousand of them need not be in memory at once.
        out.write_all(part.as_bytes())?;
        part.clear();
    }
    if findings.dropped() > 0 {
        let (kept, dropped) = (grouped(findings.distinct() as u64), grouped(findings.dropped()));
        let _ = write!(
            part,
            "<p class=note>{dropped} more of other kinds: only the first {kept} different ones are kept.</p>"
        );
    }
    if sources.exhausted() {
        part.push_str(
            "<p class=note>There were too many places in the source: some are shown without their lines.</p>",
        );
    }
    part.push_str("</section>");
    page.verdicts(&mut part);
    page.memory(&mut part);
    page.figures(&mut part);
    page.console(&mut part);
    let _ = writeln!(
        part,
        "</main><footer>Written by Umbra {}.</footer></body></html>",
        env!("CARGO_PKG_VERSION")
    );
    out.write_all(part.as_bytes())
}

impl Page<'_> {
    fn console_text(&self) -> Option<&[u8]> {
        self.run.picture.map(|p| p.console.as_slice()).filter(|text| !text.is_empty())
    }

    fn head(&self, out: &mut String) {
        let _ = write!(
            out,
            "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>\
             <meta name=viewport content='width=device-width,initial-scale=1'>\
             <meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
             base-uri 'none'; form-action 'none'\">\
             <meta name=referrer content=no-referrer><meta name=color-scheme content='light dark'>\
             <link rel=icon href='data:,'>\
             <title>{} – {} – Umbra</title><style>{STYLE}</style></head><body>",
            Esc(self.kernel),
            self.verdict()
        );
        out.push_str("<nav aria-label=Sections><a class=home href='#top'>Umbra</a>");
        let parts = [
            ("findings", "Findings", true),
            ("scenarios", "Scenarios", !self.verdicts.is_empty()),
            ("memory", "Memory", true),
            ("figures", "Figures", true),
            ("console", "Console", self.console_text().is_some()),
        ];
        for (id, name, _) in parts.iter().filter(|part| part.2) {
            let _ = write!(out, "<a href='#{id}'>{name}</a>");
        }
        out.push_str("</nav><main id=top>");
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

    fn summary(&self, out: &mut String) {
        let run = self.run;
        let class = match (run.status, run.shadow) {
            (0, None) => "plain",
            (0, Some(_)) => "good",
            _ => "bad",
        };
        let mut verdict = self.verdict();
        if let Some(first) = verdict.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        let _ = write!(
            out,
            "<header class={class}><h1>{verdict}</h1><p class=outcome>{}</p>",
            Esc(sentence(&run.outcome))
        );
        out.push_str("<div class=tiles>");
        let mut tile = |value: String, name: &str, more: String| {
            let _ =
                write!(out, "<div><b>{value}</b><span>{name}</span><small>{more}</small></div>");
        };
        let different = run.findings.distinct() as u64;
        tile(
            grouped(different),
            if different == 1 { "finding" } else { "different findings" },
            format!("{} in all", grouped(run.findings.total())),
        );
        tile(
            size(run.shadow.map_or(0, |shadow| shadow.peak_bytes)),
            "shadow, at its peak",
            format!("⅛ of memory is {}", size(run.memory_bytes / 8)),
        );
        tile(grouped(run.allocations), "allocations", format!("{} frees", grouped(run.frees)));
        tile(seconds(run.seconds), "run time", format!("{} exits", grouped(run.exits)));
        out.push_str("</div><dl class=facts>");
        let mut fact = |name: &str, value: String| {
            let _ = write!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
        };
        fact(
            "Kernel",
            format!(
                "<code>{}</code> <span class=dim>({})</span>",
                Esc(self.kernel),
                size(run.kernel_bytes)
            ),
        );
        let cmdline = match run.cmdline.trim() {
            "" => "<span class=dim>empty</span>".into(),
            text => format!("<code>{}</code>", Esc(text)),
        };
        fact("Command line", cmdline);
        fact("Guest memory", size(run.memory_bytes));
        let shadow = run.shadow.map(|shadow| {
            let limit = shadow.limit_bytes.map(|limit| format!(", at most {}", size(limit)));
            format!("{}, {}{}", shadow.mode, shadow.notify, limit.unwrap_or_default())
        });
        fact("Shadow", shadow.unwrap_or_else(|| "off".into()));
        let stop = match run.stop_at {
            Some(1) => "at the first finding".into(),
            Some(n) => format!("after {n} findings"),
            None => "goes on after findings".into(),
        };
        let time = run.timeout.map_or("no time limit".into(), |limit| {
            format!("time limit {}", humantime::format_duration(limit))
        });
        fact("Stops", format!("{stop}, {time}"));
        out.push_str("</dl></header>");
    }

    fn verdicts(&self, out: &mut String) {
        if self.verdicts.is_empty() {
            return;
        }
        let good = self.verdicts.iter().filter(|verdict| verdict.good).count();
        let _ = write!(
            out,
            "<section id=scenarios aria-labelledby=h-scenarios><h2 id=h-scenarios>Scenarios</h2><p>{good} of {} came as expected.</p>\
             <div class='scroll index' tabindex=0 role=region aria-label='List of scenarios'><table class=list>\
             <tr><th scope=col>scenario<th scope=col>verdict<th scope=col>expected<th scope=col>found</tr>",
            self.verdicts.len()
        );
        for verdict in &self.verdicts {
            let (class, word) = if verdict.good { ("ok", "ok") } else { ("failed", "failed") };
            let _ = write!(
                out,
                "<tr><td><code>{}</code><td class={class}>{word}<td>{}<td>{}</tr>",
                Esc(&verdict.name),
                Esc(&verdict.expected),
                Esc(&verdict.found)
            );
        }
        out.push_str("</table></div></section>");
    }

    fn memory(&self, out: &mut String) {
        out.push_str("<section id=memory aria-labelledby=h-memory><h2 id=h-memory>Memory</h2>");
        let picture = self.run.picture;
        if let Some(picture) = picture.filter(|picture| !picture.samples.is_empty()) {
            out.push_str("<h3>The shadow over time</h3>");
            chart::draw(out, &picture.samples);
        }
        match picture.and_then(|picture| picture.pages.as_ref()) {
            Some(pages) => {
                out.push_str("<h3>The guest’s pages at the end</h3>");
                map::draw(out, pages);
            }
            None => out.push_str(
                "<p>There was no shadow, so nothing is known about the guest’s memory.</p>",
            ),
        }
        out.push_str("</section>");
    }

    /// All of `--stats`, whatever there is in it.
    fn figures(&self, out: &mut String) {
        out.push_str(
            "<section id=figures aria-labelledby=h-figures><h2 id=h-figures>Figures</h2><div class=groups>",
        );
        if let Value::Object(stats) = &self.run.figures {
            let single: Vec<_> = stats.iter().filter(|(_, value)| !value.is_object()).collect();
            group(out, "run", single.into_iter());
            for (name, value) in stats {
                if let Value::Object(values) = value {
                    group(out, name, values.iter());
                }
            }
        }
        out.push_str("</div></section>");
    }

    fn console(&self, out: &mut String) {
        let Some(text) = self.console_text() else { return };
        let text = String::from_utf8_lossy(text);
        let _ = write!(
            out,
            "<section id=console aria-labelledby=h-console><h2 id=h-console>Console</h2><details><summary>The end of what the guest wrote, \
             {}</summary><pre class=scroll tabindex=0>{}</pre></details></section>",
            size(text.len() as u64),
            Block(text)
        );
    }
}

/// How the run ended, as a sentence.
fn sentence(outcome: &str) -> String {
    let mut text = outcome.to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text.push('.');
    text
}

fn group<'a>(out: &mut String, name: &str, values: impl Iterator<Item = (&'a String, &'a Value)>) {
    let _ = write!(out, "<table class=figures><caption>{}</caption>", Esc(name));
    for (name, value) in values {
        figure(out, name, value);
    }
    out.push_str("</table>");
}

/// One line of the figures. The unit is the end of the name.
fn figure(out: &mut String, name: &str, value: &Value) {
    if let Value::Object(more) = value {
        for (key, value) in more {
            figure(out, &format!("{name} {key}"), value);
        }
        return;
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
    let _ = write!(out, "<tr><th scope=row>{}</th><td>{}</td></tr>", Esc(label), Esc(text));
}
