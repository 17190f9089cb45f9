//! The tables, and the figures with their limits.

use std::fmt::Write as _;

use anyhow::Result;

use super::{All, KERNELS, MEMORY, Mark, Measured, WITH_SUITE};
use crate::figure::{Figure, markdown, number};

const MIB: f64 = 1_048_576.0;
/// The kernels whose shadow is in guest memory.
const IN_THE_GUEST: [&str; 2] = ["outline", "inline"];

/// The cost between two marks, or from the start of the guest.
fn since(from: Option<&Mark>, to: &Mark) -> Mark {
    let nothing = Mark::default();
    let from = from.unwrap_or(&nothing);
    Mark {
        instructions: to.instructions.map(|to| to - from.instructions.unwrap_or(0)),
        exits: to.exits - from.exits,
        hypercalls: to.hypercalls - from.hypercalls,
        shadow_faults: to.shadow_faults - from.shadow_faults,
        seconds: to.seconds - from.seconds,
        ..Mark::default()
    }
}

/// The parts of a run.
const PARTS: [(&str, Part); 3] = [("boot", boot), ("workload", workload), ("suite", suite)];
type Part = fn(&Measured) -> Option<Mark>;

fn boot(run: &Measured) -> Option<Mark> {
    Some(since(None, run.boot.as_ref()?))
}

fn workload(run: &Measured) -> Option<Mark> {
    Some(since(Some(run.boot.as_ref()?), run.workload.as_ref()?))
}

fn suite(run: &Measured) -> Option<Mark> {
    Some(since(Some(run.workload.as_ref()?), run.suite.as_ref()?))
}

/// Instructions of a kernel with KASAN for its boot and the suite, without the workload between
/// them.
fn boot_and_suite(run: &Measured) -> Option<u64> {
    Some(boot(run)?.instructions? + suite(run)?.instructions?)
}

fn ratio(of: Option<u64>, to: Option<u64>) -> Option<f64> {
    Some(of? as f64 / to.filter(|to| *to > 0)? as f64)
}

/// The shadow at its peak until the end of the workload. Stock KASAN's is 1/8 of the guest's
/// memory, all of it resident.
fn shadow(name: &str, memory: u64, at: &Mark) -> u64 {
    match name {
        _ if IN_THE_GUEST.contains(&name) => memory / 8,
        "umbra" => at.shadow_peak_bytes,
        _ => 0,
    }
}

/// The figures that have limits.
pub(super) fn figures(all: &All, allocations: u64) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut add = |name: String, measured: Option<f64>, unit, limit: Option<f64>| {
        if let Some(measured) = measured {
            let figure = Figure::new("Beside their limits", name, measured, unit);
            figures.push(limit.into_iter().fold(figure, Figure::limit));
        }
    };
    for (memory, bytes) in MEMORY {
        let run = |name| all.get(&(name, memory));
        let at = |name| run(name).and_then(|run| run.workload.as_ref());
        let instructions =
            |name, part: Part| run(name).and_then(part).and_then(|mark| mark.instructions);
        let of = |name, part| ratio(instructions("umbra", part), instructions(name, part));
        let name = |what: &str| format!("{what}, {memory}");
        let lost = at("none").zip(at("umbra")).and_then(|(none, umbra)| {
            let (whole, left) = (none.said("MemTotal:")?, umbra.said("MemTotal:")?);
            Some((whole as f64 - left as f64) / whole as f64 * 100.0)
        });
        add(name("MemTotal below the unchecked kernel's"), lost, "%", Some(1.0));
        let shadow = ratio(at("umbra").map(|umbra| umbra.shadow_peak_bytes), Some(bytes / 8));
        add(name("shadow at its peak for the workload"), shadow, "of stock's", Some(0.05));
        let suite = |name| run(name).and_then(boot_and_suite);
        for (stock, unit, limits) in [
            ("outline", "of outline's", [Some(0.2), Some(0.3), Some(0.5)]),
            ("inline", "of inline's", [None; 3]),
        ] {
            let suite = ratio(suite("umbra"), suite(stock));
            let parts = [
                ("instructions to the end of the boot", of(stock, boot)),
                ("instructions of the workload", of(stock, workload)),
                ("instructions to the end of the suite", suite),
            ];
            for ((what, ratio), limit) in parts.into_iter().zip(limits) {
                add(name(what), ratio, unit, limit);
            }
        }
        let boot = of("none", boot);
        add(name("instructions to the end of the boot"), boot, "of unchecked", Some(5.0));
        let rss = |name| at(name).map(|mark| mark.rss_bytes);
        let held = ratio(rss("umbra"), rss("none"));
        add(name("memory of the process after the workload"), held, "of unchecked", Some(1.1));
        let exits =
            run("umbra").and_then(workload).map(|mark| mark.hypercalls + mark.shadow_faults);
        let exits = ratio(exits, Some(allocations)).map(|each| each * 1000.0);
        let exits_name = name("exits of the workload for Umbra");
        add(exits_name, exits, "per 1,000 allocations", Some(1.0));
    }
    figures
}

/// The page's text.
pub(super) fn body(all: &All, figures: &[Figure], allocations: u64) -> Result<String> {
    let mut text = format!(
        "The small Linux of `guest/linux/config`, optimized for speed (`-O2`), one CPU. *none* is \
         without KASAN, *outline* and *inline* have Linux's own (generic) with checks that are \
         called and with checks that the compiler writes out, and *umbra* has the same as \
         *outline* with Umbra's shadow. The workload is {} allocations of a kernel that builds \
         Linux, replayed by an initcall through the kernel's own `kmalloc`, caches and page \
         allocator, each object written and read. Where ring 0 is emulated, Umbra gives all of \
         them a slower clock, so that few ticks of the timer are in the counts.\n",
        number(allocations as f64)
    );
    text += &markdown(figures);
    memory(&mut text, all)?;
    counts(&mut text, all)?;
    Ok(text)
}

fn memory(text: &mut String, all: &All) -> Result<()> {
    let mib =
        |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / MIB));
    writeln!(
        text,
        "\n\
         ### Memory\n\n\
         In MiB, at the end of the workload; of a run that was ended before, at the end of the \
         boot. The shadow of *outline* and *inline* is in the guest, and not in its MemTotal; \
         that of *umbra* is outside. Net is what is available less the shadow outside. The last \
         three columns are the memory that the host holds for the whole process, guest and shadow \
         included. Nothing is reclaimed for the measurement; the bytes of the quarantine are in \
         it, for *umbra* as for the others.\n"
    )?;
    writeln!(
        text,
        "| guest | KASAN | MemTotal | MemAvailable | shadow at its peak | net available | host: \
         after the boot | after the workload | after the suite |"
    )?;
    writeln!(text, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for (memory, bytes) in MEMORY {
        for (name, ..) in KERNELS {
            let Some(run) = all.get(&(name, memory)) else { continue };
            let nothing = Mark::default();
            let at = run.workload.as_ref().or(run.boot.as_ref()).unwrap_or(&nothing);
            let rss = |mark: &Option<Mark>| mib(mark.as_ref().map(|mark| mark.rss_bytes));
            let available = at.said("MemAvailable:");
            let outside = if IN_THE_GUEST.contains(&name) { 0 } else { shadow(name, bytes, at) };
            writeln!(
                text,
                "| {memory} | {name} | {} | {} | {} | {} | {} | {} | {} |",
                mib(at.said("MemTotal:")),
                mib(available),
                mib(Some(shadow(name, bytes, at))),
                mib(available.map(|available| available.saturating_sub(outside))),
                rss(&run.boot),
                rss(&run.workload),
                rss(&run.suite)
            )?;
        }
    }
    writeln!(
        text,
        "\n\
         The patch set of 2017 (per-page shadow inside of the guest), as its author measured it \
         on machines of his, in MB:\n\n\
         | guest | KASAN | MemTotal | shadow at run time | net |\n\
         | --- | --- | ---: | ---: | ---: |\n\
         | about 1 GB | stock of then | 858 | 0 | 858 |\n\
         | | per-page shadow | 987 | 30 | 957 |\n\
         | 4096 MB | stock of then | 3477 | 0 | 3477 |\n\
         | | per-page shadow | 4000 | 50 | 3950 |\n\n\
         A kernel build took it 224 s instead of 204 s."
    )?;
    Ok(())
}

fn counts(text: &mut String, all: &All) -> Result<()> {
    writeln!(
        text,
        "\n\
         ### Instructions and exits\n\n\
         The workload follows the boot, and the suite, Linux's own tests of KASAN, the workload: \
         each line is what was between two lines on the console. *To the end of the suite* is \
         boot and suite together. Most exits are the console's; those that a checked kernel makes \
         for Umbra are hypercalls (a full ring, a report, a name) and first touches of shadow. \
         Seconds are those of a machine with other work.\n"
    )?;
    writeln!(
        text,
        "| guest | | KASAN | million instructions | of outline's | of inline's | of unchecked | \
         exits | of them hypercalls | first touches of shadow | seconds |"
    )?;
    writeln!(text, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    let million =
        |count: Option<u64>| count.map_or("-".into(), |count| format!("{:.1}", count as f64 / 1e6));
    let share =
        |of: Option<u64>, to: Option<u64>| ratio(of, to).map_or("-".into(), |r| format!("{r:.2}"));
    for (memory, _) in MEMORY {
        for (what, part) in PARTS {
            let of = |name| all.get(&(name, memory)).and_then(part);
            let count = |name| of(name).and_then(|mark| mark.instructions);
            for (name, ..) in KERNELS {
                let Some(mark) = of(name) else { continue };
                writeln!(
                    text,
                    "| {memory} | {what} | {name} | {} | {} | {} | {} | {} | {} | {} | {:.0} |",
                    million(mark.instructions),
                    share(mark.instructions, count("outline")),
                    share(mark.instructions, count("inline")),
                    share(mark.instructions, count("none")),
                    number(mark.exits as f64),
                    number(mark.hypercalls as f64),
                    number(mark.shadow_faults as f64),
                    mark.seconds
                )?;
            }
        }
        if memory == WITH_SUITE {
            for name in ["outline", "inline", "umbra"] {
                let run = |name| all.get(&(name, memory)).and_then(boot_and_suite);
                let Some(count) = run(name) else { continue };
                writeln!(
                    text,
                    "| {memory} | to the end of the suite | {name} | {} | {} | {} | - | - | - | - \
                     | - |",
                    million(Some(count)),
                    share(Some(count), run("outline")),
                    share(Some(count), run("inline"))
                )?;
            }
        }
    }
    Ok(())
}
