//! Messages between the two processes: a length, and so many bytes of JSON.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Most bytes of a message.
pub(super) const MESSAGE_MAX: usize = 16 << 20;
/// Bytes that are read at once, so that memory is only taken for what has come.
const PIECE: usize = 64 << 10;
/// Longest wait before the time limit is looked at again, which another thread may change.
const SLICE: Duration = Duration::from_millis(20);

/// Why there is no message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WireError {
    /// The time is over.
    Late,
    /// The other process is gone, or sends nonsense.
    Gone,
}

/// The time that is left; none if it is over. [`Duration::MAX`] is no limit.
pub(super) type Left<'a> = &'a dyn Fn() -> Option<Duration>;

/// How long to wait at once; none for ever.
pub(super) fn slice(left: Left) -> Result<Option<Duration>, WireError> {
    let left = left().ok_or(WireError::Late)?;
    Ok((left < Duration::MAX).then_some(left.min(SLICE)))
}

/// Sends a message.
pub(super) fn send(socket: &UnixStream, message: &[u8], left: Left) -> Result<(), WireError> {
    if message.len() > MESSAGE_MAX {
        return Err(WireError::Gone);
    }
    let length = u32::try_from(message.len()).map_err(|_| WireError::Gone)?;
    for mut bytes in [&length.to_le_bytes()[..], message] {
        while !bytes.is_empty() {
            socket.set_write_timeout(slice(left)?).map_err(|_| WireError::Gone)?;
            let sent = moved((&mut &*socket).write(bytes))?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Waits for a message.
pub(super) fn receive(socket: &UnixStream, left: Left) -> Result<Vec<u8>, WireError> {
    let mut length = [0; 4];
    fill(socket, &mut length, left)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MESSAGE_MAX {
        return Err(WireError::Gone);
    }
    let mut message = Vec::new();
    while message.len() < length {
        let start = message.len();
        message.resize(length.min(start + PIECE), 0);
        fill(socket, message.get_mut(start..).unwrap_or_default(), left)?;
    }
    Ok(message)
}

fn fill(socket: &UnixStream, mut to: &mut [u8], left: Left) -> Result<(), WireError> {
    while !to.is_empty() {
        socket.set_read_timeout(slice(left)?).map_err(|_| WireError::Gone)?;
        let read = moved((&mut &*socket).read(to))?;
        to = to.get_mut(read..).unwrap_or_default();
    }
    Ok(())
}

/// The bytes that came or went: none if it has to be tried again.
fn moved(result: io::Result<usize>) -> Result<usize, WireError> {
    match result {
        Ok(0) => Err(WireError::Gone),
        Ok(bytes) => Ok(bytes),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(0),
            _ => Err(WireError::Gone),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Left = &|| Some(Duration::from_secs(60));

    #[test]
    fn a_message_arrives_whole() {
        let (one, other) = UnixStream::pair().expect("sockets");
        let message: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send(&one, b"", LONG).and_then(|()| send(&one, &message, LONG)).expect("sent")
            });
            assert_eq!(receive(&other, LONG), Ok(Vec::new()));
            assert_eq!(receive(&other, LONG).as_ref(), Ok(&message));
        });
        drop(one);
        assert_eq!(receive(&other, LONG), Err(WireError::Gone));
    }

    #[test]
    fn a_message_is_bounded_in_bytes_and_time() {
        let (one, other) = UnixStream::pair().expect("sockets");
        assert_eq!(send(&one, &vec![0; MESSAGE_MAX + 1], LONG), Err(WireError::Gone));
        (&one).write_all(&u32::MAX.to_le_bytes()).expect("sent");
        assert_eq!(receive(&other, LONG), Err(WireError::Gone));
        // Nobody sends or reads, and the time limit is set only now.
        let over = std::sync::atomic::AtomicU32::new(0);
        let left = || {
            let asked = over.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            (asked < 5).then_some(Duration::from_millis(1))
        };
        assert_eq!(receive(&other, &left), Err(WireError::Late));
        over.store(0, std::sync::atomic::Ordering::SeqCst);
        let left = || {
            let asked = over.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            (asked < 1000).then_some(Duration::from_millis(1))
        };
        assert_eq!(send(&one, &vec![0; MESSAGE_MAX], &left), Err(WireError::Late));
    }
}
