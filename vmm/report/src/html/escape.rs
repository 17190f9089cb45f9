//! Text out of the guest, its ELF or a file. `maud` escapes all text; this escapes characters that
//! could hide or reorder it.

use maud::Render;

use super::super::printable::{printable, printable_keeping};

/// Text of one line at most. Characters that could hide or reorder text are escaped.
pub struct Line<T>(pub T);

impl<T: AsRef<str>> Render for Line<T> {
    fn render_to(&self, out: &mut String) {
        printable(self.0.as_ref()).render_to(out);
    }
}

/// Text of several lines, as [`Line`], but with its line ends and tabs.
pub struct Block<T>(pub T);

impl<T: AsRef<str>> Render for Block<T> {
    fn render_to(&self, out: &mut String) {
        let text = self.0.as_ref().replace("\r\n", "\n");
        printable_keeping(&text, &['\n', '\t']).render_to(out);
    }
}

/// Bytes in a unit that suits them: `184 KiB`.
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

/// A count with grouped digits: `1 234 567`, with narrow no-break spaces.
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
        let line = Line("</pre><script>alert('1')&\"\u{202e}\n\x1b").render().into_string();
        assert_eq!(line, "&lt;/pre&gt;&lt;script&gt;alert('1')&amp;&quot;\\u{202e}\\u{a}\\u{1b}");
        let block = Block("a\tb\r\n<i>\u{7}\n").render().into_string();
        assert_eq!(block, "a\tb\n&lt;i&gt;\\u{7}\n");
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
