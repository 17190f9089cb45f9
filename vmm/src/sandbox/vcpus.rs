//! The vCPUs of a run, each in a thread of its own: how they are started, stopped for a moment, and ended.
//!
//! **Stopping for a moment.** What must not happen while the guest runs (taking records out of rings, giving shadow back)
//! is done by the vCPU that handles an exit, and so holds the state's lock. It says that the others shall stay out
//! of the guest, kicks those that are inside, and waits for them ([`Others::stop`]). Each says that it goes in *before*
//! it looks whether it may, so either it sees that it may not, or it is seen and kicked. Those that are out wait for
//! the lock, which is free when that exit has been handled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::SyncSender;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::monitor::{self, Flow, Others};
use super::{MachineSlots, Outcome, Shared};
use crate::machine::kick::Kicker;
use crate::machine::vcpu::{Vcpu, VmExit};

/// How long a kick is given before the next.
const RETRY: Duration = Duration::from_millis(5);
/// How many kicks a vCPU is given to come out: some seconds. Not a time, since a host that stands still for so long should
/// not end a run.
const KICKS: u32 = 400;
/// Looks at what is waited for, before it is slept for.
const LOOKS: u32 = 16;
/// How long at a time.
const PAUSE: Duration = Duration::from_micros(50);

/// What is known of each vCPU outside of its thread.
pub(super) struct Vcpus {
    kickers: Vec<Kicker>,
    /// Whether each is in the guest, or on its way there.
    inside: Vec<AtomicBool>,
    /// They shall stay out. Set and cleared under the state's lock.
    hold: AtomicBool,
    /// One of them has ended the run. Set and read under the state's lock.
    ended: AtomicBool,
}

impl Vcpus {
    pub(super) fn new(vcpus: &[Vcpu]) -> Self {
        Self {
            kickers: vcpus.iter().map(Vcpu::kicker).collect(),
            inside: vcpus.iter().map(|_| AtomicBool::new(false)).collect(),
            hold: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        }
    }

    /// Whether vCPU `id` may enter the guest now. If so it counts as inside until [`Self::leave`].
    fn enter(&self, id: usize) -> bool {
        self.inside[id].store(true, SeqCst);
        let may = !self.hold.load(SeqCst);
        if !may {
            self.leave(id);
        }
        may
    }

    fn leave(&self, id: usize) {
        self.inside[id].store(false, SeqCst);
    }

    /// Keeps all vCPUs but `me` out of the guest until [`Self::let_go`]. The number of one that does not come out is
    /// the error.
    fn hold(&self, me: usize) -> Result<(), usize> {
        self.hold.store(true, SeqCst);
        for (id, inside) in self.inside.iter().enumerate().filter(|(id, _)| *id != me) {
            let mut kicks = 0;
            while inside.load(SeqCst) {
                if kicks == KICKS {
                    return Err(id);
                }
                kicks += 1;
                self.kickers[id].kick();
                wait_for(|| !inside.load(SeqCst));
            }
        }
        Ok(())
    }

    fn let_go(&self) {
        self.hold.store(false, SeqCst);
    }

    /// Gets all vCPUs out of the guest, whose threads were told to end, and waits until they have. False if some do not.
    pub(super) fn end(&self, threads: &[JoinHandle<()>]) -> bool {
        let over = || threads.iter().all(JoinHandle::is_finished);
        for _ in 0..KICKS {
            if over() {
                return true;
            }
            let running = threads.iter().zip(&self.kickers).filter(|(thread, _)| !thread.is_finished());
            running.for_each(|(_, kicker)| kicker.kick());
            wait_for(over);
        }
        over()
    }
}

/// Waits until `done`, but not longer than a kick is given.
fn wait_for(done: impl Fn() -> bool) {
    let begin = Instant::now();
    // Who is waited for may need this CPU.
    for _ in 0..LOOKS {
        if done() {
            return;
        }
        thread::yield_now();
    }
    while !done() && begin.elapsed() < RETRY {
        thread::sleep(PAUSE);
    }
}

/// The other vCPUs, from the point of view of one that handles an exit.
struct OtherVcpus<'a> {
    vcpus: &'a Vcpus,
    me: usize,
    stopped: bool,
}

impl Others for OtherVcpus<'_> {
    fn stop(&mut self) -> Result<(), Outcome> {
        if !self.stopped {
            self.vcpus.hold(self.me).map_err(|id| Outcome::Unstoppable { id })?;
            self.stopped = true;
        }
        Ok(())
    }
}

impl Drop for OtherVcpus<'_> {
    fn drop(&mut self) {
        self.vcpus.let_go();
    }
}

/// Says that a thread has ended, also if it panicked.
struct Farewell(SyncSender<Option<Outcome>>);

impl Drop for Farewell {
    fn drop(&mut self) {
        // Nobody waits any more if this took too long to stop.
        let _ = self.0.send(None);
    }
}

/// Starts a thread that runs `vcpu` until the run ends. What it ended with goes to `tell`, which holds two values for each
/// vCPU; then `None`, which all others end with.
pub(super) fn spawn(
    mut vcpu: Vcpu,
    shared: Arc<Shared>,
    tell: SyncSender<Option<Outcome>>,
) -> std::io::Result<JoinHandle<()>> {
    let name = format!("vcpu{}", vcpu.id());
    thread::Builder::new().name(name).spawn(move || {
        let tell = Farewell(tell);
        run(&mut vcpu, &shared, &tell);
    })
}

fn run(vcpu: &mut Vcpu, shared: &Shared, tell: &Farewell) {
    let id = usize::from(vcpu.id());
    let Shared { vcpus, machine, .. } = shared;
    while !shared.stop.load(SeqCst) {
        if !vcpus.enter(id) {
            // Until the vCPU that has it is done.
            drop(shared.monitor());
            continue;
        }
        let exit = vcpu.run();
        vcpus.leave(id);
        if let Ok(VmExit::Interrupted) = exit {
            continue;
        }
        let mut monitor = shared.monitor();
        if vcpus.ended.load(SeqCst) {
            return;
        }
        let flow = match exit {
            Ok(exit) => {
                let mut slots = MachineSlots(machine);
                // Dropped before the lock.
                let mut others = OtherVcpus { vcpus, me: id, stopped: false };
                let mut machine = monitor::Machine {
                    id: vcpu.id(),
                    cpu: vcpu,
                    ram: machine.ram(),
                    slots: &mut slots,
                    others: &mut others,
                };
                monitor.dispatch(exit, &mut machine)
            }
            Err(error) => Flow::End(error.into()),
        };
        if let Flow::End(outcome) = flow {
            vcpus.ended.store(true, SeqCst);
            let _ = tell.0.send(Some(outcome));
            return;
        }
    }
}
