//! A ring's record, decoded: the one place that knows what the fields of a [`Record`] mean for each
//! kind of record.

use umbra_shadow::abi::{Record, record};

/// What a record says. Addresses are the guest's own, and nothing about them has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordEvent {
    /// An allocation.
    Allocated {
        /// Virtual address.
        address: u64,
        /// Bytes that were asked for.
        size: u32,
        /// Bytes of the slot; 0 if they are not known.
        slot: u32,
        /// The cache, 0 for none.
        cache: u16,
        /// The task that allocated it.
        task: u32,
    },
    /// A free.
    Freed {
        /// Virtual address.
        address: u64,
        /// Bytes of the slot, if the memory goes into the quarantine.
        slot: u32,
        /// The allocator that waits for it; 0 if it does not go into the quarantine.
        wait: u16,
        /// The task that freed it.
        task: u32,
    },
    /// Work was queued that has to do with the object at an address.
    Related {
        /// Virtual address.
        address: u64,
        /// The task that queued it.
        task: u32,
    },
    /// A cache has a name: the first bytes of [`Record::name`].
    CacheNamed {
        /// The cache.
        id: u16,
        /// Bytes of its name.
        name_len: usize,
        /// Bytes of one object.
        object_size: u32,
    },
}

impl RecordEvent {
    /// Decodes a record; none if it makes no sense.
    pub fn decode(r: &Record) -> Option<Self> {
        Some(match r.kind {
            record::ALLOCATED => Self::Allocated {
                address: r.address,
                size: r.size,
                slot: 0,
                cache: r.cache,
                task: r.task,
            },
            record::ALLOCATED_IN_SLOT => {
                let (size, rest) = (r.size & 0xffff, r.size >> 16);
                let slot = size + rest;
                Self::Allocated { address: r.address, size, slot, cache: r.cache, task: r.task }
            }
            record::FREED => {
                Self::Freed { address: r.address, slot: r.size, wait: r.cache, task: r.task }
            }
            record::RELATED => Self::Related { address: r.address, task: r.task },
            record::CACHE if usize::from(r.depth) <= r.name().len() => {
                Self::CacheNamed { id: r.cache, name_len: r.depth.into(), object_size: r.size }
            }
            _ => return None,
        })
    }
}
