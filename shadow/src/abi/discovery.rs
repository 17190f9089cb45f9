//! Discovery by CPUID, and the flags of the first call.
//!
//! A hypervisor has a block of CPUID leaves at `0x4000_0000 + 0x100 * n`. Umbra's block has a
//! signature, so it can be next to KVM's own, and a kernel on another machine does not find it.
//!
//! | leaf | eax | ebx | ecx | edx |
//! | --- | --- | --- | --- | --- |
//! | base + 0 | highest leaf of the block | `Umbr` | `aSan` | `dbox` |
//! | base + 1 | [`VERSION`](super::VERSION) | [`PORT`](super::PORT) | [`Features`] | 0 |
//! | base + 2 | page window, gpa low | gpa high | bytes, low | bytes, high |
//! | base + 3 | byte window, gpa low | gpa high | bytes, low | bytes, high |
//! | base + 4 | bytes of keys for virtual memory, low | high | 0 | 0 |
//! | base + 5 | quarantine batch in bytes | [`Redzone`] | quarantine in bytes, low | high |
//! | base + 6 | pattern pages, gpa low | gpa high | bytes, low | bytes, high |

/// The first leaf that a hypervisor block may start at.
pub const CPUID_FIRST: u32 = 0x4000_0000;
/// Leaves between possible starts of a block.
pub const CPUID_STEP: u32 = 0x100;
/// Number of possible starts.
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
/// Offset of the leaf with the number of keys for virtual memory.
pub const CPUID_LEAF_VIRTUAL: u32 = 4;
/// Offset of the leaf with the settings that the guest follows. A VMM whose block ends before it
/// has no quarantine, and its redzones are [`Redzone::Adaptive`].
pub const CPUID_LEAF_SETTINGS: u32 = 5;
/// Offset of the leaf with the address of the pattern pages ([`group`](crate::group)). A VMM whose
/// block ends before it makes no check shadow.
pub const CPUID_LEAF_PATTERNS: u32 = 6;

bit_set! {
    /// The host's offer in this run.
    pub struct Features: u32 {
        /// Two-level shadow: both windows exist.
        PER_PAGE = 1 << 0,
        /// Full shadow (KASAN's layout): only the byte window exists, and all of it is resident
        /// from the start.
        FULL = 1 << 1,
        /// The guest writes the shadow itself and records events in rings.
        RING = 1 << 2,
        /// The windows are read-only. The guest makes a call for each change of shadow and for each
        /// event.
        SYNC = 1 << 3,
        /// Stamps of records are time stamp counters, which all CPUs have in step.
        STAMPS_TSC = 1 << 4,
        /// A CPU lets its earlier loads end before it reads its time stamp counter for an
        /// allocation (`lfence`): else the counter may be older than the memory's last free on
        /// another CPU.
        STAMPS_FENCED = 1 << 5,
        /// The VMM reads rings while their CPUs run on, when a CPU writes anything to
        /// [`DOORBELL_PORT`](super::DOORBELL_PORT). A CPU does so when there are some hundred more
        /// records in its ring ([`doorbell_interval`](super::doorbell_interval)), or not at all.
        DOORBELL = 1 << 6,
        /// Either kind of shadow.
        SHADOW = 1 << 0 | 1 << 1,
    }
}

bit_set! {
    /// A guest's properties, in [`CallNumber::Hello`](super::CallNumber::Hello). The VMM ignores
    /// bits that it does not know.
    pub struct GuestFlags: u64 {
        /// The contents of free pages are dead: the host may discard pages whose page shadow is
        /// [`FREE_PAGE`](crate::codes::FREE_PAGE), and they read as zero from then on. A page
        /// allocator may set this if it keeps its lists elsewhere, as Linux's does. The host may
        /// also discard the rest of a ring, behind the records of its count, the next one, and
        /// [`RING_SPARE`](super::RING_SPARE) more.
        FREE_PAGES_UNUSED = 1 << 0,
        /// The host may also discard pages that hold nothing but
        /// [`SLAB_FREE_TRACK`](crate::codes::SLAB_FREE_TRACK) and, beside it,
        /// [`SLAB_REDZONE`](crate::codes::SLAB_REDZONE). A quarantine may set this if it keeps its
        /// lists elsewhere and nobody reads the redzones in such a page: an allocator poisons an
        /// object with another code before it stores to it. This flag counts only together with
        /// [`FREE_PAGES_UNUSED`](Self::FREE_PAGES_UNUSED).
        QUARANTINE_UNUSED = 1 << 1,
        /// The guest makes the call [`Activate`](super::CallNumber::Activate) when its checks are
        /// on. Without this flag they are believed to be on once there is a region.
        REPORTS_ACTIVATION = 1 << 2,
        /// The kernel's compiler checks inline: the guest asks for the tables of the check shadow
        /// ([`TopLevel`](super::CallNumber::TopLevel)).
        INLINE = 1 << 3,
    }
}

/// The redzone that a guest's allocators put behind each object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Redzone {
    /// More behind larger objects, as KASAN does.
    #[default]
    Adaptive,
    /// None: memory is laid out as in a kernel that is not checked.
    Off,
    /// A fixed number of bytes: a multiple of 8, at most [`Redzone::MAX`].
    Bytes(u32),
}

impl Redzone {
    /// The most bytes.
    pub const MAX: u32 = 4096;

    const OFF: u32 = 0;
    const ADAPTIVE: u32 = 1;

    /// Encodes the setting.
    pub const fn to_register(self) -> u32 {
        match self {
            Self::Off => Self::OFF,
            Self::Adaptive => Self::ADAPTIVE,
            Self::Bytes(bytes) if bytes > Self::MAX => Self::MAX,
            Self::Bytes(bytes) => bytes.next_multiple_of(8),
        }
    }

    /// Decodes the setting. More than [`Redzone::MAX`] bytes count as so many.
    #[inline]
    pub const fn from_register(value: u32) -> Self {
        match value {
            Self::OFF => Self::Off,
            Self::ADAPTIVE => Self::Adaptive,
            bytes if bytes > Self::MAX => Self::Bytes(Self::MAX),
            bytes => Self::Bytes(bytes),
        }
    }
}
