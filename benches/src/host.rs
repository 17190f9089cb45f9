//! The host that figures are measured on, and the memory it can spare.

use std::fs;
use std::thread::available_parallelism;

use serde::Serialize;

/// Host memory that a measurement leaves free.
pub(crate) const SPARE: u64 = 1 << 30;

/// The host that figures were measured on.
#[derive(Serialize)]
pub(crate) struct Host {
    /// None where no guest was run.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    cpus: usize,
    cpu: String,
    memory_mib: u64,
    kernel: String,
    /// Load average over the last minute: other work of the host.
    load: String,
}

impl Host {
    /// This host. `counted`: whether its KVM counts guest instructions, if that matters.
    pub(crate) fn new(counted: Option<bool>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let memory = read("/proc/meminfo");
        let total = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        let release = read("/proc/sys/kernel/osrelease");
        Self {
            kind: counted.map(|counted| match counted {
                true => {
                    "PVM or another host that emulates ring 0: guest instructions are counted \
                         exactly"
                }
                false => {
                    "a host that does not count guest instructions: times, limits in \
                          instructions do not apply"
                }
            }),
            cpus: available_parallelism().map_or(1, usize::from),
            cpu: cpu.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned()),
            memory_mib: total.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) >> 10,
            // The version without suffixes of its builder.
            kernel: release.split('.').take(2).collect::<Vec<_>>().join("."),
            load: read("/proc/loadavg").split_whitespace().next().unwrap_or("unknown").to_owned(),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, cpus, cpu, memory_mib, kernel, load } = self;
        if let Some(kind) = kind {
            write!(f, "{kind}; ")?;
        }
        write!(f, "{cpus} CPUs ({cpu}), {memory_mib} MiB, Linux {kernel}, load {load}")
    }
}

/// Host memory that is free or can be made so, in bytes; 0 if the kernel does not say.
pub(crate) fn available_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
