//! Umbra: boots an x86_64 kernel as a KVM guest, keeps its shadow memory outside of it, and reports its
//! memory errors.

pub mod report;
