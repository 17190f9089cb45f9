//! Plots as SVG files, in one look.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

/// Width and height, in pixels.
const SIZE: (u32, u32) = (900, 400);
/// Width of the legend, in pixels.
const LEGEND: i32 = 230;
/// Colours that colour-blind readers can also distinguish (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];

/// A line: its name and its points.
pub struct Line {
    /// Name in the legend.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// An axis: what it shows and its scale.
pub struct Axis<'a> {
    /// Name with unit.
    pub name: &'a str,
    /// Logarithmic scale.
    pub logarithmic: bool,
    /// Formats its numbers.
    pub label: &'a dyn Fn(f64) -> String,
}

impl Axis<'_> {
    fn range(&self, values: impl Iterator<Item = f64>) -> Range<f64> {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        if self.logarithmic { low / 1.3..high * 1.6 } else { low.min(0.0)..high * 1.05 }
    }
}

/// Draws lines into the file at `path`.
///
/// # Errors
/// It cannot be written, or there is nothing to draw.
pub fn lines(path: &Path, title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    if points().next().is_none() {
        return Err(anyhow!("nothing to draw in {}", path.display()));
    }
    let (xs, ys) = (x.range(points().map(|p| p.0)), y.range(points().map(|p| p.1)));
    let (path, problem) =
        (path, |error: String| anyhow!("cannot draw {}: {error}", path.display()));
    match (x.logarithmic, y.logarithmic) {
        (false, false) => draw(path, title, (x, xs), (y, ys), lines),
        (true, false) => draw(path, title, (x, xs.log_scale()), (y, ys), lines),
        (false, true) => draw(path, title, (x, xs), (y, ys.log_scale()), lines),
        (true, true) => draw(path, title, (x, xs.log_scale()), (y, ys.log_scale()), lines),
    }
    .map_err(problem)
}

fn draw<X, Y>(
    path: &Path,
    title: &str,
    (x, xs): (&Axis, X),
    (y, ys): (&Axis, Y),
    lines: &[Line],
) -> Result<(), String>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let wrong = |error: &dyn std::fmt::Display| error.to_string();
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| wrong(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(LEGEND)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(xs, ys)
        .map_err(|e| wrong(&e))?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc(x.name)
        .y_desc(y.name)
        .x_label_formatter(&|value| (x.label)(*value))
        .y_label_formatter(&|value| (y.label)(*value))
        .label_style(("sans-serif", 13))
        .draw()
        .map_err(|e| wrong(&e))?;
    for (i, (line, colour)) in (0..).zip(lines.iter().zip(COLOURS.iter().cycle())) {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))
            .map_err(|e| wrong(&e))?;
        // Mark the points only if there are few.
        if line.points.len() <= 20 {
            let dots = line.points.iter().map(|point| Circle::new(*point, 3, colour.filled()));
            chart.draw_series(dots).map_err(|e| wrong(&e))?;
        }
        let (left, top) = (SIZE.0 as i32 - LEGEND + 12, 50 + 22 * i);
        area.draw(&PathElement::new([(left, top), (left + 18, top)], style))
            .map_err(|e| wrong(&e))?;
        let name = Text::new(line.name.as_str(), (left + 24, top - 7), ("sans-serif", 13));
        area.draw(&name).map_err(|e| wrong(&e))?;
    }
    area.present().map_err(|e| wrong(&e))
}
