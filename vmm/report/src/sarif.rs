//! A run as a SARIF 2.1.0 log, the format of static analyzers that code scanning reads
//! (<https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html>).
//!
//! Each different finding is a result, each kind of bug a rule. A result's place is the line of
//! [`Finding::function`] in the source; where the memory was allocated and freed are related
//! places. Stacks are left out: viewers do not show them, and a thousand findings have many frames.
//!
//! `partialFingerprints` has the finding's [fingerprint](Finding::fingerprint) twice: under a name
//! of Umbra's own, and under the one that GitHub looks at, so that it does not compute one of its
//! own from the line.
//!
//! The types are those of `serde-sarif`, which makes them of the standard's JSON schema: a log that
//! compiles has the right names and structure.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde_sarif::sarif::{
    ArtifactLocation, Invocation, Location, LogicalLocation, Message, MultiformatMessageString,
    PhysicalLocation, PropertyBag, Region, ReportingDescriptor, Result as Entry, ResultLevel, Run,
    SCHEMA_URL, Sarif, Tool, ToolComponent,
};

use super::function::plain;
use super::identity::first_of;
use super::printable::printable;
use super::text::relation;
use super::{AccessKind, Finding, Frame, RunSummary};

/// The name under which GitHub's code scanning looks for a fingerprint.
const GITHUB: &str = "primaryLocationLineHash";
/// Umbra's own name for it, with the version of the fingerprint.
const OWN: &str = "umbraFinding/v1";
/// Most bytes of a path.
const PATH_MAX: usize = 1024;
/// The base of relative paths, by the name that viewers know.
const SOURCE_ROOT: &str = "%SRCROOT%";

/// The contents of a log.
pub struct Log<'a> {
    /// The kernel's file, or another name.
    pub kernel: &'a str,
    /// The root of the sources, an absolute path. Paths below it become relative.
    pub root: Option<&'a Path>,
    /// The run.
    pub run: &'a RunSummary<'a>,
}

/// Writes the log.
///
/// # Errors
/// An error of `out`.
pub fn write(out: &mut dyn Write, log: &Log) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &log.sarif())?;
    out.write_all(b"\n")
}

impl Log<'_> {
    fn sarif(&self) -> Sarif {
        let mut kinds: Vec<&str> = Vec::new();
        let mut results = Vec::new();
        for (finding, seen) in self.run.findings.iter() {
            let rule = kinds.iter().position(|kind| *kind == finding.kind).unwrap_or_else(|| {
                kinds.push(finding.kind);
                kinds.len() - 1
            });
            results.push(self.result(finding, seen, rule));
        }
        let driver = ToolComponent::builder()
            .name("Umbra")
            .semantic_version(env!("CARGO_PKG_VERSION"))
            .rules(kinds.into_iter().map(rule).collect::<Vec<_>>())
            .build();
        // Findings are results and no failure of the tool.
        let invocation = Invocation::builder()
            .execution_successful(matches!(self.run.status, 0 | 1))
            .exit_code(i64::from(self.run.status))
            .exit_code_description(printable(&self.run.outcome).into_owned())
            .build();
        let run = Run::builder()
            .tool(Tool::builder().driver(driver).build())
            .invocations(vec![invocation])
            .results(results)
            .build();
        Sarif::builder().schema(SCHEMA_URL).version("2.1.0").runs(vec![run]).build()
    }

    fn result(&self, finding: &Finding, seen: u64, rule: usize) -> Entry {
        let identity = finding.identity();
        let fingerprint = identity.fingerprint().to_string();
        // GitHub's own are a hash of the line and the number of the line among equal ones.
        let fingerprints = BTreeMap::from([
            (GITHUB.to_owned(), format!("{fingerprint}:1")),
            (OWN.to_owned(), fingerprint),
        ]);
        let mut text = message(&identity.title(), finding);
        let events = [("allocated", &finding.allocated), ("freed", &finding.freed)];
        let mut related = Vec::new();
        for (what, track) in events {
            let Some(track) = track else { continue };
            let frames = track.caller_frames();
            let Some(frame) = first_of(frames) else { continue };
            let name = frame.symbol.as_deref().map(|name| format!(" in {}", literal(&plain(name))));
            let number = related.len() as i64 + 1;
            text.push_str(&format!(" It was [{what}]({number}){}.", name.unwrap_or_default()));
            let place = self.location(frames, Some(frame));
            related.push(Location { id: Some(number), ..place });
        }
        Entry::builder()
            .rule_id(finding.kind)
            .rule_index(rule as i64)
            .level(ResultLevel::Error)
            .message(Message::builder().text(text).build())
            .locations(vec![self.location(finding.access_frames(), finding.function())])
            .related_locations(related)
            .occurrence_count(i64::try_from(seen).unwrap_or(i64::MAX))
            .partial_fingerprints(fingerprints)
            .build()
    }

    /// The place of `function` in its stack: the line in it or in the nearest caller below the
    /// root, or else the nearest line that is known. Without lines it is the kernel's file, since
    /// code scanning refuses a result without a file.
    fn location(&self, stack: &[Frame], function: Option<&Frame>) -> Location {
        let start = stack.iter().position(|frame| function.is_some_and(|f| std::ptr::eq(f, frame)));
        let frames = start.and_then(|start| stack.get(start..)).unwrap_or_default();
        let places: Vec<_> = frames.iter().filter_map(|frame| self.place(frame)).collect();
        let in_root = places.iter().find(|place| place.in_root);
        let place = in_root.or(places.first()).cloned().unwrap_or_else(|| self.kernel_file());
        let mut artifact = ArtifactLocation::builder().uri(place.uri).build();
        artifact.uri_base_id = place.relative.then(|| SOURCE_ROOT.to_owned());
        let physical = PhysicalLocation::builder()
            .artifact_location(artifact)
            .region(Region::builder().start_line(i64::from(place.line)).build())
            .build();
        let name = function.and_then(|frame| frame.symbol.as_deref());
        let logical = name.map(|name| {
            vec![
                LogicalLocation::builder()
                    .fully_qualified_name(printable(name).into_owned())
                    .kind("function")
                    .build(),
            ]
        });
        Location {
            logical_locations: logical,
            ..Location::builder().physical_location(physical).build()
        }
    }

    fn place(&self, frame: &Frame) -> Option<SourceLine> {
        let line = frame.line?;
        let root = self.root.and_then(|root| components(root.to_str()?));
        let below = frame.path.as_deref().and_then(|path| {
            let short = path.starts_with('/') && path.len() <= PATH_MAX;
            let path = components(path).filter(|_| short)?;
            Some(path.strip_prefix(&root?[..])?.join("/"))
        });
        let in_root = below.is_some();
        let shortened = || {
            let file = frame.file.as_deref()?;
            let path = components(file)?.join("/");
            Some(if file.starts_with('/') { format!("/{path}") } else { path })
        };
        let path = below.or_else(shortened).filter(|path| !path.trim_matches('/').is_empty())?;
        Some(SourceLine { in_root, line, ..SourceLine::at(&path) })
    }

    fn kernel_file(&self) -> SourceLine {
        let name = Path::new(self.kernel).file_name().and_then(|name| name.to_str());
        SourceLine::at(name.unwrap_or("kernel"))
    }
}

/// A line of a file.
#[derive(Clone)]
struct SourceLine {
    uri: String,
    /// The address is relative to the root of the sources, as far as one can tell.
    relative: bool,
    /// The file lies below that root.
    in_root: bool,
    line: u32,
}

impl SourceLine {
    fn at(path: &str) -> Self {
        let relative = !path.starts_with('/');
        let scheme = if relative { "" } else { "file://" };
        Self { uri: format!("{scheme}{}", encode(path)), relative, in_root: false, line: 1 }
    }
}

/// The parts of a path, without `.` and with `..` resolved by name. `None` if it leads above its
/// start. No file is looked at: the path is the guest's.
fn components(path: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts)
}

/// A path as part of a URI (RFC 3986).
fn encode(path: &str) -> String {
    let mut uri = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                uri.push(byte.into());
            }
            byte => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri
}

/// A name in a message, where brackets would begin a link.
fn literal(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for c in name.chars() {
        if matches!(c, '[' | ']' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

fn message(title: &str, finding: &Finding) -> String {
    let mut text = format!("{}.", literal(title));
    if finding.access != AccessKind::Free {
        text.push_str(&format!(" {} of size {}.", finding.access, finding.size));
    }
    if let Some(object) = &finding.object {
        let place = relation(object.offset.into(), object.size);
        text.push_str(&format!(" It is {place} of an object of {} bytes.", object.size));
    }
    if let Some(variable) = &finding.variable {
        let name = literal(&printable(&variable.name));
        text.push_str(&format!(" The variable is {name} of {} bytes.", variable.size));
    }
    text
}

fn rule(kind: &str) -> ReportingDescriptor {
    let text = |text: &str| MultiformatMessageString::builder().text(text).build();
    let tags = vec!["security".to_owned(), "memory-safety".to_owned()];
    ReportingDescriptor::builder()
        .id(kind)
        .name(kind)
        .short_description(text(kind))
        .full_description(text(description(kind)))
        .properties(PropertyBag::builder().tags(tags).build())
        .build()
}

/// A kind of bug in a sentence.
fn description(kind: &str) -> &'static str {
    match kind {
        "slab-out-of-bounds" => "The kernel accessed memory beside an object of its heap.",
        "slab-use-after-free" => "The kernel accessed an object of its heap after its free.",
        "use-after-free" => "The kernel accessed a page that is free.",
        "global-out-of-bounds" => "The kernel accessed memory beside a global variable.",
        "stack-out-of-bounds" => "The kernel accessed memory beside a variable of its stack.",
        "alloca-out-of-bounds" => "The kernel accessed memory beside what `alloca` gave it.",
        "vmalloc-out-of-bounds" => "The kernel accessed virtual memory that is not allocated.",
        "use-after-scope" => "The kernel accessed a variable of its stack after its scope.",
        "out-of-bounds" => "The kernel accessed memory that is only partly valid.",
        "null-ptr-deref" => "The kernel accessed the first page of the address space.",
        "user-memory-access" => "The kernel accessed an address of user programs.",
        "wild-memory-access" => "The kernel accessed an address where no memory is.",
        "double-free" => "The kernel freed memory that is free already.",
        "invalid-free" => "The kernel freed an address where no object starts.",
        "shadow-tampering" => "The kernel wrote to the shadow, which only the checker may write.",
        _ => "The kernel accessed memory whose shadow has no meaning.",
    }
}

#[cfg(test)]
mod tests;
