//! The figures of a run: what `--stats` writes.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use umbra_machine::memory::Ram;
use umbra_provenance::{ProvenanceFigures, QuarantineFigures};

pub use super::counts::{EventStats, ExitStats};
use super::dispatch::Dispatcher;
use super::vcpus::Vcpus;
use super::{Config, Mark, Outcome, ShadowMode};
use crate::shadow::accounting::resident_bytes;
use crate::shadow::{Notify, ProcessMemory};

/// All figures of a run. Sizes are bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// How it ended ([`super::Outcome::word`]).
    pub outcome: &'static str,
    /// The last lines of the console, if the guest did not end by itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub console_tail: Vec<String>,
    /// Costs until lines of the console, if marks were requested.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub marks: Vec<Mark>,
    /// Why the guest ran unchecked, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unchecked: Option<&'static str>,
    /// Different findings.
    pub findings: usize,
    /// All findings, with those that were only counted: repeats, and different ones beyond the
    /// limit.
    pub findings_total: u64,
    /// The shadow.
    pub shadow: ShadowStats,
    /// The quarantine.
    pub quarantine: QuarantineFigures,
    /// Redzones behind objects.
    pub redzones: RedzoneStats,
    /// The table of objects.
    pub provenance: ProvenanceFigures,
    /// The guest.
    pub guest: GuestStats,
    /// Exits from the guest to Umbra.
    pub exits: ExitStats,
    /// Events of the guest's allocators.
    pub events: EventStats,
    /// Umbra itself.
    pub host: HostStats,
}

/// Costs of the shadow.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShadowStats {
    /// `per-page`, `full` or `off`.
    pub mode: &'static str,
    /// `ring` or `sync`.
    pub notify: &'static str,
    /// Page shadow, there from the start; that of virtual memory from when the guest asked for it.
    pub page_bytes: u64,
    /// Pattern pages and page tables of the check shadow; 0 if the kernel does not check inline.
    pub check_bytes: u64,
    /// Byte shadow that is mapped, at the end.
    pub byte_mapped_bytes: u64,
    /// Byte shadow that is resident at the end, by the kernel's count.
    pub byte_resident_bytes: u64,
    /// The most that was resident.
    pub byte_peak_resident_bytes: u64,
    /// The most that byte-checked pages used.
    pub byte_used_peak_bytes: u64,
    /// Resident at the end, and used by no byte-checked page.
    pub byte_unused_bytes: u64,
    /// Chunks that were mapped because the guest touched them.
    pub faults: u64,
    /// Byte shadow that was reclaimed.
    pub released_bytes: u64,
}

impl ShadowStats {
    /// All shadow at its peak, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.page_bytes + self.check_bytes + self.byte_peak_resident_bytes
    }
}

/// Costs of redzones: bytes of live slots beyond what their caches hand out. At most 2,040 bytes of
/// each are counted, and none in slots of whole pages.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RedzoneStats {
    /// At the end.
    pub bytes: u64,
    /// The most.
    pub peak_bytes: u64,
}

/// The guest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GuestStats {
    /// Its memory.
    pub memory_bytes: u64,
    /// Its CPUs.
    pub cpus: u8,
    /// Instructions that it executed, where the host counts them; else null.
    pub instructions: Option<u64>,
    /// Memory of its free pages and of its quarantine that was reclaimed.
    pub released_bytes: u64,
}

/// Costs of Umbra itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HostStats {
    /// The most memory that the process held, guest and shadow included.
    pub rss_peak_bytes: u64,
    /// Memory at the end, without guest memory and shadow.
    pub vmm_overhead_bytes: u64,
    /// From the start of the run to the guest's first instruction.
    pub start_seconds: f64,
    /// From there to the end.
    pub seconds: f64,
    /// Of that, time outside of the guest, summed over the vCPUs' threads.
    pub outside_seconds: f64,
    /// Time of the host's CPUs that the vCPUs' threads used, the guest included.
    pub vcpus_cpu_seconds: f64,
    /// The same of the thread that reads rings while the guest runs.
    pub collector_cpu_seconds: f64,
    /// The same of the process's other threads, its start included.
    pub others_cpu_seconds: f64,
    /// How often all vCPUs were stopped for the VMM's work.
    pub pauses: u64,
    /// How long they stood still, in all.
    pub paused_seconds: f64,
    /// The longest pause.
    pub longest_pause_seconds: f64,
    /// How often a vCPU with an exit waited for another thread's work.
    pub waits: u64,
    /// How long they waited, in all.
    pub waited_seconds: f64,
    /// The longest wait.
    pub longest_wait_seconds: f64,
}

impl HostStats {
    /// What the threads of the vCPUs and the collector, which have ended, have used and waited.
    pub(super) fn of(vcpus: &Vcpus) -> Self {
        let process = clock_gettime(ClockId::ProcessCPUTime);
        let process = Duration::try_from(process).unwrap_or_default();
        let (pauses, waits) = (vcpus.pauses(), vcpus.waits());
        let collector = vcpus.collector_cpu_time();
        Self {
            outside_seconds: vcpus.outside().as_secs_f64(),
            vcpus_cpu_seconds: vcpus.cpu_time().as_secs_f64(),
            collector_cpu_seconds: collector.as_secs_f64(),
            others_cpu_seconds: process.saturating_sub(vcpus.cpu_time() + collector).as_secs_f64(),
            pauses: pauses.count,
            paused_seconds: pauses.all.as_secs_f64(),
            longest_pause_seconds: pauses.longest.as_secs_f64(),
            waits: waits.count,
            waited_seconds: waits.all.as_secs_f64(),
            longest_wait_seconds: waits.longest.as_secs_f64(),
            ..Self::default()
        }
    }
}

/// Collects all figures.
pub(super) fn collect(
    config: &Config,
    outcome: &Outcome,
    dispatcher: &mut Dispatcher,
    ram: &Ram,
    instructions: Option<u64>,
    host: HostStats,
) -> Stats {
    let shadow = shadow_stats(config, dispatcher);
    let provenance = &dispatcher.provenance;
    let (redzone_bytes, redzone_peak_bytes) = provenance.objects().redzone_bytes();
    let findings = dispatcher.session.findings();
    let watch = dispatcher.watch();
    Stats {
        outcome: outcome.word(),
        console_tail: if outcome.is_regular() { Vec::new() } else { watch.last_lines() },
        marks: watch.marks().to_vec(),
        unchecked: match config.shadow {
            ShadowMode::Off => Some("there is no shadow"),
            ShadowMode::PerPage | ShadowMode::Full => dispatcher.guest.unchecked(),
        },
        findings: findings.distinct(),
        findings_total: findings.total(),
        quarantine: provenance.quarantine().figures(),
        redzones: RedzoneStats { bytes: redzone_bytes, peak_bytes: redzone_peak_bytes },
        provenance: provenance.objects().figures(config.provenance),
        guest: GuestStats {
            memory_bytes: config.memory,
            cpus: config.cpus,
            instructions,
            released_bytes: dispatcher.shadow.reclaimed_guest_bytes(),
        },
        exits: dispatcher.exits(),
        events: dispatcher.events(),
        host: with_memory(host, ram, &shadow),
        shadow,
    }
}

fn with_memory(host: HostStats, ram: &Ram, shadow: &ShadowStats) -> HostStats {
    let guest = ram
        .regions()
        .map(|(_, at, len)| resident_bytes(&(at as u64..at as u64 + len)))
        .sum::<Result<u64, _>>();
    match (ProcessMemory::read(), guest) {
        (Ok(memory), Ok(guest)) => HostStats {
            rss_peak_bytes: memory.resident_peak,
            vmm_overhead_bytes: memory
                .resident
                .saturating_sub(guest)
                .saturating_sub(shadow.page_bytes + shadow.check_bytes)
                .saturating_sub(shadow.byte_resident_bytes),
            ..host
        },
        (Err(error), _) | (_, Err(error)) => {
            log::warn!("this process's memory figures are missing: {error}");
            host
        }
    }
}

fn shadow_stats(config: &Config, dispatcher: &mut Dispatcher) -> ShadowStats {
    let notify = match config.notify {
        Notify::Ring => "ring",
        Notify::Sync => "sync",
    };
    let mut shadow = ShadowStats { mode: config.shadow.as_str(), notify, ..ShadowStats::default() };
    if let Some(windows) = dispatcher.shadow.windows_mut() {
        match windows.figures() {
            Ok(figures) => {
                shadow = ShadowStats {
                    page_bytes: figures.page_bytes,
                    check_bytes: figures.check_bytes,
                    byte_mapped_bytes: figures.byte_mapped_bytes,
                    byte_resident_bytes: figures.byte_resident_bytes,
                    byte_peak_resident_bytes: figures.byte_peak_resident_bytes,
                    byte_used_peak_bytes: figures.byte_used_peak_bytes,
                    byte_unused_bytes: figures.byte_unused_bytes,
                    faults: figures.faults,
                    released_bytes: figures.released_bytes,
                    ..shadow
                };
            }
            Err(error) => log::warn!("the shadow's figures are missing: {error}"),
        }
    }
    shadow
}
