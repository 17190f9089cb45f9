//! The CPUID leaves by which a guest finds Umbra.

use umbra_machine::cpuid::CpuidLeaf;
use umbra_machine::stats::time_stamps_are_in_step;
use umbra_shadow::abi::{self, CPUID_FIRST, CPUID_STEP, Features, PORT, Redzone};

use super::ShadowMode;
use crate::shadow::{Layout, Notify};

/// The features of a run.
pub(super) fn features(mode: ShadowMode, notify: Notify) -> Features {
    let notify = match notify {
        Notify::Ring => Features::RING | Features::DOORBELL,
        Notify::Sync => Features::SYNC,
    };
    match mode {
        ShadowMode::PerPage => Features::PER_PAGE | notify,
        ShadowMode::Full => Features::FULL | notify,
        ShadowMode::Off => Features::default(),
    }
}

/// Settings of the guest's runtime.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Settings {
    /// Bytes of the quarantine; 0 for none.
    pub quarantine: u64,
    /// Bytes that a CPU may put into it between two drains.
    pub quarantine_batch: u64,
    /// Size of the redzone behind each object.
    pub redzone: Redzone,
    /// What the stamps of records are: [`stamps`].
    pub stamps: Features,
}

/// What the stamps of records are in a guest of so many CPUs: time stamp counters, if the host's
/// are in step. Where it emulates ring 0 there is no fence.
pub(super) fn stamps(cpus: u8, emulated: bool) -> Features {
    if cpus == 1 {
        return Features::STAMPS_TSC;
    }
    if !emulated && time_stamps_are_in_step() {
        return Features::STAMPS_TSC | Features::STAMPS_FENCED;
    }
    log::info!("the CPUs' time stamp counters are not used: findings tell no times");
    Features::default()
}

/// The leaves, one block beyond KVM's own; see [`umbra_shadow::abi`].
pub(super) fn leaves(
    mode: ShadowMode,
    notify: Notify,
    settings: Settings,
    layout: &Layout,
) -> Vec<CpuidLeaf> {
    let base = CPUID_FIRST + CPUID_STEP;
    let offered = match mode {
        // Guests take any feature for a reason to start.
        ShadowMode::Off => Features::default(),
        _ => features(mode, notify) | settings.stamps,
    };
    let leaf =
        |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuidLeaf { function, eax, ebx, ecx, edx };
    let window =
        |gpa: u64, bytes: u64| [gpa as u32, (gpa >> 32) as u32, bytes as u32, (bytes >> 32) as u32];
    let page = if mode == ShadowMode::PerPage {
        window(layout.page.gpa, layout.page.bytes)
    } else {
        [0; 4]
    };
    let byte =
        if mode == ShadowMode::Off { [0; 4] } else { window(layout.byte.gpa, layout.byte.bytes) };
    let keys = if mode == ShadowMode::Off { 0 } else { layout.virtual_bytes() };
    let settings = match mode {
        ShadowMode::Off => [0, Redzone::Off.to_register(), 0, 0],
        _ => [
            settings.quarantine_batch as u32,
            settings.redzone.to_register(),
            settings.quarantine as u32,
            (settings.quarantine >> 32) as u32,
        ],
    };
    let patterns = match (mode, notify) {
        (ShadowMode::Off, _) | (_, Notify::Sync) => [0; 4],
        _ => window(layout.patterns.gpa, layout.patterns.bytes),
    };
    let [s0, s1, s2] = abi::CPUID_SIGNATURE;
    vec![
        leaf(base, [base + abi::CPUID_LEAF_PATTERNS, s0, s1, s2]),
        leaf(base + abi::CPUID_LEAF_FEATURES, [abi::VERSION, u32::from(PORT), offered.bits(), 0]),
        leaf(base + abi::CPUID_LEAF_PAGE_WINDOW, page),
        leaf(base + abi::CPUID_LEAF_BYTE_WINDOW, byte),
        leaf(base + abi::CPUID_LEAF_VIRTUAL, [keys as u32, (keys >> 32) as u32, 0, 0]),
        leaf(base + abi::CPUID_LEAF_SETTINGS, settings),
        leaf(base + abi::CPUID_LEAF_PATTERNS, patterns),
    ]
}
