//! What makes two findings the same bug, in one run and in runs of two builds.
//!
//! A bug is the kind of error, the kind of access, the functions that made the access, and the
//! origin of the memory. Lines, offsets, sizes and addresses are not part of it:
//!
//! - Lines and addresses change with any edit. A function's name survives a rebuild, by another
//!   compiler or optimization level too, because inlined functions count as functions.
//! - A loop that runs off its object makes accesses at many offsets. Optimized, it is several
//!   instructions of several sizes. It is one bug.
//! - Two mistakes in one function with the same kind of access to the same object are therefore one
//!   bug here. A caller that must see each of them counts places ([`Distinct::Places`]).
//!
//! The functions are the first [`FUNCTIONS`] of the stack that are not only tools of their callers,
//! such as `core::ptr::read_volatile`, `memcpy` and `kfree` (`function.rs` has the rule). What
//! happens inside of an allocator is left out too, in an allocation or a free. One function would
//! not do: many bugs of a kernel go through the same few accessors. Of a recursion the function
//! counts once.
//!
//! The origin is a global variable, a variable of a stack frame, or the function that allocated the
//! object, by the same rule. It separates bugs that show in one function which handles objects of
//! many kinds.
//!
//! In one run, all uses of one freed object count as one bug (`collect.rs`), with the fingerprint
//! of the first: a timer that outlives its object is seen in many functions of the timer code.
//!
//! An address without a symbol is written as its offset in the kernel's image, `+0x1234`, or as the
//! address itself if it is outside of the image. That survives another run, and no rebuild.
//!
//! [`Distinct::Places`]: super::Distinct::Places

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::frame::StackFrame;
use super::function::{is_allocator, is_tool, plain, plain_variable};
use super::printable::NO_SYMBOL;
use super::{AccessKind, Finding, Frame, Track};

/// Most functions of an identity.
pub const FUNCTIONS: usize = 3;
/// Most frames between an event of an allocator and the function that the kernel called for it.
/// Further out there may be another allocation: one that made the kernel reclaim memory.
const INSIDE_ALLOCATOR: usize = 8;

/// The identity of a bug.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// KASAN's name of the bug.
    #[serde(skip)]
    pub kind: &'static str,
    /// The kind of access.
    #[serde(skip)]
    pub access: AccessKind,
    /// The functions that made the access, innermost first, at most [`FUNCTIONS`].
    pub functions: Vec<String>,
    /// The variable that was accessed, or the function that allocated the object.
    pub origin: Option<String>,
}

/// A hash over an [`Identity`]. Displays as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(u64);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Identity {
    /// The identity of a finding.
    pub fn of(finding: &Finding) -> Self {
        Self {
            kind: finding.kind,
            access: finding.access,
            functions: functions(finding.access_frames(), &finding.image, FUNCTIONS),
            origin: origin(finding),
        }
    }

    /// The hash: FNV-1a with 64 bits over the UTF-8 text of kind, access (`read`, `write`, `free`),
    /// origin (empty if there is none) and each function, with a line feed behind each.
    pub fn fingerprint(&self) -> Fingerprint {
        let origin = self.origin.as_deref().unwrap_or_default();
        let access = self.access.word();
        let functions = self.functions.iter().map(String::as_str);
        let mut hash = Fnv::default();
        for text in [self.kind, access, origin].into_iter().chain(functions) {
            hash.add(text.as_bytes());
            hash.add(b"\n");
        }
        Fingerprint(hash.0)
    }

    /// The bug in a few words, without addresses: `slab-out-of-bounds Write in function`.
    pub fn title(&self) -> String {
        let function = match self.functions.first() {
            Some(name) if !name.starts_with(['+', '0']) => name,
            _ => NO_SYMBOL,
        };
        match self.access {
            AccessKind::Free => format!("{} in {function}", self.kind),
            access => format!("{} {access} in {function}", self.kind),
        }
    }
}

impl Finding {
    /// The frames from that of [`Finding::ip`] on; of a free those outside of the allocator.
    pub(super) fn access_frames(&self) -> &[Frame] {
        let start = self.frames.iter().position(|frame| frame.ip == self.ip);
        let frames = start.and_then(|start| self.frames.get(start..)).unwrap_or_default();
        match self.access {
            AccessKind::Free => outside_allocator(frames),
            AccessKind::Read | AccessKind::Write => frames,
        }
    }

    /// The function that a person would look at first: that of the access, or the first of its
    /// callers that is not only a tool, such as `memcpy` or `core::ptr::read_volatile`. It may be
    /// an inlined one.
    pub fn function(&self) -> Option<&Frame> {
        first_of(self.access_frames())
    }

    /// The identity of the bug.
    pub fn identity(&self) -> Identity {
        Identity::of(self)
    }

    /// The hash over the identity of the bug. Equal bugs have equal ones in every run and build.
    pub fn fingerprint(&self) -> Fingerprint {
        self.identity().fingerprint()
    }
}

impl Track {
    /// The frames outside of the allocator.
    pub(super) fn caller_frames(&self) -> &[Frame] {
        outside_allocator(&self.frames)
    }
}

/// FNV-1a with 64 bits. It is no defence: a guest that wants two bugs to look alike can
/// do that with any names.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// The stack of an allocation or a free without what the allocator does inside.
fn outside_allocator(frames: &[Frame]) -> &[Frame] {
    let is_allocator =
        |frame: &Frame| frame.symbol.as_deref().is_some_and(|name| is_allocator(&plain(name)));
    let entry = frames.iter().take(INSIDE_ALLOCATOR).position(is_allocator);
    entry.and_then(|entry| frames.get(entry..)).unwrap_or(frames)
}

/// The first frame that is not only a tool of its caller; if all are tools, the first function of
/// the ELF, as KASAN names it.
pub(super) fn first_of(frames: &[Frame]) -> Option<&Frame> {
    let interesting = frames.iter().filter(|frame| is_function(frame)).find(|f| !is_only_tool(f));
    interesting.or_else(|| frames.iter().find(|frame| !frame.inlined))
}

/// Whether a frame is only a tool of its caller.
pub(super) fn is_only_tool(frame: &Frame) -> bool {
    frame.symbol.as_deref().is_some_and(|name| is_tool(&plain(name), file(frame)))
}

/// The whole path if it is known: what a frame shows may be without the folder of the library.
fn file(frame: &Frame) -> Option<&str> {
    frame.path.as_deref().or(frame.file.as_deref())
}

/// Debug information may lack the name of an inlined function.
fn is_function(frame: &Frame) -> bool {
    !frame.inlined || frame.symbol.is_some()
}

/// The first `most` functions of a stack that are not only tools of their callers, without repeats
/// in a row. If all are tools, the first ones.
fn functions(frames: &[Frame], image: &Range<u64>, most: usize) -> Vec<String> {
    let named = |frame: &Frame| match frame.symbol.as_deref() {
        Some(name) => plain(name),
        None if image.contains(&frame.ip) => format!("+{:#x}", frame.ip - image.start),
        None => format!("{:#x}", frame.ip),
    };
    let all = || frames.iter().filter(|frame| is_function(frame));
    let interesting = |frame: &&Frame| !is_tool(&named(frame), file(frame));
    let found = first(&mut all().filter(interesting).map(named), most);
    if found.is_empty() { first(&mut all().map(named), most) } else { found }
}

fn first(names: &mut dyn Iterator<Item = String>, most: usize) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for name in names {
        if found.last() == Some(&name) {
            continue;
        }
        if found.len() == most {
            break;
        }
        found.push(name);
    }
    found
}

fn origin(finding: &Finding) -> Option<String> {
    if let Some(variable) = &finding.variable {
        return Some(plain_variable(&variable.name));
    }
    if let Some(frame) = &finding.stack_frame {
        return Some(of_stack(frame));
    }
    let allocated = finding.allocated.as_ref()?;
    functions(allocated.caller_frames(), &finding.image, 1).pop()
}

/// The function of a stack frame and its variable: `function: variable`. An address between two
/// variables belongs to the lower one, as with globals. So an overrun is one bug up to the next
/// variable.
fn of_stack(frame: &StackFrame) -> String {
    let mut named = frame.variables.iter().filter(|variable| !variable.name.is_empty());
    let below = named.clone().rfind(|variable| variable.offset <= frame.offset);
    let variable = below.or_else(|| named.next()).map(|variable| plain_variable(&variable.name));
    let function = frame.function.as_deref().unwrap_or_default();
    let function = function.rsplit_once("+0x").map_or(function, |(name, _)| name);
    format!("{}: {}", plain(function), variable.unwrap_or_default())
}

#[cfg(test)]
mod tests;
