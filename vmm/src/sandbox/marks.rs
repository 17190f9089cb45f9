//! Marks: the costs of a run when a text first appears on the guest's console, such as at the end
//! of a boot or of a test.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use umbra_machine::stats::Counters;

use super::console::LINE_BYTES;
use super::counts::{EventStats, ExitStats};
use crate::shadow::{ProcessMemory, Windows};

/// Costs of a run until a line of the console. Sizes are bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// The text that was looked for.
    pub text: String,
    /// The first line with it.
    pub line: String,
    /// Since the guest began.
    pub seconds: f64,
    /// CPU time of the whole process until then, guest included.
    pub cpu_seconds: f64,
    /// Instructions of the guest, where the host counts them; else null.
    pub instructions: Option<u64>,
    /// Exits to Umbra.
    pub exits: u64,
    /// Those of them that are hypercalls.
    pub hypercalls: u64,
    /// Those of them that are first touches of byte shadow.
    pub shadow_faults: u64,
    /// Allocations without those whose records are still in a ring.
    pub allocations: u64,
    /// The memory that the process held.
    pub rss_bytes: u64,
    /// The most that it had held.
    pub rss_peak_bytes: u64,
    /// The most shadow that was resident, both levels together.
    pub shadow_peak_bytes: u64,
}

/// Looks for the texts.
pub(super) struct Marks {
    wanted: Vec<String>,
    passed: Vec<Mark>,
    counters: Option<Arc<Counters>>,
    start: Instant,
}

impl Default for Marks {
    fn default() -> Self {
        Self::new(Vec::new(), None)
    }
}

impl Marks {
    /// The guest begins now. `counters` are its vCPUs', where they count instructions.
    pub(super) fn new(wanted: Vec<String>, counters: Option<Arc<Counters>>) -> Self {
        Self { wanted, passed: Vec::new(), counters, start: Instant::now() }
    }

    /// Whether a line is looked for.
    pub(super) fn wants(&self, line: &[u8]) -> bool {
        self.find(line).is_some()
    }

    /// Which text a line has, and the line.
    fn find<'a>(&self, line: &'a [u8]) -> Option<(usize, Cow<'a, str>)> {
        if self.wanted.is_empty() {
            return None;
        }
        let line = String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES)]);
        Some((self.wanted.iter().position(|text| line.contains(text.as_str()))?, line))
    }

    /// Handles a line of the console.
    pub(super) fn line(
        &mut self,
        line: &[u8],
        exits: &ExitStats,
        events: &EventStats,
        windows: Option<&mut Windows>,
    ) {
        let Some((at, line)) = self.find(line) else { return };
        // 0 if the host does not report it.
        let memory = ProcessMemory::read().unwrap_or_default();
        let shadow = windows.and_then(|windows| windows.figures().ok());
        self.passed.push(Mark {
            text: self.wanted.swap_remove(at),
            line: line.trim_end().chars().filter(|c| !c.is_control()).collect(),
            seconds: self.start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds(),
            instructions: self
                .counters
                .as_ref()
                .and_then(|counters| counters.instructions_emulated()),
            exits: exits.total,
            hypercalls: exits.hypercall,
            shadow_faults: exits.shadow_fault,
            allocations: events.allocations,
            rss_bytes: memory.resident,
            rss_peak_bytes: memory.resident_peak,
            shadow_peak_bytes: shadow.map_or(0, |shadow| shadow.peak_bytes()),
        });
    }

    /// The marks so far, in order.
    pub(super) fn passed(&self) -> &[Mark] {
        &self.passed
    }
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_text_is_marked_once() {
        let mut marks = Marks::new(vec!["end of boot".into(), "never".into()], None);
        let exits = |total| ExitStats { total, ..ExitStats::default() };
        let mut line =
            |text: &[u8], total| marks.line(text, &exits(total), &EventStats::default(), None);
        line(b"[ 1.0] begin of boot\r", 1);
        line(b"[ 2.0] the end of boot\x1b, or not\r", 2);
        line(b"the end of boot", 3);
        line(b"\xffnev\xffer", 4);
        let passed = marks.passed();
        assert_eq!(passed.len(), 1);
        assert_eq!(
            (passed[0].exits, passed[0].line.as_str()),
            (2, "[ 2.0] the end of boot, or not")
        );
        assert!(passed[0].rss_bytes > 0 && passed[0].instructions.is_none());
    }
}
