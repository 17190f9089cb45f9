//! Watches a run beside its exits: the console, the marks on it, and the shadow's memory over time.

use umbra_report::Sample;

use super::Outcome;
use super::console::ConsoleWatch;
pub(super) use super::console::Sign;
use super::counts::{EventStats, ExitStats};
use super::marks::{Mark, Marks};
use super::picture::Timeline;
use crate::shadow::Windows;

/// Watches a run.
pub(super) struct Watch {
    console: ConsoleWatch,
    marks: Marks,
    /// None if no samples were requested.
    timeline: Option<Timeline>,
}

impl Watch {
    /// Watches `console` for `marks` and for the end of the guest, and fills `timeline`.
    pub(super) fn new(console: ConsoleWatch, marks: Marks, timeline: Option<Timeline>) -> Self {
        Self { console, marks, timeline }
    }

    /// Whether a line has the text of a mark.
    pub(super) fn is_mark(&self, line: &[u8]) -> bool {
        self.marks.wants(line)
    }

    /// Records the costs until a line.
    pub(super) fn mark(
        &mut self,
        line: &[u8],
        exits: &ExitStats,
        events: &EventStats,
        windows: Option<&mut Windows>,
    ) {
        self.marks.line(line, exits, events, windows);
    }

    /// Handles a line of the console.
    pub(super) fn console_line(&mut self, line: &[u8]) -> Sign {
        self.console.line(line)
    }

    /// The last lines of the console.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.console.lines().map(str::to_owned).collect()
    }

    /// The marks that were passed.
    pub(super) fn marks(&self) -> &[Mark] {
        self.marks.passed()
    }

    /// Samples the shadow, if requested and if it is time for a sample.
    pub(super) fn sample(&mut self, windows: Option<&mut Windows>) {
        if let (Some(timeline), Some(windows)) = (&mut self.timeline, windows) {
            timeline.sample(windows);
        }
    }

    /// Takes the last sample and returns all of them, if samples were requested.
    pub(super) fn finish_samples(&mut self, windows: Option<&mut Windows>) -> Option<Vec<Sample>> {
        self.timeline.take().map(|timeline| timeline.finish(windows))
    }

    /// Corrects how the run ended by the console: Linux resets or halts the machine after a panic.
    pub(super) fn correct(&self, outcome: Outcome) -> Outcome {
        match (outcome, self.console.panic()) {
            (
                Outcome::Reset
                | Outcome::PowerOff
                | Outcome::Halted
                | Outcome::HaltedForGood { .. }
                | Outcome::DebugExit { .. }
                | Outcome::Panic
                | Outcome::TripleFault { .. }
                | Outcome::TimeLimit(_),
                Some(message),
            ) => Outcome::LinuxPanic(message.to_owned()),
            // Other kernels halt like this on purpose.
            (Outcome::HaltedForGood { .. }, None) if !self.console.is_linux() => Outcome::Halted,
            (outcome, None) if outcome.is_regular() => match self.console.oops() {
                Some(message) => Outcome::LinuxOops(message.to_owned()),
                None => outcome,
            },
            (outcome, _) => outcome,
        }
    }
}
