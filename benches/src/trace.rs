//! Recorded allocator events of a real kernel: the file format, and what can be wrong with a file.
//!
//! A file is compressed by zstd. In it, little endian: `KMEMTRC1`; the number of events (u64), of
//! caches (u32) and of call sites (u32); the names of both, each a length (u8) and as many bytes;
//! then the events, 20 bytes each: type (u8), cache or page order (u8), call site (u16), physical
//! address (u64), bytes asked for and bytes handed out (u32 each).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use umbra_shadow::codes::PAGE_SIZE;

/// The slice of a trace that is in the repository.
pub const SLICE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/traces/kernel-build-slice.kmt.zst");
/// The first bytes of a trace.
const MAGIC: [u8; 8] = *b"KMEMTRC1";
/// Bytes of an event.
const EVENT: usize = 20;
/// A cache's number is one byte.
const MAX_CACHES: u32 = 1 << 8;
/// A call site's number is two.
const MAX_SITES: u32 = 1 << 16;
/// The largest block of Linux's page allocator (`MAX_PAGE_ORDER`).
const MAX_ORDER: u8 = 10;

/// What is wrong with a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// There is no such file, or it cannot be read.
    #[error("cannot read the trace {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// It is not a trace.
    #[error("{} is not an allocator trace: {}", .0.display(), .1)]
    Foreign(PathBuf, &'static str),
    /// It stops before its end.
    #[error("the trace {} is truncated: it ends in event {} of {}", .path.display(), .at, .events)]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The first event that is not whole.
        at: u64,
        /// Events according to its header.
        events: u64,
    },
    /// One of its events makes no sense.
    #[error("event {at} of the trace {} {what}", .path.display())]
    Event {
        /// The file.
        path: PathBuf,
        /// The number of the event, from 1.
        at: u64,
        /// What is wrong.
        what: String,
    },
}

/// An allocator's event. Addresses are physical, sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `kmalloc` or `kmem_cache_alloc`.
    Alloc {
        /// The object.
        addr: u64,
        /// Bytes asked for, the object's size in a cache.
        bytes: u32,
        /// Bytes that its slot has.
        slot: u32,
        /// The number of its cache; none for `kmalloc`.
        cache: Option<u8>,
    },
    /// `kfree` or `kmem_cache_free`.
    Free {
        /// The object.
        addr: u64,
    },
    /// A block of `1 << order` pages was allocated.
    PageAlloc {
        /// Its first page.
        addr: u64,
        /// Its order.
        order: u8,
    },
    /// A block was freed.
    PageFree {
        /// Its first page.
        addr: u64,
        /// Its order.
        order: u8,
    },
}

impl Event {
    fn decode(event: &[u8; EVENT], caches: usize) -> Result<Self, String> {
        let [kind, c, _, _, rest @ ..] = *event;
        let (addr, sizes) = rest.split_at(8);
        let addr = u64::from_le_bytes(addr.try_into().map_err(|_| "is too short")?);
        let size = |at: usize| {
            let bytes = sizes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u32::from_le_bytes(bytes.unwrap_or_default())
        };
        match kind {
            0 | 2 => {
                let (bytes, slot) = (size(0), size(4));
                if slot == 0 || bytes > slot {
                    return Err(format!("hands out {slot} bytes where {bytes} are asked for"));
                }
                if kind == 2 && usize::from(c) >= caches {
                    return Err(format!("names cache {c} of {caches}"));
                }
                Ok(Self::Alloc { addr, bytes, slot, cache: (kind == 2).then_some(c) })
            }
            1 | 3 => Ok(Self::Free { addr }),
            4 | 5 if c > MAX_ORDER => {
                Err(format!("has the page order {c}, of at most {MAX_ORDER}"))
            }
            4 | 5 if !addr.is_multiple_of(PAGE_SIZE << c) => {
                Err(format!("has no block of order {c} at {addr:#x}"))
            }
            4 => Ok(Self::PageAlloc { addr, order: c }),
            5 => Ok(Self::PageFree { addr, order: c }),
            _ => Err(format!("has the unknown type {kind}")),
        }
    }

    /// The end of the memory that it names.
    pub fn end(&self) -> u64 {
        match *self {
            Self::Alloc { addr, slot, .. } => addr.saturating_add(slot.into()),
            Self::Free { addr } => addr,
            Self::PageAlloc { addr, order } | Self::PageFree { addr, order } => {
                addr.saturating_add(PAGE_SIZE << order)
            }
        }
    }
}

type Source = BufReader<StreamingDecoder<BufReader<File>, FrameDecoder>>;

/// A trace that is being read, event by event.
pub struct Trace {
    path: PathBuf,
    source: Source,
    header: Vec<u8>,
    events: u64,
    caches: Vec<String>,
    at: u64,
}

impl Trace {
    /// Opens a trace and reads all but its events.
    ///
    /// # Errors
    /// It cannot be read, or is no trace.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let cannot = |error| TraceError::Open(path.to_owned(), error);
        let foreign = |why| TraceError::Foreign(path.to_owned(), why);
        let file = File::open(path).map_err(cannot)?;
        if file.metadata().map_err(cannot)?.is_dir() {
            return Err(foreign("it is a folder"));
        }
        const OTHER: &str = "it is not compressed by zstd, or empty";
        let decoder = StreamingDecoder::new(BufReader::new(file)).map_err(|_| foreign(OTHER))?;
        let mut source = BufReader::with_capacity(1 << 20, decoder);
        let mut header = Vec::new();
        let mut take = |len: usize, why| {
            let start = header.len();
            header.resize(start + len, 0);
            source.read_exact(&mut header[start..]).map_err(|_| foreign(why))?;
            Ok(header[start..].to_vec())
        };
        if take(MAGIC.len(), "it is truncated")? != MAGIC {
            return Err(foreign("it does not begin with KMEMTRC1"));
        }
        const SHORT: &str = "it ends before its first event";
        let numbers = take(16, SHORT)?;
        let number = |at: usize| {
            numbers.iter().skip(at).take(4).rev().fold(0, |n, b| n << 8 | u32::from(*b))
        };
        let events = u64::from(number(0)) | u64::from(number(4)) << 32;
        let (caches, sites) = (number(8), number(12));
        if caches > MAX_CACHES || sites > MAX_SITES {
            return Err(foreign("it has more caches or call sites than events can name"));
        }
        let mut names = Vec::with_capacity(caches as usize);
        for i in 0..caches + sites {
            let len = take(1, SHORT)?.first().copied().unwrap_or_default();
            let name = take(len.into(), SHORT)?;
            if i < caches {
                names.push(String::from_utf8_lossy(&name).into_owned());
            }
        }
        Ok(Self { path: path.to_owned(), source, header, events, caches: names, at: 0 })
    }

    /// Events in it.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The names of its caches.
    pub fn caches(&self) -> &[String] {
        &self.caches
    }

    /// An error about the event that was read last.
    pub fn wrong(&self, what: impl Into<String>) -> TraceError {
        TraceError::Event { path: self.path.clone(), at: self.at, what: what.into() }
    }

    fn bytes(&mut self) -> Option<Result<[u8; EVENT], TraceError>> {
        if self.at >= self.events {
            return None;
        }
        self.at += 1;
        let mut event = [0; EVENT];
        Some(match self.source.read_exact(&mut event) {
            Ok(()) => Ok(event),
            Err(_) => {
                let error = TraceError::Truncated {
                    path: self.path.clone(),
                    at: self.at,
                    events: self.events,
                };
                self.at = self.events;
                Err(error)
            }
        })
    }

    /// Writes the next `events` events to a file of their own.
    ///
    /// # Errors
    /// The trace is bad, or the file cannot be written.
    pub fn write_slice(mut self, events: u64, to: &Path) -> anyhow::Result<u64> {
        let events = events.min(self.events - self.at);
        let mut all = std::mem::take(&mut self.header);
        all.splice(MAGIC.len()..MAGIC.len() + 8, events.to_le_bytes());
        for _ in 0..events {
            let Some(event) = self.bytes() else { break };
            all.extend_from_slice(&event?);
        }
        let cannot = |error| TraceError::Open(to.to_owned(), error);
        let compressed = compress_to_vec(&*all, CompressionLevel::Fastest);
        std::fs::write(to, compressed).map_err(cannot)?;
        Ok(events)
    }
}

impl Iterator for Trace {
    type Item = Result<Event, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let event = match self.bytes()? {
            Ok(event) => event,
            Err(error) => return Some(Err(error)),
        };
        Some(Event::decode(&event, self.caches.len()).map_err(|what| self.wrong(what)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this content, compressed.
    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), compress_to_vec(content, CompressionLevel::Fastest)).unwrap();
        file
    }

    fn header(events: u64, caches: &[&str]) -> Vec<u8> {
        let mut all = MAGIC.to_vec();
        all.extend(events.to_le_bytes());
        all.extend((caches.len() as u32).to_le_bytes());
        all.extend(1u32.to_le_bytes());
        for name in caches.iter().chain(&["site"]) {
            all.push(name.len() as u8);
            all.extend(name.bytes());
        }
        all
    }

    fn event(kind: u8, c: u8, addr: u64, bytes: u32, slot: u32) -> Vec<u8> {
        let mut event = vec![kind, c, 0, 0];
        event.extend(addr.to_le_bytes());
        event.extend(bytes.to_le_bytes());
        event.extend(slot.to_le_bytes());
        event
    }

    fn error(content: &[u8]) -> String {
        let file = file(content);
        match Trace::open(file.path()) {
            Err(error) => error.to_string(),
            Ok(mut trace) => {
                trace.find_map(Result::err).map_or_else(String::new, |error| error.to_string())
            }
        }
    }

    #[test]
    fn events_are_read_and_sliced() {
        let mut content = header(4, &["filp"]);
        for event in [
            event(4, 2, 0x8000, 0, 0),
            event(2, 0, 0x8040, 184, 192),
            event(0, 0, 0x8400, 20, 32),
            event(1, 0, 0x8400, 0, 0),
        ] {
            content.extend(event);
        }
        let whole = file(&content);
        let trace = Trace::open(whole.path()).unwrap();
        assert_eq!((trace.events(), trace.caches()), (4, &["filp".to_owned()][..]));
        let all: Vec<_> = trace.map(Result::unwrap).collect();
        assert_eq!(
            all,
            [
                Event::PageAlloc { addr: 0x8000, order: 2 },
                Event::Alloc { addr: 0x8040, bytes: 184, slot: 192, cache: Some(0) },
                Event::Alloc { addr: 0x8400, bytes: 20, slot: 32, cache: None },
                Event::Free { addr: 0x8400 },
            ]
        );
        let slice = tempfile::NamedTempFile::new().unwrap();
        let written = Trace::open(whole.path()).unwrap().write_slice(3, slice.path()).unwrap();
        assert_eq!(written, 3);
        let part: Vec<_> = Trace::open(slice.path()).unwrap().map(Result::unwrap).collect();
        assert_eq!(part, all[..3]);
    }

    #[test]
    fn what_is_wrong_is_one_sentence() {
        let short = [header(2, &[]), event(1, 0, 0, 0, 0), vec![0; 7]].concat();
        assert!(
            error(&short).ends_with("is truncated: it ends in event 2 of 2"),
            "{}",
            error(&short)
        );
        for (content, part) in [
            (b"KMEMTRC2 and more than enough bytes of it".to_vec(), "does not begin with KMEMTRC1"),
            (MAGIC.to_vec(), "ends before its first event"),
            (header(1, &["a", "b"])[..26].to_vec(), "ends before its first event"),
            ([MAGIC.to_vec(), vec![0xff; 16]].concat(), "more caches"),
            ([header(1, &[]), event(9, 0, 0, 0, 0)].concat(), "event 1 of the trace"),
            ([header(1, &[]), event(4, 11, 0, 0, 0)].concat(), "page order 11"),
            ([header(1, &[]), event(4, 1, 0x1000, 0, 0)].concat(), "no block of order 1 at 0x1000"),
            ([header(1, &[]), event(2, 0, 0, 8, 8)].concat(), "names cache 0 of 0"),
            ([header(1, &[]), event(0, 0, 0, 9, 8)].concat(), "hands out 8 bytes"),
        ] {
            assert!(error(&content).contains(part), "{part}: {}", error(&content));
        }
        let missing = Trace::open(Path::new("no/such/trace")).err().unwrap().to_string();
        assert_eq!(missing, "cannot read the trace no/such/trace");
        let plain = tempfile::NamedTempFile::new().unwrap();
        for content in [&b""[..], b"\x7fELF and what follows"] {
            std::fs::write(plain.path(), content).unwrap();
            let said = Trace::open(plain.path()).err().unwrap().to_string();
            assert!(said.contains("it is not compressed by zstd, or empty"), "{said}");
        }
        let folder = Trace::open(Path::new("/")).err().unwrap().to_string();
        assert!(folder.contains("it is a folder"), "{folder}");
    }
}
