//! Instructions of each check, from the call to the return, both included.

use anyhow::Result;

use crate::figure::Figure;
use crate::meter::{Meter, Mode, Word};

/// Limits in instructions, for accesses of 1 to 8 bytes inside one page.
const UNTYPED: f64 = 8.0;
const BYTE_CHECKED: f64 = 16.0;

struct Case {
    entry: String,
    place: &'static str,
    offset: u64,
    size: u64,
    name: &'static str,
    limit: Option<f64>,
    known: Option<&'static str>,
}

/// Why some unaligned accesses are over their limits. Compilers call `__asan_loadN` for accesses
/// that they know to be unaligned.
const UNALIGNED: &str = "unaligned: a page of another kind beside, or a granule that is not \
                         whole, takes more instructions";

impl Case {
    fn word(&self) -> Word {
        Word::new("check", format!("{}:{}:{}:{}", self.entry, self.place, self.offset, self.size))
    }
}

/// The places of accesses of a fixed size. The object has 125 whole granules and 5 valid bytes in
/// one more.
fn fixed(size: u64) -> Vec<(&'static str, u64, &'static str, Option<f64>)> {
    let mut all = vec![
        ("page", 0, "untyped page", Some(UNTYPED)),
        ("object", 0, "byte-checked, whole granule", Some(BYTE_CHECKED)),
    ];
    if size > 1 {
        all.push(("page", 1, "untyped page, unaligned", Some(UNTYPED)));
        all.push((
            "beside",
            1,
            "untyped page, unaligned, beside a byte-checked one",
            Some(UNTYPED),
        ));
        all.push(("page", 4096 - size / 2, "untyped pages, across both", None));
        all.push((
            "object",
            if size == 16 { 12 } else { 8 - size / 2 },
            "byte-checked, unaligned, across granules",
            Some(BYTE_CHECKED),
        ));
    }
    if let Some(offset) = match size {
        1 => Some(1004),
        2 => Some(1002),
        4 => Some(1000),
        _ => None,
    } {
        all.push(("object", offset, "byte-checked, partial granule", Some(BYTE_CHECKED)));
    }
    if size == 2 || size == 4 {
        all.push(("object", 1, "byte-checked, unaligned, in a whole granule", Some(BYTE_CHECKED)));
        all.push((
            "object",
            993,
            "byte-checked, unaligned, in a whole granule before a partial one",
            Some(BYTE_CHECKED),
        ));
        all.push((
            "object",
            1001 - size,
            "byte-checked, unaligned, into a partial granule",
            Some(BYTE_CHECKED),
        ));
        all.push((
            "object",
            1001,
            "byte-checked, unaligned, in a partial granule",
            Some(BYTE_CHECKED),
        ));
    }
    if size == 8 {
        all.push((
            "object",
            997,
            "byte-checked, unaligned, into a partial granule",
            Some(BYTE_CHECKED),
        ));
    }
    if size > 8 {
        all.iter_mut().for_each(|case| case.3 = None);
    }
    all
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for access in ["load", "store"] {
        for size in [1, 2, 4, 8, 16] {
            for (place, offset, name, limit) in fixed(size) {
                // Loads and stores come from one macro: measure the less common cases once.
                if access == "load" || !name.contains("unaligned") {
                    let known = name.contains("unaligned").then_some(UNALIGNED);
                    all.push(Case {
                        entry: format!("{access}{size}"),
                        place,
                        offset,
                        size,
                        name,
                        limit,
                        known,
                    });
                }
            }
        }
        for (place, offset, size, name) in [
            ("page", 0, 64, "64 bytes of an untyped page"),
            ("page", 4000, 200, "200 bytes across two untyped pages"),
            ("object", 1, 3, "3 bytes, byte-checked, in a granule"),
            ("object", 5, 8, "8 bytes, byte-checked, unaligned"),
            ("object", 997, 8, "8 bytes, byte-checked, unaligned, into a partial granule"),
            ("object", 0, 64, "64 bytes, byte-checked"),
            ("object", 1, 1003, "1003 bytes, byte-checked, unaligned"),
        ] {
            all.push(Case {
                entry: format!("{access}N"),
                place,
                offset,
                size,
                name,
                limit: None,
                known: None,
            });
        }
    }
    all
}

/// Measures all checks with two-level and with full shadow.
pub fn figures(meter: &Meter) -> Result<Vec<Figure>> {
    let none = Case {
        entry: "none".into(),
        place: "page",
        offset: 0,
        size: 0,
        name: "",
        limit: None,
        known: None,
    };
    let modes = [
        (Mode::RING, "checks, two-level shadow, from the call to the return"),
        (Mode::FULL, "checks, full shadow, from the call to the return"),
    ];
    let mut all = Vec::new();
    for (mode, group) in modes {
        let cases = cases();
        let words: Vec<_> = std::iter::once(&none).chain(&cases).map(Case::word).collect();
        let costs = meter.cost(mode, &words)?;
        // The loop calls a bare `ret`: two instructions that belong to a check; by the clock, they
        // count as nothing.
        let (empty, costs) = (costs[0], &costs[1..]);
        for (case, cost) in cases.iter().zip(costs) {
            let call = if meter.counts() { 2.0 } else { 0.0 };
            let mut figure = Figure::new(
                group,
                format!("{}: {}", case.entry, case.name),
                cost - empty + call,
                meter.unit(),
            );
            if mode == Mode::RING
                && let Some(limit) = case.limit
            {
                figure = figure.limit(limit);
            }
            figure.known = case.known;
            all.push(if meter.counts() { figure } else { figure.not_applicable() });
        }
    }
    Ok(all)
}
