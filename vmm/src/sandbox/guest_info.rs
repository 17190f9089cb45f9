//! What is known about a guest: its memory regions and global variables, and its symbols.

use umbra_machine::complete::Cpu;
use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_report::symbols::Symbols;
use umbra_shadow::abi::GuestFlags;
use vm_memory::GuestAddress;

use super::Outcome;
use super::globals::Globals;
use super::location::CodeLocation;
use crate::hypercall::{CallError, Region, Regions};

/// What is known about the guest.
pub(super) struct GuestInfo {
    regions: Regions,
    globals: Globals,
    symbols: Symbols,
    /// How far it got with its checks.
    checks: Checks,
}

/// How far a guest got with its checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checks {
    /// It never called, or with another version of the interface.
    None,
    /// It found Umbra. `reports`: it will report when checks are on.
    Found { reports: bool },
    /// They are on.
    On,
}

impl GuestInfo {
    /// A guest that has reported nothing yet.
    pub(super) fn new(symbols: Symbols) -> Self {
        Self {
            regions: Regions::default(),
            globals: Globals::default(),
            symbols,
            checks: Checks::None,
        }
    }

    /// The guest's first call.
    pub(super) fn hello(&mut self, flags: GuestFlags) {
        let reports = flags.has(GuestFlags::REPORTS_ACTIVATION);
        if self.checks == Checks::None {
            self.checks = Checks::Found { reports };
        }
    }

    /// The guest's checks are on. Returns the result of the call.
    pub(super) fn activate(&mut self) -> u64 {
        self.checks = Checks::On;
        0
    }

    /// Why the guest ran unchecked, if it did.
    pub(super) fn unchecked(&self) -> Option<&'static str> {
        match self.checks {
            Checks::None => Some("it did not look for Umbra"),
            Checks::Found { reports: true } => Some("it found Umbra but never turned checks on"),
            Checks::Found { reports: false } if self.regions.is_empty() => {
                Some("it found Umbra but added no memory to check")
            }
            Checks::Found { reports: false } | Checks::On => None,
        }
    }

    /// Its regions.
    pub(super) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Its global variables.
    pub(super) fn globals(&self) -> &Globals {
        &self.globals
    }

    /// Its symbols.
    pub(super) fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// The location of the instruction at `rip`, for a message.
    pub(super) fn location(&self, rip: u64) -> String {
        self.symbols.begin();
        CodeLocation::new(rip, &self.symbols).to_string()
    }

    /// Adds a region of memory that the guest maps one to one.
    pub(super) fn add_region(&mut self, region: Region, ram_end: u64) -> Result<(), CallError> {
        self.regions.add(region, ram_end)
    }

    /// Takes back the region that was added last.
    pub(super) fn remove_last_region(&mut self) {
        self.regions.remove_last();
    }

    /// Adds virtual memory; see [`Regions::add_virtual`].
    pub(super) fn add_virtual(
        &mut self,
        va: u64,
        len: u64,
        key: impl FnOnce() -> Result<u64, CallError>,
    ) -> Result<u64, CallError> {
        self.regions.add_virtual(va, len, key)
    }

    /// Adds `count` descriptions of global variables at `va`.
    pub(super) fn add_globals(&mut self, va: u64, count: u64) -> Result<(), CallError> {
        self.globals.add(va, count)
    }

    /// The key of `len` bytes at `va`; see [`Regions::key_of`].
    pub(super) fn key(&self, va: u64, len: u64) -> Result<u64, CallError> {
        let key = self.regions.key_of(va, len.max(1));
        key.ok_or(CallError::Argument { what: "address", value: va })
    }

    /// The guest-physical address of `len` bytes of RAM at `va`. An error calls them `what`.
    pub(super) fn in_ram(
        &self,
        ram: &Ram,
        va: u64,
        len: u64,
        what: &'static str,
    ) -> Result<u64, CallError> {
        // In RAM a key is the guest-physical address.
        self.regions
            .key_of(va, len)
            .filter(|gpa| ram.contains(GuestAddress(*gpa), len))
            .ok_or(CallError::Argument { what, value: va })
    }

    /// Reads `to` from `va` in RAM or in mapped virtual memory, such as a stack there. False if it
    /// is neither.
    pub(super) fn read(
        &self,
        ram: &Ram,
        cpu: &dyn Cpu,
        va: u64,
        to: &mut [u8],
    ) -> Result<bool, Outcome> {
        let len = to.len() as u64;
        if let Ok(gpa) = self.in_ram(ram, va, len, "address") {
            return Ok(ram.read(GuestAddress(gpa), to).is_ok());
        }
        if self.regions.key_of(va, len).is_none() {
            return Ok(false);
        }
        Ok(AddressSpace::new(&cpu.sregs()?).read(ram, va, to).is_ok())
    }
}
