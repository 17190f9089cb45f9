//! The interface between a guest and the VMM: discovery, hypercalls, ring records.
//!
//! Every number of it is defined here and nowhere else. The guest runtime encodes with these types
//! and the VMM decodes with them. `guest/c/umbra.h` and the Linux patches cannot use them; a test
//! (`tests/abi.rs`) compares their constants with the ones here.
//!
//! **A hypercall** is `out dx, eax` with [`PORT`] in `dx`, a [`CallNumber`] in `eax`, and arguments
//! in `rdi`, `rsi`, `rcx` and `r8` (not `rdx`, which holds the port). The result is in `rax`;
//! values from [`ERR_MIN`] on are errors. No other register changes.
//!
//! The interface has a version of its own, [`VERSION`]. It is raised when an existing kernel would
//! misbehave.

/// Defines an enum whose values are numbers of the ABI: `TryFrom` the number, `From` back to it and
/// to the wider integers that are listed.
macro_rules! numbered {
    (
        $(#[$meta:meta])*
        pub enum $name:ident: $repr:ident $(, $wider:ident)* {
            $($(#[$variant_meta:meta])* $variant:ident = $number:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name {
            $($(#[$variant_meta])* $variant = $number,)*
        }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
        }

        impl TryFrom<$repr> for $name {
            type Error = $repr;

            /// The error is the number, which has no meaning.
            fn try_from(number: $repr) -> Result<Self, $repr> {
                match number {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(number),
                }
            }
        }

        numbered!(@from $name $repr $($wider)*);
    };
    (@from $name:ident $($int:ident)*) => {$(
        impl From<$name> for $int {
            #[inline]
            fn from(value: $name) -> $int {
                value as $int
            }
        }
    )*};
}

/// Defines a set of bits. Bits without a name are kept; readers ignore them.
macro_rules! bit_set {
    (
        $(#[$meta:meta])*
        pub struct $name:ident: $repr:ident {
            $($(#[$bit_meta:meta])* $bit:ident = $value:expr,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name($repr);

        impl $name {
            $($(#[$bit_meta])* pub const $bit: Self = Self($value);)*

            /// A set of these bits.
            #[inline]
            pub const fn from_bits(bits: $repr) -> Self {
                Self(bits)
            }

            /// The bits.
            #[inline]
            pub const fn bits(self) -> $repr {
                self.0
            }

            /// Whether any bit of `other` is set.
            #[inline]
            pub const fn has(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }
        }

        impl core::ops::BitOr for $name {
            type Output = Self;

            #[inline]
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    };
}

mod calls;
pub mod check_shadow;
mod discovery;
mod ring;

pub use calls::{
    Access, Actor, CallNumber, ERR_ARGUMENT, ERR_CALL, ERR_LIMIT, ERR_MIN, ERR_MODE, ERR_VERSION,
    ExitReason, FREE_REFUSED, GLOBAL_BYTES, GLOBALS_MAX, Global, MODULE_INFO_BYTES,
    MODULE_NAME_MAX, MODULE_SYMBOLS_MAX, MemoryUse, ModuleInfo, NAME_MAX, NameKind, Owner,
    RELEASED_BYTES, RELEASED_MAX, Released, Slot, VIRTUAL_UNIT,
};
pub use discovery::{
    CPUID_BLOCKS, CPUID_FIRST, CPUID_LEAF_BYTE_WINDOW, CPUID_LEAF_FEATURES, CPUID_LEAF_PAGE_WINDOW,
    CPUID_LEAF_PATTERNS, CPUID_LEAF_SETTINGS, CPUID_LEAF_VIRTUAL, CPUID_SIGNATURE, CPUID_STEP,
    Features, GuestFlags, Redzone,
};
pub use ring::{
    BadRecord, PackedRecord, RECORD_BYTES, RECORD_FRAMES, RECORD_NAME_MAX, RING_MAX_RECORDS,
    RING_SPARE, RawRecord, Record, RecordBody, RecordKind, RingHeader, record_frames,
};

/// Version of the interface.
pub const VERSION: u32 = 2;

/// The I/O port of the hypercall.
pub const PORT: u16 = 0x0b5e;

/// The I/O port by which a CPU asks to have the rings read while it runs on
/// ([`Features::DOORBELL`]). It is no hypercall: no register changes, and nothing has happened yet
/// when the write ends.
pub const DOORBELL_PORT: u16 = 0x0b62;

/// After how many records a CPU writes to [`DOORBELL_PORT`], each time, if its ring holds so many.
/// A VMM that keeps up has no more than these left to read when the ring is full.
pub const fn doorbell_interval(records: u64) -> u64 {
    const MOST: u64 = 512;
    if records / 2 > MOST { MOST } else { records / 2 }
}
