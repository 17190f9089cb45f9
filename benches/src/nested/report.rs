//! The page of what a whole host spends.

use std::fmt::Write as _;

use super::linux::{BOOT, KERNELS, MEMORY, PARTS, REPLAYED, WHOLE};
use super::programs::PROGRAMS;
use crate::figure::{Measured, number};
use crate::results::Section;

/// The page's part.
pub(super) fn section(body: String, versions: &str) -> Section<'static> {
    Section {
        name: "05-nested",
        title: "A whole host: guest, VMM and host kernel",
        command: "cargo xtask bench nested",
        host: format!("the nested SVM host, one instruction a nanosecond ({versions})"),
        body,
    }
}

/// Its text.
pub(super) fn body(measured: &[Measured]) -> String {
    let mut text = String::from(
        "Instructions of the whole nested host: the guest's, Umbra's, and the host kernel's on \
         their behalf. They are what hardware has to execute; what it pays for an exit or a cache \
         miss is not in them. *Outside the guest* is what the vCPU's thread spends while the guest \
         stands still; *in the collector* is what is done while it runs. With one CPU they add up; \
         with several the collector has another.\n",
    );
    let mut group = "";
    for figure in measured.iter().filter(|figure| !figure.group.starts_with("Linux: ")) {
        if figure.group != group {
            group = &figure.group;
            // Writing to a string does not fail.
            let _ = write!(text, "\n| {group} | instructions |\n| --- | ---: |\n");
        }
        let _ = writeln!(text, "| {} | {} |", figure.name, number(figure.measured));
    }
    linux(&mut text, measured);
    text
}

fn linux(text: &mut String, measured: &[Measured]) {
    let value = |group: &str, name: &str| {
        let mut figures = measured.iter();
        let found = figures.find(|figure| figure.group == group && figure.name == name);
        found.map(|figure| figure.measured)
    };
    if value(BOOT, KERNELS[0].0).is_none() {
        return;
    }
    text.push_str(
        "\nLinux in 1 GiB with one CPU, compiled with -O2: without KASAN, with its own (generic, \
         by calls and inline), and with Umbra's shadow. The workload replays allocations of a \
         kernel that builds Linux; the programs are 8 compilations by gcc and md5sum of 20 MB.\n",
    );
    for (group, unit, by) in [
        (BOOT, "million instructions", 1e6),
        (REPLAYED, "million instructions", 1e6),
        (PROGRAMS, "million instructions", 1e6),
        (MEMORY, "MiB", 1024.0),
    ] {
        if value(group, KERNELS[0].0).is_none() {
            continue;
        }
        let _ = write!(
            text,
            "\n| {} | {unit} | of unchecked | of stock outline | of stock inline |\n\
             | --- | ---: | ---: | ---: | ---: |\n",
            group.trim_end_matches(", KiB")
        );
        for (name, ..) in KERNELS {
            let Some(here) = value(group, name) else { continue };
            let of = |other: &str| {
                value(group, other).map_or("-".into(), |other| format!("{:.2}", here / other))
            };
            let _ = writeln!(
                text,
                "| {name} | {:.1} | {} | {} | {} |",
                here / by,
                of("none"),
                of("stock outline"),
                of("stock inline")
            );
        }
    }
    let _ = write!(text, "\n| {WHOLE} | million instructions |\n| --- | ---: |\n");
    for part in PARTS {
        let Some(cost) = value(WHOLE, part) else { continue };
        let _ = writeln!(text, "| {part} | {:.1} |", cost / 1e6);
    }
}
