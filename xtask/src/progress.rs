//! Shows the current step: a spinner on a terminal, one line per step elsewhere.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The current step.
pub struct Progress {
    verbose: bool,
    /// All spinners of this terminal, and the one of this step.
    bars: Option<(MultiProgress, ProgressBar)>,
    step: Mutex<String>,
}

impl Progress {
    /// Starts without a step. `verbose` shows the output of commands instead of a spinner.
    pub fn new(verbose: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let spins = !verbose && !dumb && std::io::stderr().is_terminal();
        Self::among(verbose, spins.then(MultiProgress::new))
    }

    /// Another one, for what is done at the same time.
    pub fn beside(&self) -> Self {
        Self::among(self.verbose, self.bars.as_ref().map(|(all, _)| all.clone()))
    }

    fn among(verbose: bool, spinners: Option<MultiProgress>) -> Self {
        let bars = spinners.map(|all| {
            let bar = all.add(spinner());
            (all, bar)
        });
        Self { verbose, bars, step: Mutex::default() }
    }

    fn bar(&self) -> Option<&ProgressBar> {
        self.bars.as_ref().map(|(_, bar)| bar)
    }

    /// Whether the output of commands is shown.
    pub fn verbose(&self) -> bool {
        self.verbose
    }

    /// Begins a step.
    pub fn step(&self, what: &str) {
        what.clone_into(&mut self.step.lock().unwrap_or_else(PoisonError::into_inner));
        match self.bar() {
            Some(bar) => {
                bar.reset_elapsed();
                bar.set_prefix(what.to_owned());
                bar.set_message("");
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            None => eprintln!("xtask: {what}"),
        }
    }

    /// The current step, for error messages.
    pub fn current(&self) -> String {
        self.step.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows a detail of the current step, if there is a spinner.
    pub fn detail(&self, line: &str) {
        if let Some(bar) = self.bar() {
            bar.set_message(line.trim().to_owned());
        }
    }

    /// Prints a line that stays.
    pub fn say(&self, line: &str) {
        match self.bar() {
            Some(bar) => bar.suspend(|| eprintln!("xtask: {line}")),
            None => eprintln!("xtask: {line}"),
        }
    }

    /// Prints the output of a command unchanged.
    pub fn show(&self, text: &str) {
        match self.bar() {
            Some(bar) => bar.suspend(|| eprint!("{text}")),
            None => eprint!("{text}"),
        }
    }

    /// Removes the spinner, so that others can print.
    pub fn finish(&self) {
        if let Some(bar) = self.bar() {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
    }
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let template = if colours {
        "{spinner:.cyan} {prefix} {elapsed:.dim} {wide_msg:.dim}"
    } else {
        "{spinner} {prefix} {elapsed} {wide_msg}"
    };
    // The template is a constant; the default style would also do.
    bar.set_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar
}
