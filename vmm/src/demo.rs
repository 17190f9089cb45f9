//! `umbra demo`: runs the built-in test kernel's scenarios, compares each with its expected
//! verdict, and compares the cost of the shadow with a full one.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_report::{Names, Target, html};

use crate::kernel::{Expected, Scenario};
use crate::print::{FindingPrinter, say, size};
use crate::sandbox::{Config, RunReport, ShadowMode};
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

/// Runs the demonstration and prints the verdicts. Returns the exit status: 0 when every
/// scenario got its verdict.
///
/// # Errors
/// The run could not begin, or the page could not be written.
pub(crate) fn run(
    config: &Config,
    chosen: &[Scenario],
    quiet: bool,
    page: Option<Target>,
    stop: &AtomicBool,
) -> Result<u8> {
    let (verdicts, report) =
        verdicts::run(config, chosen, !quiet, Box::new(FindingPrinter::text(quiet)), stop)?;
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
        writeln!(table, "{stray} finding(s) belong to no scenario that was chosen")?;
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
    if let Some(target) = page {
        write_page(target, &config_for(config, chosen), &verdicts, &report)?;
    }
    if config.shadow == ShadowMode::PerPage && good {
        good &= compare(config, chosen, &report, stop)?;
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

/// Writes the page about the run.
fn write_page(
    target: Target,
    config: &Config,
    verdicts: &[Verdict],
    report: &RunReport,
) -> Result<()> {
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
        run: &report.summary(config),
        names: Names::Demangled,
        verdicts: verdicts.iter().map(row).collect(),
    };
    target.write(|out| html::write(out, &page)).context("cannot write --html")
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
            size(s.shadow.page_bytes + s.shadow.byte_peak_resident_bytes),
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
