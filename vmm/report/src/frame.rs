//! The variables of a stack frame, as an instrumenting compiler describes them in memory.
//!
//! A frame with redzones begins with three words: a magic number, the address of a description, and
//! the function. The description is text: the number of variables, then for each its offset from
//! the frame's start, its bytes, the length of its name, and the name, which may end in `:line`
//! (LLVM's `ComputeASanStackFrameDescription`, gcc's `asan_emit_stack_protection`).

use serde::Serialize;

/// The first word of a frame with redzones (`ASAN_STACK_FRAME_MAGIC` in `mm/kasan/kasan.h`).
pub const FRAME_MAGIC: u64 = 0x41b5_8ab3;
/// Most bytes of a description that are read.
pub const DESCRIPTION_MAX: usize = 2048;
/// Most variables of a frame.
const VARIABLES_MAX: usize = 64;

/// The stack frame that holds a bad address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StackFrame {
    /// Bytes from the frame's start to the first bad address.
    pub offset: u64,
    /// It is on the stack of the task that made the access.
    pub current: bool,
    /// The function, with offset and size as in a stack; none if it is not known.
    pub function: Option<String>,
    /// Its variables, by rising offset.
    pub variables: Vec<StackVariable>,
}

/// A variable of a stack frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StackVariable {
    /// Bytes from the frame's start.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Its name; a compiler's own variables may have none.
    pub name: String,
    /// The line of its declaration, if the compiler gives it.
    pub line: Option<u32>,
}

/// Reads a description. `None` if it is not one: guest memory may hold anything.
pub fn parse(description: &[u8]) -> Option<Vec<StackVariable>> {
    let mut rest = description;
    let count = number(&mut rest)?;
    let mut variables = Vec::new();
    for _ in 0..usize::try_from(count).ok()?.min(VARIABLES_MAX) {
        let (offset, size, len) = (number(&mut rest)?, number(&mut rest)?, number(&mut rest)?);
        let (name, behind) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        rest = behind.strip_prefix(b" ").unwrap_or(behind);
        let name = String::from_utf8_lossy(name);
        let (name, line) = match name.rsplit_once(':').map(|(name, line)| (name, line.parse().ok()))
        {
            Some((name, Some(line))) => (name, Some(line)),
            _ => (&*name, None),
        };
        variables.push(StackVariable { offset, size, name: name.into(), line });
    }
    Some(variables)
}

/// A decimal number and the blank behind it.
fn number(text: &mut &[u8]) -> Option<u64> {
    let digits = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at_checked(digits)?;
    *text = rest.strip_prefix(b" ").unwrap_or(rest);
    std::str::from_utf8(number).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(offset: u64, size: u64, name: &str, line: Option<u32>) -> StackVariable {
        StackVariable { offset, size, name: name.into(), line }
    }

    #[test]
    fn descriptions_of_both_compilers_are_read() {
        let llvm = b"2 32 10 8 array:12 64 4 1 x";
        let expected = [variable(32, 10, "array", Some(12)), variable(64, 4, "x", None)];
        assert_eq!(parse(llvm).as_deref(), Some(&expected[..]));
        assert_eq!(
            parse(b"1 32 16 10 buffer:77"),
            None,
            "the name is shorter than its length says"
        );
        let gcc = b"1 32 16 9 buffer:77";
        assert_eq!(parse(gcc), Some(vec![variable(32, 16, "buffer", Some(77))]));
        // C++ and Rust have names with colons in them.
        assert_eq!(parse(b"1 8 1 4 a::b"), Some(vec![variable(8, 1, "a::b", None)]));
    }

    #[test]
    fn what_is_no_description_is_refused() {
        for bad in [
            &b""[..],
            b"x",
            b"1",
            b"1 32",
            b"1 32 10 99999999999999999999 a",
            b"1 32 10 18446744073709551615 a",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert_eq!(parse(b"0"), Some(Vec::new()));
        let many = format!("1000000 {}", "1 1 1 a ".repeat(200));
        assert_eq!(parse(many.as_bytes()).map(|v| v.len()), Some(VARIABLES_MAX));
    }
}
