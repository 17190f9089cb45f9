//! This run's settings: quarantine and redzones.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use umbra_shadow::abi::{Features, Redzone};

use crate::host::{self, Host};
use crate::stamp;

static BATCH: AtomicU64 = AtomicU64::new(0);
static DOORBELL: AtomicBool = AtomicBool::new(false);
static REDZONE: AtomicU32 = AtomicU32::new(UNKNOWN);
/// The VMM's setting was not read yet.
const UNKNOWN: u32 = u32::MAX;

/// Takes the settings over from the VMM, if there is one that keeps shadow.
pub fn set(host: Option<&Host>) {
    let host = host.filter(|host| host.features.has(Features::SHADOW));
    stamp::set(host.map_or(Features::default(), |host| host.features));
    DOORBELL.store(host.is_some_and(|host| host.features.has(Features::DOORBELL)), Relaxed);
    BATCH.store(host.map_or(0, |host| host.quarantine_batch), Relaxed);
    REDZONE.store(host.map_or(Redzone::Off, |host| host.redzone).to_register(), Relaxed);
}

/// Bytes that a CPU may put into the quarantine between two drains. 0 if there is no quarantine.
#[inline(always)]
pub fn batch() -> u64 {
    BATCH.load(Relaxed)
}

/// Whether the VMM reads rings while their CPUs run on.
pub fn has_doorbell() -> bool {
    DOORBELL.load(Relaxed)
}

/// Bytes of redzone behind an object. By default KASAN's (`optimal_redzone`, `mm/kasan/common.c`):
/// objects with their redzones fill 32, 64, 128, ... bytes. A redzone is a quarter of that, or less
/// behind large ones.
///
/// The setting holds for the whole run, also before checks are on: an allocator may compute it
/// again when the object is freed.
pub fn redzone_of(object: u64) -> u64 {
    /// Bytes of an object with its redzone, at most, and of the redzone.
    const ADAPTIVE: [(u64, u64); 7] = [
        (64, 16),
        (128, 32),
        (512, 64),
        (4096, 128),
        (1 << 14, 256),
        (1 << 15, 512),
        (1 << 16, 1024),
    ];
    if REDZONE.load(Relaxed) == UNKNOWN {
        set(host::discover().as_ref());
    }
    match Redzone::from_register(REDZONE.load(Relaxed)) {
        Redzone::Off => 0,
        Redzone::Adaptive => ADAPTIVE
            .iter()
            .find(|(room, redzone)| object <= room - redzone)
            .map_or(2048, |fits| fits.1),
        Redzone::Bytes(bytes) => bytes.into(),
    }
}
