//! The debug information: source lines, and functions inlined into others.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use addr2line::{Context, LookupContinuation, LookupResult};
use object::{CompressionFormat, Object, ObjectSection};

use super::contents::Blocks;
use super::reader::{Limits, Reader};
use super::table::Elf;

/// Time limit of a lookup. The first in a large unit parses that unit, which takes a part of a
/// second.
const TIME: Duration = Duration::from_secs(4);
/// Lookups after which the parsed data is dropped: it grows with each unit of the kernel that a
/// lookup reaches.
const LOOKUPS_MAX: u32 = 48;
/// Most inlined functions of one address.
const DEPTH_MAX: usize = 64;

/// A place in the source.
pub(super) struct Source {
    /// The function's name as the compiler wrote it.
    pub function: Option<String>,
    /// The path when it was compiled.
    pub file: Option<String>,
    pub line: Option<u32>,
}

/// The debug information of an address.
#[derive(Default)]
pub(super) struct Found {
    /// Innermost first; the last is the function that the others were inlined into.
    pub sources: Vec<Source>,
    /// The directory that the compiler ran in.
    pub directory: Option<String>,
    /// Start and bytes of that last function.
    pub function: Option<(u64, u64)>,
    /// The part that could not be read.
    pub error: Option<String>,
}

/// The debug information of a kernel, parsed as far as it was needed.
pub(super) struct Dwarf {
    context: Context<Reader>,
    limits: Arc<Limits>,
    lookups: Cell<u32>,
}

impl Dwarf {
    /// Reads the list of units.
    ///
    /// # Errors
    /// The reason why there are no lines, as a sentence.
    pub(super) fn open(limits: Arc<Limits>, file: &Blocks, elf: &Elf) -> Result<Self, String> {
        section(elf, file.len(), ".debug_info")?.ok_or(
            "the kernel has no debug information (.debug_info): its frames have no source lines",
        )?;
        limits.start(TIME);
        let sections = gimli::Dwarf::load(|id| {
            Ok::<_, String>(Reader::new(
                &limits,
                section(elf, file.len(), id.name())?.unwrap_or_default(),
            ))
        })?;
        let context = Context::from_dwarf(sections)
            .map_err(|e| format!("the debug information cannot be read: {e}"))?;
        Ok(Self { context, limits, lookups: Cell::new(0) })
    }

    /// Whether the budget is used up; then nothing more will be found.
    pub(super) fn exhausted(&self) -> bool {
        self.limits.exhausted()
    }

    /// Whether it has grown, and there is budget enough to open it anew.
    pub(super) fn has_grown(&self) -> bool {
        self.lookups.get() >= LOOKUPS_MAX && self.limits.plenty()
    }

    /// Lookups since it was opened.
    #[cfg(test)]
    pub(super) fn lookups(&self) -> u32 {
        self.lookups.get()
    }

    /// Looks up the instruction at `address`.
    pub(super) fn find(&self, address: u64) -> Found {
        self.limits.start(TIME);
        self.lookups.set(self.lookups.get().saturating_add(1));
        let mut found = Found::default();
        let mut die = None;
        let complete = resolve(self.context.find_frames(address)).and_then(|mut frames| {
            while let Some(frame) = frames.next()? {
                if found.sources.len() == DEPTH_MAX {
                    break;
                }
                let function = frame
                    .function
                    .as_ref()
                    .and_then(|name| Some(name.raw_name().ok()?.into_owned()));
                let (file, line) = frame.location.map_or((None, None), |at| (at.file, at.line));
                found.sources.push(Source { function, file: file.map(str::to_owned), line });
                die = frame.dw_die_offset;
            }
            Ok(())
        });
        if let Err(error) = complete {
            let why = match error {
                // The reader refused; `exhausted` shows whether the budget was spent.
                gimli::Error::Io if self.limits.unreadable() => {
                    "the kernel's file is not whole any more".to_owned()
                }
                gimli::Error::Io => "it is nested too deep".to_owned(),
                other => other.to_string(),
            };
            found.error =
                Some(format!("the debug information of {address:#x} cannot be read: {why}"));
            // The lines of a unit may be good although its functions are garbage.
            if found.sources.is_empty()
                && let Ok(Some(at)) = self.context.find_location(address)
            {
                let file = at.file.map(str::to_owned);
                found.sources.push(Source { function: None, file, line: at.line });
            }
            return found;
        }
        if let Some(unit) = resolve(self.context.find_dwarf_and_unit(address)) {
            found.directory = unit.comp_dir.as_ref().and_then(|dir| Some(lossy(dir)?.into_owned()));
            found.function = die.and_then(|die| {
                let entry = unit.entry(die).ok()?;
                let mut ranges = unit.die_ranges(&entry).ok()?;
                while let Some(range) = ranges.next().ok()? {
                    if (range.begin..range.end).contains(&address) {
                        return Some((range.begin, range.end - range.begin));
                    }
                }
                None
            });
        }
        found
    }
}

pub(super) fn lossy(reader: &Reader) -> Option<std::borrow::Cow<'_, str>> {
    gimli::Reader::to_string_lossy(reader).ok()
}

/// The result of a lookup, without the files of split debug information.
fn resolve<L: LookupContinuation<Buf = Reader>>(mut result: LookupResult<L>) -> L::Output {
    loop {
        match result {
            LookupResult::Output(output) => return output,
            LookupResult::Load { continuation, .. } => result = continuation.resume(None),
        }
    }
}

/// The range of a section's bytes in the file.
///
/// # Errors
/// A sentence, if some are missing or they are compressed.
pub(super) fn section(elf: &Elf, len: usize, name: &str) -> Result<Option<Range<usize>>, String> {
    let Some(section) = elf.section_by_name(name) else { return Ok(None) };
    let truncated =
        || format!("the kernel's file ends inside its section {name}: frames have no source lines");
    let range = section.compressed_file_range().map_err(|_| truncated())?;
    if range.format != CompressionFormat::None {
        return Err(format!(
            "the kernel's section {name} is compressed: frames have no source lines"
        ));
    }
    let (start, size) = (range.offset, range.compressed_size);
    let end = start.checked_add(size).filter(|end| *end <= len as u64).ok_or_else(truncated)?;
    match (usize::try_from(start), usize::try_from(end)) {
        (Ok(start), Ok(end)) => Ok(Some(start..end)),
        _ => Err(truncated()),
    }
}
