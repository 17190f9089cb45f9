//! What a run counts: exits, and events of the guest's allocators.

use std::collections::BTreeMap;

use serde::Serialize;

/// Exits by kind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ExitStats {
    /// All of them.
    pub total: u64,
    /// Hypercalls.
    pub hypercall: u64,
    /// First touches of byte shadow.
    pub shadow_fault: u64,
    /// Ports other than the hypercall's.
    pub io: u64,
    /// Guest-physical addresses that are neither memory nor shadow.
    pub mmio: u64,
    /// Instructions that KVM refused and Umbra completed, by mnemonic.
    pub completed: BTreeMap<&'static str, u64>,
}

/// Events of the guest's allocators.
#[derive(Clone, Debug, Default, Serialize)]
pub struct EventStats {
    /// Allocations.
    pub allocations: u64,
    /// Frees.
    pub frees: u64,
    /// Drains, of all rings at once, for a CPU that waited or with all CPUs stopped.
    pub ring_drains: u64,
    /// Records that were read while their CPUs ran on.
    pub collected: u64,
    /// Refused events and calls: their values make no sense, or a table is full.
    pub refused: u64,
}
