//! The rings in which a guest records its allocator events, and the records in them.
//!
//! A record is 64 bytes, little endian:
//!
//! | bytes | |
//! | --- | --- |
//! | 0 | [`RecordKind`] |
//! | 1 | number of frames; of a name, its bytes |
//! | 2..4 | an allocation's or a name's cache (0 for none); a free's [`Owner`] |
//! | 4..8 | task |
//! | 8..16 | virtual address of the memory |
//! | 16..20 | sizes, by kind |
//! | 20..28 | stamp |
//! | 28..64 | frames, 4 bytes each; or a name |
//!
//! A stamp says when the event happened: for a free, before the memory can be handed out again; for
//! an allocation, after that. So stamps put the events of any piece of memory in their true order.
//! A free comes before an allocation with the same stamp. With [`Features::STAMPS_TSC`] it is the
//! CPU's time stamp counter, else the next number of a counter that all CPUs share.
//!
//! [`Features::STAMPS_TSC`]: super::Features::STAMPS_TSC
//!
//! The guest writes one with [`PackedRecord`], which packs these bytes for each kind. The VMM reads
//! one with [`Record::decode`].

use core::fmt;

use super::Owner;

/// Bytes of a [`RingHeader`], and of a record.
pub const RECORD_BYTES: u64 = 64;
/// Most records of one ring.
pub const RING_MAX_RECORDS: u64 = 1 << 16;
/// Most return addresses in one record.
pub const RECORD_FRAMES: usize = 9;
/// Where frames, or a name, begin.
const FRAMES_AT: usize = 28;
/// Most bytes of a name in a record.
pub const RECORD_NAME_MAX: usize = 4 * RECORD_FRAMES;

/// The first 64 bytes of a ring; records follow.
///
/// The guest writes a record, then raises `count`. While every CPU stands still, the VMM takes the
/// records that it has not taken yet, from all rings, in the order of their stamps. It sets `count`
/// to 0 only when the ring's CPU asks for a drain. At any other time that CPU may have
/// read the old count and be about to store the next.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub struct RingHeader {
    /// Records written since this CPU's last [`RingDrain`](super::CallNumber::RingDrain).
    pub count: u64,
    /// Records begun since then, for the guest's own use; such a drain sets it to 0, too. What
    /// interrupts a CPU in the middle of a record takes the next one, and the outermost raises
    /// `count` for all.
    pub claimed: u64,
    /// Not used; zero.
    pub reserved: [u64; 6],
}

/// Records at the end of a ring for what interrupts a CPU in the middle of another record, when it
/// cannot ask for a drain: non-maskable interrupts and machine checks.
pub const RING_SPARE: u64 = 4;

numbered! {
    /// The kind of a record, its first byte.
    pub enum RecordKind: u8 {
        /// An allocation. Sizes: its bytes, saturated.
        Allocated = 1,
        /// A free. Sizes: with an [`Owner`] the bytes of the slot, else 0.
        Freed = 2,
        /// An allocation at the start of a slot. Sizes: in bits 0..16 the bytes of the object, in
        /// bits 16..32 the bytes that the slot has beyond them.
        AllocatedInSlot = 3,
        /// Work on the object that holds the address was queued.
        Related = 4,
        /// The name of a cache, as [`CallNumber::Name`](super::CallNumber::Name) gives it, without
        /// a call. Sizes: bytes of one object.
        Cache = 5,
        /// The name of the record's task.
        Task = 6,
    }
}

/// A record in guest memory, as the guest stores it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub struct RawRecord {
    /// [`PackedRecord::head`].
    pub head: u32,
    /// The task.
    pub task: u32,
    /// Virtual address of the memory.
    pub address: u64,
    /// [`PackedRecord::sizes`].
    pub sizes: u32,
    /// Its stamp, the low half first, as the CPU gives its time stamp counter.
    pub stamp: [u32; 2],
    /// Its return addresses.
    pub frames: [u32; RECORD_FRAMES],
}

impl RawRecord {
    /// Its bytes.
    pub fn to_bytes(&self) -> [u8; RECORD_BYTES as usize] {
        let mut bytes = [0; RECORD_BYTES as usize];
        let address = [self.address as u32, (self.address >> 32) as u32];
        let parts: [&[u32]; 5] =
            [&[self.head, self.task], &address, &[self.sizes], &self.stamp, &self.frames];
        for (to, word) in bytes.chunks_exact_mut(4).zip(parts.into_iter().flatten()) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The parts of a record that its kind decides, packed for the guest's hot path.
#[derive(Clone, Copy, Debug)]
pub struct PackedRecord {
    /// The first four bytes, without depth.
    head: u32,
    sizes: u32,
}

impl PackedRecord {
    #[inline(always)]
    const fn new(kind: RecordKind, low: u16, sizes: u32) -> Self {
        Self { head: kind as u32 | (low as u32) << 16, sizes }
    }

    /// An allocation of `bytes`; `cache` is 0 for none.
    #[inline(always)]
    pub const fn allocated(cache: u16, bytes: u64) -> Self {
        let bytes = if bytes > u32::MAX as u64 { u32::MAX } else { bytes as u32 };
        Self::new(RecordKind::Allocated, cache, bytes)
    }

    /// An allocation of `bytes` at the start of a slot of `slot` bytes, which is below 64 KiB and
    /// at least as large.
    #[inline(always)]
    pub const fn allocated_in_slot(cache: u16, bytes: u64, slot: u64) -> Self {
        let sizes = (bytes | (slot - bytes) << 16) as u32;
        Self::new(RecordKind::AllocatedInSlot, cache, sizes)
    }

    /// A free of memory that its allocator gets back at once.
    #[inline(always)]
    pub const fn freed() -> Self {
        Self::new(RecordKind::Freed, 0, 0)
    }

    /// A free of a slot of `slot` bytes that goes into the quarantine and then to `owner`.
    #[inline(always)]
    pub const fn quarantined(owner: Owner, slot: u32) -> Self {
        Self::new(RecordKind::Freed, owner.to_bits(), slot)
    }

    /// Work on an object was queued.
    #[inline(always)]
    pub const fn related() -> Self {
        Self::new(RecordKind::Related, 0, 0)
    }

    /// The first four bytes of the record, with its number of frames.
    #[inline(always)]
    pub const fn head(self, depth: u64) -> u32 {
        self.head | (depth as u32) << 8
    }

    /// Its sizes, by kind.
    #[inline(always)]
    pub const fn sizes(self) -> u32 {
        self.sizes
    }

    /// The record, without frames. `actor` is an [`Actor`](super::Actor) in a register.
    pub const fn record(self, depth: u64, actor: u64, address: u64, stamp: u64) -> RawRecord {
        RawRecord {
            head: self.head(depth),
            task: (actor >> 32) as u32,
            address,
            sizes: self.sizes,
            stamp: [stamp as u32, (stamp >> 32) as u32],
            frames: [0; RECORD_FRAMES],
        }
    }

    /// Whether it is of an allocation.
    #[inline(always)]
    pub const fn is_allocation(self) -> bool {
        let kind = self.head as u8;
        kind == RecordKind::Allocated as u8 || kind == RecordKind::AllocatedInSlot as u8
    }
}

/// A record, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The task that did it.
    pub task: u32,
    /// What happened.
    pub body: RecordBody<'a>,
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordBody<'a> {
    /// An allocation.
    Allocated {
        /// Virtual address.
        address: u64,
        /// Requested bytes, saturated.
        bytes: u32,
        /// Bytes of the slot that it starts; 0 if the record has none.
        slot: u32,
        /// The cache, 0 for none.
        cache: u16,
    },
    /// A free.
    Freed {
        /// Virtual address.
        address: u64,
        /// Bytes of the slot, for memory that has an owner.
        slot: u32,
        /// The allocator that gets the memory from the quarantine; none if it does not go there.
        owner: Option<Owner>,
    },
    /// Work on an object was queued.
    Related {
        /// A virtual address in the object.
        address: u64,
    },
    /// The name of a cache.
    Cache {
        /// Its id.
        id: u16,
        /// Bytes of one object.
        object: u32,
        /// Its name.
        name: &'a [u8],
    },
    /// The name of the record's task.
    Task {
        /// The name.
        name: &'a [u8],
    },
}

/// The return addresses in a record of an event, innermost first: little-endian distances from the
/// ring's text base, as many as there are. 0 is an address more than 4 GiB from it. More than fit
/// count as all that fit.
#[inline]
pub fn record_frames(record: &[u8; RECORD_BYTES as usize]) -> &[[u8; 4]] {
    let frames = record[FRAMES_AT..].as_chunks().0;
    frames.get(..usize::from(record[1])).unwrap_or(frames)
}

/// Why a record makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRecord {
    /// There is no such kind.
    Kind(u8),
    /// The name is longer than [`RECORD_NAME_MAX`].
    NameLength(u8),
}

impl fmt::Display for BadRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "there are no records of kind {kind}"),
            Self::NameLength(len) => write!(f, "a name of {len} bytes does not fit a record"),
        }
    }
}

impl core::error::Error for BadRecord {}

impl<'a> Record<'a> {
    /// Decodes a record, but for its stack ([`record_frames`]).
    ///
    /// # Errors
    /// The record makes no sense.
    #[inline]
    pub fn decode(bytes: &'a [u8; RECORD_BYTES as usize]) -> Result<Self, BadRecord> {
        let kind = RecordKind::try_from(bytes[0]).map_err(BadRecord::Kind)?;
        let low = u16::from_le_bytes([bytes[2], bytes[3]]);
        let address = bytes[8..].first_chunk().map_or(0, |address| u64::from_le_bytes(*address));
        let sizes = word(bytes, 16);
        let body = match kind {
            RecordKind::Allocated => {
                RecordBody::Allocated { address, bytes: sizes, slot: 0, cache: low }
            }
            RecordKind::AllocatedInSlot => {
                let object = sizes & 0xffff;
                let slot = object + (sizes >> 16);
                RecordBody::Allocated { address, bytes: object, slot, cache: low }
            }
            RecordKind::Freed => {
                RecordBody::Freed { address, slot: sizes, owner: Owner::from_bits(low) }
            }
            RecordKind::Related => RecordBody::Related { address },
            RecordKind::Cache => RecordBody::Cache { id: low, object: sizes, name: name(bytes)? },
            RecordKind::Task => RecordBody::Task { name: name(bytes)? },
        };
        Ok(Self { task: word(bytes, 4), body })
    }

    /// The stamp of a record, of any kind.
    #[inline]
    pub fn stamp(bytes: &[u8; RECORD_BYTES as usize]) -> u64 {
        bytes[20..].first_chunk().map_or(0, |stamp| u64::from_le_bytes(*stamp))
    }
}

/// The name in a record.
fn name(bytes: &[u8; RECORD_BYTES as usize]) -> Result<&[u8], BadRecord> {
    let len = bytes[1];
    bytes[FRAMES_AT..].get(..len.into()).ok_or(BadRecord::NameLength(len))
}

fn word(bytes: &[u8; RECORD_BYTES as usize], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

const _: () = assert!(size_of::<RawRecord>() as u64 == RECORD_BYTES);
const _: () = assert!(core::mem::offset_of!(RawRecord, frames) == FRAMES_AT);
const _: () = assert!(size_of::<RingHeader>() as u64 == RECORD_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Actor;

    const ACTOR: Actor = Actor { cpu: 3, task: 0x1234_5678 };
    const STAMP: u64 = 0x0123_4567_89ab_cdef;
    const ADDRESS: u64 = 0xffff_8000_0012_3450;

    /// A record as a guest writes it.
    fn written(packed: PackedRecord, depth: u64) -> [u8; RECORD_BYTES as usize] {
        let record = packed.record(depth, ACTOR.to_register(0xffff), ADDRESS, STAMP);
        let mut bytes = record.to_bytes();
        for i in 0..RECORD_FRAMES {
            bytes[28 + 4 * i..][..4].copy_from_slice(&(i as u32 * 16).to_le_bytes());
        }
        bytes
    }

    /// The body of such a record. Checks its frames and task.
    fn read(bytes: &[u8; RECORD_BYTES as usize], depth: u64) -> RecordBody<'_> {
        assert_eq!(Record::stamp(bytes), STAMP);
        let record = Record::decode(bytes).expect("a good record");
        assert_eq!(record.task, ACTOR.task);
        let address = match record.body {
            RecordBody::Allocated { address, .. }
            | RecordBody::Freed { address, .. }
            | RecordBody::Related { address, .. } => address,
            RecordBody::Cache { .. } | RecordBody::Task { .. } => panic!("not what was written"),
        };
        assert_eq!(address, ADDRESS);
        let frames = record_frames(bytes);
        assert_eq!(frames.len() as u64, depth.min(RECORD_FRAMES as u64));
        assert!((0..).zip(frames).all(|(i, frame)| u32::from_le_bytes(*frame) == i * 16));
        record.body
    }

    #[test]
    fn the_vmm_reads_what_the_guest_writes() {
        for depth in [0, 1, 9, 255] {
            let RecordBody::Allocated { bytes, slot, cache, .. } =
                read(&written(PackedRecord::allocated_in_slot(7, 50, 0xffff), depth), depth)
            else {
                panic!("not an allocation")
            };
            assert_eq!((bytes, slot, cache), (50, 0xffff, 7));
            let RecordBody::Allocated { bytes, slot, cache, .. } =
                read(&written(PackedRecord::allocated(0xffff, 1 << 32), depth), depth)
            else {
                panic!("not an allocation")
            };
            assert_eq!((bytes, slot, cache), (u32::MAX, 0, 0xffff));
            let RecordBody::Freed { slot, owner, .. } =
                read(&written(PackedRecord::freed(), depth), depth)
            else {
                panic!("not a free")
            };
            assert_eq!((slot, owner), (0, None));
            let to = Owner { allocator: 63, note: 0xfe };
            let RecordBody::Freed { slot, owner, .. } =
                read(&written(PackedRecord::quarantined(to, 0x8000_0001), depth), depth)
            else {
                panic!("not a free")
            };
            assert_eq!((slot, owner), (0x8000_0001, Some(to)));
            assert!(matches!(
                read(&written(PackedRecord::related(), depth), depth),
                RecordBody::Related { .. }
            ));
        }
    }

    #[test]
    fn names_have_at_most_36_bytes() {
        let mut bytes = [b'x'; RECORD_BYTES as usize];
        bytes[0] = RecordKind::Cache.into();
        bytes[2..4].copy_from_slice(&9u16.to_le_bytes());
        bytes[16..20].copy_from_slice(&192u32.to_le_bytes());
        for len in [0, 1, 36] {
            bytes[1] = len;
            let Ok(Record { body: RecordBody::Cache { id, object, name }, .. }) =
                Record::decode(&bytes)
            else {
                panic!("not a name")
            };
            assert_eq!((id, object, name.len()), (9, 192, usize::from(len)));
        }
        bytes[1] = 37;
        assert_eq!(Record::decode(&bytes), Err(BadRecord::NameLength(37)));

        bytes[0] = RecordKind::Task.into();
        assert_eq!(Record::decode(&bytes), Err(BadRecord::NameLength(37)));
        bytes[1] = 3;
        let record = Record::decode(&bytes).expect("a name");
        let RecordBody::Task { name } = record.body else { panic!("not a task's name") };
        assert_eq!((record.task, name), (0x7878_7878, &b"xxx"[..]));
    }

    #[test]
    fn other_kinds_are_refused() {
        let kinds = RecordKind::ALL.iter().map(|kind| u8::from(*kind));
        for kind in (0..=255).filter(|kind| !kinds.clone().any(|known| known == *kind)) {
            let mut bytes = [0; RECORD_BYTES as usize];
            bytes[0] = kind;
            assert_eq!(Record::decode(&bytes), Err(BadRecord::Kind(kind)));
        }
    }
}
