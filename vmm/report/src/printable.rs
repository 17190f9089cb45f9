//! How text of a guest, its file or its debug information is shown to people.

use std::borrow::Cow;

use unicode_general_category::{GeneralCategory, get_general_category};

/// The function in a headline where the kernel's ELF has no symbol. An address would differ between
/// two builds of the same kernel.
pub(super) const NO_SYMBOL: &str = "<no symbol>";

/// Stands for what was cut out of a text.
const ELLIPSIS: char = '…';

/// `text` without characters that could forge lines of a report, control a terminal, or hide or
/// reorder text: each of them becomes an escape such as `\u{1b}`. What is returned passes
/// unchanged.
///
/// All text that comes from the guest, from its file or from the debug information goes through
/// this function, or through [`printable_keeping`], before a person sees it.
pub fn printable(text: &str) -> Cow<'_, str> {
    printable_keeping(text, &[])
}

/// As [`printable`], but with the characters in `keep`, such as tabs and line ends.
pub fn printable_keeping<'a>(text: &'a str, keep: &[char]) -> Cow<'a, str> {
    let good = |c: char| !is_harmful(c) || keep.contains(&c);
    if text.chars().all(good) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if good(c) { shown.push(c) } else { shown.extend(c.escape_unicode()) }
    }
    shown.into()
}

/// Whether a character is no visible one: controls, formats (among them those that change the
/// direction of text, and those without width), line separators, private and unassigned code
/// points; and those that are letters or marks by their category and yet show nothing.
fn is_harmful(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    matches!(
        get_general_category(c),
        GeneralCategory::Control
            | GeneralCategory::Format
            | GeneralCategory::LineSeparator
            | GeneralCategory::ParagraphSeparator
            | GeneralCategory::PrivateUse
            | GeneralCategory::Surrogate
            | GeneralCategory::Unassigned
    ) || matches!(
        c,
        '\u{34f}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{2800}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{ffa0}'
            | '\u{e0100}'..='\u{e01ef}'
    )
}

/// `text` with at most `max` bytes: of a longer one the middle is left out.
pub(super) fn cut(text: &str, max: usize) -> Cow<'_, str> {
    if text.len() <= max {
        return text.into();
    }
    let half = max.saturating_sub(ELLIPSIS.len_utf8()) / 2;
    let head = text.get(..text.floor_char_boundary(half)).unwrap_or_default();
    let tail = text.get(text.ceil_char_boundary(text.len() - half)..).unwrap_or_default();
    format!("{head}{ELLIPSIS}{tail}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_forge_lines() {
        assert_eq!(printable("a\nb\x1b[31m\u{202e}é {x}"), r"a\u{a}b\u{1b}[31m\u{202e}é {x}");
        assert_eq!(printable_keeping("a\tb\n\r", &['\t', '\n']), "a\tb\n\\u{d}");
        // What is escaped passes again unchanged.
        let once = printable("\u{9b}2J").into_owned();
        assert_eq!(printable(&once), once);
    }

    #[test]
    fn each_kind_of_harmful_character_is_escaped_and_no_other() {
        // One of each kind: C0, DEL, C1, zero width, direction, isolate, line and paragraph
        // separators, tag, byte order mark, soft hyphen, private use, unassigned, filler,
        // variation.
        for c in [
            '\0',
            '\r',
            '\u{7f}',
            '\u{85}',
            '\u{9b}',
            '\u{200b}',
            '\u{200f}',
            '\u{202e}',
            '\u{2066}',
            '\u{2028}',
            '\u{2029}',
            '\u{e0041}',
            '\u{feff}',
            '\u{ad}',
            '\u{e000}',
            '\u{378}',
            '\u{10ffff}',
            '\u{3164}',
            '\u{fe0f}',
            '\u{61c}',
        ] {
            assert_eq!(printable(&c.to_string()), c.escape_unicode().to_string(), "{c:?}");
        }
        for text in ["<core::Ö as ß>::naïve {closure#0}", "日本語", "Ελλάδα", "a\\u{1b}", "…", "→"]
        {
            assert!(matches!(printable(text), Cow::Borrowed(_)), "{text}");
        }
    }

    #[test]
    fn the_middle_is_cut_out() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdefghij", 9), "abc…hij");
        let cut = cut(&"é".repeat(1000), 100).into_owned();
        assert!(cut.len() <= 100 && cut.starts_with('é') && cut.ends_with('é'), "{cut}");
        assert_eq!(super::cut("abc", 1), "…");
    }
}
