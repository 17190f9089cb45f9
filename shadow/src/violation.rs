//! Errors of the shadow models: bad accesses, and changes that make no sense.

use core::fmt;

/// Why an access is a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It touches a poisoned byte.
    Poisoned,
    /// Address plus length goes past the end of the address space.
    Wrapped,
    /// It touches an address that no shadow describes.
    Outside,
}

/// An access that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Violation {
    /// The first bad address: exact to the byte for [`Cause::Poisoned`], the first address without
    /// shadow for [`Cause::Outside`], the start of the access for [`Cause::Wrapped`].
    pub address: u64,
    /// The shadow value of the granule that holds `address`, as
    /// [`Shadow::state`](crate::model::Shadow::state) gives it;
    /// [`codes::UNKNOWN`](crate::codes::UNKNOWN) unless the cause is [`Cause::Poisoned`]. For 1 to
    /// 7 the code is that of the next granule: see [`classify`](crate::classify::classify).
    pub code: u8,
    /// Why it is not allowed.
    pub cause: Cause,
}

/// A change of the shadow that was refused; the shadow is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeError {
    /// The range goes past the end of the address space.
    Wrapped {
        /// First address of the range.
        addr: u64,
        /// Bytes of the range.
        len: u64,
    },
    /// The range leaves the checked addresses.
    Outside {
        /// The first address of the range that no shadow describes.
        addr: u64,
    },
    /// The value to poison with is not a poison code, which start at
    /// [`codes::POISON_MIN`](crate::codes::POISON_MIN).
    NotPoison {
        /// The value.
        code: u8,
    },
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Wrapped { addr, len } => {
                write!(
                    f,
                    "{len:#x} bytes from address {addr:#x} go past the end of the address space"
                )
            }
            Self::Outside { addr } => write!(f, "address {addr:#x} has no shadow"),
            Self::NotPoison { code } => write!(f, "{code:#04x} is not a poison code"),
        }
    }
}

impl core::error::Error for RangeError {}
