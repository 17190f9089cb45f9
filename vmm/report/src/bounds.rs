//! Bounds on what one finding holds and prints. Names, paths and stacks are the guest's and its
//! file's, so each of them may be as long as their authors like, and there may be a thousand
//! findings.

use std::io::{self, Write};
use std::sync::Arc;

use super::frame::StackFrame;
use super::printable::{cut, printable};
use super::{CpuState, Finding, Frame, Task, Track};

/// Most bytes of a name: what `symbols` reads, and the dots that it adds to a longer one.
pub(super) const NAME_MAX: usize = 1027;
/// Most bytes of the name of a variable on a stack.
const VARIABLE_MAX: usize = 128;
/// Most bytes of a path that is kept to look for the file.
pub(super) const PATH_MAX: usize = 4096;
/// Most bytes of a path that is shown.
pub(super) const SHOWN_PATH_MAX: usize = 256;
/// Most bytes of a note.
const NOTE_MAX: usize = 512;
/// Most notes.
const NOTES_MAX: usize = 16;
/// Most inlined functions in all stacks of a finding.
const INLINED_MAX: usize = 128;
/// Most bytes of inlined functions, and of the others, in all stacks of a finding, as text.
const INLINED_BYTES: usize = 20 << 10;
const FUNCTION_BYTES: usize = 36 << 10;
/// Most bytes of all paths that are kept to look for files.
const PATH_BYTES: usize = 64 << 10;
/// Bytes of a frame beside its names, as text.
const FRAME_BYTES: usize = 40;

/// What is left for the stacks of a finding.
struct Room {
    inlined: usize,
    inlined_bytes: usize,
    function_bytes: usize,
    path_bytes: usize,
    left_out: usize,
}

impl Room {
    fn new() -> Self {
        Self {
            inlined: INLINED_MAX,
            inlined_bytes: INLINED_BYTES,
            function_bytes: FUNCTION_BYTES,
            path_bytes: PATH_BYTES,
            left_out: 0,
        }
    }

    /// Whether there is room for this frame.
    fn takes(&mut self, frame: &Frame) -> bool {
        let len = |text: &Option<Arc<str>>| text.as_deref().map_or(0, str::len);
        let name = len(&frame.symbol).max(len(&frame.linkage));
        let bytes = FRAME_BYTES + name + len(&frame.module) + len(&frame.file);
        let left = if frame.inlined { &mut self.inlined_bytes } else { &mut self.function_bytes };
        let fits = *left >= bytes && (!frame.inlined || self.inlined > 0);
        if fits {
            *left -= bytes;
            self.inlined -= usize::from(frame.inlined);
        } else {
            self.left_out += 1;
        }
        fits
    }

    /// Shortens a stack. What is left out are inlined functions and outer ones.
    fn stack(&mut self, frames: &mut Vec<Frame>) {
        frames.iter_mut().for_each(clean_frame);
        frames.retain(|frame| self.takes(frame));
        for frame in frames {
            // It only names a file, which a part of it would not.
            let bytes = frame.path.as_ref().map_or(0, |path| path.len());
            if bytes > PATH_MAX.min(self.path_bytes) {
                frame.path = None;
            } else {
                self.path_bytes -= bytes;
            }
        }
    }

    fn track(&mut self, track: &mut Track) {
        clean_task(&mut track.task);
        self.stack(&mut track.frames);
    }

    /// A sentence, if something was left out.
    fn note(&self) -> Option<String> {
        (self.left_out > 0).then(|| {
            format!("the stacks are too long: {} of their functions are left out", self.left_out)
        })
    }
}

impl Finding {
    /// The finding with printable and bounded texts, and with stacks of bounded size. A note says
    /// what was left out.
    pub(super) fn bounded(mut self) -> Self {
        let mut room = Room::new();
        clean_task(&mut self.task);
        room.stack(&mut self.frames);
        let previous = self.previous.as_mut();
        let (before, last) =
            previous.map_or((None, None), |p| (p.allocated.as_mut(), Some(&mut p.freed)));
        let tracks = [self.allocated.as_mut(), self.freed.as_mut()].into_iter().flatten();
        let tracks = tracks.chain(&mut self.related_work).chain(before).chain(last);
        tracks.for_each(|track| room.track(track));
        if let Some(cache) = self.object.as_mut().and_then(|object| object.cache.as_mut()) {
            clean(cache, NAME_MAX);
        }
        if let Some(variable) = &mut self.variable {
            clean(&mut variable.name, NAME_MAX);
            variable.module.iter_mut().for_each(|module| clean(module, SHOWN_PATH_MAX));
            clean_shared(&mut variable.file, SHOWN_PATH_MAX);
        }
        self.stack_frame.iter_mut().for_each(clean_stack_frame);
        bound_notes(&mut self.notes, room.note());
        self
    }
}

impl CpuState {
    /// The state with printable and bounded texts, and a stack of bounded size.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        let mut room = Room::new();
        room.stack(&mut self.frames);
        bound_notes(&mut self.notes, room.note());
        self
    }
}

fn bound_notes(notes: &mut Vec<String>, more: Option<String>) {
    notes.truncate(NOTES_MAX);
    notes.extend(more);
    notes.iter_mut().for_each(|note| clean(note, NOTE_MAX));
}

fn clean_frame(frame: &mut Frame) {
    for name in [&mut frame.symbol, &mut frame.linkage, &mut frame.module] {
        clean_shared(name, NAME_MAX);
    }
    clean_shared(&mut frame.file, SHOWN_PATH_MAX);
}

fn clean_stack_frame(frame: &mut StackFrame) {
    frame.function.iter_mut().for_each(|function| clean(function, NAME_MAX));
    frame.variables.iter_mut().for_each(|variable| clean(&mut variable.name, VARIABLE_MAX));
}

fn clean_task(task: &mut Task) {
    clean(&mut task.name, NAME_MAX);
}

fn clean(text: &mut String, max: usize) {
    if let Some(clean) = cleaned(text, max) {
        *text = clean;
    }
}

fn clean_shared(text: &mut Option<Arc<str>>, max: usize) {
    if let Some(clean) = text.as_deref().and_then(|text| cleaned(text, max)) {
        *text = Some(clean.into());
    }
}

/// The printable and bounded text, if that is another.
fn cleaned(text: &str, max: usize) -> Option<String> {
    let shown = printable(text);
    let shown = cut(&shown, max);
    (shown != text).then(|| shown.into_owned())
}

/// Passes lines on until they are more than a number of bytes in all. Then it counts them.
pub(super) struct BoundedLines<'a> {
    out: &'a mut dyn Write,
    left: usize,
    line: Vec<u8>,
    dropped: usize,
}

impl<'a> BoundedLines<'a> {
    pub(super) fn new(out: &'a mut dyn Write, max: usize) -> Self {
        Self { out, left: max, line: Vec::new(), dropped: 0 }
    }

    /// Says how many lines were left out, if there are such, and lets all more pass.
    ///
    /// # Errors
    /// An error of the output.
    pub(super) fn finish(self) -> io::Result<&'a mut dyn Write> {
        if self.dropped > 0 {
            writeln!(self.out, "({} more lines are left out)", self.dropped)?;
        }
        Ok(self.out)
    }
}

impl Write for BoundedLines<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            // A line that is too long is dropped, and need not be kept.
            if self.line.len() <= self.left {
                self.line.extend_from_slice(part);
            }
            if !part.ends_with(b"\n") {
                continue;
            }
            if self.dropped == 0 && self.line.len() <= self.left {
                self.out.write_all(&self.line)?;
                self.left -= self.line.len();
            } else {
                self.dropped += 1;
            }
            self.line.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests;
