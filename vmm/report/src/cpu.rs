//! A CPU of the guest at the end of a run that did not end well: its registers and its stack.

use std::io::{self, Write};

use serde::Serialize;

use super::Frame;
use super::bounds::BoundedLines;
use super::headline::place;
use super::printable::{NO_SYMBOL, printable};
use super::text::{REPORT_MAX, TextStyle, write_frames};

/// The general registers and those that explain a fault, in the guest's own values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cr2: u64,
    pub cr3: u64,
}

/// A CPU at the end of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CpuState {
    /// Its number.
    pub cpu: u8,
    /// Its registers.
    pub registers: Registers,
    /// Where it was, innermost first.
    pub frames: Vec<Frame>,
    /// What is odd about it.
    pub notes: Vec<String>,
}

impl CpuState {
    /// Writes the state as lines of text, like those of a Linux oops, at most as many as of a
    /// finding.
    ///
    /// # Errors
    /// An error of `out`.
    pub fn write(&self, out: &mut dyn Write, style: TextStyle) -> io::Result<()> {
        let mut lines = BoundedLines::new(out, REPORT_MAX);
        self.write_lines(&mut lines, style)?;
        lines.finish().map(drop)
    }

    fn write_lines(&self, out: &mut dyn Write, style: TextStyle) -> io::Result<()> {
        let r = &self.registers;
        let at = self.frames.iter().find(|frame| !frame.inlined);
        let at = at.and_then(|frame| place(frame, style.names));
        writeln!(out, "CPU {} was in {}", self.cpu, at.as_deref().unwrap_or(NO_SYMBOL))?;
        let rows = [
            [("RIP", r.rip), ("RSP", r.rsp), ("RBP", r.rbp), ("EFLAGS", r.rflags)],
            [("RAX", r.rax), ("RBX", r.rbx), ("RCX", r.rcx), ("RDX", r.rdx)],
            [("RSI", r.rsi), ("RDI", r.rdi), ("R8 ", r.r8), ("R9 ", r.r9)],
            [("R10", r.r10), ("R11", r.r11), ("R12", r.r12), ("R13", r.r13)],
            [("R14", r.r14), ("R15", r.r15), ("CR2", r.cr2), ("CR3", r.cr3)],
        ];
        for row in rows {
            let row = row.map(|(name, value)| format!("{name}: {value:016x}"));
            writeln!(out, " {}", row.join(" "))?;
        }
        writeln!(out, "Call Trace:")?;
        write_frames(out, &self.frames, style)?;
        for note in &self.notes {
            writeln!(out, "Note: {}", printable(note))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_all_registers_and_the_stack() {
        let registers =
            Registers { rip: 0xffff_ffff_8000_1234, r15: 0xf15, ..Registers::default() };
        let frame = Frame {
            ip: registers.rip,
            symbol: Some("spin\x1b[2J".into()),
            offset: 4,
            size: 32,
            ..Frame::default()
        };
        let state =
            CpuState { cpu: 2, registers, frames: vec![frame], notes: vec!["odd".to_owned()] };
        let mut text = Vec::new();
        state.write(&mut text, TextStyle::default()).expect("memory takes all");
        let text = String::from_utf8(text).expect("text");
        assert!(text.starts_with("CPU 2 was in spin\\u{1b}[2J+0x4/0x20\n"), "{text}");
        for part in ["RIP: ffffffff80001234", "R15: 0000000000000f15", "CR3: ", "Note: odd\n"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(text.contains("Call Trace:\n spin\\u{1b}[2J+0x4/0x20\n"), "{text}");
        let unknown = CpuState::default();
        let mut text = Vec::new();
        unknown.write(&mut text, TextStyle::default()).expect("memory takes all");
        assert!(String::from_utf8_lossy(&text).contains("(stack is not available)"));
    }
}
