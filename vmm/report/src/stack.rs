//! A guest's stack by frame pointers, read through a closure; every value on it may be garbage.

use std::fmt;

/// Most frames of the checking runtime between the report call and the access.
const SKIP_MAX: usize = 32;

/// Most frames that [`holds`] looks at.
const SEARCHED: usize = 256;

/// The result of a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Return addresses, innermost first.
    pub ips: Vec<u64>,
    /// The reason for its end.
    pub end: StackEnd,
    /// The first frame was found, or none was requested.
    pub start_found: bool,
}

/// Why a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackEnd {
    /// At the outermost frame.
    Complete,
    /// At a bad frame pointer.
    Broken {
        /// The frame pointer.
        at: u64,
        /// What is wrong with it.
        why: Break,
    },
    /// At the limit of frames.
    Truncated,
}

/// What is wrong with a frame pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// No memory there.
    Unreadable,
    /// Not a multiple of 8.
    Misaligned,
    /// Not above the frame that holds it. This ends cycles, too.
    NotRising,
}

impl fmt::Display for StackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => f.write_str("the stack is complete"),
            Self::Truncated => f.write_str("the stack has more frames than are shown"),
            Self::Broken { at, why } => {
                let why = match why {
                    Break::Unreadable => "is not readable",
                    Break::Misaligned => "is not aligned",
                    Break::NotRising => "does not lead outwards",
                };
                write!(f, "the stack breaks off: frame pointer {at:#x} {why}")
            }
        }
    }
}

impl Stack {
    /// What is missing in this stack, one sentence each.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.start_found {
            notes.push(
                "the instruction is not on the stack: all frames are shown, the runtime's too"
                    .into(),
            );
        }
        if self.end != StackEnd::Complete {
            notes.push(self.end.to_string());
        }
        notes
    }
}

/// Walks the chain of frames from the frame pointer `rbp` on. `read` gives the 8 bytes at a
/// guest-virtual address, or `None` where there are none.
///
/// With `start_ip` the stack begins with the frame that returns there, and inner frames are left
/// out; if there is no such frame, the stack is `start_ip` and all frames. At most `max` addresses
/// are returned, and at most that many frames and a few more are read, whatever the memory holds.
///
/// A chain is followed only while it leads to higher addresses. Linux marks a frame pointer that is
/// the address of saved registers instead, at an interrupt or at the entry from a program, with bit
/// 0 (`ENCODE_FRAME_POINTER` in `arch/x86/include/asm/frame.h`). An interrupted stack is followed
/// wherever it lies; registers of a program, and those of a kernel thread, which are zero, are the
/// end.
pub fn walk(
    read: &mut dyn FnMut(u64) -> Option<u64>,
    rbp: u64,
    start_ip: Option<u64>,
    max: usize,
) -> Stack {
    let steps = max.saturating_add(if start_ip.is_some() { SKIP_MAX } else { 0 });
    let (mut ips, mut end) = chain(read, rbp, steps);
    let mut start_found = true;
    if let Some(start) = start_ip {
        match ips.iter().take(SKIP_MAX + 1).position(|ip| *ip == start) {
            Some(at) => drop(ips.drain(..at)),
            None => {
                start_found = false;
                ips.insert(0, start);
            }
        }
    }
    if ips.len() > max {
        ips.truncate(max);
        end = StackEnd::Truncated;
    }
    Stack { ips, end, start_found }
}

/// Bytes from the start of Linux's saved registers (`struct pt_regs`) to some of them.
mod registers {
    pub const RBP: u64 = 32;
    pub const RIP: u64 = 128;
    pub const CS: u64 = 136;
    pub const RSP: u64 = 152;
}

/// Where a kernel's code was interrupted.
struct Interrupted {
    rip: u64,
    rbp: u64,
    rsp: u64,
}

/// Linux's saved registers at an address; none of a program, or of a kernel thread that starts. An
/// error if these are not saved registers.
fn interrupted(
    read: &mut dyn FnMut(u64) -> Option<u64>,
    at: u64,
) -> Result<Option<Interrupted>, Break> {
    if !at.is_multiple_of(8) {
        return Err(Break::Misaligned);
    }
    let mut read = |offset| {
        let value = at.checked_add(offset).and_then(&mut *read);
        value.ok_or(Break::Unreadable)
    };
    let (rip, cs) = (read(registers::RIP)?, read(registers::CS)?);
    match cs {
        0..=0xffff if rip == 0 || cs & 3 == 3 => Ok(None),
        1..=0xffff => {
            let (rbp, rsp) = (read(registers::RBP)?, read(registers::RSP)?);
            Ok(Some(Interrupted { rip, rbp, rsp }))
        }
        _ => Err(Break::Misaligned),
    }
}

/// Whether an address is in a frame of the stack with this stack pointer and frame pointer, or of
/// one that it interrupted. At most 256 frames are looked at. The variables of a function
/// lie below its frame pointer.
pub fn holds(read: &mut dyn FnMut(u64) -> Option<u64>, rsp: u64, rbp: u64, address: u64) -> bool {
    let (mut low, mut frame) = (rsp, rbp);
    for _ in 0..SEARCHED {
        if frame & 1 != 0 {
            let Ok(Some(before)) = interrupted(read, frame - 1) else { return false };
            (low, frame) = (before.rsp, before.rbp);
            continue;
        }
        if frame <= low || !frame.is_multiple_of(8) {
            return false;
        }
        if (low..frame).contains(&address) {
            return true;
        }
        let Some(next) = read(frame) else { return false };
        (low, frame) = (frame, next);
    }
    false
}

/// Up to `steps` return addresses.
fn chain(read: &mut dyn FnMut(u64) -> Option<u64>, rbp: u64, steps: usize) -> (Vec<u64>, StackEnd) {
    let mut ips = Vec::new();
    let mut frame = rbp;
    loop {
        if frame == 0 {
            return (ips, StackEnd::Complete);
        }
        if ips.len() >= steps {
            return (ips, StackEnd::Truncated);
        }
        let broken = |why| StackEnd::Broken { at: frame, why };
        if frame & 1 != 0 {
            match interrupted(read, frame - 1) {
                Ok(Some(before)) => {
                    ips.push(before.rip);
                    frame = before.rbp;
                    continue;
                }
                Ok(None) => return (ips, StackEnd::Complete),
                Err(why) => return (ips, broken(why)),
            }
        }
        if !frame.is_multiple_of(8) {
            return (ips, broken(Break::Misaligned));
        }
        let (Some(next), Some(ip)) = (read(frame), frame.checked_add(8).and_then(&mut *read))
        else {
            return (ips, broken(Break::Unreadable));
        };
        if ip == 0 {
            return (ips, StackEnd::Complete);
        }
        ips.push(ip);
        if next != 0 && next <= frame {
            return (ips, StackEnd::Broken { at: next, why: Break::NotRising });
        }
        frame = next;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Memory with frames at these places: (address, saved frame pointer, return address).
    fn memory(frames: &[(u64, u64, u64)]) -> impl FnMut(u64) -> Option<u64> {
        let mut memory = HashMap::new();
        for (at, saved, ip) in frames {
            memory.insert(*at, *saved);
            memory.insert(at + 8, *ip);
        }
        move |at| memory.get(&at).copied()
    }

    const GOOD: [(u64, u64, u64); 3] =
        [(0x100, 0x140, 0xa1), (0x140, 0x180, 0xa2), (0x180, 0, 0xa3)];

    fn walked(
        frames: &[(u64, u64, u64)],
        start: Option<u64>,
        max: usize,
    ) -> (Vec<u64>, StackEnd, bool) {
        let stack = walk(&mut memory(frames), 0x100, start, max);
        (stack.ips, stack.end, stack.start_found)
    }

    #[test]
    fn a_whole_chain() {
        assert_eq!(walked(&GOOD, None, 16), (vec![0xa1, 0xa2, 0xa3], StackEnd::Complete, true));
        assert_eq!(walked(&GOOD, None, 3), (vec![0xa1, 0xa2, 0xa3], StackEnd::Complete, true));
        assert_eq!(walked(&GOOD, None, 2), (vec![0xa1, 0xa2], StackEnd::Truncated, true));
        let zero_ip = [GOOD[0], (0x140, 0x180, 0)];
        assert_eq!(walked(&zero_ip, None, 16), (vec![0xa1], StackEnd::Complete, true));
        assert_eq!(walk(&mut memory(&[]), 0, None, 16).end, StackEnd::Complete);
        assert_eq!(walked(&GOOD, None, 0), (vec![], StackEnd::Truncated, true));
    }

    #[test]
    fn starts_at_the_instruction() {
        assert_eq!(walked(&GOOD, Some(0xa2), 16), (vec![0xa2, 0xa3], StackEnd::Complete, true));
        assert_eq!(walked(&GOOD, Some(0xa2), 1), (vec![0xa2], StackEnd::Truncated, true));
        let (ips, end, found) = walked(&GOOD, Some(0xbad), 16);
        assert_eq!((ips, end, found), (vec![0xbad, 0xa1, 0xa2, 0xa3], StackEnd::Complete, false));
        assert_eq!(walked(&GOOD, Some(0xbad), 2).0, [0xbad, 0xa1]);
        let stack = walk(&mut memory(&[]), 0x7, Some(0xbad), 16);
        assert_eq!(stack.ips, [0xbad]);
        assert_eq!(stack.notes().len(), 2);
        assert_eq!(stack.notes()[1], "the stack breaks off: frame pointer 0x7 is not aligned");
    }

    #[test]
    fn broken_chains_end_where_they_break() {
        let broken = |at, why| StackEnd::Broken { at, why };
        for (saved, why) in [
            (0x100, Break::NotRising), // a cycle of one
            (0x80, Break::NotRising),
            (0x8, Break::NotRising),
            (0x144, Break::Misaligned),
            (0x1000, Break::Unreadable),
            (u64::MAX - 7, Break::Unreadable), // the return address would wrap
        ] {
            assert_eq!(
                walked(&[(0x100, saved, 0xa1)], None, 16),
                (vec![0xa1], broken(saved, why), true)
            );
        }
        let cycle = [GOOD[0], (0x140, 0x100, 0xa2)];
        assert_eq!(
            walked(&cycle, None, 16),
            (vec![0xa1, 0xa2], broken(0x100, Break::NotRising), true)
        );
    }

    /// Saved registers at 0x200, which the frame at 0x100 leads to.
    fn over_registers(rip: u64, cs: u64, rbp: u64) -> (Vec<u64>, StackEnd, bool) {
        let registers = [(0x100, 0x201, 0xa1), (0x218, 0, rbp), (0x280, rip, cs), (0x298, 0x70, 0)];
        walked(&[&registers[..], &[(0x80, 0xc0, 0xb1), (0xc0, 0, 0xb2)]].concat(), None, 16)
    }

    #[test]
    fn an_interrupted_stack_goes_on_wherever_it_lies() {
        let all = vec![0xa1, 0xee, 0xb1, 0xb2];
        assert_eq!(over_registers(0xee, 0x10, 0x80), (all, StackEnd::Complete, true));
        let (ips, end, _) = over_registers(0xee, 0x10, 0x201);
        assert_eq!((ips.len(), end), (16, StackEnd::Truncated));
    }

    #[test]
    fn an_address_is_on_the_stack_or_not() {
        let on = |rsp, address| holds(&mut memory(&GOOD), rsp, 0x100, address);
        for (address, expected) in
            [(0xef, false), (0xf0, true), (0x13f, true), (0x17f, true), (0x180, false)]
        {
            assert_eq!(on(0xf0, address), expected, "{address:#x}");
        }
        // A frame pointer below the stack pointer is none of it.
        assert!(!on(0x110, 0x118));
        let interrupting = [
            (0x100, 0x201, 0xa1),
            (0x218, 0, 0xc0),
            (0x280, 0xee, 0x10),
            (0x290, 0, 0x70),
            (0xc0, 0, 0xb1),
        ];
        let on = |address| holds(&mut memory(&interrupting), 0xf8, 0x100, address);
        assert_eq!([on(0xf8), on(0x80), on(0x6f), on(0xd0)], [true, true, false, false]);
        // Without an end.
        let mut endless = |at: u64| Some(at + 16);
        assert!(!holds(&mut endless, 0x100, 0x110, u64::MAX));
    }

    #[test]
    fn registers_of_programs_and_new_threads_end_a_stack() {
        for (rip, cs) in [(0x40_1000, 0x33), (0, 0), (0, 0x10)] {
            let ended = (vec![0xa1], StackEnd::Complete, true);
            assert_eq!(over_registers(rip, cs, 0x80), ended, "{rip:#x} {cs:#x}");
        }
    }

    #[test]
    fn what_looks_like_registers_may_be_none() {
        let broken = |why| (vec![0xa1], StackEnd::Broken { at: 0x201, why }, true);
        assert_eq!(over_registers(0xee, 0x1_0010, 0x80), broken(Break::Misaligned));
        assert_eq!(walked(&[(0x100, 0x201, 0xa1)], None, 16), broken(Break::Unreadable));
        let last = StackEnd::Broken { at: u64::MAX, why: Break::Misaligned };
        assert_eq!(walked(&[(0x100, u64::MAX, 0xa1)], None, 16), (vec![0xa1], last, true));
    }

    #[test]
    fn work_is_bounded() {
        let mut reads = 0;
        let mut endless = |at: u64| {
            reads += 1;
            Some(at + 16)
        };
        let stack = walk(&mut endless, 0x100, Some(1), 10);
        assert_eq!(
            (stack.ips.len(), stack.end, stack.start_found),
            (10, StackEnd::Truncated, false)
        );
        assert!(reads <= 2 * (10 + SKIP_MAX), "{reads} reads");
    }
}
