//! A dispatcher without a machine. Its caller makes the exits, and holds the CPU, the memory and
//! the memslots that they are about: for fuzzers, tests, and exits that were recorded.

use umbra_machine::devices::Devices;
use umbra_machine::memory::Ram;
use umbra_provenance::{ObjectLimits, Objects, Provenance, Quarantine};
use umbra_report::symbols::Symbols;
use umbra_report::{Distinct, Findings};
use umbra_shadow::Shadow as _;

use super::console::ConsoleWatch;
use super::counts::{EventStats, ExitStats};
use super::dispatch::Dispatcher;
use super::guest_info::GuestInfo;
use super::marks::Marks;
use super::run_shadow::RunShadow;
use super::session::Session;
use super::watch::Watch;
use super::{Observer, Outcome};
use crate::shadow::{Memslots, Mode, Notify, ShadowError, Windows, WindowsConfig};

/// The settings of a run without a machine.
#[derive(Clone, Copy, Debug)]
pub struct Detached {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Which shadow there is, if any.
    pub mode: Option<Mode>,
    /// Who writes it.
    pub notify: Notify,
    /// Most bytes of byte shadow that are mapped at a time.
    pub shadow_limit: Option<u64>,
    /// Bytes of host memory for provenance.
    pub provenance: u64,
    /// Bytes of the quarantine; 0 for none.
    pub quarantine: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Whether the guest is Linux, whose console tells how it ends.
    pub linux: bool,
    /// The number of findings after which the run ends.
    pub stop_at: Option<usize>,
}

impl Dispatcher {
    /// The state of a run that begins, without a machine, of a guest with these symbols. What the
    /// guest prints is lost.
    ///
    /// # Errors
    /// There is no shadow for so much memory, or no host memory for it.
    pub fn detached(
        settings: &Detached,
        symbols: Symbols,
        memslots: &mut dyn Memslots,
        observer: Box<dyn Observer>,
    ) -> Result<Self, ShadowError> {
        let windows = |mode| WindowsConfig {
            ram: std::iter::once(0..settings.memory).collect(),
            mode,
            notify: settings.notify,
            limit: settings.shadow_limit,
        };
        let windows = settings.mode.map(|mode| Windows::new(&windows(mode), memslots));
        let objects = Objects::new(ObjectLimits::of_budget(settings.provenance));
        Ok(Self::new(
            Devices::new(Box::new(std::io::sink()), None),
            RunShadow::new(windows.transpose()?),
            Provenance::new(objects, Quarantine::new(settings.quarantine, settings.cpus)),
            GuestInfo::new(symbols),
            Session::new(observer, Distinct::default(), settings.stop_at),
            Watch::new(ConsoleWatch::new(settings.linux), Marks::default(), None),
        ))
    }

    /// Drains the rings, as at the end of a run, and takes the findings out.
    ///
    /// # Errors
    /// A finding is the last one wanted.
    pub fn finish(&mut self, ram: &Ram) -> Result<Findings, Outcome> {
        self.drain_all(ram)?;
        Ok(self.session.take_findings())
    }

    /// The exits and the events of the guest's allocators so far.
    pub fn counts(&self) -> (ExitStats, EventStats) {
        (self.exits(), self.events())
    }

    /// What is remembered of the guest's objects.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Bytes of byte shadow that are mapped now, of both windows in a full shadow.
    pub fn shadow_mapped(&self) -> u64 {
        self.shadow.model().map_or(0, |model| model.memory().mapped_bytes())
    }
}
