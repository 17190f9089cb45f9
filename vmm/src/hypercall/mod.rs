//! Decodes a guest's calls: registers become a typed [`Call`], or the error that the guest gets.
//!
//! Everything that does not depend on the state of the run is checked here. The handler checks the
//! rest: whether memory lies in a region, and whether the call fits the mode.

mod regions;
#[cfg(test)]
mod tests;

use umbra_shadow::abi::{self, CallNumber, ExitReason, GuestFlags, MemoryUse, NameKind, Owner};
use umbra_shadow::codes::POISON_MIN;

use crate::shadow::TableError;

pub use self::regions::{Region, Regions};
pub use umbra_shadow::abi::{Access, Actor, Slot};

/// A call that may be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The guest speaks this version of the ABI.
    Hello {
        /// Its flags.
        flags: GuestFlags,
    },
    /// Virtual memory that maps guest-physical memory one to one.
    RegionAdd(Region),
    /// A ring of events.
    RingSetup(RingPlace),
    /// Drain a CPU's ring.
    RingDrain {
        /// The CPU.
        cpu: u16,
        /// Room for a list of objects to evict, if the guest wants one.
        released: Option<EvictionBuffer>,
    },
    /// Make memory inaccessible.
    Poison {
        /// Virtual address.
        va: u64,
        /// Bytes; may be 0.
        len: u64,
        /// The poison code, at least [`POISON_MIN`].
        code: u8,
    },
    /// Make memory accessible.
    Unpoison {
        /// Virtual address.
        va: u64,
        /// Bytes; may be 0.
        len: u64,
        /// Whether it begins (or ceases) to be a stack; none for no change.
        stack: Option<bool>,
    },
    /// Memory was allocated.
    Allocated {
        /// Virtual address.
        va: u64,
        /// Bytes; may be 0.
        size: u64,
        /// The cache, 0 for none.
        cache: u16,
        /// The task that did it.
        actor: Actor,
        /// The slot that starts with it, if the VMM is to change the shadow.
        slot: Option<Slot>,
    },
    /// Memory was freed.
    Freed {
        /// Virtual address.
        va: u64,
        /// The task that did it.
        actor: Actor,
        /// The slot that becomes inaccessible, if the VMM is to change the shadow.
        slot: Option<Slot>,
        /// The owner that gets it when it is evicted from the quarantine; none if it does not go
        /// there.
        owner: Option<Owner>,
    },
    /// Checks are on.
    Activate,
    /// A module is described at `va`.
    Module {
        /// Virtual address.
        va: u64,
    },
    /// A violation.
    Report(BadAccess),
    /// A name, `len` bytes (at most [`abi::NAME_MAX`]) at `va`.
    Name {
        /// What it is for.
        what: Named,
        /// Virtual address.
        va: u64,
        /// Bytes; may be 0.
        len: u64,
    },
    /// Give `len` bytes (not 0) of virtual memory at `va` their own shadow. Both are multiples of
    /// 4096.
    VirtualAdd {
        /// Virtual address.
        va: u64,
        /// Bytes.
        len: u64,
    },
    /// The guest is done.
    Exit(Exit),
    /// `count` (1 to [`abi::GLOBALS_MAX`]) descriptions of globals at `va`.
    Globals {
        /// Virtual address.
        va: u64,
        /// How many.
        count: u64,
    },
    /// Evict objects from the quarantine.
    Quarantine {
        /// Room for the list.
        to: EvictionBuffer,
        /// Evict everything, not only what is over the limit.
        all: bool,
    },
    /// Give the entry of the guest's top-level page table for a slot.
    TopLevel {
        /// The slot.
        slot: u16,
    },
    /// Work was queued that has to do with the object at an address.
    Related {
        /// Virtual address.
        va: u64,
        /// The task that queued it.
        actor: Actor,
    },
}

/// Where a CPU's ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Virtual address of the header, a multiple of 64.
    pub va: u64,
    /// Records that fit, 1 to [`abi::RING_MAX_RECORDS`]; they start 64 bytes behind `va`.
    pub records: u64,
    /// The CPU that writes it.
    pub cpu: u16,
    /// What the frames of its records are relative to.
    pub text_base: u64,
}

impl RingPlace {
    fn decode(va: u64, bytes: u64, cpu_number: u64, text_base: u64) -> Result<Self, CallError> {
        if !va.is_multiple_of(abi::RECORD_BYTES) {
            return Err(wrong("ring address", va));
        }
        let records = (bytes / abi::RECORD_BYTES).saturating_sub(1);
        if !bytes.is_multiple_of(abi::RECORD_BYTES)
            || !(1..=abi::RING_MAX_RECORDS).contains(&records)
        {
            return Err(wrong("ring size", bytes));
        }
        range("ring address", va, bytes)?;
        Ok(Self { va, records, cpu: cpu(cpu_number)?, text_base })
    }
}

/// An access or a free that the guest's checks found wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAccess {
    /// Any address, the one of the access.
    pub address: u64,
    /// Any number of bytes; may go past the end of the address space.
    pub size: u64,
    /// What was tried.
    pub access: Access,
    /// The task and the CPU that tried it.
    pub actor: Actor,
    /// The instruction after the access.
    pub ip: u64,
}

/// Room for a list of evicted objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvictionBuffer {
    /// Virtual address.
    pub va: u64,
    /// How many fit, at most [`abi::RELEASED_MAX`]; may be 0.
    pub count: u64,
}

impl EvictionBuffer {
    fn new(va: u64, count: u64) -> Result<Self, CallError> {
        if count > abi::RELEASED_MAX {
            return Err(wrong("number of released objects", count));
        }
        range("address of released objects", va, count * abi::RELEASED_BYTES)?;
        Ok(Self { va, count })
    }
}

/// Decodes the slot at `va`; 0 is none.
fn slot_at(va: u64, value: u64) -> Result<Option<Slot>, CallError> {
    let Some(slot) = Slot::from_register(value) else { return Ok(None) };
    if slot.bytes == 0 || slot.code < POISON_MIN {
        return Err(wrong("slot", value));
    }
    range("slot", va, slot.bytes)?;
    Ok(Some(slot))
}

/// What a name is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// A cache.
    Cache {
        /// Its id.
        id: u16,
        /// Bytes of one object slot.
        object_size: u64,
    },
    /// A task.
    Task {
        /// Its id.
        id: u32,
    },
}

impl Named {
    fn decode(kind: u64, id: u32, object_size: u64) -> Result<Self, CallError> {
        Ok(match NameKind::try_from(kind).map_err(|kind| wrong("name kind", kind))? {
            NameKind::Cache => Self::Cache {
                id: u16::try_from(id).map_err(|_| wrong("cache id", id.into()))?,
                object_size,
            },
            NameKind::Task => Self::Task { id },
        })
    }
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It is done.
    Done {
        /// Whether it failed.
        failed: bool,
    },
    /// It panicked.
    Panic,
    /// A CPU exception that it did not handle.
    Fault {
        /// The exception.
        vector: u32,
        /// Its error code.
        error: u32,
        /// The instruction.
        rip: u64,
        /// The faulting address.
        address: u64,
    },
}

impl Exit {
    fn decode(reason: u64, first: u64, second: u64, third: u64) -> Result<Self, CallError> {
        match ExitReason::try_from(reason) {
            Ok(ExitReason::Done) => Ok(Self::Done { failed: first != 0 }),
            Ok(ExitReason::Panic) => Ok(Self::Panic),
            Ok(ExitReason::Fault) => Ok(Self::Fault {
                vector: first as u32,
                error: (first >> 32) as u32,
                rip: second,
                address: third,
            }),
            Err(reason) => Err(wrong("exit reason", reason)),
        }
    }
}

/// Why a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No such call.
    #[error("there is no call {0}")]
    Unknown(u32),
    /// An argument is wrong.
    #[error("{what} {value:#x} is out of range, misaligned or not in a region")]
    Argument {
        /// Which argument.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The guest speaks another version of the ABI.
    #[error("the guest speaks version {0} of the ABI, not {version}", version = abi::VERSION)]
    Version(u64),
    /// The call does not belong to the mode of the run.
    #[error("call {0} does not belong to the mode of this run")]
    Mode(u32),
    /// A region does not fit into the page tables of the check shadow.
    #[error("no check shadow: {0}")]
    Tables(TableError),
    /// A table is full.
    #[error("more than {max} {what}")]
    Limit {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        max: u64,
    },
}

impl CallError {
    /// What the guest gets in `rax`.
    pub fn result(&self) -> u64 {
        match self {
            Self::Unknown(_) => abi::ERR_CALL,
            Self::Argument { .. } | Self::Tables(_) => abi::ERR_ARGUMENT,
            Self::Version(_) => abi::ERR_VERSION,
            Self::Mode(_) => abi::ERR_MODE,
            Self::Limit { .. } => abi::ERR_LIMIT,
        }
    }
}

/// Shorthand for a wrong argument.
const fn wrong(what: &'static str, value: u64) -> CallError {
    CallError::Argument { what, value }
}

impl Call {
    /// Decodes call `number` with the arguments in `rdi`, `rsi`, `rcx` and `r8`.
    ///
    /// # Errors
    /// What the guest gets: there is no such call, or an argument is wrong.
    pub fn decode(number: u32, rdi: u64, rsi: u64, rcx: u64, r8: u64) -> Result<Self, CallError> {
        let call = CallNumber::try_from(number).map_err(CallError::Unknown)?;
        Ok(match call {
            CallNumber::Hello if rdi == u64::from(abi::VERSION) => {
                Self::Hello { flags: GuestFlags::from_bits(rsi) }
            }
            CallNumber::Hello => return Err(CallError::Version(rdi)),
            CallNumber::Module => {
                range("address of a module", rdi, abi::MODULE_INFO_BYTES)?;
                Self::Module { va: rdi }
            }
            CallNumber::RegionAdd => Self::RegionAdd(Region::new(rdi, rsi, rcx)?),
            CallNumber::RingSetup => Self::RingSetup(RingPlace::decode(rdi, rsi, rcx, r8)?),
            CallNumber::RingDrain => {
                let released = if rcx == 0 { None } else { Some(EvictionBuffer::new(rsi, rcx)?) };
                Self::RingDrain { cpu: cpu(rdi)?, released }
            }
            CallNumber::Poison => {
                range("address", rdi, rsi)?;
                let code = u8::try_from(rcx).ok().filter(|code| *code >= POISON_MIN);
                Self::Poison { va: rdi, len: rsi, code: code.ok_or(wrong("poison code", rcx))? }
            }
            CallNumber::Unpoison => {
                range("address", rdi, rsi)?;
                let stack = match MemoryUse::try_from(rcx) {
                    Ok(MemoryUse::Unchanged) => None,
                    Ok(MemoryUse::Stack) => Some(true),
                    Ok(MemoryUse::NotStack) => Some(false),
                    Err(value) => return Err(wrong("use of memory", value)),
                };
                Self::Unpoison { va: rdi, len: rsi, stack }
            }
            CallNumber::Allocated => {
                range("address", rdi, rsi)?;
                let slot = slot_at(rdi, r8)?;
                Self::Allocated {
                    va: rdi,
                    size: rsi,
                    cache: rcx as u16,
                    actor: Actor::from_register(rcx),
                    slot,
                }
            }
            CallNumber::Freed => {
                let slot = slot_at(rdi, r8)?;
                Self::Freed {
                    va: rdi,
                    actor: Actor::from_register(rcx),
                    slot,
                    owner: Owner::from_bits(rcx as u16),
                }
            }
            CallNumber::Report => Self::Report(BadAccess {
                address: rdi,
                size: rsi,
                access: Access::try_from(rcx as u16)
                    .map_err(|number| wrong("access", number.into()))?,
                actor: Actor::from_register(rcx),
                ip: r8,
            }),
            CallNumber::Name => {
                let (len, id) = (rcx & 0xffff_ffff, (rcx >> 32) as u32);
                if len > abi::NAME_MAX {
                    return Err(wrong("name length", len));
                }
                range("name address", rsi, len)?;
                Self::Name { what: Named::decode(rdi, id, r8)?, va: rsi, len }
            }
            CallNumber::Exit => Self::Exit(Exit::decode(rdi, rsi, rcx, r8)?),
            CallNumber::Globals => {
                if !(1..=abi::GLOBALS_MAX).contains(&rsi) {
                    return Err(wrong("number of globals", rsi));
                }
                range("address of globals", rdi, rsi * abi::GLOBAL_BYTES)?;
                Self::Globals { va: rdi, count: rsi }
            }
            CallNumber::VirtualAdd => {
                // Its key takes the place of guest-physical memory later.
                let region = Region::new(rdi, rsi, 0)?;
                let (va, len) = (region.va(), region.bytes());
                Self::VirtualAdd { va, len }
            }
            CallNumber::Quarantine => {
                Self::Quarantine { to: EvictionBuffer::new(rsi, rcx)?, all: rdi != 0 }
            }
            CallNumber::Activate => Self::Activate,
            CallNumber::TopLevel => {
                let slot = u16::try_from(rdi).ok().filter(|slot| *slot < 512);
                Self::TopLevel { slot: slot.ok_or(wrong("top-level slot", rdi))? }
            }
            CallNumber::Related => Self::Related { va: rdi, actor: Actor::from_register(rcx) },
        })
    }
}

/// Refuses a range that goes past the end of the address space.
fn range(what: &'static str, start: u64, len: u64) -> Result<(), CallError> {
    match start.checked_add(len.saturating_sub(1)) {
        Some(_) => Ok(()),
        None => Err(wrong(what, start)),
    }
}

/// A CPU number that fits all calls and records.
fn cpu(value: u64) -> Result<u16, CallError> {
    u16::try_from(value).map_err(|_| wrong("CPU", value))
}
