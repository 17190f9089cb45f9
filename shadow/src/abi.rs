//! The hypercall ABI: discovery, call numbers, register use, ring records.
//!
//! **Discovery.** A hypervisor CPUID leaf block at `0x4000_0000 + 0x100 * n`, found by its
//! signature, so that it coexists with KVM's own block and a kernel that runs elsewhere simply does
//! not find it.
//!
//! | leaf | eax | ebx | ecx | edx |
//! | --- | --- | --- | --- | --- |
//! | base + 0 | highest leaf of the block | `Umbr` | `aSan` | `dbox` |
//! | base + 1 | [`VERSION`] | [`PORT`] | [`features`] bits | 0 |
//! | base + 2 | page window, gpa low | gpa high | bytes, low | bytes, high |
//! | base + 3 | byte window, gpa low | gpa high | bytes, low | bytes, high |
//! | base + 4 | bytes that [`call::VIRTUAL_ADD`] has for virtual memory, low | high | 0 | 0 |
//! | base + 5 | quarantine batch in bytes | [`redzone`] | quarantine in bytes, low | high |
//!
//! **A call** is `out dx, eax` with the number in `eax`, [`PORT`] in `dx`, arguments in `rdi`,
//! `rsi`, `rcx`, `r8` (not `rdx`, which the port occupies). The result comes back in `rax`; values
//! from [`ERR_MIN`] on are errors. No other register changes.
//!
//! This module has a version of its own ([`VERSION`]); it changes when an existing kernel would
//! misbehave.

/// Version of this ABI.
pub const VERSION: u32 = 1;

/// First leaf where a hypervisor block may start.
pub const CPUID_FIRST: u32 = 0x4000_0000;
/// Distance of the places where a hypervisor block may start.
pub const CPUID_STEP: u32 = 0x100;
/// Number of places to look at.
pub const CPUID_BLOCKS: u32 = 0x100;
/// ebx, ecx, edx of the first leaf of Umbra's block: "UmbraSandbox".
pub const CPUID_SIGNATURE: [u32; 3] =
    [u32::from_le_bytes(*b"Umbr"), u32::from_le_bytes(*b"aSan"), u32::from_le_bytes(*b"dbox")];
/// Offset of the leaf with version, port and features.
pub const CPUID_LEAF_FEATURES: u32 = 1;
/// Offset of the leaf with the page-shadow window.
pub const CPUID_LEAF_PAGE_WINDOW: u32 = 2;
/// Offset of the leaf with the byte-shadow window.
pub const CPUID_LEAF_BYTE_WINDOW: u32 = 3;

/// Offset of the leaf with the room for virtual memory.
pub const CPUID_LEAF_VIRTUAL: u32 = 4;
/// Offset of the leaf with the settings that are the guest's to follow. A VMM whose block ends
/// before it has no quarantine, and redzones are [`redzone::ADAPTIVE`].
pub const CPUID_LEAF_SETTINGS: u32 = 5;

/// How much a guest's allocators put behind each object.
pub mod redzone {
    /// Nothing: objects lie as in a kernel that is not checked.
    pub const OFF: u32 = 0;
    /// More behind larger objects, as KASAN does.
    pub const ADAPTIVE: u32 = 1;
    /// Most bytes; other values are bytes, multiples of 8.
    pub const MAX: u32 = 4096;
}

/// The I/O port of the hypercall.
pub const PORT: u16 = 0x0b5e;

/// What the host offers this run.
pub mod features {
    /// Two-level shadow: both windows exist.
    pub const PER_PAGE: u32 = 1 << 0;
    /// Full shadow (KASAN's own layout): only the byte window exists, all of it resident from the
    /// start.
    pub const FULL: u32 = 1 << 1;
    /// The guest writes the shadow itself and records events in rings.
    pub const RING: u32 = 1 << 2;
    /// Windows are read-only; the guest calls for each change of shadow and each event.
    pub const SYNC: u32 = 1 << 3;
}

/// What a guest says of itself. Bits that the VMM does not know are ignored.
pub mod hello {
    /// What lies in pages whose page shadow is [`crate::codes::FREE_PAGE`] matters to nobody: they
    /// may read as zero at any time, and the host need not keep them. True of a page allocator that
    /// keeps its lists elsewhere, as Linux's does. The same then goes for what lies in rings behind
    /// the records that their counts tell of, but for the next one.
    pub const FREE_PAGES_UNUSED: u64 = 1 << 0;
    /// The same of pages in which all is poisoned as [`crate::codes::SLAB_FREE_TRACK`], or some of
    /// it and the rest as [`crate::codes::SLAB_REDZONE`]. True of a quarantine that keeps its lists
    /// elsewhere, if nothing of the redzones that lie in a page with such an object is ever read:
    /// an allocator poisons an object with another code before it stores to it. It counts together
    /// with [`FREE_PAGES_UNUSED`] only.
    pub const QUARANTINE_UNUSED: u64 = 1 << 1;
}

/// The numbers of the calls, in `eax`.
pub mod call {
    /// `rdi`: the guest's ABI version, `rsi`: [`super::hello`] bits. Result: the feature bits, or
    /// [`super::ERR_VERSION`].
    pub const HELLO: u32 = 1;
    /// `rdi`: virtual start, `rsi`: bytes, `rcx`: guest-physical start. Says that a virtual range
    /// maps guest-physical memory one to one. All three are multiples of 4096.
    pub const REGION_ADD: u32 = 2;
    /// `rdi`: virtual address of a [`super::RingHeader`] (in an added region, 64-byte aligned),
    /// `rsi`: bytes of header and records, `rcx`: CPU, `r8`: text base (see [`super::Record`]).
    pub const RING_SETUP: u32 = 3;
    /// `rdi`: the calling CPU, whose ring is full. Takes all records out of all rings and empties
    /// its own; an error if it has none. If memory is due to leave the quarantine, it goes to the
    /// array that `rsi` and `rcx` tell as those of [`QUARANTINE`] do. Result: how many were
    /// written.
    pub const RING_DRAIN: u32 = 4;
    /// `rdi`: address, `rsi`: bytes, `rcx`: code. `sync` mode only.
    pub const POISON: u32 = 5;
    /// `rdi`: address, `rsi`: bytes, `rcx`: a [`super::memory`] use. `sync` mode only.
    pub const UNPOISON: u32 = 6;
    /// `rdi`: address, `rsi`: bytes, `rcx`: cache in bits 0..16, CPU in bits 16..32, task in bits
    /// 32..64, `r8`: a [`super::slot`]. The memory is unpoisoned and the rest of the slot poisoned;
    /// without a slot the shadow stays as it is. The VMM walks the caller's stack from `rbp`.
    /// `sync` mode only.
    pub const ALLOCATED: u32 = 7;
    /// `rdi`: address, `rcx`: a [`super::wait`] in bits 0..16, CPU in bits 16..32, task in bits
    /// 32..64, `r8`: a [`super::slot`], which is poisoned. Result: not 0 if memory is due to leave
    /// the quarantine. `sync` mode only.
    pub const FREED: u32 = 8;
    /// A violation. `rdi`: address of the access, `rsi`: bytes, `rcx`: [`super::access`] in bits
    /// 0..16, CPU in bits 16..32, task in bits 32..64; `r8`: address of the instruction after the
    /// access. The VMM walks the stack from `rbp` and starts at the frame that returns to `r8`. The
    /// finding names the vCPU that made the call. Returns 0 when the guest shall go on.
    pub const REPORT: u32 = 9;
    /// `rdi`: [`super::name`] kind, `rsi`: virtual address of the name, `rcx`: its bytes (at most
    /// [`super::NAME_MAX`]) in bits 0..32, the id in bits 32..64, `r8`: for a cache, bytes of one
    /// object.
    pub const NAME: u32 = 10;
    /// The guest is done. `rdi`: [`super::exit`] reason; for a fault `rsi`: vector in bits 0..32,
    /// error code in bits 32..64, `rcx`: rip, `r8`: faulting address; for `DONE` `rsi`: 0, or not 0
    /// for failure.
    pub const EXIT: u32 = 11;
    /// The compiler's descriptions of global variables with redzones. `rdi`: virtual address of an
    /// array of [`super::Global`] (in an added region), `rsi`: how many. It is read when a finding
    /// needs it.
    pub const GLOBALS: u32 = 12;
    /// `rdi`: virtual start, `rsi`: bytes, both multiples of 4096. Says that a virtual range maps
    /// single pages, which come and go (vmalloc), and shall have shadow of its own. Result: the
    /// range's *key*, a guest-physical address above all memory that stands for the range's start:
    /// from here on it counts as a region that maps memory from there on one to one, and its shadow
    /// is in the same windows as all other. The key is equal to the start modulo
    /// [`super::VIRTUAL_UNIT`]. The whole range is poisoned with [`crate::codes::VMALLOC_INVALID`].
    /// Keys are handed out once, in units of [`super::VIRTUAL_UNIT`]; CPUID tells for how many
    /// bytes there are any.
    pub const VIRTUAL_ADD: u32 = 13;
    /// Takes memory out of the quarantine. `rdi`: 0 for what is due, 1 for all that can be had,
    /// `rsi`: virtual address of an array of [`super::Released`] (in an added region), `rcx`: how
    /// many fit, at most [`super::RELEASED_MAX`]; 0 only asks whether the array will do. Result:
    /// how many were written. The guest gives them to its allocators.
    pub const QUARANTINE: u32 = 14;
    /// Work was made that has to do with an object, such as work that will free it. `rdi`: an
    /// address in it, `rcx`: CPU in bits 16..32, task in bits 32..64. The VMM walks the caller's
    /// stack from `rbp`. `sync` mode only.
    pub const RELATED: u32 = 15;
}

/// What the keys of virtual ranges are handed out in: as much memory as one page of page shadow is
/// for.
pub const VIRTUAL_UNIT: u64 = crate::codes::PAGE_SIZE << crate::codes::PAGE_SHIFT;

/// The least value of `rax` that is an error.
pub const ERR_MIN: u64 = -4095i64 as u64;
/// No such call.
pub const ERR_CALL: u64 = -1i64 as u64;
/// An argument is out of range, misaligned, or not in an added region.
pub const ERR_ARGUMENT: u64 = -2i64 as u64;
/// The versions of guest and host do not go together.
pub const ERR_VERSION: u64 = -3i64 as u64;
/// The call does not belong to the mode that this run uses.
pub const ERR_MODE: u64 = -4i64 as u64;
/// A bounded table of the host is full.
pub const ERR_LIMIT: u64 = -5i64 as u64;

/// What a reported access was.
pub mod access {
    /// A load.
    pub const READ: u16 = 0;
    /// A store.
    pub const WRITE: u16 = 1;
    /// A free of memory that is free already.
    pub const DOUBLE_FREE: u16 = 2;
    /// A free of an address that is not the start of an allocation.
    pub const INVALID_FREE: u16 = 3;
}

/// An allocator's slot as one argument: its bytes in bits 0..56, in bits 56..64 the code that
/// poisons what of it is not allocated. 0 is none.
pub const fn slot(bytes: u64, code: u8) -> u64 {
    bytes & SLOT_BYTES_MAX | (code as u64) << 56
}
/// Most bytes of a [`slot`].
pub const SLOT_BYTES_MAX: u64 = (1 << 56) - 1;

/// What becomes of freed memory: 0, it goes back to its allocator at once; else it waits in the
/// quarantine. `allocator` is the guest's number of an allocator, not 0; `note` is for that
/// allocator.
pub const fn wait(allocator: u8, note: u8) -> u16 {
    allocator as u16 | (note as u16) << 8
}

/// Memory that leaves the quarantine, 16 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Released {
    /// Virtual address, as it was told when the memory was freed.
    pub address: u64,
    /// Bytes of its slot.
    pub slot: u32,
    /// Its [`wait`].
    pub wait: u16,
    /// Not used; zero.
    pub reserved: u16,
}
/// Bytes of a [`Released`].
pub const RELEASED_BYTES: u64 = 16;
/// Most of them in one call.
pub const RELEASED_MAX: u64 = 1 << 16;

impl Released {
    /// As it lies in guest memory.
    pub fn to_bytes(self) -> [u8; RELEASED_BYTES as usize] {
        let mut bytes = [0; RELEASED_BYTES as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.slot.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.wait.to_le_bytes());
        bytes
    }
}

/// What a name is of.
pub mod name {
    /// An allocator's cache; ids below 65,536.
    pub const CACHE: u64 = 0;
    /// A task.
    pub const TASK: u64 = 1;
}
/// Longest name, in bytes.
pub const NAME_MAX: u64 = 64;

/// What a compiler tells of one global variable (LLVM's and gcc's `struct __asan_global`).
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
    /// Virtual address of its place in the source, 0 if the compiler does not say.
    pub location: u64,
    /// For C++'s one-definition rule.
    pub odr_indicator: u64,
}
/// Bytes of a [`Global`].
pub const GLOBAL_BYTES: u64 = 64;
/// Most globals in one call.
pub const GLOBALS_MAX: u64 = 1 << 16;

/// Why the guest ends.
pub mod exit {
    /// It has done what it was to do.
    pub const DONE: u64 = 0;
    /// A panic; the message is on the console.
    pub const PANIC: u64 = 1;
    /// A CPU exception it had no answer to.
    pub const FAULT: u64 = 2;
}

/// What unpoisoned memory is for.
///
/// Compilers store the shadow of stack variables directly, which read-only windows refuse. The VMM
/// carries out such a store if all that it covers is stack and each of its bytes is one that a
/// stack's shadow may hold ([`crate::codes::on_stack`]); any other store to a window is shadow
/// tampering.
pub mod memory {
    /// As before.
    pub const AS_BEFORE: u64 = 0;
    /// From now on its whole pages are a stack. They stop being one with [`NO_STACK`], or when
    /// whole pages are poisoned with a code that is not one of stacks.
    pub const STACK: u64 = 1;
    /// It is no stack any more.
    pub const NO_STACK: u64 = 2;
}

/// Bytes of a [`RingHeader`], and of a [`Record`].
pub const RECORD_BYTES: u64 = 64;
/// Most records one ring may have.
pub const RING_MAX_RECORDS: u64 = 1 << 16;
/// Most return addresses in one record.
pub const RECORD_FRAMES: usize = 10;

/// The first 64 bytes of a ring; [`Record`]s follow.
///
/// The guest writes a record, then raises `count`. The VMM takes the records that it has not taken
/// yet while every CPU stands still, from all rings together, in the order of their sequence
/// numbers. It sets `count` to 0 only when the ring's CPU calls for a drain: at any other time that
/// CPU may be about to raise it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub struct RingHeader {
    /// Records written since this CPU's last [`call::RING_DRAIN`].
    pub count: u64,
    /// Not used; zero.
    pub reserved: [u64; 7],
}

/// What a record tells.
pub mod record {
    /// Memory was allocated.
    pub const ALLOCATED: u8 = 1;
    /// Memory was freed.
    pub const FREED: u8 = 2;
    /// Memory was allocated, and the rest of its slot is told.
    pub const ALLOCATED_IN_SLOT: u8 = 3;
    /// Work was made that has to do with the object that holds the address.
    pub const RELATED: u8 = 4;
    /// A cache has a name: what [`super::call::NAME`] tells of one, without a call, if it fits.
    pub const CACHE: u8 = 5;
}
/// Most bytes of a name in a record.
pub const RECORD_NAME_MAX: usize = 4 * RECORD_FRAMES;

/// One allocator event in a ring, 64 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Record {
    /// [`record`] kind.
    pub kind: u8,
    /// How many of `frames` are set; of a name, its bytes.
    pub depth: u8,
    /// The cache it belongs to or names, 0 for none; for a free a [`wait`].
    pub cache: u16,
    /// The task that did it.
    pub task: u32,
    /// Virtual address of the memory.
    pub address: u64,
    /// For [`record::ALLOCATED`] bytes asked for, saturated. For [`record::ALLOCATED_IN_SLOT`]
    /// these in bits 0..16, and in bits 16..32 the bytes that the slot has beyond them. For
    /// [`record::FREED`] with a [`wait`] the bytes of the slot, else 0. For [`record::CACHE`] bytes
    /// of one object.
    pub size: u32,
    /// Sequence number across all CPUs, wrapping. Each is taken once, from a counter that is raised
    /// atomically, when the event happens: for a free, before the memory can be handed out again.
    pub sequence: u32,
    /// Return addresses, innermost first, as the distance from the ring's text base. 0 is an
    /// address that lies more than 4 GiB from it. A name takes their place, byte by byte.
    pub frames: [u32; RECORD_FRAMES],
}

impl Record {
    /// The record in its 64 bytes of guest memory.
    pub fn from_bytes(bytes: &[u8; RECORD_BYTES as usize]) -> Self {
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut frames = [0; RECORD_FRAMES];
        for (i, frame) in frames.iter_mut().enumerate() {
            *frame = u32_at(24 + 4 * i);
        }
        Self {
            kind: bytes[0],
            depth: bytes[1],
            cache: u16::from_le_bytes([bytes[2], bytes[3]]),
            task: u32_at(4),
            address: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32,
            size: u32_at(16),
            sequence: u32_at(20),
            frames,
        }
    }
}

impl Record {
    /// What lies in the place of the return addresses, as the name of a [`record::CACHE`].
    pub fn name(&self) -> [u8; RECORD_NAME_MAX] {
        let mut name = [0; RECORD_NAME_MAX];
        for (bytes, word) in name.chunks_exact_mut(4).zip(self.frames) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        name
    }
}

const _: () = assert!(size_of::<Record>() as u64 == RECORD_BYTES);
const _: () = assert!(size_of::<Released>() as u64 == RELEASED_BYTES);
const _: () = assert!(size_of::<Global>() as u64 == GLOBAL_BYTES);
const _: () = assert!(size_of::<RingHeader>() as u64 == RECORD_BYTES);
