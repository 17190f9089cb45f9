//! `umbra demo`: runs the built-in test kernel's scenarios, compares each with its expected
//! verdict, and compares the cost of the shadow with a full one.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_report::text::{self, TextStyle};
use umbra_report::{Finding, Names, SourceRoots, Target, html, json};

use crate::kernel::{Expected, Scenario};
use crate::print::{FindingPrinter, say, size};
use crate::sandbox::{Config, Observer, RunReport, ShadowMode};
use crate::verdicts::{self, Verdict, config_for};

/// The expected findings of a scenario, in words.
fn in_words(expected: &[Expected]) -> String {
    if expected.is_empty() {
        return "silent".into();
    }
    let each: Vec<_> = expected.iter().map(|e| format!("{} ({})", e.kind, e.access)).collect();
    each.join(", ")
}

/// Writes the list of scenarios.
pub fn list(scenarios: &[Scenario], out: &mut dyn Write) -> io::Result<()> {
    let width = scenarios.iter().map(|s| s.name.len()).max().unwrap_or(0);
    for scenario in scenarios {
        writeln!(out, "{:width$}  {}", scenario.name, scenario.about)?;
        writeln!(out, "{:width$}    expected: {}", "", in_words(&scenario.expected))?;
    }
    Ok(())
}

/// The scenarios with these names; all if there are no names.
///
/// # Errors
/// There is no scenario with one of the names.
pub fn choose(scenarios: &[Scenario], names: &[String]) -> Result<Vec<Scenario>> {
    for name in names {
        if !scenarios.iter().any(|s| s.name == *name) {
            bail!("there is no scenario {name}: `umbra demo --list` names them all");
        }
    }
    let wanted = |s: &&Scenario| names.is_empty() || names.contains(&s.name);
    Ok(scenarios.iter().filter(wanted).cloned().collect())
}

/// The findings that are printed in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// None.
    None,
    /// The first one.
    First,
    /// All, and the guest's console.
    All,
}

/// Where the demonstration writes.
pub(crate) struct Outputs {
    /// The findings on standard error.
    pub shown: Shown,
    /// An HTML page about the run.
    pub page: Option<Target>,
    /// A folder for all findings as text and as JSON, and for the page.
    pub folder: Option<Folder>,
    /// The folders that the page's source lines may come from.
    pub roots: SourceRoots,
}

/// A folder with all that a run found.
pub(crate) struct Folder {
    path: PathBuf,
    page: Target,
    text: File,
    json: File,
}

impl Folder {
    /// Makes the folder, if it is not there, and opens its files.
    ///
    /// # Errors
    /// It cannot be made, or a file in it cannot be written.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let all = || {
            fs::create_dir_all(path)?;
            Ok(Self {
                path: path.to_owned(),
                page: Target::new(&path.join("report.html"))?,
                text: File::create(path.join("findings.txt"))?,
                json: File::create(path.join("findings.json"))?,
            })
        };
        let all: io::Result<Self> = all();
        all.with_context(|| format!("cannot write to {}", path.display()))
    }

    /// Where the page is made.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.page.folder()
    }

    /// Writes what a run found.
    fn write(mut self, page: &html::Page, report: &RunReport) -> io::Result<PathBuf> {
        for (finding, _) in report.findings.iter() {
            text::write(&mut self.text, finding, TextStyle::default())?;
            json::write(&mut self.json, finding)?;
        }
        self.page.write(|out| html::write(out, page))?;
        Ok(self.path)
    }
}

/// Prints the first finding.
struct FirstFinding {
    printer: FindingPrinter,
    done: bool,
}

impl Observer for FirstFinding {
    fn finding(&mut self, finding: &Finding) {
        if !std::mem::replace(&mut self.done, true) {
            self.printer.finding(finding);
        }
    }
}

/// Runs the demonstration and prints the verdicts. Returns the exit status: 0 when every
/// scenario got its verdict.
///
/// # Errors
/// The run could not begin, or an output could not be written.
pub(crate) fn run(
    config: &Config,
    chosen: &[Scenario],
    outputs: Outputs,
    stop: &AtomicBool,
) -> Result<u8> {
    let printer = FindingPrinter::text(outputs.shown == Shown::None);
    let observer: Box<dyn Observer> = match outputs.shown {
        Shown::First => Box::new(FirstFinding { printer, done: false }),
        Shown::None | Shown::All => Box::new(printer),
    };
    let (verdicts, report) =
        verdicts::run(config, chosen, outputs.shown == Shown::All, observer, stop)?;
    let width = verdicts.iter().map(|v| v.name.len()).max().unwrap_or(0);
    let mut table = String::new();
    for verdict in &verdicts {
        let came = if verdict.good() {
            "ok".to_owned()
        } else if verdict.ran {
            format!("FAILED: expected {:?}, found {:?}", verdict.expected, verdict.found)
        } else {
            "FAILED: it did not run to its end".to_owned()
        };
        writeln!(table, "{:width$}  {:5}  {}", verdict.name, came, in_words(&verdict.found))?;
    }
    let attributed: usize = verdicts.iter().map(|v| v.found.len()).sum();
    let stray = report.findings.distinct().saturating_sub(attributed);
    if stray > 0 {
        let belong = if stray == 1 { "finding belongs" } else { "findings belong" };
        writeln!(table, "{stray} {belong} to no scenario that was chosen")?;
    }
    // If standard output is closed, the exit status still has the result.
    let _ = write!(
        io::stdout(),
        "\n{table}\n{}: {} scenarios, {}\n",
        config.shadow.as_str(),
        verdicts.len(),
        report.outcome
    );
    let mut good = verdicts.iter().all(Verdict::good) && stray == 0 && report.outcome.is_regular();
    let folder = write_outputs(outputs, &config_for(config, chosen), &verdicts, &report)?;
    if config.shadow == ShadowMode::PerPage && good {
        good &= compare(config, chosen, &report, stop)?;
    }
    if let Some(folder) = folder {
        let _ = writeln!(
            io::stdout(),
            "\nAll findings are in {}: findings.txt, findings.json, report.html",
            folder.display()
        );
    }
    let _ = io::stdout().flush();
    if good {
        return Ok(0);
    }
    say(format_args!("not every scenario got its verdict"));
    Ok(match report.outcome.status(true) {
        0 => 1,
        status => status,
    })
}

/// Writes the page about the run, and the folder. Returns the folder.
fn write_outputs(
    outputs: Outputs,
    config: &Config,
    verdicts: &[Verdict],
    report: &RunReport,
) -> Result<Option<PathBuf>> {
    let row = |verdict: &Verdict| html::Verdict {
        name: verdict.name.clone(),
        expected: in_words(&verdict.expected),
        found: if verdict.ran {
            in_words(&verdict.found)
        } else {
            "it did not run to its end".into()
        },
        good: verdict.good(),
    };
    let page = html::Page {
        kernel: "the built-in test kernel",
        file: None,
        roots: &outputs.roots,
        run: &report.summary(config),
        names: Names::Demangled,
        verdicts: verdicts.iter().map(row).collect(),
    };
    if let Some(target) = outputs.page {
        target.write(|out| html::write(out, &page)).context("cannot write --html")?;
    }
    let write = |folder: Folder| folder.write(&page, report).context("cannot write to --out");
    outputs.folder.map(write).transpose()
}

/// Runs the same scenarios with a full shadow and prints the costs of both. Returns whether the
/// findings are the same.
fn compare(
    config: &Config,
    chosen: &[Scenario],
    per_page: &RunReport,
    stop: &AtomicBool,
) -> Result<bool> {
    let spinner = if io::stderr().is_terminal() {
        indicatif::ProgressBar::new_spinner()
    } else {
        indicatif::ProgressBar::hidden()
    };
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner.set_message("the same with a full shadow, to compare");
    let full =
        Config { shadow: ShadowMode::Full, shadow_limit: None, picture: false, ..config.clone() };
    let (verdicts, full) = verdicts::run(&full, chosen, false, Box::new(()), stop)?;
    spinner.finish_and_clear();
    let row = |report: &RunReport| {
        let s = &report.stats;
        let instructions =
            s.guest.instructions.map_or("-".into(), |n| format!("{:.1} M", n as f64 / 1e6));
        format!(
            "{:9} {:>12} {:>14} {:>12} {:>9} {:>13} {:>7}",
            s.shadow.mode,
            size(s.shadow.page_bytes),
            size(s.shadow.byte_peak_resident_bytes),
            size(s.shadow.peak_bytes()),
            s.findings,
            instructions,
            s.exits.total,
        )
    };
    let mut out = io::stdout();
    let _ = writeln!(out, "\nWhat the shadow of a {} guest cost:", size(config.memory));
    let _ = writeln!(
        out,
        "{:9} {:>12} {:>14} {:>12} {:>9} {:>13} {:>7}",
        "shadow", "page shadow", "byte, peak", "together", "findings", "instructions", "exits"
    );
    let _ = writeln!(out, "{}\n{}", row(per_page), row(&full));
    let good = verdicts.iter().all(Verdict::good);
    if !good {
        let _ = writeln!(out, "the full shadow did not find the same");
    }
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_scenarios_are_refused() {
        let one = Scenario { name: "one".into(), expected: Vec::new(), about: String::new() };
        let all = [one.clone(), Scenario { name: "two".into(), ..one }];
        assert_eq!(choose(&all, &[]).map(|c| c.len()).ok(), Some(2));
        assert_eq!(choose(&all, &["two".into()]).map(|c| c.len()).ok(), Some(1));
        assert!(choose(&all, &["three".into()]).is_err_and(|e| e.to_string().contains("--list")));
    }
}
