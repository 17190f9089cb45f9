//! A guest's calls, decoded: numbers in registers become a typed [`Call`], or the error that the guest gets.
//!
//! Everything that can be said about a call without the state of the run is checked here. What needs
//! state (whether memory lies in a region, whether the call fits the mode) is left to the handler.

mod regions;

use umbra_shadow::{
    abi::{self, access, call, exit, memory, name},
    codes::POISON_MIN,
};

pub use self::regions::{Region, Regions};

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
    /// `len` bytes (not 0) of virtual memory at `va`, both multiples of 4096, shall have shadow of their own.
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

/// Room for what leaves the quarantine.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIRECT: u64 = 0xffff_8000_0000_0000;
    const IMAGE: u64 = 0xffff_ffff_8000_0000;

    fn ok(number: u32, rdi: u64, rsi: u64, rdx: u64, rcx: u64) -> Call {
        Call::decode(number, rdi, rsi, rdx, rcx).unwrap()
    }

    fn error(number: u32, rdi: u64, rsi: u64, rdx: u64, rcx: u64) -> u64 {
        Call::decode(number, rdi, rsi, rdx, rcx).unwrap_err().result()
    }

    #[test]
    fn calls_are_decoded() {
        let actor = Actor { cpu: 0x5678, task: 0x9abc_def0 };
        let who = 0x9abc_def0_5678_0000;
        assert_eq!(ok(call::HELLO, abi::VERSION.into(), 0, 0, 0), Call::Hello);
        let Call::RegionAdd(region) = ok(call::REGION_ADD, DIRECT, 1 << 28, 0x1000, 0) else { panic!() };
        assert_eq!((region.va(), region.bytes(), region.gpa()), (DIRECT, 1 << 28, 0x1000));
        assert_eq!(
            ok(call::RING_SETUP, IMAGE, 64 * 65, 3, IMAGE),
            Call::RingSetup { va: IMAGE, records: 64, cpu: 3, text_base: IMAGE }
        );
        assert_eq!(ok(call::RING_DRAIN, 0xffff, 0, 0, 0), Call::RingDrain { cpu: 0xffff, released: None });
        assert_eq!(ok(call::POISON, u64::MAX, 1, 0xfc, 0), Call::Poison { va: u64::MAX, len: 1, code: 0xfc });
        assert_eq!(ok(call::UNPOISON, 5, 0, 0, 0), Call::Unpoison { va: 5, len: 0, stack: None });
        assert_eq!(
            ok(call::UNPOISON, DIRECT, 4096, memory::STACK, 0),
            Call::Unpoison { va: DIRECT, len: 4096, stack: Some(true) }
        );
        assert_eq!(
            ok(call::ALLOCATED, DIRECT, 50, who | 0x1234, 0),
            Call::Allocated { va: DIRECT, size: 50, cache: 0x1234, actor, slot: None }
        );
        let slot = Some(Slot { bytes: 64, code: 0xfc });
        assert_eq!(
            ok(call::ALLOCATED, DIRECT, 50, who, abi::slot(64, 0xfc)),
            Call::Allocated { va: DIRECT, size: 50, cache: 0, actor, slot }
        );
        assert_eq!(
            ok(call::FREED, DIRECT, 0, who, 0),
            Call::Freed { va: DIRECT, actor, slot: None, wait: 0 }
        );
        assert_eq!(
            ok(call::FREED, DIRECT, 0, who | u64::from(abi::wait(2, 7)), abi::slot(64, 0xfc)),
            Call::Freed { va: DIRECT, actor, slot, wait: 0x702 }
        );
        for (va, bad) in [(DIRECT, 64), (DIRECT, abi::slot(64, 0x7f)), (DIRECT, abi::slot(0, 0xfc))] {
            assert_eq!(error(call::ALLOCATED, va, 1, who, bad), abi::ERR_ARGUMENT);
            assert_eq!(error(call::FREED, va, 0, who, bad), abi::ERR_ARGUMENT);
        }
        assert_eq!(error(call::FREED, u64::MAX - 8, 0, who, abi::slot(10, 0xfc)), abi::ERR_ARGUMENT);
        // A size that wraps is a finding, not a mistake of the call.
        let report = Call::Report { address: 7, size: u64::MAX, access: Access::Write, actor, ip: IMAGE };
        assert_eq!(ok(call::REPORT, 7, u64::MAX, who | 1, IMAGE), report);
        assert_eq!(
            ok(call::NAME, name::CACHE, DIRECT, 7 << 32 | 64, 96),
            Call::Name { what: Named::Cache { id: 7, object_size: 96 }, va: DIRECT, len: 64 }
        );
        assert_eq!(
            ok(call::NAME, name::TASK, DIRECT, 0xffff_ffff << 32, 0),
            Call::Name { what: Named::Task { id: u32::MAX }, va: DIRECT, len: 0 }
        );
        let to = Array { va: DIRECT, count: 1 << 16 };
        assert_eq!(ok(call::QUARANTINE, 1, DIRECT, abi::RELEASED_MAX, 0), Call::Quarantine { to, all: true });
        assert_eq!(
            ok(call::RING_DRAIN, 3, DIRECT, abi::RELEASED_MAX, 0),
            Call::RingDrain { cpu: 3, released: Some(to) }
        );
        for number in [call::QUARANTINE, call::RING_DRAIN] {
            assert_eq!(error(number, 0, DIRECT, abi::RELEASED_MAX + 1, 0), abi::ERR_ARGUMENT);
            assert_eq!(error(number, 0, u64::MAX - 30, 2, 0), abi::ERR_ARGUMENT);
        }
        assert_eq!(ok(call::RELATED, DIRECT, 0, who, 0), Call::Related { va: DIRECT, actor });
        assert_eq!(ok(call::EXIT, exit::DONE, 0, 0, 0), Call::Exit(Exit::Done { failed: false }));
        assert_eq!(ok(call::EXIT, exit::DONE, 1 << 40, 0, 0), Call::Exit(Exit::Done { failed: true }));
        assert_eq!(ok(call::EXIT, exit::PANIC, 0, 0, 0), Call::Exit(Exit::Panic));
        assert_eq!(
            ok(call::EXIT, exit::FAULT, 2 << 32 | 14, IMAGE, DIRECT),
            Call::Exit(Exit::Fault { vector: 14, error: 2, rip: IMAGE, address: DIRECT })
        );
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for number in [0, 16, 255, u32::MAX] {
            assert_eq!(error(number, 0, 0, 0, 0), abi::ERR_CALL);
        }
        for version in [0, 2, u64::MAX, 1 << 32 | 1] {
            assert_eq!(error(call::HELLO, version, 0, 0, 0), abi::ERR_VERSION);
        }
        for (number, rdi, rsi, rdx) in [
            (call::REGION_ADD, 1, 0x1000, 0),
            (call::REGION_ADD, 0, 0x1001, 0),
            (call::REGION_ADD, 0, 0x1000, 0x800),
            (call::REGION_ADD, 0, 0, 0),
            (call::REGION_ADD, IMAGE, (2 << 30) + 0x1000, 0),
            (call::REGION_ADD, 0, 0x2000, 0u64.wrapping_sub(0x1000)),
            (call::RING_SETUP, 32, 128, 0),
            (call::RING_SETUP, 0, 0, 0),
            (call::RING_SETUP, 0, 64, 0),
            (call::RING_SETUP, 0, 129, 0),
            (call::RING_SETUP, 0, 64 * (abi::RING_MAX_RECORDS + 2), 0),
            (call::RING_SETUP, 0, 128, 0x1_0000),
            (call::RING_SETUP, u64::MAX - 63, 128, 0),
            (call::RING_DRAIN, 0x1_0000, 0, 0),
            (call::POISON, u64::MAX, 2, 0xff),
            (call::POISON, 0, 8, 0),
            (call::POISON, 0, 8, 0x7f),
            (call::POISON, 0, 8, 0x1ff),
            (call::UNPOISON, 1 << 63, (1 << 63) + 1, 0),
            (call::ALLOCATED, 16, u64::MAX, 0),
            (call::REPORT, 0, 1, 4),
            (call::NAME, 2, 0, 0),
            (call::NAME, name::TASK, 0, 65),
            (call::NAME, name::TASK, u64::MAX, 2),
            (call::NAME, name::CACHE, 0, 1 << 48),
            (call::EXIT, 3, 0, 0),
            (call::GLOBALS, 0, 0, 0),
            (call::GLOBALS, 0, abi::GLOBALS_MAX + 1, 0),
            (call::GLOBALS, u64::MAX - 62, 1, 0),
        ] {
            assert_eq!(
                error(number, rdi, rsi, rdx, 0),
                abi::ERR_ARGUMENT,
                "{number} {rdi:#x} {rsi:#x} {rdx:#x}"
            );
        }
        assert_eq!(error(call::UNPOISON, DIRECT, 4096, 3, 0), abi::ERR_ARGUMENT);
        assert_eq!(CallError::Mode(5).result(), abi::ERR_MODE);
    }

    /// Values around all that is checked.
    fn wild() -> impl Strategy<Value = u64> {
        prop_oneof![
            any::<u64>(),
            0..300u64,
            (0..64u32, -2..3i64).prop_map(|(bit, more)| (1u64 << bit).wrapping_add_signed(more)),
            (0..1000u64).prop_map(|less| u64::MAX - less),
            any::<u64>().prop_map(|value| value & !0xfff),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        /// Every call with wild values is an error of the ABI, or a call that keeps its promises.
        #[test]
        fn wild_values_never_get_through(number in 0..17u32, rdi in wild(), rsi in wild(), rdx in wild(), rcx in wild()) {
            let holds = |va: u64, len: u64| len == 0 || va.checked_add(len - 1).is_some();
            match Call::decode(number, rdi, rsi, rdx, rcx) {
                Err(error) => {
                    prop_assert!(error.result() >= abi::ERR_MIN);
                    prop_assert!(!error.to_string().contains('\n'));
                    prop_assert_eq!(error.result() == abi::ERR_CALL, !(1..=15).contains(&number));
                    prop_assert_eq!(error.result() == abi::ERR_VERSION, number == call::HELLO);
                }
                Ok(Call::RegionAdd(region)) => {
                    let mut regions = Regions::default();
                    if regions.add(region, 1 << 32).is_ok() {
                        prop_assert!(region.bytes() > 0 && region.gpa() + region.bytes() <= 1 << 32);
                        prop_assert_eq!(regions.to_gpa(region.va(), region.bytes()), Some(region.gpa()));
                        prop_assert_eq!(regions.to_gpa(region.va(), region.bytes() + 1), None);
                        prop_assert_eq!(regions.to_va(region.gpa()), Some(region.va()));
                    }
                    regions.to_gpa(rcx, rdx);
                    regions.to_va(rcx);
                }
                Ok(Call::RingSetup { va, records, .. }) => {
                    prop_assert!(va.is_multiple_of(64) && (1..=abi::RING_MAX_RECORDS).contains(&records));
                    prop_assert!(holds(va, 64 + records * 64));
                }
                Ok(Call::Poison { va, len, code }) => prop_assert!(code >= 0x80 && holds(va, len)),
                Ok(Call::Unpoison { va, len, .. } | Call::Allocated { va, size: len, .. }) => {
                    prop_assert!(holds(va, len));
                }
                Ok(Call::Globals { va, count }) => {
                    prop_assert!((1..=abi::GLOBALS_MAX).contains(&count) && holds(va, count * 64));
                }
                Ok(Call::Quarantine { to: Array { va, count }, .. }) => {
                    prop_assert!(count <= abi::RELEASED_MAX && holds(va, count * abi::RELEASED_BYTES));
                }
                Ok(Call::Name { va, len, .. }) => prop_assert!(len <= abi::NAME_MAX && holds(va, len)),
                Ok(_) => {}
            }
        }
    }
}
