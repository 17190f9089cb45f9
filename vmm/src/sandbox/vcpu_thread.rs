//! The thread of a vCPU: runs it and handles its exits until the run ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::SyncSender;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use umbra_machine::vcpu::{Vcpu, VmExit};

use super::Outcome;
use super::context::{ExitContext, OtherVcpus};
use super::end_state::EndState;
use super::gate::Gate;
use super::shared::{MachineMemslots, Shared};
use super::vcpus::Vcpus;
use crate::jail::ThreadKind;

/// Pauses the other vCPUs for a thread that holds the state's lock; they continue when it is
/// dropped.
pub(super) struct PauseGuard<'a> {
    vcpus: &'a Vcpus,
    /// The vCPU that handles an exit; none for the collector.
    me: Option<usize>,
    stop: &'a AtomicBool,
    /// Since when they stand still.
    since: Option<Instant>,
}

impl<'a> PauseGuard<'a> {
    fn of_vcpu(vcpus: &'a Vcpus, me: usize, stop: &'a AtomicBool) -> Self {
        Self { vcpus, me: Some(me), stop, since: None }
    }

    /// That of the collector, to which all vCPUs are others.
    pub(super) fn of_collector(vcpus: &'a Vcpus, stop: &'a AtomicBool) -> Self {
        Self { vcpus, me: None, stop, since: None }
    }
}

impl OtherVcpus for PauseGuard<'_> {
    fn pause(&mut self) -> Result<(), Outcome> {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            self.vcpus.pause(self.me, self.stop).map_err(|id| Outcome::Unstoppable { id })?;
        }
        Ok(())
    }
}

impl Drop for PauseGuard<'_> {
    fn drop(&mut self) {
        self.vcpus.resume();
        if let Some(since) = self.since {
            self.vcpus.add_pause(since.elapsed());
        }
    }
}

/// Sends how the run ended. Sends `None` when its thread ends, also by a panic.
pub(super) struct OutcomeSender(pub(super) SyncSender<Option<Outcome>>);

impl OutcomeSender {
    /// Sends that the thread has ended the run.
    pub(super) fn send(&self, outcome: Outcome) {
        let _ = self.0.send(Some(outcome));
    }
}

impl Drop for OutcomeSender {
    fn drop(&mut self) {
        // If this thread took too long to end, nobody receives it.
        let _ = self.0.send(None);
    }
}

/// Starts a thread that runs `vcpu`, once the `gate` is open, until the run ends. If this vCPU ends
/// it, the outcome goes to `sender`; each thread, that of the collector too, sends `None` as its
/// last value. The channel holds two values for each.
pub(super) fn spawn(
    mut vcpu: Vcpu,
    shared: Arc<Shared>,
    sender: SyncSender<Option<Outcome>>,
    gate: Arc<Gate>,
) -> std::io::Result<JoinHandle<()>> {
    let name = format!("vcpu{}", vcpu.id());
    thread::Builder::new().name(name).spawn(move || {
        let sender = OutcomeSender(sender);
        if !gate.arrive(ThreadKind::Vcpu) {
            return;
        }
        drop(gate);
        run(&mut vcpu, &shared, &sender);
        shared.vcpus.add_cpu_time(thread_cpu_time());
        shared.vcpus.note_end(usize::from(vcpu.id()), EndState::of(&vcpu));
    })
}

/// The time of the host's CPUs that this thread has used.
pub(super) fn thread_cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

fn run(vcpu: &mut Vcpu, shared: &Shared, sender: &OutcomeSender) {
    let id = usize::from(vcpu.id());
    let Shared { vcpus, machine, .. } = shared;
    // When it last came out of the guest.
    let mut out: Option<Instant> = None;
    while !shared.stop.load(SeqCst) {
        if !vcpus.enter(id) {
            // Waits until the thread that paused this vCPU has done its work.
            drop(shared.dispatcher());
            continue;
        }
        if let Some(out) = out.take() {
            vcpus.add_outside(out.elapsed());
        }
        let exit = vcpu.run();
        out = Some(Instant::now());
        vcpus.leave(id);
        if let Ok(VmExit::Interrupted) = exit {
            vcpus.note_halted(vcpu);
            continue;
        }
        let mut dispatcher = shared.try_dispatcher().unwrap_or_else(|| {
            let begin = Instant::now();
            let dispatcher = shared.dispatcher();
            vcpus.add_wait(begin.elapsed());
            dispatcher
        });
        if vcpus.has_ended() {
            return;
        }
        let handled = match exit {
            Ok(exit) => {
                let mut memslots = MachineMemslots(machine);
                // Dropped before the lock.
                let mut others = PauseGuard::of_vcpu(vcpus, id, &shared.stop);
                let mut context = ExitContext {
                    id: vcpu.id(),
                    cpu: vcpu,
                    ram: machine.ram(),
                    memslots: &mut memslots,
                    others: &mut others,
                };
                dispatcher.dispatch(exit, &mut context)
            }
            Err(error) => Err(error.into()),
        };
        if let Err(outcome) = handled {
            vcpus.set_ended();
            sender.send(outcome);
            return;
        }
    }
}
