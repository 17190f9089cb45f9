//! The hypercalls: their numbers and their registers.

use crate::codes::{PAGE_SHIFT, PAGE_SIZE};

numbered! {
    /// The number of a call, in `eax`.
    ///
    /// Several calls have an [`Actor`] in `rcx`. The lowest 16 bits of `rcx` then hold another
    /// argument.
    pub enum CallNumber: u32, u64 {
        /// The first call. `rdi`: the guest's ABI version, `rsi`:
        /// [`GuestFlags`](super::GuestFlags). Result: [`Features`](super::Features), or
        /// [`ERR_VERSION`].
        Hello = 1,
        /// Adds a region: a virtual range that maps guest-physical memory one to one. `rdi`:
        /// virtual start, `rsi`: bytes, `rcx`: guest-physical start. All three are multiples of
        /// 4096.
        RegionAdd = 2,
        /// Hands over a ring. `rdi`: virtual address of a [`RingHeader`](super::RingHeader) (in an
        /// added region, 64-byte aligned), `rsi`: bytes of header and records, `rcx`: CPU, `r8`:
        /// text base (see [`record_frames`](super::record_frames)).
        RingSetup = 3,
        /// Drains all rings. `rdi`: the calling CPU, whose ring is emptied; an error if it has
        /// none. `rsi`, `rcx`: an array as in [`Quarantine`](Self::Quarantine), for the memory that
        /// was evicted from the quarantine. Result: the number of entries written.
        RingDrain = 4,
        /// Poisons memory. `rdi`: address, `rsi`: bytes, `rcx`: code. `sync` mode only.
        Poison = 5,
        /// Unpoisons memory. `rdi`: address, `rsi`: bytes, `rcx`: a [`MemoryUse`]. `sync` mode
        /// only.
        Unpoison = 6,
        /// An allocation. `rdi`: address, `rsi`: bytes, `rcx`: cache (0 for none) and actor, `r8`:
        /// a [`Slot`]. The memory is unpoisoned and the rest of the slot is poisoned; without a
        /// slot the shadow does not change. The VMM walks the caller's stack from `rbp`. `sync`
        /// mode only.
        Allocated = 7,
        /// A free. `rdi`: address, `rcx`: an [`Owner`] and actor, `r8`: a [`Slot`], which is
        /// poisoned. Result: not 0 if evicted memory is pending. `sync` mode only.
        Freed = 8,
        /// A violation. `rdi`: address of the access, `rsi`: bytes, `rcx`: an [`Access`] and actor,
        /// `r8`: address of the instruction after the access. The VMM walks the stack from `rbp`
        /// and starts at the frame that returns to `r8`. The finding names the vCPU that made the
        /// call. Result: 0 if the guest goes on.
        Report = 9,
        /// Names something. `rdi`: a [`NameKind`], `rsi`: virtual address of the name, `rcx`: its
        /// bytes (at most [`NAME_MAX`]) in bits 0..32, the id in bits 32..64, `r8`: for a cache,
        /// bytes of one object.
        Name = 10,
        /// Ends the guest. `rdi`: an [`ExitReason`]. After [`ExitReason::Done`] `rsi`: 0, or not 0
        /// for failure. After [`ExitReason::Fault`] `rsi`: vector in bits 0..32, error code in bits
        /// 32..64, `rcx`: rip, `r8`: faulting address.
        Exit = 11,
        /// Adds the compiler's descriptions of global variables with redzones. `rdi`: virtual
        /// address of an array of [`Global`] (in an added region), `rsi`: its length. The VMM reads
        /// it when a finding needs it.
        Globals = 12,
        /// Asks for shadow for a virtual range that maps single pages, which come and go (vmalloc).
        /// `rdi`: virtual start, `rsi`: bytes, both multiples of 4096. Result: the range's *key*, a
        /// guest-physical address above all memory that stands for the range's start. From here on
        /// the range counts as a region that maps memory from the key on one to one, and its shadow
        /// is in the same windows as all other. The key is equal to the start modulo
        /// [`VIRTUAL_UNIT`]. The whole range is poisoned with
        /// [`VMALLOC_INVALID`](crate::codes::VMALLOC_INVALID). Keys are handed out once, in units
        /// of [`VIRTUAL_UNIT`]; a CPUID leaf says how many bytes of them there are.
        VirtualAdd = 13,
        /// Takes memory out of the quarantine. `rdi`: 0 for evicted memory, 1 for all, `rsi`:
        /// virtual address of an array of [`Released`] (in an added region), `rcx`: its length, at
        /// most [`RELEASED_MAX`]; 0 only asks whether the array is accepted. Result: the number of
        /// entries written. The guest returns the memory to its allocators.
        Quarantine = 14,
        /// Work on an object was queued, such as work that will free it. `rdi`: an address in the
        /// object, `rcx`: actor. The VMM walks the caller's stack from `rbp`. `sync` mode only.
        Related = 15,
        /// Checks are on from here on. No arguments.
        Activate = 16,
        /// A module of the kernel was loaded, or its symbols have moved. `rdi`: virtual address of
        /// a [`ModuleInfo`]. The VMM reads it and the symbols during the call. What it knows of a
        /// module stays after the module is gone, until another one takes its place.
        Module = 17,
        /// Asks for the page tables of the check shadow and of the windows
        /// ([`check_shadow`](super::check_shadow)). `rdi`: a slot of the top-level table. Result:
        /// the slot's entry, which the guest puts there; 0 if the slot is not needed. The regions
        /// so far are in the tables, and later ones get there when they are added. `ring` mode
        /// only.
        TopLevel = 18,
    }
}

/// A module of the kernel, for [`CallNumber::Module`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ModuleInfo {
    /// Its name, filled up with zeros.
    pub name: [u8; MODULE_NAME_MAX],
    /// Virtual start and bytes of the memory that it keeps.
    pub core: [u64; 2],
    /// The same of the memory that it gives back after its start.
    pub init: [u64; 2],
    /// Virtual address of its ELF symbols (`Elf64_Sym`), whose values are virtual addresses.
    pub symbols: u64,
    /// How many there are. The VMM reads at most [`MODULE_SYMBOLS_MAX`].
    pub count: u64,
    /// Virtual address of their names.
    pub strings: u64,
}

/// Bytes of a module's name in [`ModuleInfo`].
pub const MODULE_NAME_MAX: usize = 56;
/// Most symbols of a module that the VMM reads.
pub const MODULE_SYMBOLS_MAX: u64 = 1 << 14;
/// Bytes of a [`ModuleInfo`].
pub const MODULE_INFO_BYTES: u64 = 112;
const _: () = assert!(size_of::<ModuleInfo>() as u64 == MODULE_INFO_BYTES);

/// The unit of keys of virtual ranges: the memory that one page of page shadow describes.
pub const VIRTUAL_UNIT: u64 = PAGE_SIZE << PAGE_SHIFT;

/// The least value of `rax` that is an error.
pub const ERR_MIN: u64 = -4095i64 as u64;
/// No such call.
pub const ERR_CALL: u64 = -1i64 as u64;
/// The result of [`CallNumber::Freed`] for an address inside of a live object: nothing was changed,
/// and the allocator must not take the memory back.
pub const FREE_REFUSED: u64 = 2;

/// An argument is out of range, misaligned, or not in an added region.
pub const ERR_ARGUMENT: u64 = -2i64 as u64;
/// Guest and host have different versions of the ABI.
pub const ERR_VERSION: u64 = -3i64 as u64;
/// The call does not belong to the mode that this run uses.
pub const ERR_MODE: u64 = -4i64 as u64;
/// A bounded table of the host is full.
pub const ERR_LIMIT: u64 = -5i64 as u64;

/// The CPU and the task that did something, in bits 16..64 of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Actor {
    /// The guest's number of the CPU, in bits 16..32.
    pub cpu: u16,
    /// The guest's task id, in bits 32..64.
    pub task: u32,
}

impl Actor {
    /// Encodes the actor, with `low` in bits 0..16.
    #[inline]
    pub const fn to_register(self, low: u16) -> u64 {
        low as u64 | (self.cpu as u64) << 16 | (self.task as u64) << 32
    }

    /// Decodes the actor in bits 16..64.
    pub const fn from_register(value: u64) -> Self {
        Self { cpu: (value >> 16) as u16, task: (value >> 32) as u32 }
    }
}

numbered! {
    /// The attempt that was a violation.
    pub enum Access: u16, u64 {
        /// A load.
        Read = 0,
        /// A store.
        Write = 1,
        /// A free of memory that is free already.
        DoubleFree = 2,
        /// A free of an address that is not the start of an allocation.
        InvalidFree = 3,
    }
}

numbered! {
    /// What a name belongs to.
    pub enum NameKind: u64 {
        /// An allocator's cache; ids below 65,536.
        Cache = 0,
        /// A task.
        Task = 1,
    }
}
/// Longest name, in bytes.
pub const NAME_MAX: u64 = 64;

numbered! {
    /// Why the guest ends.
    pub enum ExitReason: u64 {
        /// Its work is done.
        Done = 0,
        /// A panic; the message is on the console.
        Panic = 1,
        /// A CPU exception that it cannot handle.
        Fault = 2,
    }
}

numbered! {
    /// What unpoisoned memory is used for.
    ///
    /// Compilers store the shadow of stack variables directly, which read-only windows refuse. The
    /// VMM carries out such a store if it covers only stack and each of its bytes may be shadow of
    /// a stack ([`on_stack`](crate::codes::on_stack)). Any other store to a window is shadow
    /// tampering.
    pub enum MemoryUse: u64 {
        /// The use does not change.
        Unchanged = 0,
        /// Its whole pages become a stack. That ends with [`NotStack`](Self::NotStack), or when
        /// whole pages are poisoned with a code that is not a stack's.
        Stack = 1,
        /// It is no stack any more.
        NotStack = 2,
    }
}

/// An allocator's slot: the room of an object and its redzone. In a register, 0 is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its bytes, in bits 0..56.
    pub bytes: u64,
    /// The code for the part of it that is not allocated, in bits 56..64.
    pub code: u8,
}

impl Slot {
    /// Most bytes of a slot.
    pub const BYTES_MAX: u64 = (1 << 56) - 1;

    /// Encodes the slot.
    #[inline]
    pub const fn to_register(self) -> u64 {
        self.bytes & Self::BYTES_MAX | (self.code as u64) << 56
    }

    /// Decodes a slot; none for 0. Its values may still make no sense.
    pub const fn from_register(value: u64) -> Option<Self> {
        if value == 0 {
            return None;
        }
        Some(Self { bytes: value & Self::BYTES_MAX, code: (value >> 56) as u8 })
    }
}

/// The allocator that gets memory back when it leaves the quarantine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// The guest's number of the allocator, not 0.
    pub allocator: u8,
    /// For the allocator's own use.
    pub note: u8,
}

impl Owner {
    /// Encodes the owner in 16 bits.
    #[inline]
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes([self.allocator, self.note])
    }

    /// Decodes an owner. None for 0: the memory does not go through the quarantine.
    pub const fn from_bits(bits: u16) -> Option<Self> {
        let [allocator, note] = bits.to_le_bytes();
        if bits == 0 { None } else { Some(Self { allocator, note }) }
    }
}

/// Memory that leaves the quarantine, 16 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Released {
    /// Virtual address, as given when the memory was freed.
    pub address: u64,
    /// Bytes of its slot.
    pub slot: u32,
    /// The allocator that gets it back.
    pub owner: Owner,
    /// Not used; zero.
    pub reserved: u16,
}
/// Bytes of a [`Released`].
pub const RELEASED_BYTES: u64 = 16;
/// Most of them in one call.
pub const RELEASED_MAX: u64 = 1 << 16;

impl Released {
    /// An entry for the memory at `address`.
    pub const fn new(address: u64, slot: u32, owner: Owner) -> Self {
        Self { address, slot, owner, reserved: 0 }
    }

    /// Encodes it for guest memory.
    pub fn encode(self) -> [u8; RELEASED_BYTES as usize] {
        let mut bytes = [0; RELEASED_BYTES as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.slot.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.owner.to_bits().to_le_bytes());
        bytes
    }
}

/// A compiler's description of one global variable (LLVM's and gcc's `struct __asan_global`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Global {
    /// Virtual address.
    pub start: u64,
    /// Bytes of the variable.
    pub size: u64,
    /// Bytes with the redzone behind it.
    pub size_with_redzone: u64,
    /// Virtual address of its name, zero-terminated.
    pub name: u64,
    /// Virtual address of the name of its compilation unit, zero-terminated.
    pub module: u64,
    /// Not 0 if a constructor initializes it.
    pub has_dynamic_init: u64,
    /// Virtual address of its location in the source, 0 if the compiler does not give it.
    pub location: u64,
    /// For C++'s one-definition rule.
    pub odr_indicator: u64,
}
/// Bytes of a [`Global`].
pub const GLOBAL_BYTES: u64 = 64;
/// Most globals in one call.
pub const GLOBALS_MAX: u64 = 1 << 16;

const _: () = assert!(size_of::<Released>() as u64 == RELEASED_BYTES);
const _: () = assert!(size_of::<Global>() as u64 == GLOBAL_BYTES);
