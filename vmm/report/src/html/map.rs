//! Draws the guest's page map: a cell for each block of pages, at most a few thousand cells.

use std::fmt::Write;

use umbra_shadow::codes::PAGE_SIZE;

use super::escape::{grouped, size};
use crate::{PageCounts, PageMap};

/// Cells in a row.
const COLUMNS: usize = 128;
/// Rows between two addresses at the side.
const LABELS: usize = 8;

/// The classes of cells, in the order of the paths.
const CLASSES: [&str; 6] = ["p-valid", "p-free", "p-some", "p-half", "p-most", "p-poison"];

/// The class of a cell, as an index into [`CLASSES`]; none for a hole. Rare kinds of pages show
/// first.
fn class(cell: &PageCounts) -> Option<usize> {
    let total = cell.total();
    match cell {
        _ if total == 0 => None,
        cell if cell.bytes * 4 > total * 3 => Some(4),
        cell if cell.bytes * 4 > total => Some(3),
        cell if cell.bytes > 0 => Some(2),
        cell if cell.poisoned > 0 => Some(5),
        cell if cell.free > cell.valid => Some(1),
        _ => Some(0),
    }
}

fn share(percent: f64) -> String {
    if percent > 0.0 && percent < 0.05 { "&lt; 0.1 %".into() } else { format!("{percent:.1} %") }
}

/// Draws `map` with its legend.
pub fn draw(out: &mut String, map: &PageMap) {
    let rows = map.cells.len().div_ceil(COLUMNS).max(1);
    let columns = map.cells.len().clamp(1, COLUMNS);
    let per_row = map.pages_per_cell * PAGE_SIZE * columns as u64;
    let total = &map.total;
    out.push_str("<div class=map><div class=side aria-hidden=true>");
    for row in (0..rows).step_by(LABELS.min(rows.div_ceil(4)).max(1)) {
        let top = row as f64 * 100.0 / rows as f64;
        let _ = write!(out, "<span style='top:{top:.2}%'>{}</span>", size(row as u64 * per_row));
    }
    let _ = write!(
        out,
        "</div><svg class=cells role=img aria-label='Page map: {} pages valid, {} free, \
         {} byte-checked, {} poisoned' viewBox='0 0 {columns} {rows}' preserveAspectRatio=none \
         style='aspect-ratio:{columns}/{rows}'>",
        total.valid, total.free, total.bytes, total.poisoned
    );
    for (class, path) in CLASSES.iter().zip(&paths(map)).filter(|(_, path)| !path.is_empty()) {
        let _ = write!(out, "<path class={class} d='{path}'/>");
    }
    out.push_str("</svg></div>");
    legend(out, total);
    note(out, map, per_row);
}

/// The cells of each class as a path.
fn paths(map: &PageMap) -> [String; CLASSES.len()] {
    let mut paths: [String; CLASSES.len()] = Default::default();
    for (y, row) in map.cells.chunks(COLUMNS).enumerate() {
        let mut x = 0;
        // Runs of equal cells are one rectangle.
        for run in row.chunk_by(|a, b| class(a) == class(b)) {
            if let Some(path) = run.first().and_then(class).and_then(|class| paths.get_mut(class)) {
                let _ = write!(path, "M{x} {y}h{0}v1h-{0}z", run.len());
            }
            x += run.len();
        }
    }
    paths
}

/// A table with the number, memory and share of each kind of pages.
fn legend(out: &mut String, total: &PageCounts) {
    out.push_str(
        "<table class='figures series'><tr><td><th scope=col>pages<th scope=col>memory\
         <th scope=col>share</tr>",
    );
    let all = total.total().max(1) as f64;
    for (class, name, pages) in [
        ("p-valid", "valid", total.valid),
        ("p-free", "free", total.free),
        ("p-most", "byte-checked", total.bytes),
        ("p-poison", "poisoned otherwise", total.poisoned),
    ] {
        let _ = write!(
            out,
            "<tr><th scope=row><i class='key {class}'></i>{name}</th><td>{}<td>{}<td>{}</tr>",
            grouped(pages),
            size(pages * PAGE_SIZE),
            share(pages as f64 * 100.0 / all)
        );
    }
    out.push_str("</table>");
}

/// The scale of the map and the meaning of a cell; a row is `per_row` bytes.
fn note(out: &mut String, map: &PageMap, per_row: u64) {
    let _ = write!(
        out,
        "<p class=note>By guest-physical address. A cell is {} {}, {}, a row {}.",
        grouped(map.pages_per_cell),
        if map.pages_per_cell == 1 { "page" } else { "pages" },
        size(map.pages_per_cell * PAGE_SIZE),
        size(per_row)
    );
    if map.pages_per_cell > 1 {
        out.push_str(
            " A cell is darker the more byte-checked pages it has. Without any it shows its \
             poisoned pages, or else the kind of most of its pages.",
        );
    }
    if map.cells.iter().any(|cell| cell.total() == 0) {
        out.push_str(" Hatched areas are no memory.");
    }
    out.push_str("</p>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_guest_is_a_bounded_picture() {
        // The worst: no two neighbours alike.
        let cell = |i: usize| match i % 4 {
            0 => PageCounts { valid: 4096, ..PageCounts::default() },
            1 => PageCounts { free: 4096, ..PageCounts::default() },
            2 => PageCounts { bytes: 1, valid: 4095, ..PageCounts::default() },
            _ => PageCounts::default(),
        };
        let map =
            PageMap { pages_per_cell: 4096, cells: (0..8192).map(cell).collect(), total: cell(0) };
        let mut out = String::new();
        draw(&mut out, &map);
        assert!(out.len() < 200 << 10, "{} bytes", out.len());
        assert!(out.contains("viewBox='0 0 128 64'") && out.contains("Hatched"));
    }

    #[test]
    fn rare_pages_show() {
        let of = |valid, free, bytes, poisoned| class(&PageCounts { valid, free, bytes, poisoned });
        assert_eq!(of(4095, 0, 1, 0), Some(2));
        assert_eq!(of(2, 0, 2, 0), Some(3));
        assert_eq!(of(0, 0, 4, 0), Some(4));
        assert_eq!(of(4095, 0, 0, 1), Some(5));
        assert_eq!((of(2, 2, 0, 0), of(1, 2, 0, 0), of(0, 0, 0, 0)), (Some(0), Some(1), None));
    }

    #[test]
    fn equal_neighbours_are_one_rectangle() {
        let valid = PageCounts { valid: 8, ..PageCounts::default() };
        let map = PageMap { pages_per_cell: 8, cells: vec![valid; 200], total: valid };
        let mut out = String::new();
        draw(&mut out, &map);
        assert!(out.contains("d='M0 0h128v1h-128zM0 1h72v1h-72z'"), "{out}");
    }
}
