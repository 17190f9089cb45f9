//! The vCPUs of a run, as other threads see them: how they are paused and ended.
//!
//! **Pausing.** Some work must not happen while the guest runs: reports, reclaiming memory. The
//! vCPU that handles an exit does it, or the collector, and holds the state's lock. It sets `hold`,
//! kicks the vCPUs that are inside the guest, and waits for them ([`Vcpus::pause`]). Each vCPU
//! marks itself as inside *before* it reads `hold`. So either it sees `hold` and stays out, or it
//! is seen inside and kicked. Those that are out wait for the lock, which is free once the work is
//! done.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use umbra_machine::kick::Kicker;
use umbra_machine::vcpu::Vcpu;

use super::end_state::EndState;

/// Time between two kicks.
const RETRY: Duration = Duration::from_millis(5);
/// Most kicks for a vCPU that does not come out at the end of a run: some seconds' worth, then it
/// is left behind. A number and not a time, so that a suspended host does not count.
const KICKS: u32 = 400;
/// Most kicks for a vCPU that is to be paused, after which the run ends. A host with far more to do
/// than it has CPUs may take that long.
const PAUSE_KICKS: u32 = 10 * KICKS;
/// Polls before the first sleep.
const POLLS: u32 = 16;
/// Sleep between two polls.
const POLL_SLEEP: Duration = Duration::from_micros(50);

/// The vCPUs, as other threads see them.
pub(super) struct Vcpus {
    kickers: Vec<Kicker>,
    /// Whether each is in the guest, or on its way there.
    inside: Vec<AtomicBool>,
    /// All have to stay out. Set and cleared under the state's lock.
    hold: AtomicBool,
    /// Number of the last check whether they halted for good.
    halt_checks: AtomicU64,
    /// For each vCPU the last check at which it had halted, and its instruction pointer.
    halted: Vec<Mutex<(u64, u64)>>,
    /// The state of each when its thread ended.
    ends: Vec<Mutex<Option<EndState>>>,
    /// Nanoseconds that the threads spent outside of the guest.
    outside: AtomicU64,
    /// Nanoseconds of the host's CPUs that the threads used which have ended.
    cpu_time: AtomicU64,
    /// The same of the collector.
    collector_cpu_time: AtomicU64,
    /// Pauses. Changed under the state's lock.
    pauses: Mutex<Pauses>,
    /// Times that a thread with an exit waited for the state. Changed under its lock.
    waits: Mutex<Pauses>,
    /// One of them, or the collector, has ended the run. Set and read under the state's lock.
    ended: AtomicBool,
}

/// The pauses of a run, or its waits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pauses {
    pub(super) count: u64,
    /// All of them together.
    pub(super) all: Duration,
    pub(super) longest: Duration,
}

impl Pauses {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.all += time;
        self.longest = self.longest.max(time);
    }
}

impl Vcpus {
    pub(super) fn new(vcpus: &[Vcpu]) -> Self {
        Self {
            kickers: vcpus.iter().map(Vcpu::kicker).collect(),
            inside: vcpus.iter().map(|_| AtomicBool::new(false)).collect(),
            hold: AtomicBool::new(false),
            halt_checks: AtomicU64::new(0),
            halted: vcpus.iter().map(|_| Mutex::default()).collect(),
            ends: vcpus.iter().map(|_| Mutex::default()).collect(),
            outside: AtomicU64::new(0),
            cpu_time: AtomicU64::new(0),
            collector_cpu_time: AtomicU64::new(0),
            pauses: Mutex::default(),
            waits: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    /// Makes each vCPU come out and check whether it has halted for good.
    pub(super) fn check_halted(&self) {
        self.halt_checks.fetch_add(1, SeqCst);
        self.kickers.iter().for_each(Kicker::kick);
    }

    /// The first vCPU's instruction pointer, if at the last check all of them had halted for good.
    pub(super) fn halted_for_good(&self) -> Option<u64> {
        let check = self.halt_checks.load(SeqCst);
        let mut all =
            self.halted.iter().map(|state| *state.lock().unwrap_or_else(PoisonError::into_inner));
        let (first, rip) = all.next()?;
        (check > 0 && first == check && all.all(|(at, _)| at == check)).then_some(rip)
    }

    /// A vCPU's part of a check.
    pub(super) fn note_halted(&self, vcpu: &Vcpu) {
        if let Some(rip) = vcpu.halted_for_good()
            && let Some(state) = self.halted.get(usize::from(vcpu.id()))
        {
            *state.lock().unwrap_or_else(PoisonError::into_inner) =
                (self.halt_checks.load(SeqCst), rip);
        }
    }

    /// The thread of a vCPU ends.
    pub(super) fn note_end(&self, id: usize, state: Option<EndState>) {
        if let Some(end) = self.ends.get(id) {
            *end.lock().unwrap_or_else(PoisonError::into_inner) = state;
        }
    }

    /// The states of the vCPUs whose threads have ended, with their numbers.
    pub(super) fn ends(&self) -> impl Iterator<Item = (u8, EndState)> {
        let ends = self.ends.iter().map(|end| *end.lock().unwrap_or_else(PoisonError::into_inner));
        (0..).zip(ends).filter_map(|(id, end)| Some((id, end?)))
    }

    /// The time that all threads together spent outside of the guest.
    pub(super) fn outside(&self) -> Duration {
        Duration::from_nanos(self.outside.load(SeqCst))
    }

    /// Adds time that a thread spent outside of the guest.
    pub(super) fn add_outside(&self, time: Duration) {
        self.outside.fetch_add(nanoseconds(time), SeqCst);
    }

    /// The CPU time of the threads that have ended.
    pub(super) fn cpu_time(&self) -> Duration {
        Duration::from_nanos(self.cpu_time.load(SeqCst))
    }

    /// A thread ends that used so much CPU time.
    pub(super) fn add_cpu_time(&self, time: Duration) {
        self.cpu_time.fetch_add(nanoseconds(time), SeqCst);
    }

    /// The CPU time of the collector's thread, once that has ended.
    pub(super) fn collector_cpu_time(&self) -> Duration {
        Duration::from_nanos(self.collector_cpu_time.load(SeqCst))
    }

    /// The collector's thread ends, which used so much CPU time.
    pub(super) fn set_collector_cpu_time(&self, time: Duration) {
        self.collector_cpu_time.store(nanoseconds(time), SeqCst);
    }

    /// The pauses so far.
    pub(super) fn pauses(&self) -> Pauses {
        *self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pause is over.
    pub(super) fn add_pause(&self, time: Duration) {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner).add(time);
    }

    /// The waits for the state so far.
    pub(super) fn waits(&self) -> Pauses {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread with an exit has waited for the state.
    pub(super) fn add_wait(&self, time: Duration) {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).add(time);
    }

    /// Whether a thread has ended the run. Called under the state's lock.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(SeqCst)
    }

    /// A thread has ended the run. Called under the state's lock.
    pub(super) fn set_ended(&self) {
        self.ended.store(true, SeqCst);
    }

    /// Whether vCPU `id` may enter the guest now. If so it counts as inside until [`Self::leave`].
    pub(super) fn enter(&self, id: usize) -> bool {
        self.inside[id].store(true, SeqCst);
        let may = !self.hold.load(SeqCst);
        if !may {
            self.leave(id);
        }
        may
    }

    pub(super) fn leave(&self, id: usize) {
        self.inside[id].store(false, SeqCst);
    }

    /// Gets all vCPUs, but `me` if that is one, out of the guest and keeps them out until
    /// [`Self::resume`]. The error is the number of one that does not come out. If the run is to
    /// `stop`, fewer kicks are sent.
    pub(super) fn pause(&self, me: Option<usize>, stop: &AtomicBool) -> Result<(), usize> {
        self.hold.store(true, SeqCst);
        let others = || self.inside.iter().enumerate().filter(|(id, _)| Some(*id) != me);
        let inside = || others().filter(|(_, inside)| inside.load(SeqCst)).map(|(id, _)| id);
        // All at once, since each may have to wait for a CPU of the host.
        for kick in 0..PAUSE_KICKS {
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

    pub(super) fn resume(&self) {
        self.hold.store(false, SeqCst);
    }

    /// Gets all vCPUs out of the guest and waits until `threads` have ended, of which theirs are
    /// the first. Returns false if some have not.
    pub(super) fn end(&self, threads: &[JoinHandle<()>]) -> bool {
        let done = || threads.iter().all(JoinHandle::is_finished);
        for _ in 0..KICKS {
            if done() {
                return true;
            }
            let running =
                threads.iter().zip(&self.kickers).filter(|(thread, _)| !thread.is_finished());
            running.for_each(|(_, kicker)| kicker.kick());
            wait_for(done);
        }
        done()
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Waits until `done`, at most for the time between two kicks.
fn wait_for(done: impl Fn() -> bool) {
    let begin = Instant::now();
    // The other thread may need this CPU.
    for _ in 0..POLLS {
        if done() {
            return;
        }
        thread::yield_now();
    }
    while !done() && begin.elapsed() < RETRY {
        thread::sleep(POLL_SLEEP);
    }
}
