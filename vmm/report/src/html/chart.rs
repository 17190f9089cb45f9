//! The shadow's memory over time, drawn as lines.

use std::fmt::Write;

use super::escape::{seconds, size};
use crate::Sample;

/// The drawing's own units; it is stretched to the page.
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

/// Draws `samples` and says what the lines are.
pub fn draw(out: &mut String, samples: &[Sample]) {
    let Some(last) = samples.last() else { return };
    let top = samples.iter().flat_map(|s| SERIES.map(|series| series.2(s))).max().unwrap_or(0);
    let step = byte_step(top);
    let top = top.next_multiple_of(step).max(step);
    let end = last.at.as_secs_f64().max(1e-6);
    let x = |sample: &Sample| sample.at.as_secs_f64() / end * WIDTH;
    let y = |bytes: u64| HEIGHT - bytes as f64 / top as f64 * HEIGHT;
    let _ = write!(
        out,
        "<div class=chart><svg role=img aria-label='The shadow over {}' viewBox='0 0 {WIDTH} {HEIGHT}' \
         preserveAspectRatio=none>",
        seconds(end)
    );
    let ticks: Vec<u64> = (0..=top / step).map(|i| i * step).collect();
    for tick in &ticks {
        let _ = write!(out, "<path class=grid d='M0 {:.1}H{WIDTH}'/>", y(*tick));
    }
    for (class, _, value) in SERIES {
        let mut path = String::new();
        let mut before = None;
        for sample in samples {
            let bytes = value(sample);
            let (x, y) = (x(sample), y(bytes));
            match before {
                None => {
                    let _ = write!(path, "M{x:.1} {y:.1}");
                }
                // It stays as it was until it is seen to be different.
                Some(old) if old != bytes => {
                    let _ = write!(path, "H{x:.1}V{y:.1}");
                }
                Some(_) => {}
            }
            before = Some(bytes);
        }
        let _ = write!(out, "<path class={class} d='{path}H{WIDTH}'/>");
    }
    out.push_str("</svg>");
    for tick in &ticks {
        let _ = write!(
            out,
            "<span class=y style='bottom:{:.2}%'>{}</span>",
            *tick as f64 * 100.0 / top as f64,
            size(*tick)
        );
    }
    let step = time_step(end);
    for i in 0..=(end / step) as u32 {
        let at = f64::from(i) * step;
        let _ = write!(
            out,
            "<span class=x style='left:{:.2}%'>{}</span>",
            at * 100.0 / end,
            seconds_tick(at)
        );
    }
    out.push_str(
        "</div><table class='figures series'><tr><td><th scope=col>peak<th scope=col>at the end</tr>",
    );
    for (class, name, value) in SERIES {
        let peak = samples.iter().map(value).max().unwrap_or(0);
        let _ = write!(
            out,
            "<tr><th scope=row><svg class=stroke aria-hidden=true viewBox='0 0 24 8'><path class={class} d='M0 4H24'/></svg>\
             {name}</th><td>{}<td>{}</tr>",
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
