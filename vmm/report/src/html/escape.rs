//! Text out of the guest, its ELF or a file, made harmless for a page.

use std::fmt::{self, Display, Write};

use super::super::finding::printable;

/// Text that is one line at most: markup is escaped, and characters that could hide or reorder text
/// are replaced.
pub struct Esc<T>(pub T);

impl<T: AsRef<str>> Display for Esc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        markup(&printable(self.0.as_ref()), f)
    }
}

/// Text of several lines, as [`Esc`], which keeps its line ends and tabs.
pub struct Block<T>(pub T);

impl<T: AsRef<str>> Display for Block<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, line) in self.0.as_ref().split('\n').enumerate() {
            if i > 0 {
                f.write_char('\n')?;
            }
            for (j, part) in line.trim_end_matches('\r').split('\t').enumerate() {
                if j > 0 {
                    f.write_char('\t')?;
                }
                markup(&printable(part), f)?;
            }
        }
        Ok(())
    }
}

fn markup(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for c in text.chars() {
        match c {
            '&' => f.write_str("&amp;")?,
            '<' => f.write_str("&lt;")?,
            '>' => f.write_str("&gt;")?,
            '"' => f.write_str("&quot;")?,
            '\'' => f.write_str("&#39;")?,
            c => f.write_char(c)?,
        }
    }
    Ok(())
}

/// Bytes for people: `184 KiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 100.0 && value.fract() > 0.05);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A count for people: `1 234 567`, with narrow no-break spaces.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Seconds for people: `3.2 ms`.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.1} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s if s >= 0.001 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_is_markup() {
        assert_eq!(
            Esc("</pre><script>alert('1')&\"\u{202e}\n\x1b").to_string(),
            "&lt;/pre&gt;&lt;script&gt;alert(&#39;1&#39;)&amp;&quot;???"
        );
        assert_eq!(Block("a\tb\r\n<i>\u{7}\n").to_string(), "a\tb\n&lt;i&gt;?\n");
    }

    #[test]
    fn figures_for_people() {
        assert_eq!(
            [0, 1023, 1024, 188_416, 268_435_456, 1_610_612_736, u64::MAX].map(size),
            ["0 B", "1023 B", "1 KiB", "184 KiB", "256 MiB", "1.5 GiB", "16777216 TiB"]
        );
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1\u{202f}000", "1\u{202f}234\u{202f}567"]
        );
        assert_eq!(
            [0.0, 0.0032, 0.25, 2.5, 300.0].map(seconds),
            ["0 µs", "3.2 ms", "250 ms", "2.5 s", "300 s"]
        );
    }
}
