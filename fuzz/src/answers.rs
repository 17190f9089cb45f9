//! What a symbol worker answers whose process a hostile file has taken over.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use umbra::report::symbols::Symbols;

use crate::symbols::ask;

/// Most bytes, so that the socket takes all at once.
const MOST: usize = 64 << 10;

/// Looks addresses up in the symbols that the bytes are the answers of.
pub fn run(data: &[u8]) {
    let Some((symbols, _end)) = symbols(data) else { return };
    ask(&symbols, &[0x10_0000, 0x10_0010], 0x10_0000..0x20_0000);
    let _ = symbols.image();
}

/// Symbols whose answers are the lines of `data`, each as a message; the last one as it is, with or
/// without its length. And the other end, which takes the questions.
fn symbols(data: &[u8]) -> Option<(Symbols, UnixStream)> {
    let data = data.get(..MOST).unwrap_or(data);
    let (ours, theirs) = UnixStream::pair().ok()?;
    let mut lines = data.split(|byte| *byte == b'\n').peekable();
    let mut bytes = Vec::new();
    while let Some(line) = lines.next() {
        if lines.peek().is_some() {
            bytes.extend((line.len() as u32).to_le_bytes());
        }
        bytes.extend_from_slice(line);
    }
    let sent = theirs.set_nonblocking(true).and_then(|()| (&theirs).write_all(&bytes));
    sent.and_then(|()| theirs.shutdown(Shutdown::Write)).ok()?;
    Some((Symbols::answered_over(ours), theirs))
}

#[cfg(test)]
mod tests {
    use umbra::report::symbols::Position;

    use super::*;

    #[test]
    fn answers_arrive() {
        let (symbols, _end) = symbols(include_bytes!("../seeds/answers/all")).expect("a socket");
        let frames = symbols.frames(0x10_0000, Position::Return);
        let names: Vec<_> = frames.iter().map(|frame| frame.symbol.as_deref()).collect();
        assert_eq!(names, [Some("f\x1b[31m\u{202e}"); 2]);
    }
}
