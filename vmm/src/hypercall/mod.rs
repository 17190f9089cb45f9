//! A guest's calls, decoded: numbers in registers become a typed [`Call`], or the error that the
//! guest gets.
//!
//! Everything that can be said about a call without the state of the run is checked here. What
//! needs state (whether memory lies in a region, whether the call fits the mode) is left to the
//! handler.

mod regions;
#[cfg(test)]
mod tests;

use umbra_shadow::{
    abi::{self, access, call, exit, memory, name},
    codes::POISON_MIN,
};

pub use self::regions::{Region, Regions};

/// A call that may be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The guest speaks this version of the ABI.
    Hello {
        /// [`abi::hello`] bits.
        flags: u64,
    },
    /// Virtual memory that maps guest-physical memory one to one.
    RegionAdd(Region),
    /// A ring of events.
    RingSetup(RingPlace),
    /// Take all records out of a CPU's ring.
    RingDrain {
        /// The CPU.
        cpu: u16,
        /// Where to put what is due to leave the quarantine, if it fetches that too.
        released: Option<Array>,
    },
    /// Make memory inaccessible.
    Poison {
        /// Virtual address.
        va: u64,
        /// Bytes; may be 0.
        len: u64,
        /// Why, at least [`POISON_MIN`].
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
        /// Who did it.
        actor: Actor,
        /// The slot that it lies at the start of, if the shadow shall change.
        slot: Option<Slot>,
    },
    /// Memory was freed.
    Freed {
        /// Virtual address.
        va: u64,
        /// Who did it.
        actor: Actor,
        /// The slot that becomes inaccessible, if the shadow shall change.
        slot: Option<Slot>,
        /// Not 0 if it goes into the quarantine ([`abi::wait`]).
        wait: u16,
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
    /// `len` bytes (not 0) of virtual memory at `va`, both multiples of 4096, shall have shadow of
    /// their own.
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
    /// Take memory out of the quarantine.
    Quarantine {
        /// Where to put it.
        to: Array,
        /// All of it, not only what is due.
        all: bool,
    },
    /// Work was made that has to do with the object at an address.
    Related {
        /// Virtual address.
        va: u64,
        /// Who made it.
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
pub struct Array {
    /// Virtual address.
    pub va: u64,
    /// How many fit, at most [`abi::RELEASED_MAX`]; may be 0.
    pub count: u64,
}

impl Array {
    fn new(va: u64, count: u64) -> Result<Self, CallError> {
        if count > abi::RELEASED_MAX {
            return Err(wrong("number of released objects", count));
        }
        range("address of released objects", va, count * abi::RELEASED_BYTES)?;
        Ok(Self { va, count })
    }
}

/// An allocator's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its bytes, at least 1.
    pub bytes: u64,
    /// What poisons the part of it that is not allocated, at least [`POISON_MIN`].
    pub code: u8,
}

impl Slot {
    /// Decodes the slot at `va`; 0 is none.
    fn from_register(va: u64, value: u64) -> Result<Option<Self>, CallError> {
        if value == 0 {
            return Ok(None);
        }
        let (bytes, code) = (value & abi::SLOT_BYTES_MAX, (value >> 56) as u8);
        if bytes == 0 || code < POISON_MIN {
            return Err(wrong("slot", value));
        }
        range("slot", va, bytes)?;
        Ok(Some(Self { bytes, code }))
    }
}

/// Who did something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Actor {
    /// The guest's number of the CPU.
    pub cpu: u16,
    /// The guest's task id.
    pub task: u32,
}

impl Actor {
    fn from_register(value: u64) -> Self {
        Self { cpu: (value >> 16) as u16, task: (value >> 32) as u32 }
    }
}

/// What a reported access was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// A free of memory that is free already.
    DoubleFree,
    /// A free of an address that is not the start of an allocation.
    InvalidFree,
}

impl Access {
    /// The access with a number of the ABI ([`access`]).
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            access::READ => Some(Self::Read),
            access::WRITE => Some(Self::Write),
            access::DOUBLE_FREE => Some(Self::DoubleFree),
            access::INVALID_FREE => Some(Self::InvalidFree),
            _ => None,
        }
    }

    /// Its number in the ABI.
    pub const fn number(self) -> u16 {
        match self {
            Self::Read => access::READ,
            Self::Write => access::WRITE,
            Self::DoubleFree => access::DOUBLE_FREE,
            Self::InvalidFree => access::INVALID_FREE,
        }
    }
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

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It has done what it was to do.
    Done {
        /// Whether that went wrong.
        failed: bool,
    },
    /// It panicked.
    Panic,
    /// A CPU exception it had no answer to.
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
    /// A table is full.
    #[error("more than {most} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How many may be.
        most: u64,
    },
}

impl CallError {
    /// What the guest gets in `rax`.
    pub fn result(&self) -> u64 {
        match self {
            Self::Unknown(_) => abi::ERR_CALL,
            Self::Argument { .. } => abi::ERR_ARGUMENT,
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
    pub fn decode(number: u32, rdi: u64, rsi: u64, rcx: u64, r8: u64) -> Result<Self, CallError> {
        Ok(match number {
            call::HELLO if rdi == u64::from(abi::VERSION) => Self::Hello { flags: rsi },
            call::HELLO => return Err(CallError::Version(rdi)),
            call::REGION_ADD => Self::RegionAdd(Region::new(rdi, rsi, rcx)?),
            call::RING_SETUP => {
                if !rdi.is_multiple_of(abi::RECORD_BYTES) {
                    return Err(wrong("ring address", rdi));
                }
                let records = (rsi / abi::RECORD_BYTES).saturating_sub(1);
                if !rsi.is_multiple_of(abi::RECORD_BYTES)
                    || !(1..=abi::RING_MAX_RECORDS).contains(&records)
                {
                    return Err(wrong("ring size", rsi));
                }
                range("ring address", rdi, rsi)?;
                Self::RingSetup(RingPlace { va: rdi, records, cpu: cpu(rcx)?, text_base: r8 })
            }
            call::RING_DRAIN => {
                let released = if rcx == 0 { None } else { Some(Array::new(rsi, rcx)?) };
                Self::RingDrain { cpu: cpu(rdi)?, released }
            }
            call::POISON => {
                range("address", rdi, rsi)?;
                let code = u8::try_from(rcx).ok().filter(|code| *code >= POISON_MIN);
                Self::Poison { va: rdi, len: rsi, code: code.ok_or(wrong("poison code", rcx))? }
            }
            call::UNPOISON => {
                range("address", rdi, rsi)?;
                let stack = match rcx {
                    memory::AS_BEFORE => None,
                    memory::STACK => Some(true),
                    memory::NO_STACK => Some(false),
                    _ => return Err(wrong("use of memory", rcx)),
                };
                Self::Unpoison { va: rdi, len: rsi, stack }
            }
            call::ALLOCATED => {
                range("address", rdi, rsi)?;
                let slot = Slot::from_register(rdi, r8)?;
                Self::Allocated {
                    va: rdi,
                    size: rsi,
                    cache: rcx as u16,
                    actor: Actor::from_register(rcx),
                    slot,
                }
            }
            call::FREED => {
                let slot = Slot::from_register(rdi, r8)?;
                Self::Freed { va: rdi, actor: Actor::from_register(rcx), slot, wait: rcx as u16 }
            }
            call::REPORT => {
                let access = Access::from_number(rcx as u16);
                Self::Report(BadAccess {
                    address: rdi,
                    size: rsi,
                    access: access.ok_or(wrong("access", rcx & 0xffff))?,
                    actor: Actor::from_register(rcx),
                    ip: r8,
                })
            }
            call::NAME => {
                let (len, id) = (rcx & 0xffff_ffff, (rcx >> 32) as u32);
                if len > abi::NAME_MAX {
                    return Err(wrong("name length", len));
                }
                range("name address", rsi, len)?;
                let what = match rdi {
                    name::CACHE => Named::Cache {
                        id: u16::try_from(id).map_err(|_| wrong("cache id", id.into()))?,
                        object_size: r8,
                    },
                    name::TASK => Named::Task { id },
                    _ => return Err(wrong("name kind", rdi)),
                };
                Self::Name { what, va: rsi, len }
            }
            call::EXIT => Self::Exit(match rdi {
                exit::DONE => Exit::Done { failed: rsi != 0 },
                exit::PANIC => Exit::Panic,
                exit::FAULT => Exit::Fault {
                    vector: rsi as u32,
                    error: (rsi >> 32) as u32,
                    rip: rcx,
                    address: r8,
                },
                _ => return Err(wrong("exit reason", rdi)),
            }),
            call::GLOBALS => {
                if !(1..=abi::GLOBALS_MAX).contains(&rsi) {
                    return Err(wrong("number of globals", rsi));
                }
                range("address of globals", rdi, rsi * abi::GLOBAL_BYTES)?;
                Self::Globals { va: rdi, count: rsi }
            }
            call::VIRTUAL_ADD => {
                // Its key takes the place of guest-physical memory later.
                let region = Region::new(rdi, rsi, 0)?;
                let (va, len) = (region.va(), region.bytes());
                Self::VirtualAdd { va, len }
            }
            call::QUARANTINE => Self::Quarantine { to: Array::new(rsi, rcx)?, all: rdi != 0 },
            call::RELATED => Self::Related { va: rdi, actor: Actor::from_register(rcx) },
            _ => return Err(CallError::Unknown(number)),
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

/// A CPU number, as it fits all calls and records.
fn cpu(value: u64) -> Result<u16, CallError> {
    u16::try_from(value).map_err(|_| wrong("CPU", value))
}
