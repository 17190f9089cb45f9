//! The collector: a thread that reads the rings while the guest runs on.
//!
//! A CPU that has written some more records writes to the doorbell's port, which signals an event
//! and is no exit to Umbra. The collector then drains the rings in small steps, and lets a vCPU
//! that makes an exit go first between two of them. So a CPU whose ring is full finds most of its
//! records taken already. It does not depend on that: its own request drains the rest, and a
//! collector that gets no processor costs it only time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::SyncSender;
use std::thread::{self, JoinHandle};

use parking_lot::MutexGuard;
use umbra_machine::Machine;
use umbra_shadow::abi::DOORBELL_PORT;
use vmm_sys_util::eventfd::EventFd;

use super::Outcome;
use super::gate::Gate;
use super::shared::Shared;
use super::vcpu_thread::{OutcomeSender, PauseGuard, thread_cpu_time};
use crate::jail::ThreadKind;

/// What wakes the collector.
#[derive(Debug)]
pub(super) struct Doorbell(EventFd);

impl Doorbell {
    /// The doorbell of a machine whose rings are collected. If the host does not signal it, each of
    /// the guest's rings is an exit.
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub(super) fn new(machine: &Machine) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_CLOEXEC)?;
        if let Err(error) = machine.signal_on_write(DOORBELL_PORT, &event) {
            log::info!("rings are read at exits only: {error}");
        }
        Ok(Self(event))
    }

    /// Wakes the collector, as the guest does.
    pub(super) fn ring(&self) {
        // It would wait only at 2^64 - 1 rings that nobody heard.
        let _ = self.0.write(1);
    }

    /// Waits until the doorbell has rung, once or often, or a signal has come.
    fn wait(&self) {
        let _ = self.0.read();
    }
}

/// Starts the thread, which collects once the `gate` is open, until the run ends. Its outcomes are
/// as those of a vCPU's thread.
pub(super) fn spawn(
    shared: Arc<Shared>,
    sender: SyncSender<Option<Outcome>>,
    gate: Arc<Gate>,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("collector".into()).spawn(move || {
        let sender = OutcomeSender(sender);
        if !gate.arrive(ThreadKind::Collector) {
            return;
        }
        drop(gate);
        if let Some(doorbell) = &shared.doorbell {
            run(&shared, doorbell, &sender);
        }
        shared.vcpus.set_collector_cpu_time(thread_cpu_time());
    })
}

fn run(shared: &Shared, doorbell: &Doorbell, sender: &OutcomeSender) {
    while !shared.stop.load(SeqCst) {
        doorbell.wait();
        while collect(shared, sender) {}
    }
}

/// A step. Returns whether there is more to do at once.
fn collect(shared: &Shared, sender: &OutcomeSender) -> bool {
    let mut dispatcher = shared.dispatcher();
    if shared.stop.load(SeqCst) || shared.vcpus.has_ended() {
        return false;
    }
    // Dropped before the lock.
    let mut others = PauseGuard::of_collector(&shared.vcpus, &shared.stop);
    let collected = dispatcher.collect(shared.machine.ram(), &mut others);
    drop(others);
    let more = collected.unwrap_or_else(|outcome| {
        shared.vcpus.set_ended();
        sender.send(outcome);
        false
    });
    // A vCPU that waits for the lock goes first.
    MutexGuard::unlock_fair(dispatcher);
    more
}
