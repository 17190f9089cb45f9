//! A finding as one line of JSON, for programs. `docs/findings.schema.json` describes it.

use std::io::{self, Write};

use serde::Serialize;

use super::{Finding, Fingerprint, Identity};

/// The version of the format. It is raised when a field is removed or changes its meaning, and when
/// the [fingerprint](Finding::fingerprint) of a bug changes.
pub const VERSION: u32 = 1;

/// A line: what is made of the finding, and the finding.
#[derive(Serialize)]
struct Line<'a> {
    version: u32,
    fingerprint: Fingerprint,
    title: String,
    identity: Identity,
    #[serde(flatten)]
    finding: &'a Finding,
}

/// Most bytes of a line. It follows from the bounds of a finding in [`Findings`](super::Findings).
pub const LINE_MAX: usize = 512 << 10;

/// Writes `finding` as one line of JSON, with its line end.
///
/// Fields are those of [`Finding`], whose documentation says how addresses are written, and before
/// them `version`, `fingerprint`, `title` and `identity`. A field may be added at any time.
///
/// # Errors
/// An error of `out`.
pub fn write(out: &mut dyn Write, finding: &Finding) -> io::Result<()> {
    let identity = finding.identity();
    let line = Line {
        version: VERSION,
        fingerprint: identity.fingerprint(),
        title: identity.title(),
        identity,
        finding,
    };
    let mut line = serde_json::to_vec(&line)?;
    line.push(b'\n');
    out.write_all(&line)
}
