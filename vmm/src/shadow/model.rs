//! The model of `umbra-shadow` for a run, over host memory.

use umbra_shadow::{Full, RangeError, Shadow, TwoLevel, Violation};

use super::memory::ShadowBacking;

/// Either model.
#[derive(Debug)]
pub enum Model {
    /// Page shadow, and byte shadow where it is needed.
    PerPage(TwoLevel<ShadowBacking>),
    /// Byte shadow for everything.
    Full(Full<ShadowBacking>),
}

impl Model {
    /// The model that fits `shadow`.
    pub(super) fn new(shadow: ShadowBacking) -> Self {
        match shadow.page {
            Some(_) => Self::PerPage(TwoLevel::new(shadow)),
            None => Self::Full(Full::new(shadow)),
        }
    }

    pub(super) fn memory_mut(&mut self) -> &mut ShadowBacking {
        match self {
            Self::PerPage(model) => model.memory_mut(),
            Self::Full(model) => model.memory_mut(),
        }
    }
}

impl Shadow for Model {
    type Memory = ShadowBacking;

    fn memory(&self) -> &ShadowBacking {
        match self {
            Self::PerPage(model) => model.memory(),
            Self::Full(model) => model.memory(),
        }
    }

    fn poison(&mut self, addr: u64, len: u64, code: u8) -> Result<(), RangeError> {
        match self {
            Self::PerPage(model) => model.poison(addr, len, code),
            Self::Full(model) => model.poison(addr, len, code),
        }
    }

    fn unpoison(&mut self, addr: u64, len: u64) -> Result<(), RangeError> {
        match self {
            Self::PerPage(model) => model.unpoison(addr, len),
            Self::Full(model) => model.unpoison(addr, len),
        }
    }

    fn promote(&mut self, addr: u64, len: u64) -> Result<(), RangeError> {
        match self {
            Self::PerPage(model) => model.promote(addr, len),
            Self::Full(model) => model.promote(addr, len),
        }
    }

    fn check(&self, addr: u64, len: u64) -> Result<(), Violation> {
        match self {
            Self::PerPage(model) => model.check(addr, len),
            Self::Full(model) => model.check(addr, len),
        }
    }

    fn passes_at_once(&self, addr: u64, len: u64) -> bool {
        match self {
            Self::PerPage(model) => model.passes_at_once(addr, len),
            Self::Full(model) => model.passes_at_once(addr, len),
        }
    }

    fn state(&self, addr: u64) -> u8 {
        match self {
            Self::PerPage(model) => model.state(addr),
            Self::Full(model) => model.state(addr),
        }
    }
}
