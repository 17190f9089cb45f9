//! Runs scenarios of a test kernel and compares the findings with those expected. The
//! demonstration, the tests and the benchmarks use it.

use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use umbra_report::Finding;
use umbra_report::frame::StackVariable;

use crate::kernel::{self, Expected, Scenario};
use crate::sandbox::{self, Config, Distinct, Observer, RunError, RunReport, ShadowMode};

/// Default time limit.
const TIMEOUT: Duration = Duration::from_secs(300);

/// The result of one scenario.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// Whether it ran to its end.
    pub ran: bool,
    /// Expected findings.
    pub expected: Vec<Expected>,
    /// Findings.
    pub found: Vec<Expected>,
}

impl Verdict {
    /// Whether it is as expected.
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

/// Offset of the first bad byte from the start of its variable. For a stack frame, that is the
/// nearest variable.
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

/// The guest's console: passes lines on, except those that report that a scenario ran.
struct ScenarioConsole {
    line: Vec<u8>,
    ran: Arc<Mutex<Vec<String>>>,
    pass_on: bool,
}

impl Write for ScenarioConsole {
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

/// Most bytes of scenario names on the command line. The boot protocol bounds it.
const NAMES_MAX: usize = 1800;

/// The word of the command line that makes a test kernel with the scenarios `all` run `chosen`. If
/// their names are too long, it names those to leave out, or is empty if there are none.
pub fn choice(all: &[Scenario], chosen: &[Scenario]) -> String {
    let named = |word: &str, scenarios: &[&Scenario]| {
        let names: Vec<_> = scenarios.iter().map(|s| s.name.as_str()).collect();
        format!("{word}={}", names.join(","))
    };
    let by_name = named("scenarios", &chosen.iter().collect::<Vec<_>>());
    let (kept, left): (Vec<_>, Vec<_>) = all.iter().partition(|s| chosen.contains(s));
    // Without names, each scenario runs once, in the kernel's order.
    if by_name.len() <= NAMES_MAX || !kept.into_iter().eq(chosen) {
        return by_name;
    }
    if left.is_empty() { String::new() } else { named("without", &left) }
}

/// The configuration of a guest that runs `chosen`.
pub(crate) fn config_for(config: &Config, chosen: &[Scenario]) -> Config {
    // If the file is bad, booting it fails with an error.
    let elf = config.kernel.test_kernel();
    let all = elf.and_then(|elf| kernel::scenarios(&elf).ok()).unwrap_or_default();
    Config {
        cmdline: format!("{} {}", choice(&all, chosen), config.cmdline),
        timeout: config.timeout.or(Some(TIMEOUT)),
        // Each statement of a scenario that misbehaves is expected.
        distinct: Distinct::Places,
        irqchip: kernel::irqchip(config.cpus),
        ..config.clone()
    }
}

/// Runs `chosen` in one guest with a test kernel. `config.cmdline` comes behind the word that
/// chooses them. The guest has the interrupt controllers that the kernel needs.
///
/// # Errors
/// The run could not begin.
pub fn run(
    config: &Config,
    chosen: &[Scenario],
    pass_on: bool,
    observer: Box<dyn Observer>,
    stop: &AtomicBool,
) -> Result<(Vec<Verdict>, RunReport), RunError> {
    let ran = Arc::new(Mutex::new(Vec::new()));
    let console = ScenarioConsole { line: Vec::new(), ran: ran.clone(), pass_on };
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
        // Repeats and another order need names.
        let twice: Vec<_> = all.iter().chain(&all[..1]).cloned().collect();
        assert!(choice(&all, &twice).starts_with("scenarios=a_name_000,"));
        assert_eq!(choice(&[], &all[..1]), "scenarios=a_name_000");
    }

    #[test]
    fn the_console_keeps_what_ran_to_itself() {
        let ran = Arc::new(Mutex::new(Vec::new()));
        let mut console = ScenarioConsole { line: Vec::new(), ran: ran.clone(), pass_on: false };
        console.write_all(b"hello\r\nran a\r\nran b").expect("nothing is passed on");
        assert_eq!(*ran.lock().expect("not poisoned"), ["a"]);
    }
}
