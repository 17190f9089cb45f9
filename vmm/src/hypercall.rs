//! A guest's calls, decoded: numbers in registers become a typed [`Call`], or the error that the guest gets.
//!
//! Everything that can be said about a call without the state of the run is checked here. What needs
//! state (whether memory lies in a region, whether the call fits the mode) is left to the handler.

use umbra_shadow::{
    abi::{self, access, call, exit, name},
    codes::{PAGE_SIZE, POISON_MIN},
};

/// A call that may be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The guest speaks this version of the ABI.
    Hello,
    /// Virtual memory that maps guest-physical memory one to one.
    RegionAdd(Region),
    /// A ring of events.
    RingSetup {
        /// Virtual address of the header, a multiple of 64.
        va: u64,
        /// Records that fit, 1 to [`abi::RING_MAX_RECORDS`]; they start 64 bytes behind `va`.
        records: u64,
        /// The CPU that writes it.
        cpu: u16,
        /// What the frames of its records are relative to.
        text_base: u64,
    },
    /// Take all records out of a CPU's ring.
    RingDrain {
        /// The CPU.
        cpu: u16,
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
    },
    /// Memory was freed.
    Freed {
        /// Virtual address.
        va: u64,
        /// Who did it.
        actor: Actor,
    },
    /// A violation.
    Report {
        /// Any address, the one of the access.
        address: u64,
        /// Any number of bytes; may go past the end of the address space.
        size: u64,
        /// What was tried.
        access: Access,
        /// Who did it.
        actor: Actor,
        /// The instruction after the access.
        ip: u64,
    },
    /// A name, `len` bytes (at most [`abi::NAME_MAX`]) at `va`.
    Name {
        /// What it is for.
        what: Named,
        /// Virtual address.
        va: u64,
        /// Bytes; may be 0.
        len: u64,
    },
    /// The guest is done.
    Exit(Exit),
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
            call::HELLO if rdi == u64::from(abi::VERSION) => Self::Hello,
            call::HELLO => return Err(CallError::Version(rdi)),
            call::REGION_ADD => Self::RegionAdd(Region::new(rdi, rsi, rcx)?),
            call::RING_SETUP => {
                if !rdi.is_multiple_of(abi::RECORD_BYTES) {
                    return Err(wrong("ring address", rdi));
                }
                let records = (rsi / abi::RECORD_BYTES).saturating_sub(1);
                if !rsi.is_multiple_of(abi::RECORD_BYTES) || !(1..=abi::RING_MAX_RECORDS).contains(&records) {
                    return Err(wrong("ring size", rsi));
                }
                range("ring address", rdi, rsi)?;
                Self::RingSetup { va: rdi, records, cpu: cpu(rcx)?, text_base: r8 }
            }
            call::RING_DRAIN => Self::RingDrain { cpu: cpu(rdi)? },
            call::POISON => {
                range("address", rdi, rsi)?;
                let code = u8::try_from(rcx).ok().filter(|code| *code >= POISON_MIN);
                Self::Poison { va: rdi, len: rsi, code: code.ok_or(wrong("poison code", rcx))? }
            }
            call::UNPOISON => {
                range("address", rdi, rsi)?;
                Self::Unpoison { va: rdi, len: rsi }
            }
            call::ALLOCATED => {
                range("address", rdi, rsi)?;
                Self::Allocated { va: rdi, size: rsi, cache: rcx as u16, actor: Actor::from_register(rcx) }
            }
            call::FREED => Self::Freed { va: rdi, actor: Actor::from_register(rcx) },
            call::REPORT => {
                let access = match rcx as u16 {
                    access::READ => Access::Read,
                    access::WRITE => Access::Write,
                    access::DOUBLE_FREE => Access::DoubleFree,
                    access::INVALID_FREE => Access::InvalidFree,
                    _ => return Err(wrong("access", rcx & 0xffff)),
                };
                Self::Report { address: rdi, size: rsi, access, actor: Actor::from_register(rcx), ip: r8 }
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
                exit::FAULT => {
                    Exit::Fault { vector: rsi as u32, error: (rsi >> 32) as u32, rip: rcx, address: r8 }
                }
                _ => return Err(wrong("exit reason", rdi)),
            }),
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

/// Virtual memory that maps guest-physical memory one to one. At least a page; neither end wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    va: u64,
    len: u64,
    gpa: u64,
}

impl Region {
    fn new(va: u64, len: u64, gpa: u64) -> Result<Self, CallError> {
        for (what, value) in [("region address", va), ("region size", len), ("region memory", gpa)] {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(wrong(what, value));
            }
        }
        if len == 0 {
            return Err(wrong("region size", len));
        }
        range("region address", va, len)?;
        range("region memory", gpa, len)?;
        Ok(Self { va, len, gpa })
    }

    /// Virtual start.
    pub fn va(&self) -> u64 {
        self.va
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Guest-physical start.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Its last virtual address; its end may be the end of the address space.
    fn last(&self) -> u64 {
        self.va + (self.len - 1)
    }
}

/// The regions that a guest added.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    regions: Vec<Region>,
}

impl Regions {
    /// Most regions that are kept.
    pub const MOST: usize = 64;

    /// Adds a region of a guest whose memory ends at `ram_end`.
    ///
    /// # Errors
    /// It reaches beyond guest memory, overlaps a region in virtual memory, or there are too many.
    pub fn add(&mut self, region: Region, ram_end: u64) -> Result<(), CallError> {
        if region.len > ram_end || region.gpa > ram_end - region.len {
            return Err(wrong("region memory", region.gpa));
        }
        if self.regions.iter().any(|other| region.va <= other.last() && other.va <= region.last()) {
            return Err(wrong("region address", region.va));
        }
        if self.regions.len() >= Self::MOST {
            return Err(CallError::Limit { what: "regions", most: Self::MOST as u64 });
        }
        self.regions.push(region);
        Ok(())
    }

    /// The guest-physical address of `len` bytes at `va`, if one region holds them all.
    pub fn to_gpa(&self, va: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = va.checked_sub(region.va)?;
            (offset < region.len && len <= region.len - offset).then(|| region.gpa + offset)
        })
    }

    /// The virtual address of `gpa` in the region that was added first of those that show it.
    pub fn to_va(&self, gpa: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = gpa.checked_sub(region.gpa)?;
            (offset < region.len).then(|| region.va + offset)
        })
    }

    /// All of them, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}
