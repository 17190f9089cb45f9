//! The figures that repeat exactly, which the gate compares.

use std::path::Path;

use anyhow::Result;
use umbra::shadow::Mode;

use super::{checks, costs, replay};
use crate::figure::Figure;
use crate::gate::Measured;
use crate::meter::Meter;
use crate::replay::replay as replay_natively;
use crate::trace::SLICE;

/// The units of figures that repeat exactly.
const UNITS: [&str; 4] = ["instructions", "exits", "exits/call", "KiB"];
/// Memory of the machine that the trace was recorded on.
const MEMORY: u64 = 24 << 30;

/// Measures the figures that repeat exactly. `tick` gets each step.
///
/// # Errors
/// A measurement failed that this host supports.
pub fn measure(tick: impl Fn(&str) + 'static) -> Result<Measured> {
    tick("replaying the trace's slice");
    let slice = replay_natively(Path::new(SLICE), MEMORY, Mode::PerPage, |_, _| {})?.figures;
    let kib = |name: &str, bytes: u64| {
        Figure::new("replay of the slice, two-level", name, bytes as f64 / 1024.0, "KiB")
    };
    let natively = vec![
        kib("page shadow", slice.page_bytes),
        kib("byte shadow resident at the peak", slice.byte_peak_resident_bytes),
        kib("byte shadow resident at the end", slice.byte_resident_bytes),
        kib("byte shadow used at the peak", slice.byte_used_peak_bytes),
    ];
    Ok(Measured { natively, guests: guests(tick)? })
}

fn guests(tick: impl Fn(&str) + 'static) -> Result<Result<(String, Vec<Figure>), String>> {
    let Some(kernel) = umbra::kernel::test_kernel() else {
        return Ok(Err("there is no test kernel in this build".into()));
    };
    Ok(match Meter::new(kernel.into(), None, Box::new(tick)) {
        Err(error) => Err(format!("{error:#}")),
        Ok(meter) if !meter.counts() => Err("this host does not count guest instructions".into()),
        Ok(meter) => {
            let mut figures = of_guests(&meter)?;
            figures.retain(|figure| UNITS.contains(&figure.unit));
            Ok((compiler(kernel), figures))
        }
    })
}

/// The figures of guests, without times.
fn of_guests(meter: &Meter) -> Result<Vec<Figure>> {
    let mut all = replay::figures(meter, Path::new(SLICE))?.0;
    all.extend(checks::figures(meter)?);
    all.extend(costs::exact(meter)?);
    Ok(all)
}

/// The compiler that is named in a kernel's file.
fn compiler(kernel: &[u8]) -> String {
    const MARK: &[u8] = b"rustc version ";
    let at = kernel.windows(MARK.len()).position(|part| part == MARK);
    let text = at.and_then(|at| kernel.get(at..)).unwrap_or_default();
    let end = text.iter().take(100).position(|byte| !(b' '..=b'~').contains(byte)).unwrap_or(0);
    String::from_utf8_lossy(&text[..end]).replace("))", ")")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_is_in_the_file() {
        assert_eq!(
            compiler(b"\0\x7fELF rustc version 1.96.0 (x)\0more"),
            "rustc version 1.96.0 (x)"
        );
        assert_eq!(compiler(b"nothing"), "");
    }
}
