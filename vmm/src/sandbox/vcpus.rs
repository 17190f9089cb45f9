//! The vCPUs of a run, each in a thread of its own: how they are started, stopped for a moment, and
//! ended.
//!
//! **Stopping for a moment.** What must not happen while the guest runs (taking records out of
//! rings, giving shadow back) is done by the vCPU that handles an exit, and so holds the state's
//! lock. It says that the others shall stay out of the guest, kicks those that are inside, and
//! waits for them ([`Others::stop`]). Each says that it goes in *before* it looks whether it may,
//! so either it sees that it may not, or it is seen and kicked. Those that are out wait for the
//! lock, which is free when that exit has been handled.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use umbra_machine::kick::Kicker;
use umbra_machine::vcpu::{Vcpu, VmExit};

use super::monitor::{self, Flow, Others};
use super::{MachineSlots, Outcome, Shared};

/// How long a kick is given before the next.
const RETRY: Duration = Duration::from_millis(5);
/// How many kicks a vCPU is given to come out: for the end of a run some seconds, after which it is
/// left behind; and while the run goes on as long as a host may take that has far more to do than
/// CPUs, for without it the run ends. Not times, since a host that stands still for so long should
/// not count.
const KICKS: u32 = 400;
const HOLD_KICKS: u32 = 10 * KICKS;
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
    /// Number of looks at whether they halted for good.
    looks: AtomicU64,
    /// Of each vCPU the last look at which it had, and where it had.
    halted: Vec<Mutex<(u64, u64)>>,
    /// Nanoseconds that the threads spent outside of the guest.
    outside: AtomicU64,
    /// One of them has ended the run. Set and read under the state's lock.
    ended: AtomicBool,
}

impl Vcpus {
    pub(super) fn new(vcpus: &[Vcpu]) -> Self {
        Self {
            kickers: vcpus.iter().map(Vcpu::kicker).collect(),
            inside: vcpus.iter().map(|_| AtomicBool::new(false)).collect(),
            hold: AtomicBool::new(false),
            looks: AtomicU64::new(0),
            halted: vcpus.iter().map(|_| Mutex::default()).collect(),
            outside: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// Has each vCPU come out and look whether it has halted for good.
    pub(super) fn look(&self) {
        self.looks.fetch_add(1, SeqCst);
        self.kickers.iter().for_each(Kicker::kick);
    }

    /// The first vCPU's instruction pointer, if at the last look all of them had halted for good.
    pub(super) fn halted_for_good(&self) -> Option<u64> {
        let look = self.looks.load(SeqCst);
        let mut all =
            self.halted.iter().map(|state| *state.lock().unwrap_or_else(PoisonError::into_inner));
        let (first, rip) = all.next()?;
        (look > 0 && first == look && all.all(|(at, _)| at == look)).then_some(rip)
    }

    /// What vCPU `vcpu` finds at a look.
    fn looked(&self, vcpu: &Vcpu) {
        if let Some(rip) = vcpu.halted_for_good()
            && let Some(state) = self.halted.get(usize::from(vcpu.id()))
        {
            *state.lock().unwrap_or_else(PoisonError::into_inner) = (self.looks.load(SeqCst), rip);
        }
    }

    /// The time that all threads together spent outside of the guest.
    pub(super) fn outside(&self) -> Duration {
        Duration::from_nanos(self.outside.load(SeqCst))
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

    /// Keeps all vCPUs but `me` out of the guest until [`Self::let_go`]. The number of one that
    /// does not come out is the error. When the run shall `stop`, patience ends sooner.
    fn hold(&self, me: usize, stop: &AtomicBool) -> Result<(), usize> {
        self.hold.store(true, SeqCst);
        let others = || self.inside.iter().enumerate().filter(|(id, _)| *id != me);
        let inside = || others().filter(|(_, inside)| inside.load(SeqCst)).map(|(id, _)| id);
        // All at once: each may have to wait for a CPU of the host before it comes out.
        for kick in 0..HOLD_KICKS {
            if inside().next().is_none() {
                return Ok(());
            }
            if kick >= KICKS && stop.load(SeqCst) {
                break;
            }
            inside().for_each(|id| self.kickers[id].kick());
            wait_for(|| inside().next().is_none());
        }
        inside().next().map_or(Ok(()), Err)
    }

    fn let_go(&self) {
        self.hold.store(false, SeqCst);
    }

    /// Gets all vCPUs out of the guest, whose threads were told to end, and waits until they have.
    /// False if some do not.
    pub(super) fn end(&self, threads: &[JoinHandle<()>]) -> bool {
        let over = || threads.iter().all(JoinHandle::is_finished);
        for _ in 0..KICKS {
            if over() {
                return true;
            }
            let running =
                threads.iter().zip(&self.kickers).filter(|(thread, _)| !thread.is_finished());
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
    stop: &'a AtomicBool,
    stopped: bool,
}

impl Others for OtherVcpus<'_> {
    fn stop(&mut self) -> Result<(), Outcome> {
        if !self.stopped {
            self.vcpus.hold(self.me, self.stop).map_err(|id| Outcome::Unstoppable { id })?;
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

/// Starts a thread that runs `vcpu` until the run ends. What it ended with goes to `tell`, which
/// holds two values for each vCPU; then `None`, which all others end with.
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
    // When it last came out of the guest.
    let mut out = None;
    while !shared.stop.load(SeqCst) {
        if !vcpus.enter(id) {
            // Until the vCPU that has it is done.
            drop(shared.monitor());
            continue;
        }
        if let Some(out) = out.take() {
            vcpus.outside.fetch_add(nanoseconds(out), SeqCst);
        }
        let exit = vcpu.run();
        out = Some(Instant::now());
        vcpus.leave(id);
        if let Ok(VmExit::Interrupted) = exit {
            vcpus.looked(vcpu);
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
                let mut others = OtherVcpus { vcpus, me: id, stop: &shared.stop, stopped: false };
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

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
