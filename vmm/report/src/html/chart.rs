//! The shadow's memory over time, drawn as lines.

use std::fmt::Write;

use super::escape::{seconds, size};
use crate::Sample;

/// The drawing's size in units of its own; it is stretched to the page.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 300.0;

/// A line: its class, its name, and its value.
type Series = (&'static str, &'static str, fn(&Sample) -> u64);

const SERIES: [Series; 4] = [
    ("s-mapped", "byte shadow, mapped", |s| s.mapped),
    ("s-resident", "byte shadow, resident", |s| s.resident),
    ("s-used", "byte shadow, used", |s| s.used),
    ("s-page", "page shadow", |s| s.page),
];

/// The scales of a drawing.
struct Scale {
    /// Bytes at the top, a multiple of `step`.
    top: u64,
    /// Bytes between two lines of the grid.
    step: u64,
    /// Seconds at the right end.
    end: f64,
}

impl Scale {
    fn new(samples: &[Sample], last: &Sample) -> Self {
        let top = samples.iter().flat_map(|s| SERIES.map(|series| series.2(s))).max().unwrap_or(0);
        let step = byte_step(top);
        let top = top.next_multiple_of(step).max(step);
        Self { top, step, end: last.at.as_secs_f64().max(1e-6) }
    }

    fn x(&self, sample: &Sample) -> f64 {
        sample.at.as_secs_f64() / self.end * WIDTH
    }

    fn y(&self, bytes: u64) -> f64 {
        HEIGHT - bytes as f64 / self.top as f64 * HEIGHT
    }

    /// The bytes at the lines of the grid.
    fn grid(&self) -> impl Iterator<Item = u64> {
        let step = self.step;
        (0..=self.top / step).map(move |i| i * step)
    }
}

/// Draws `samples`, with a legend.
pub fn draw(out: &mut String, samples: &[Sample]) {
    let Some(last) = samples.last() else { return };
    let scale = Scale::new(samples, last);
    let _ = write!(
        out,
        "<div class=chart><svg role=img aria-label='The shadow over {}' \
         viewBox='0 0 {WIDTH} {HEIGHT}' preserveAspectRatio=none>",
        seconds(scale.end)
    );
    for bytes in scale.grid() {
        let _ = write!(out, "<path class=grid d='M0 {:.1}H{WIDTH}'/>", scale.y(bytes));
    }
    for (class, _, value) in SERIES {
        let path = steps(&scale, samples, value);
        let _ = write!(out, "<path class={class} d='{path}H{WIDTH}'/>");
    }
    out.push_str("</svg>");
    axes(out, &scale);
    out.push_str("</div>");
    legend(out, samples, last);
}

/// A series as a path. A value holds until the first sample with another one.
fn steps(scale: &Scale, samples: &[Sample], value: fn(&Sample) -> u64) -> String {
    let mut path = String::new();
    let mut before = None;
    for sample in samples {
        let bytes = value(sample);
        let (x, y) = (scale.x(sample), scale.y(bytes));
        let _ = match before {
            None => write!(path, "M{x:.1} {y:.1}"),
            Some(old) if old != bytes => write!(path, "H{x:.1}V{y:.1}"),
            Some(_) => Ok(()),
        };
        before = Some(bytes);
    }
    path
}

/// The labels at the lines of the grid, and the times.
fn axes(out: &mut String, scale: &Scale) {
    for bytes in scale.grid() {
        let bottom = bytes as f64 * 100.0 / scale.top as f64;
        let _ = write!(out, "<span class=y style='bottom:{bottom:.2}%'>{}</span>", size(bytes));
    }
    let step = time_step(scale.end);
    for i in 0..=(scale.end / step) as u32 {
        let at = f64::from(i) * step;
        let left = at * 100.0 / scale.end;
        let _ = write!(out, "<span class=x style='left:{left:.2}%'>{}</span>", seconds_tick(at));
    }
}

/// A table with the name of each line, its peak and its last value.
fn legend(out: &mut String, samples: &[Sample], last: &Sample) {
    out.push_str(
        "<table class='figures series'><tr><td><th scope=col>peak<th scope=col>at the end</tr>",
    );
    for (class, name, value) in SERIES {
        let peak = samples.iter().map(value).max().unwrap_or(0);
        let _ = write!(
            out,
            "<tr><th scope=row><svg class=stroke aria-hidden=true viewBox='0 0 24 8'>\
             <path class={class} d='M0 4H24'/></svg>{name}</th><td>{}<td>{}</tr>",
            size(peak),
            size(value(last))
        );
    }
    let _ = write!(out, "</table><p class=note>Samples: {}.</p>", samples.len());
}

/// Bytes between two lines of the grid: a power of two, for four to eight lines.
fn byte_step(top: u64) -> u64 {
    (top / 4)
        .max(1)
        .checked_next_power_of_two()
        .map_or(1 << 62, |step| if step > top / 4 { (step / 2).max(1) } else { step })
}

/// Seconds between two marks: 1, 2 or 5 of some unit, for at most five marks.
fn time_step(end: f64) -> f64 {
    let unit = 10f64.powf((end / 4.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|n| n * unit)
        .into_iter()
        .find(|step| end / step <= 5.0)
        .unwrap_or(end)
}

fn seconds_tick(at: f64) -> String {
    if at == 0.0 { "0".into() } else { seconds(at).replace(".0 ", " ") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn grids_have_few_lines() {
        for top in (0..63).map(|i| 1u64 << i).chain([3, 5, 7, 120 << 10, 100_000_001]) {
            let step = byte_step(top);
            assert!(step.is_power_of_two() && top.div_ceil(step) <= 8, "{top}: {step}");
        }
        for end in [1e-6, 3e-5, 0.0099, 0.05, 0.1, 0.99, 7.0, 3600.0] {
            let marks = (end / time_step(end)) as u32;
            assert!((2..=5).contains(&marks), "{end}: {marks}");
        }
    }

    #[test]
    fn a_line_for_each_series_and_nothing_without_samples() {
        let mut out = String::new();
        draw(&mut out, &[]);
        assert_eq!(out, "");
        let sample = |ms, resident| Sample {
            at: Duration::from_millis(ms),
            page: 4096,
            resident,
            ..Sample::default()
        };
        draw(&mut out, &[sample(0, 0), sample(5, 8192), sample(10, 4096)]);
        // At 8 KiB of 8 KiB from the middle on, and down to half of it at the end.
        assert!(out.contains("d='M0.0 300.0H500.0V0.0H1000.0V150.0H1000'"), "{out}");
        for (class, name, _) in SERIES {
            assert!(out.contains(class) && out.contains(name));
        }
        let mut one = String::new();
        draw(&mut one, &[Sample::default()]);
        assert!(one.contains("Samples: 1.") && !one.contains("NaN") && !one.contains("inf"));
    }
}
