//! What the table tells of an object.

use crate::Moment;

/// An allocator's cache, as the guest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache<'a> {
    /// The guest's id.
    pub id: u16,
    /// Its name, printable ASCII.
    pub name: &'a str,
    /// Bytes of one object slot; 0 if the guest did not say.
    pub object_size: u64,
}

/// What the shadow says about an address that [`nearest`](super::Objects::nearest) is to explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowHint {
    /// Nothing that would help.
    Anywhere,
    /// It is accessible, or in a free page: only an object that holds it explains it.
    Inside,
    /// It is a redzone: no freed object explains it.
    Redzone,
    /// It is the rest of a live object's last granule, or the redzone behind a large one: that
    /// object lies before it.
    Behind,
}

/// An allocation or a free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectEvent<'a> {
    /// The guest's task id.
    pub task: u32,
    /// The task's name, printable ASCII, if the guest gave it.
    pub name: Option<&'a str>,
    /// On which CPU, and when; not kept of all events.
    pub at: Option<Moment>,
    /// Return addresses, innermost first.
    pub frames: Vec<u64>,
    /// There was a call stack, but no room for it.
    pub lost: bool,
}

/// An object that explains an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundObject<'a> {
    /// The key of its start.
    pub start: u64,
    /// Bytes that were asked for; 0 if only the free is known.
    pub size: u64,
    /// Whether it is allocated now.
    pub live: bool,
    /// Its cache, if it has one that the guest named.
    pub cache: Option<Cache<'a>>,
    /// Its allocation, if known.
    pub allocated: Option<ObjectEvent<'a>>,
    /// Its free, if it was freed.
    pub freed: Option<ObjectEvent<'a>>,
    /// What was in its place before, if that was freed.
    pub previous: Option<Previous<'a>>,
    /// Who queued work that had to do with it, such as the work that freed it: the last one first.
    pub related: Vec<ObjectEvent<'a>>,
}

/// An object that was freed before another one took its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Previous<'a> {
    /// The key of its start.
    pub start: u64,
    /// Bytes that were asked for.
    pub size: u64,
    /// Its allocation, if known.
    pub allocated: Option<ObjectEvent<'a>>,
    /// Its free.
    pub freed: ObjectEvent<'a>,
}
