//! A location in the guest's code, for a message.

use std::fmt;

use umbra_report::Frame;
use umbra_report::symbols::{Position, Symbols};

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
        write!(f, ", in {symbol}+{:#x}", frame.offset)
    }
}
