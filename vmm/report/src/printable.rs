//! How names from the guest are printed.

/// The function in a headline where the kernel's ELF has no symbol. An address would differ between
/// two builds of the same kernel.
pub(super) const NO_SYMBOL: &str = "<no symbol>";

/// A name from the guest or its ELF, without characters that could forge lines of a report or
/// control a terminal: control characters, and those that hide or reorder text.
pub(super) fn printable(name: &str) -> String {
    let bad = |c: char| {
        c.is_control()
            || matches!(
                c,
                '\u{200b}'..='\u{200f}'
                    | '\u{2028}'..='\u{202e}'
                    | '\u{2060}'..='\u{206f}'
                    | '\u{feff}'
            )
    };
    name.chars().map(|c| if bad(c) { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_forge_lines() {
        assert_eq!(printable("a\nb\x1b[31m\u{202e}é {x}"), "a?b?[31m?é {x}");
    }
}
