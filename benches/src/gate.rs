//! The gate: `gate.json` holds the figures that repeat exactly, and a test fails when one gets
//! worse.
//!
//! Instructions, exits and bytes of shadow do not depend on the host's speed or load. They depend
//! on the guest's compiler, so figures are held for each compiler. Instructions are measured only
//! where KVM counts them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::figure::{Figure, number};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/gate.json");
/// Most that a figure may grow, in percent.
const MORE: f64 = 2.0;
/// Figures without a guest, in the list of what was not compared.
const NATIVELY: &str = "figures without a guest";
/// Figures of guests.
pub const GUESTS: &str = "figures of guests";
/// Figures of the nested host.
const NESTED: &str = "figures of the nested host";
/// Advice where no figure is held.
const HOLD: &str = "`cargo xtask bench gate --update` holds these";

/// Figures by group and name.
type Held = BTreeMap<String, f64>;

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Figures without a guest.
    natively: Held,
    /// Figures of guests, by the guest's compiler: another one generates other instructions.
    guests: BTreeMap<String, Held>,
    /// Figures of the nested host, by its versions of QEMU and Linux.
    #[serde(default)]
    nested: BTreeMap<String, Held>,
}

/// The result of a comparison, in sentences.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Figures that got worse, or are gone.
    pub worse: Vec<String>,
    /// Figures that got better, or are new.
    pub better: Vec<String>,
    /// Number of figures within the tolerance.
    pub same: usize,
    /// Number of figures for which one is held; if 0, nothing was compared.
    pub compared: usize,
    /// Kinds of figures that were not compared, and why.
    pub skipped: Vec<(&'static str, String)>,
}

/// The figures that this host can measure.
#[derive(Debug)]
pub struct Measured {
    /// Figures without a guest.
    pub natively: Vec<Figure>,
    /// The guest's compiler and the figures of guests, or why no guest was run.
    pub guests: Result<(String, Vec<Figure>), String>,
}

impl Measured {
    /// How many figures there are.
    pub fn count(&self) -> usize {
        self.natively.len() + self.guests.as_ref().map_or(0, |(_, figures)| figures.len())
    }
}

fn key(figure: &Figure) -> String {
    format!("{}: {}", figure.group, figure.name)
}

impl Gate {
    /// Reads the file.
    ///
    /// # Errors
    /// The file is missing, or not as [`Gate::update`] writes it.
    pub fn read() -> Result<Self> {
        let text = fs::read(FILE).with_context(|| format!("cannot read {FILE}"))?;
        serde_json::from_slice(&text).with_context(|| format!("{FILE} is damaged"))
    }

    /// Replaces the held figures by `measured`. Figures that could not be measured, and those of
    /// other compilers, stay.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update(mut self, measured: &Measured) -> Result<()> {
        let held = |figures: &[Figure]| figures.iter().map(|f| (key(f), f.measured)).collect();
        self.natively = held(&measured.natively);
        if let Ok((compiler, figures)) = &measured.guests {
            self.guests.insert(compiler.clone(), held(figures));
        }
        self.write()
    }

    fn write(&self) -> Result<()> {
        fs::write(FILE, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("cannot write {FILE}"))
    }

    /// Replaces the held figures of the nested host with these versions.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update_nested(mut self, versions: &str, figures: &[Figure]) -> Result<()> {
        let held = figures.iter().map(|f| (key(f), f.measured)).collect();
        self.nested.insert(versions.to_owned(), held);
        self.write()
    }

    /// Compares figures of a nested host with those held for the same versions.
    pub fn compare_nested(&self, versions: &str, figures: &[Figure]) -> Compared {
        let mut compared = Compared::default();
        match self.nested.get(versions) {
            Some(held) => compared.take(NESTED, held, figures),
            None => {
                let known: Vec<_> = self.nested.keys().map(String::as_str).collect();
                let why = format!(
                    "this one is {versions}, and figures are held for {}; ratios are on the page",
                    if known.is_empty() { "none".into() } else { known.join(", and ") }
                );
                compared.skipped.push((NESTED, why));
            }
        }
        compared
    }

    /// Compares figures with those held.
    pub fn compare(&self, measured: &Measured) -> Compared {
        let mut compared = Compared::default();
        compared.take(NATIVELY, &self.natively, &measured.natively);
        match &measured.guests {
            Err(why) => compared.skipped.push((GUESTS, why.clone())),
            Ok((compiler, figures)) => match self.guests.get(compiler) {
                Some(held) => compared.take(GUESTS, held, figures),
                None => {
                    let known: Vec<_> = self.guests.keys().map(String::as_str).collect();
                    let known =
                        if known.is_empty() { "no compiler".into() } else { known.join(", ") };
                    let why = format!(
                        "the guest is compiled by {compiler}, and figures are held for {known}; \
                         {HOLD}"
                    );
                    compared.skipped.push((GUESTS, why));
                }
            },
        }
        compared
    }
}

impl Compared {
    /// Prints the result.
    pub fn print(&self) {
        for (figures, why) in &self.skipped {
            println!("{}", umbra_skip::line(figures, why));
        }
        self.worse.iter().chain(&self.better).for_each(|line| println!("{line}"));
        println!(
            "{} figures compared: {} within 2 % of those held, {} worse or gone, {} better or new",
            self.compared,
            self.same,
            self.worse.len(),
            self.better.len()
        );
    }

    fn take(&mut self, kind: &'static str, held: &Held, measured: &[Figure]) {
        let before = self.compared;
        for figure in measured {
            let (key, now) = (key(figure), figure.measured);
            let Some(&held) = held.get(&key) else {
                self.better.push(format!("new: {key}: {} {}", number(now), figure.unit));
                continue;
            };
            self.compared += 1;
            let percent = if held == now { 0.0 } else { (now - held) / held * 100.0 };
            let mut said = String::new();
            // Writing to a string does not fail.
            let _ =
                write!(said, "{:.1} %: {key}: {} {}, ", percent.abs(), number(now), figure.unit);
            let _ = write!(said, "{} held", number(held));
            match percent {
                more if more > MORE => self.worse.push(format!("worse by {said}")),
                less if less < -MORE => self.better.push(format!("better by {said}")),
                _ => self.same += 1,
            }
        }
        let there = |key: &String| measured.iter().any(|figure| self::key(figure) == *key);
        let gone = held.keys().filter(|key| !there(key));
        self.worse.extend(gone.map(|key| format!("not measured any more: {key}")));
        if self.compared == before {
            self.skipped.push((kind, format!("none of them is held; {HOLD}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &str, measured: f64) -> Figure {
        Figure::new("checks", name, measured, "instructions")
    }

    fn held(figures: &[(&str, f64)]) -> Held {
        figures.iter().map(|(name, value)| (format!("checks: {name}"), *value)).collect()
    }

    #[test]
    fn another_nested_host_is_compared_with_nothing() {
        let gate = Gate {
            nested: [("QEMU 1".to_owned(), held(&[("a", 100.0)]))].into(),
            ..Gate::default()
        };
        let worse = gate.compare_nested("QEMU 1", &[figure("a", 103.0)]);
        assert_eq!((worse.worse.len(), worse.compared), (1, 1));
        let other = gate.compare_nested("QEMU 2", &[figure("a", 103.0)]);
        assert_eq!((other.worse.len(), other.compared, other.skipped.len()), (0, 0, 1));
        assert!(other.skipped[0].1.contains("QEMU 2") && other.skipped[0].1.contains("QEMU 1"));
    }

    #[test]
    fn two_percent_more_are_worse() {
        let guests =
            held(&[("a", 100.0), ("b", 100.0), ("c", 100.0), ("gone", 1.0), ("zero", 0.0)]);
        let gate = Gate {
            natively: held(&[("bytes", 8.0)]),
            guests: [
                ("rustc version 1".to_owned(), guests),
                ("rustc version 3".to_owned(), Held::new()),
            ]
            .into(),
            nested: BTreeMap::new(),
        };
        let figures: Vec<_> =
            [("a", 102.0), ("b", 102.5), ("c", 90.0), ("new", 1.0), ("zero", 1.0)]
                .map(|(name, value)| figure(name, value))
                .into();
        let of = |compiler: &str| Ok((compiler.to_owned(), figures.clone()));
        let mut measured =
            Measured { natively: vec![figure("bytes", 9.0)], guests: of("rustc version 1") };
        let compared = gate.compare(&measured);
        const BYTES: &str = "worse by 12.5 %: checks: bytes: 9 instructions, 8 held";
        assert_eq!(
            compared.worse,
            [
                BYTES,
                "worse by 2.5 %: checks: b: 102.50 instructions, 100 held",
                "worse by inf %: checks: zero: 1 instructions, 0 held",
                "not measured any more: checks: gone",
            ]
        );
        assert_eq!(
            compared.better,
            [
                "better by 10.0 %: checks: c: 90 instructions, 100 held",
                "new: checks: new: 1 instructions"
            ]
        );
        assert_eq!((compared.same, compared.compared, compared.skipped.len()), (1, 5, 0));
        measured.guests = of("rustc version 2");
        let compared = gate.compare(&measured);
        let why = "the guest is compiled by rustc version 2, and figures are held for rustc \
                   version 1, rustc version 3; `cargo xtask bench gate --update` holds these";
        assert_eq!(
            (compared.worse.as_slice(), compared.skipped),
            ([BYTES.into()].as_slice(), vec![(GUESTS, why.into())])
        );
        measured.guests = Err("no KVM".into());
        let compared = gate.compare(&measured);
        assert_eq!((compared.worse.len(), compared.compared), (1, 1));
        assert_eq!(compared.skipped, [(GUESTS, "no KVM".into())]);
    }

    #[test]
    fn nothing_compared_is_said() {
        let guests = [("rustc version 1".to_owned(), Held::new())].into();
        let natively = vec![figure("bytes", 9.0)];
        let measured = Measured {
            natively: natively.clone(),
            guests: Ok(("rustc version 1".into(), natively)),
        };
        let compared = Gate { guests, ..Gate::default() }.compare(&measured);
        assert_eq!((compared.compared, compared.better.len(), compared.worse.len()), (0, 2, 0));
        let skipped: Vec<_> = compared.skipped.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(skipped, [NATIVELY, GUESTS]);
    }
}
