//! Names the bug behind a violation, as KASAN does: by the shadow of the first bad address.

use core::fmt;

use crate::abi::Access;
use crate::codes::{
    ALLOCA_LEFT, ALLOCA_RIGHT, FREE_PAGE, GLOBAL_REDZONE, GRANULE, LARGE_REDZONE, PAGE_SIZE,
    SLAB_FREE, SLAB_FREE_TRACK, SLAB_REDZONE, STACK_AFTER_RETURN, STACK_LEFT, STACK_MID,
    STACK_PARTIAL, STACK_RIGHT, USE_AFTER_SCOPE,
};
use crate::model::Shadow;
use crate::span::contains;
use crate::violation::{Cause, Violation};

/// The end of the lower half of the address space, where user programs live.
const USER_END: u64 = 1 << 47;

/// A kind of bug. Displays as KASAN's name of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BugKind {
    /// Beside a slab object or a large allocation.
    SlabOutOfBounds,
    /// In a freed slab object.
    SlabUseAfterFree,
    /// In a freed page, or on the stack of a thread that has ended.
    UseAfterFree,
    /// Beside a global variable.
    GlobalOutOfBounds,
    /// Beside a stack variable.
    StackOutOfBounds,
    /// Beside an `alloca` region.
    AllocaOutOfBounds,
    /// In virtual memory that is not allocated, or behind the requested bytes.
    VmallocOutOfBounds,
    /// In a stack variable whose scope has ended.
    UseAfterScope,
    /// A size that wraps or is negative, or a bad byte with valid ones around it.
    OutOfBounds,
    /// In the first page of the address space.
    NullPtrDeref,
    /// In the lower half of the address space.
    UserMemoryAccess,
    /// At any other address without shadow.
    WildMemoryAccess,
    /// A free of memory that is free already.
    DoubleFree,
    /// A free of an address that is not the start of an allocation.
    InvalidFree,
    /// A store of the guest into shadow that only the VMM may write.
    ShadowTampering,
    /// A shadow value without a meaning.
    Unknown,
}

impl BugKind {
    /// The name, as in the headline of a report.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SlabOutOfBounds => "slab-out-of-bounds",
            Self::SlabUseAfterFree => "slab-use-after-free",
            Self::UseAfterFree => "use-after-free",
            Self::GlobalOutOfBounds => "global-out-of-bounds",
            Self::StackOutOfBounds => "stack-out-of-bounds",
            Self::AllocaOutOfBounds => "alloca-out-of-bounds",
            Self::VmallocOutOfBounds => "vmalloc-out-of-bounds",
            Self::UseAfterScope => "use-after-scope",
            Self::OutOfBounds => "out-of-bounds",
            Self::NullPtrDeref => "null-ptr-deref",
            Self::UserMemoryAccess => "user-memory-access",
            Self::WildMemoryAccess => "wild-memory-access",
            Self::DoubleFree => "double-free",
            Self::InvalidFree => "invalid-free",
            Self::ShadowTampering => "shadow-tampering",
            Self::Unknown => "unknown-crash",
        }
    }

    /// The kind of a bad free. The access alone decides it; the memory may be valid.
    pub const fn of_free(access: Access) -> Option<Self> {
        match access {
            Access::DoubleFree => Some(Self::DoubleFree),
            Access::InvalidFree => Some(Self::InvalidFree),
            Access::Read | Access::Write => None,
        }
    }

    /// The kind of an access to memory with this shadow value.
    const fn of_state(state: u8) -> Self {
        match state {
            // Valid memory: the shadow changed after the access was checked.
            0..=7 => Self::OutOfBounds,
            LARGE_REDZONE | SLAB_REDZONE => Self::SlabOutOfBounds,
            SLAB_FREE | SLAB_FREE_TRACK => Self::SlabUseAfterFree,
            FREE_PAGE | STACK_AFTER_RETURN => Self::UseAfterFree,
            GLOBAL_REDZONE => Self::GlobalOutOfBounds,
            STACK_LEFT | STACK_MID | STACK_RIGHT | STACK_PARTIAL => Self::StackOutOfBounds,
            ALLOCA_LEFT | ALLOCA_RIGHT => Self::AllocaOutOfBounds,
            // `VMALLOC_INVALID` has the same value, and the shadow does not know where stacks are.
            USE_AFTER_SCOPE => Self::UseAfterScope,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for BugKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Names the bug behind `violation`, which `shadow` found in an access to `len` bytes from `addr`
/// on.
///
/// `addr` is the address that the guest used. The shadow may be keyed by another address: a pointer
/// is null by its virtual address.
pub fn classify<S: Shadow>(
    shadow: &S,
    violation: &Violation,
    addr: u64,
    len: u64,
    access: Access,
) -> BugKind {
    if let Some(kind) = BugKind::of_free(access) {
        return kind;
    }
    let negative = len > i64::MAX as u64;
    match violation.cause {
        Cause::Wrapped => BugKind::OutOfBounds,
        Cause::Poisoned | Cause::Outside if negative => BugKind::OutOfBounds,
        Cause::Outside if addr < PAGE_SIZE => BugKind::NullPtrDeref,
        Cause::Outside if addr < USER_END => BugKind::UserMemoryAccess,
        Cause::Outside => BugKind::WildMemoryAccess,
        Cause::Poisoned => match violation.code {
            // A granule with valid bytes has no code for the others; the next granule does.
            1..=7 => match violation.address.checked_add(GRANULE) {
                Some(next) if contains(shadow.memory(), next) => {
                    BugKind::of_state(shadow.state(next))
                }
                _ => BugKind::OutOfBounds,
            },
            code => BugKind::of_state(code),
        },
    }
}
