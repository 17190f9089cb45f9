//! The library's interface: a run, built step by step.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::{Config, Console, GuestFile, Observer, RunError, RunReport, ShadowMode, run};
use crate::shadow::Notify;

/// A run of a kernel, which [`Sandbox::run`] starts.
///
/// A program that runs kernels that it does not trust calls
/// [`symbol_worker`](crate::symbol_worker) first in its `main`: then another process parses their
/// symbols and debug information.
///
/// ```no_run
/// use std::time::Duration;
///
/// use umbra::sandbox::{GuestFile, Sandbox};
///
/// let kernel = GuestFile::open("kernel", "vmlinux".as_ref())?;
/// let report = Sandbox::new(kernel)
///     .memory(256 << 20)
///     .cpus(2)
///     .timeout(Duration::from_secs(60))
///     .run()?;
/// println!("{}", report.outcome);
/// for (finding, seen) in report.findings.iter() {
///     println!("{seen} x {} at {:#x}", finding.kind, finding.address);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Sandbox {
    config: Config,
    console: Console,
    observer: Box<dyn Observer>,
    stop: Arc<AtomicBool>,
}

impl Sandbox {
    /// A run of `kernel` with 256 MiB, one CPU, the per-page shadow, and no limits. Its console
    /// output is dropped.
    pub fn new(kernel: GuestFile) -> Self {
        Self::with_config(Config { kernel, ..Config::default() })
    }

    /// A run with all settings of `config`.
    pub fn with_config(config: Config) -> Self {
        Self {
            config,
            console: Box::new(io::sink()).into(),
            observer: Box::new(()),
            stop: Arc::default(),
        }
    }

    /// Sets the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.config.cmdline = cmdline.into();
        self
    }

    /// Sets guest memory, in bytes.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.memory = bytes;
        self
    }

    /// Sets the number of CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.config.cpus = cpus;
        self
    }

    /// Sets the kind of shadow, and who writes it.
    #[must_use]
    pub fn shadow(mut self, shadow: ShadowMode, notify: Notify) -> Self {
        (self.config.shadow, self.config.notify) = (shadow, notify);
        self
    }

    /// Sets the time limit.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.config.timeout = Some(limit);
        self
    }

    /// Ends the run after this many different findings.
    #[must_use]
    pub fn stop_at(mut self, findings: usize) -> Self {
        self.config.stop_at = Some(findings);
        self
    }

    /// Writes the guest's console to `output`.
    #[must_use]
    pub fn console(mut self, output: impl Write + Send + 'static) -> Self {
        self.console = Box::new(output).into();
        self
    }

    /// Passes each new finding to `observer` while the guest runs.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observer = Box::new(observer);
        self
    }

    /// Ends the run when `stop` becomes true.
    #[must_use]
    pub fn stop_flag(mut self, stop: Arc<AtomicBool>) -> Self {
        self.stop = stop;
        self
    }

    /// Runs the kernel to its end.
    ///
    /// # Errors
    /// The run could not begin; see [`run`].
    pub fn run(self) -> Result<RunReport, RunError> {
        run(&self.config, self.console, self.observer, &self.stop)
    }
}
