//! A location in the guest's code, for a message.

use std::fmt;

use umbra_report::symbols::{Position, Symbols};
use umbra_report::{Frame, printable};

/// A location in the guest's code, for a message.
pub struct CodeLocation {
    rip: u64,
    frame: Option<Frame>,
}

impl CodeLocation {
    /// The location of the instruction at `rip`.
    pub fn new(rip: u64, symbols: &Symbols) -> Self {
        Self { rip, frame: symbols.frames(rip, Position::Instruction).pop() }
    }
}

impl fmt::Display for CodeLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rip {:#x}", self.rip)?;
        let Some((frame, symbol)) = self.frame.as_ref().and_then(|f| Some((f, f.symbol.as_ref()?)))
        else {
            return Ok(());
        };
        write!(f, ", in {}+{:#x}", printable(symbol), frame.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_a_message_is_printable() {
        let symbol = "f\x1b]0;title\x07\x1b[2J\numbra: clean\u{202e}";
        let frame = Frame { symbol: Some(symbol.into()), offset: 4, ..Frame::unknown(0x1000) };
        let place = CodeLocation { rip: 0x1000, frame: Some(frame) }.to_string();
        assert!(
            place.starts_with(r"rip 0x1000, in f\u{1b}]0;title\u{7}\u{1b}[2J\u{a}umbra"),
            "{place}"
        );
        assert!(place.ends_with(r"clean\u{202e}+0x4"), "{place}");
    }
}
