//! A finding as one line of JSON, for programs.

use std::io::{self, Write};

use super::Finding;

/// Writes `finding` as one line of JSON, with its line end.
///
/// Fields are those of [`Finding`]; see there for how addresses are written. A field may be added
/// at any time.
///
/// # Errors
/// An error of `out`.
pub fn write(out: &mut dyn Write, finding: &Finding) -> io::Result<()> {
    let mut line = serde_json::to_vec(finding)?;
    line.push(b'\n');
    out.write_all(&line)
}
