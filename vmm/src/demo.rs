//! `umbra demo`: the built-in test kernel's scenarios, each held against its expected verdict, and
//! what the shadow cost beside a full one.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_report::frame::StackVariable;
use umbra_report::{Finding, Names, html};

use crate::cli::{Printer, say};
use crate::kernel::{self, Expected, Scenario};
use crate::sandbox::{self, Config, Observer, Report, RunError, ShadowMode};

/// How long a demonstration may take.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// What was expected of a scenario, in words.
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

/// The scenarios that `names` name, all if there are none.
///
/// # Errors
/// There is no scenario of a name.
pub fn choose(scenarios: &[Scenario], names: &[String]) -> Result<Vec<Scenario>> {
    for name in names {
        if !scenarios.iter().any(|s| s.name == *name) {
            bail!("there is no scenario {name}: `umbra demo --list` names them all");
        }
    }
    let wanted = |s: &&Scenario| names.is_empty() || names.contains(&s.name);
    Ok(scenarios.iter().filter(wanted).cloned().collect())
}

/// What came of one scenario.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// Whether it ran to its end.
    pub ran: bool,
    /// What was expected.
    pub expected: Vec<Expected>,
    /// What was found.
    pub found: Vec<Expected>,
}

impl Verdict {
    /// Whether it came as expected.
    pub fn good(&self) -> bool {
        self.ran && self.expected == self.found
    }
}

fn as_expected(finding: &Finding) -> Expected {
    Expected {
        kind: finding.kind.to_owned(),
        access: finding.access.to_string(),
        size: finding.size,
        offset: finding
            .object
            .as_ref()
            .map(|object| object.offset)
            .or_else(|| offset_from_variable(finding)),
    }
}

/// Where the first bad byte lies, seen from the start of the variable that it belongs to. Of a
/// stack frame's variables that is the nearest.
fn offset_from_variable(finding: &Finding) -> Option<i64> {
    if let Some(variable) = &finding.variable {
        return Some(finding.shadow.first_bad.wrapping_sub(variable.start).cast_signed());
    }
    let frame = finding.stack_frame.as_ref()?;
    let at = i128::from(frame.offset);
    let distance = |v: &&StackVariable| {
        let (start, end) = (i128::from(v.offset), i128::from(v.offset) + i128::from(v.size));
        (start - at).max(at - end + 1).max(0)
    };
    let nearest = frame.variables.iter().min_by_key(distance)?;
    i64::try_from(at - i128::from(nearest.offset)).ok()
}

/// Takes the guest's console and passes it on, line by line, but for the lines that say that a
/// scenario ran.
struct Console {
    line: Vec<u8>,
    ran: Arc<Mutex<Vec<String>>>,
    pass_on: bool,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' && self.line.len() < 1024 {
                self.line.push(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&self.line).trim_end().to_owned();
            self.line.clear();
            if let Some(name) = text.strip_prefix("ran ") {
                self.ran.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned());
            } else if self.pass_on {
                writeln!(io::stdout(), "guest: {text}")?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that the names of scenarios may take on the command line, which the boot protocol bounds.
const NAMES_MAX: usize = 1800;

/// The word of the command line that has a test kernel whose scenarios are `all` run `chosen`.
/// Where their names are too long, those of the others are told, or none if there are no others.
pub fn choice(all: &[Scenario], chosen: &[Scenario]) -> String {
    let named = |word: &str, scenarios: &[&Scenario]| {
        let names: Vec<_> = scenarios.iter().map(|s| s.name.as_str()).collect();
        format!("{word}={}", names.join(","))
    };
    let by_name = named("scenarios", &chosen.iter().collect::<Vec<_>>());
    let (kept, left): (Vec<_>, Vec<_>) = all.iter().partition(|s| chosen.contains(s));
    // Without names each runs once, in the kernel's order.
    if by_name.len() <= NAMES_MAX || !kept.into_iter().eq(chosen) {
        return by_name;
    }
    if left.is_empty() { String::new() } else { named("without", &left) }
}

/// `config`, for a guest that runs `chosen`.
fn config_for(config: &Config, chosen: &[Scenario]) -> Config {
    // Whatever is wrong with the file is told when it is to be booted.
    let all =
        config.kernel.read().ok().and_then(|elf| kernel::scenarios(&elf).ok()).unwrap_or_default();
    Config {
        cmdline: format!("{} {}", choice(&all, chosen), config.cmdline),
        timeout: config.timeout.or(Some(TIMEOUT)),
        ..config.clone()
    }
}

/// Runs `chosen` in one guest. `config.cmdline` is added to what names them; its kernel is the test
/// kernel.
///
/// # Errors
/// The run could not begin.
pub fn verdicts(
    config: &Config,
    chosen: &[Scenario],
    pass_on: bool,
    observer: Box<dyn Observer>,
    stop: &AtomicBool,
) -> Result<(Vec<Verdict>, Report), RunError> {
    let ran = Arc::new(Mutex::new(Vec::new()));
    let console = Console { line: Vec::new(), ran: ran.clone(), pass_on };
    let config = config_for(config, chosen);
    let report = sandbox::run(&config, Box::new(console), observer, stop)?;
    let ran = ran.lock().unwrap_or_else(PoisonError::into_inner);
    let checked = config.shadow != ShadowMode::Off;
    let verdicts = chosen.iter().map(|scenario| Verdict {
        name: scenario.name.clone(),
        ran: ran.contains(&scenario.name),
        expected: if checked { scenario.expected.clone() } else { Vec::new() },
        found: report
            .findings
            .iter()
            .filter(|(finding, _)| finding.task.name == scenario.name)
            .map(|(finding, _)| as_expected(finding))
            .collect(),
    });
    let verdicts = verdicts.collect();
    Ok((verdicts, report))
}

/// Runs the demonstration and prints what came of it. Returns the exit status: 0 when every
/// scenario got its verdict.
///
/// # Errors
/// The run could not begin, or the page that was asked for could not be written.
pub(crate) fn run(
    config: &Config,
    chosen: &[Scenario],
    quiet: bool,
    page: Option<html::Target>,
    stop: &AtomicBool,
) -> Result<u8> {
    let (verdicts, report) =
        verdicts(config, chosen, !quiet, Box::new(Printer::text(quiet)), stop)?;
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
    // Who reads no further still gets the exit status.
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
    target: html::Target,
    config: &Config,
    verdicts: &[Verdict],
    report: &Report,
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

/// Runs the same once more with a full shadow and prints both costs. Returns whether that found the
/// same.
fn compare(
    config: &Config,
    chosen: &[Scenario],
    per_page: &Report,
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
    let (verdicts, full) = verdicts(&full, chosen, false, Box::new(()), stop)?;
    spinner.finish_and_clear();
    let row = |report: &Report| {
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

    fn expected(kind: &str, offset: Option<i64>) -> Expected {
        Expected { kind: kind.into(), access: "Write".into(), size: 1, offset }
    }

    fn verdict(ran: bool, expected: Vec<Expected>, found: Vec<Expected>) -> Verdict {
        Verdict { name: "x".into(), ran, expected, found }
    }

    #[test]
    fn a_verdict_is_good_only_if_all_of_it_is() {
        let want = || vec![expected("a", Some(3)), expected("b", None)];
        assert!(verdict(true, want(), want()).good());
        assert!(
            !verdict(true, want(), vec![expected("a", Some(3)), expected("b", Some(7))]).good()
        );
        assert!(!verdict(false, want(), vec![expected("a", Some(3)), expected("b", None)]).good());
        assert!(!verdict(true, want(), vec![expected("a", Some(4)), expected("b", None)]).good());
        assert!(!verdict(true, want(), vec![expected("a", Some(3))]).good());
        assert!(!verdict(true, Vec::new(), want()).good());
        assert!(verdict(true, Vec::new(), Vec::new()).good());
    }

    #[test]
    fn many_scenarios_are_chosen_by_those_left_out() {
        let one = |i: u32| Scenario {
            name: format!("a_name_{i:03}"),
            expected: Vec::new(),
            about: String::new(),
        };
        let all: Vec<_> = (0..200).map(one).collect();
        assert_eq!(choice(&all, &all[3..5]), "scenarios=a_name_003,a_name_004");
        assert_eq!(choice(&all, &all), "");
        assert_eq!(choice(&all, &all[2..]), "without=a_name_000,a_name_001");
        // Twice, or in another order, can only be said by name.
        let twice: Vec<_> = all.iter().chain(&all[..1]).cloned().collect();
        assert!(choice(&all, &twice).starts_with("scenarios=a_name_000,"));
        assert_eq!(choice(&[], &all[..1]), "scenarios=a_name_000");
    }

    #[test]
    fn unknown_scenarios_are_refused() {
        let one = Scenario { name: "one".into(), expected: Vec::new(), about: String::new() };
        let all = [one.clone(), Scenario { name: "two".into(), ..one }];
        assert_eq!(choose(&all, &[]).map(|c| c.len()).ok(), Some(2));
        assert_eq!(choose(&all, &["two".into()]).map(|c| c.len()).ok(), Some(1));
        assert!(choose(&all, &["three".into()]).is_err_and(|e| e.to_string().contains("--list")));
    }

    #[test]
    fn the_console_keeps_what_ran_to_itself() {
        let ran = Arc::new(Mutex::new(Vec::new()));
        let mut console = Console { line: Vec::new(), ran: ran.clone(), pass_on: false };
        console.write_all(b"hello\r\nran a\r\nran b").expect("nothing is passed on");
        assert_eq!(*ran.lock().expect("not poisoned"), ["a"]);
    }
}
