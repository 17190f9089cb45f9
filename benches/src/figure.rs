//! Figures: measured values, their limits, and how they are printed.

use std::borrow::Cow;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// One measured value.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Heading of its table.
    pub group: Cow<'static, str>,
    /// What was measured.
    pub name: String,
    /// The value.
    pub measured: f64,
    /// Its unit.
    pub unit: &'static str,
    /// Upper limit; none for a figure without a promise.
    pub limit: Option<f64>,
    /// The verdict.
    pub verdict: Verdict,
    /// A remark.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Known reason why it is over its limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known: Option<&'static str>,
}

/// A value that was measured in the nested host, which writes it to a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The heading.
    pub group: String,
    /// What was measured.
    pub name: String,
    /// The value.
    pub measured: f64,
}

impl From<Measured> for Figure {
    fn from(measured: Measured) -> Self {
        let Measured { group, name, measured } = measured;
        let unit = if group.ends_with("KiB") { "KiB" } else { "instructions" };
        Self::new(group, name, measured, unit)
    }
}

impl Measured {
    /// A value of instructions, or of KiB if its heading ends so.
    pub fn new(group: &str, name: String, measured: f64) -> Self {
        Self { group: group.to_owned(), name, measured }
    }
}

/// How a figure compares with its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Within its limit.
    Ok,
    /// Over its limit.
    Over,
    /// There is no limit.
    Told,
    /// There is a limit, but this host cannot measure in its unit.
    NotApplicable,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Over => "OVER",
            Self::Told => "",
            Self::NotApplicable => "n/a here",
        }
    }
}

impl Figure {
    /// A figure without a limit.
    pub fn new(
        group: impl Into<Cow<'static, str>>,
        name: impl Into<String>,
        measured: f64,
        unit: &'static str,
    ) -> Self {
        let (limit, verdict, note) = (None, Verdict::Told, String::new());
        Self {
            group: group.into(),
            name: name.into(),
            measured,
            unit,
            limit,
            verdict,
            note,
            known: None,
        }
    }

    /// Sets the upper limit.
    #[must_use]
    pub fn limit(self, limit: f64) -> Self {
        let verdict = if self.measured <= limit { Verdict::Ok } else { Verdict::Over };
        Self { limit: Some(limit), verdict, ..self }
    }

    /// Marks its limit as one that this host cannot measure.
    #[must_use]
    pub fn not_applicable(self) -> Self {
        match self.limit {
            Some(_) => Self { verdict: Verdict::NotApplicable, ..self },
            None => self,
        }
    }

    /// Whether it is over its limit without a known reason.
    pub fn is_news(&self) -> bool {
        self.verdict == Verdict::Over && self.known.is_none()
    }

    /// Adds a remark.
    #[must_use]
    pub fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }
}

/// A number for people: whole ones without a fraction, large ones in groups of three digits.
pub(crate) fn number(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    if value.fract().abs() >= 0.005 && value.abs() < 1000.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// All figures as a table.
pub fn table(figures: &[Figure]) -> String {
    let width = figures.iter().map(|f| f.name.chars().count()).max().unwrap_or(0).max(6);
    let mut text = String::new();
    let mut group = "";
    for f in figures {
        if f.group != group {
            group = &f.group;
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "\n{group}\n{:width$}  {:>12}  {:>10}  {:12}  verdict\n",
                "  figure", "measured", "limit", "unit"
            );
        }
        let limit = f.limit.map(number).unwrap_or_default();
        let line = format!(
            "  {:inner$}  {:>12}  {limit:>10}  {:12}  {}  {}",
            f.name,
            number(f.measured),
            f.unit,
            f.verdict.as_str(),
            f.known.filter(|_| f.verdict == Verdict::Over).unwrap_or(&f.note),
            inner = width.saturating_sub(2),
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// All figures as tables in Markdown, one for each group.
pub fn markdown(figures: &[Figure]) -> String {
    let mut text = String::new();
    let mut group = "";
    for f in figures {
        if f.group != group {
            group = &f.group;
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "\n\
                 ### {group}\n\n\
                 | figure | measured | limit | unit | |\n\
                 | --- | ---: | ---: | --- | --- |\n"
            );
        }
        let verdict = f.verdict.as_str();
        let note = f.known.filter(|_| f.verdict == Verdict::Over).unwrap_or(&f.note);
        let between = if verdict.is_empty() || note.is_empty() { "" } else { ": " };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {verdict}{between}{note} |",
            f.name,
            number(f.measured),
            f.limit.map(number).unwrap_or_default(),
            f.unit,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_the_most_that_is_good() {
        let figure = |measured| Figure::new("g", "n", measured, "x").limit(8.0);
        assert_eq!(figure(8.0).verdict, Verdict::Ok);
        assert_eq!(figure(8.5).verdict, Verdict::Over);
        assert_eq!(figure(9.0).not_applicable().verdict, Verdict::NotApplicable);
        assert_eq!(Figure::new("g", "n", 9.0, "x").not_applicable().verdict, Verdict::Told);
        assert!(figure(8.5).is_news() && !figure(8.0).is_news());
        assert!(!Figure { known: Some("for a reason"), ..figure(8.5) }.is_news());
    }

    #[test]
    fn numbers_read_well() {
        for (value, text) in [
            (7.0, "7"),
            (0.126, "0.13"),
            (999.0, "999"),
            (1000.4, "1,000"),
            (18613294.0, "18,613,294"),
        ] {
            assert_eq!(number(value), text);
        }
        assert_eq!(number(-1234.0), "-1,234");
    }

    #[test]
    fn what_is_over_shows_in_the_table() {
        let text = table(&[Figure::new("checks", "load8", 9.0, "instructions").limit(8.0)]);
        assert!(
            text.lines().any(|line| line.contains("load8") && line.ends_with("OVER")),
            "{text}"
        );
    }
}
