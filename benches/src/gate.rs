//! Keeps the figures that repeat exactly from getting worse unseen: `gate.json` holds them, a test compares.
//!
//! Instructions, exits and bytes of shadow do not depend on the host's speed or load. They depend on the compiler of the guest,
//! which is held too; instructions exist only where KVM counts them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use umbra::shadow::Mode;

use crate::figure::{Figure, number};
use crate::meter::Meter;
use crate::replay::replay;
use crate::suite::{SLICE, exact};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/gate.json");
/// How much more a figure may be, in percent.
const MORE: f64 = 2.0;
/// The units of what repeats exactly.
const UNITS: [&str; 4] = ["instructions", "exits", "exits/call", "KiB"];
/// Memory of the machine that the trace was recorded on.
const MEMORY: u64 = 24 << 30;

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// The compiler of the guest.
    compiler: String,
    /// The figures by group and name.
    figures: BTreeMap<String, f64>,
}

/// What a comparison came to, in sentences.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// What got worse, or is gone.
    pub worse: Vec<String>,
    /// What got better, or is new.
    pub better: Vec<String>,
    /// Figures that are as they were.
    pub same: usize,
}

/// What can be measured here.
#[derive(Debug, Default)]
pub struct Measured {
    /// The figures.
    pub figures: Vec<Figure>,
    /// The compiler of the guest; empty if no guest was asked.
    pub compiler: String,
    /// Why no guest was asked, if so.
    pub skipped: Option<String>,
}

/// The compiler that a kernel's file names.
fn compiler(kernel: &[u8]) -> String {
    const MARK: &[u8] = b"rustc version ";
    let at = kernel.windows(MARK.len()).position(|part| part == MARK);
    let text = at.and_then(|at| kernel.get(at..)).unwrap_or_default();
    let end = text.iter().take(100).position(|byte| !(b' '..=b'~').contains(byte)).unwrap_or(0);
    String::from_utf8_lossy(&text[..end]).replace("))", ")")
}

/// Measures all that repeats. `tick` hears what is being done.
///
/// # Errors
/// Something that can be measured here could not.
pub fn measure(tick: impl Fn(&str) + 'static) -> Result<Measured> {
    tick("replaying the trace's slice");
    let slice = replay(Path::new(SLICE), MEMORY, Mode::PerPage, |_, _| {})?.figures;
    let kib = |name: &str, bytes: u64| {
        Figure::new("replay of the slice, two-level", name, bytes as f64 / 1024.0, "KiB")
    };
    let mut measured = Measured {
        figures: vec![
            kib("page shadow", slice.page_bytes),
            kib("byte shadow resident at the peak", slice.byte_peak_resident_bytes),
            kib("byte shadow resident at the end", slice.byte_resident_bytes),
            kib("byte shadow used at the peak", slice.byte_used_peak_bytes),
        ],
        ..Measured::default()
    };
    let Some(kernel) = umbra::kernel::test_kernel() else {
        measured.skipped = Some("there is no test kernel in this build".into());
        return Ok(measured);
    };
    match Meter::new(kernel.into(), None, Box::new(tick)) {
        Err(error) => measured.skipped = Some(format!("{error:#}")),
        Ok(meter) if !meter.counts() => {
            measured.skipped = Some("this host does not count guest instructions".into());
        }
        Ok(meter) => {
            measured.figures.extend(exact(&meter)?);
            measured.compiler = compiler(kernel);
        }
    }
    measured.figures.retain(|figure| UNITS.contains(&figure.unit));
    Ok(measured)
}

fn key(figure: &Figure) -> String {
    format!("{}: {}", figure.group, figure.name)
}

impl Gate {
    /// Reads the file.
    ///
    /// # Errors
    /// There is none, or it is not as [`Gate::update`] writes it.
    pub fn read() -> Result<Self> {
        let text = fs::read(FILE).with_context(|| format!("cannot read {FILE}"))?;
        serde_json::from_slice(&text).with_context(|| format!("{FILE} is damaged"))
    }

    /// Holds what was measured from now on; what could not be measured stays as it was.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update(mut self, measured: &Measured) -> Result<()> {
        if measured.skipped.is_none() {
            self = Self { compiler: measured.compiler.clone(), figures: BTreeMap::new() };
        }
        self.figures.extend(measured.figures.iter().map(|figure| (key(figure), figure.measured)));
        fs::write(FILE, serde_json::to_string_pretty(&self)? + "\n")
            .with_context(|| format!("cannot write {FILE}"))
    }

    /// Why the guest's figures cannot be compared, if so: another compiler makes other instructions.
    pub fn foreign(&self, measured: &Measured) -> Option<String> {
        let other = measured.skipped.is_none() && measured.compiler != self.compiler;
        other.then(|| {
            format!(
                "the guest is compiled by {}, and the figures are held for {}",
                measured.compiler, self.compiler
            )
        })
    }

    /// Compares.
    pub fn compare(&self, measured: &Measured) -> Compared {
        let mut compared = Compared::default();
        for figure in &measured.figures {
            let (key, now) = (key(figure), figure.measured);
            let Some(&held) = self.figures.get(&key) else {
                compared.better.push(format!("new: {key}: {} {}", number(now), figure.unit));
                continue;
            };
            let percent = if held == now { 0.0 } else { (now - held) / held * 100.0 };
            let mut said = String::new();
            // Writing to a string does not fail.
            let _ = write!(said, "{:.1} %: {key}: {} {}, ", percent.abs(), number(now), figure.unit);
            let _ = write!(said, "{} held", number(held));
            match percent {
                more if more > MORE => compared.worse.push(format!("worse by {said}")),
                less if less < -MORE => compared.better.push(format!("better by {said}")),
                _ => compared.same += 1,
            }
        }
        if measured.skipped.is_none() {
            let there = |key: &String| measured.figures.iter().any(|figure| self::key(figure) == *key);
            let gone = self.figures.keys().filter(|key| !there(key));
            compared.worse.extend(gone.map(|key| format!("not measured any more: {key}")));
        }
        compared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &str, measured: f64) -> Figure {
        Figure::new("checks", name, measured, "instructions")
    }

    #[test]
    fn two_percent_more_are_worse() {
        let held = [("a", 100.0), ("b", 100.0), ("c", 100.0), ("gone", 1.0), ("zero", 0.0)];
        let figures = held.map(|(name, value)| (format!("checks: {name}"), value)).into();
        let gate = Gate { compiler: "rustc version 1".into(), figures };
        let mut measured = Measured {
            figures: [("a", 102.0), ("b", 102.5), ("c", 90.0), ("new", 1.0), ("zero", 1.0)]
                .map(|(name, value)| figure(name, value))
                .into(),
            compiler: "rustc version 1".into(),
            skipped: None,
        };
        let compared = gate.compare(&measured);
        assert_eq!(
            compared.worse,
            [
                "worse by 2.5 %: checks: b: 102.50 instructions, 100 held",
                "worse by inf %: checks: zero: 1 instructions, 0 held",
                "not measured any more: checks: gone",
            ]
        );
        assert_eq!(
            compared.better,
            ["better by 10.0 %: checks: c: 90 instructions, 100 held", "new: checks: new: 1 instructions"]
        );
        assert_eq!((compared.same, gate.foreign(&measured)), (1, None));
        measured.compiler = "rustc version 2".into();
        assert!(gate.foreign(&measured).unwrap().contains("rustc version 2"));
        measured.skipped = Some("no KVM".into());
        assert_eq!(gate.foreign(&measured), None);
        assert!(!gate.compare(&measured).worse.iter().any(|said| said.contains("gone")));
    }

    #[test]
    fn the_compiler_is_in_the_file() {
        assert_eq!(compiler(b"\0\x7fELF rustc version 1.96.0 (x)\0more"), "rustc version 1.96.0 (x)");
        assert_eq!(compiler(b"nothing"), "");
    }
}
