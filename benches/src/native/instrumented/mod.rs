//! Instrumented programs in user space: what checks cost them on a real CPU.
//!
//! A host that emulates ring 0, or counts instructions, hides what a call costs that is made for
//! each access. So small C programs (`workloads.c`) are compiled as kernels are, with all their
//! memory checked, and run with shadow at the addresses where a guest has it. No access is bad, and
//! the programs' results are compared.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, iter};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::size;
use crate::figure::Figure;
use crate::runtime::Checks;

/// The programs, and their working sets in bytes.
const WORKLOADS: [&str; 5] = ["list", "hash", "sort", "lz", "parse"];
const SETS: [u64; 3] = [32 << 10, 1 << 20, 64 << 20];
/// Turns in which each way to check runs once; the median of their ratios counts. And runs in one
/// of a turn.
const TURNS: usize = 5;
const RUNS: &str = "2";
/// Most time of inline checks in the check shadow, relative to those in full shadow.
const LIMIT: f64 = 1.05;
/// Sources, which are compiled with all compilers.
const SOURCES: [(&str, &str); 4] = [
    ("workloads.c", include_str!("workloads.c")),
    ("workloads.h", include_str!("workloads.h")),
    ("main.c", include_str!("main.c")),
    ("outline.c", include_str!("outline.c")),
];

/// A way to check: what the tables call it, the program, and its shadow.
struct Way {
    name: &'static str,
    program: &'static str,
    shadow: &'static str,
}

const WAYS: [Way; 6] = [
    Way { name: "unchecked", program: "none", shadow: "none" },
    Way { name: "inline, full shadow", program: "inline", shadow: "full" },
    Way { name: "inline, check shadow", program: "inline", shadow: "patterns" },
    Way { name: "calls, two-level, untyped", program: "umbra", shadow: "untyped" },
    Way { name: "calls, two-level, byte-checked", program: "umbra", shadow: "bytes" },
    Way { name: "calls, KASAN's in C", program: "outline", shadow: "full" },
];
/// Places in [`WAYS`].
const FULL: usize = 1;
const CHECK_SHADOW: usize = 2;

/// How a compiler is told to instrument. The shadow of stacks and globals is left alone.
struct Compiler {
    name: &'static str,
    flags: &'static [&'static str],
    /// An option, but for its value: above so many accesses in a function, checks are calls.
    calls: &'static str,
}

const COMPILERS: [Compiler; 2] = [
    Compiler {
        name: "gcc",
        flags: &["-fasan-shadow-offset=0", "--param=asan-stack=0", "--param=asan-globals=0"],
        calls: "--param=asan-instrumentation-with-call-threshold=",
    },
    Compiler {
        name: "clang",
        flags: &[
            "-mllvm",
            "-asan-mapping-offset=0",
            "-mllvm",
            "-asan-stack=0",
            "-mllvm",
            "-asan-globals=0",
            "-mllvm",
        ],
        calls: "-asan-instrumentation-with-call-threshold=",
    },
];

impl Compiler {
    fn run(&self, folder: &Path, arguments: &[&str]) -> Result<()> {
        let output = Command::new(self.name).args(arguments).current_dir(folder).output();
        let output = output.with_context(|| format!("cannot start {}", self.name))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} {}: {said}", self.name, arguments.join(" "));
        Ok(())
    }

    /// Builds all programs in a folder that has the sources.
    fn build(&self, folder: &Path) -> Result<()> {
        let plain = ["-O2", "-Wall", "-Wextra", "-Werror", "-c"];
        let compile = |source: &str, object: &str, flags: &[&str]| {
            self.run(folder, &[&plain, flags, &[source, "-o", object]].concat())
        };
        compile("main.c", "main.o", &[])?;
        compile("outline.c", "outline.o", &["-fno-builtin"])?;
        compile("checks.s", "umbra.o", &[])?;
        for (program, calls, checks) in [
            ("none", None, &[][..]),
            ("inline", Some("1000000"), &[]),
            ("umbra", Some("0"), &["umbra.o"]),
            ("outline", Some("0"), &["outline.o"]),
        ] {
            let calls = calls.map(|calls| format!("{}{calls}", self.calls));
            let mut flags: Vec<_> = calls.iter().map(|_| "-fsanitize=kernel-address").collect();
            if let Some(calls) = &calls {
                flags.extend(self.flags.iter().copied().chain(iter::once(&**calls)));
            }
            compile("workloads.c", "workloads.o", &flags)?;
            self.run(folder, &[&["-o", program, "main.o", "workloads.o"], checks].concat())?;
        }
        Ok(())
    }
}

/// Writes the sources, and the runtime's checks as one, into a new folder.
fn sources(kernel: &[u8]) -> Result<TempDir> {
    let folder = tempfile::tempdir().context("no temporary folder")?;
    for (name, text) in SOURCES {
        fs::write(folder.path().join(name), text)?;
    }
    let checks = Checks::new(kernel, "umbra_templates_two_level")?;
    fs::write(folder.path().join("checks.bin"), &checks.code)?;
    let mut assembly = String::from(".text\n.balign 64\nchecks: .incbin \"checks.bin\"\n");
    for (i, name) in Checks::symbols().enumerate() {
        let _ = writeln!(assembly, ".globl {name}\n.set {name}, checks + {}", i * checks.each);
    }
    assembly.push_str(".section .note.GNU-stack, \"\", @progbits\n");
    fs::write(folder.path().join("checks.s"), assembly)?;
    Ok(folder)
}

/// Runs a program. Returns its nanoseconds of CPU time, and its result.
fn run(folder: &Path, way: &Way, workload: &str, set: u64) -> Result<(f64, String)> {
    let program: PathBuf = folder.join(way.program);
    let output =
        Command::new(program).args([workload, &set.to_string(), way.shadow, RUNS]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let (time, result) = said.trim().split_once(' ').with_context(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        format!("{workload}, {}: {}: {error}", way.name, output.status)
    })?;
    Ok((time.parse()?, result.to_owned()))
}

/// A workload's times by all ways: the median ratios to unchecked, and of the check shadow to the
/// full one.
struct Row {
    name: String,
    ratios: [f64; WAYS.len()],
    check_to_full: f64,
}

impl Row {
    fn measure(folder: &Path, workload: &str, set: u64) -> Result<Self> {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let mut times = [0.0; WAYS.len()];
            let mut results = Vec::new();
            for (way, time) in WAYS.iter().zip(&mut times) {
                let (took, result) = run(folder, way, workload, set)?;
                *time = took;
                results.push(result);
            }
            let same = results.windows(2).all(|both| both[0] == both[1]);
            ensure!(same, "{workload}: checks changed its result: {results:?}");
            turns.push(times);
        }
        let median = |of: &dyn Fn(&[f64; WAYS.len()]) -> f64| {
            let mut all: Vec<_> = turns.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[TURNS / 2]
        };
        Ok(Self {
            name: format!("{workload}, {}", size(set)),
            ratios: std::array::from_fn(|way| median(&|times| times[way] / times[0])),
            check_to_full: median(&|times| times[CHECK_SHADOW] / times[FULL]),
        })
    }
}

fn geometric_mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count() as f64;
    (values.map(f64::ln).sum::<f64>() / count).exp()
}

/// Measures with the compilers that there are. Returns the figures and the text for the page.
///
/// # Errors
/// A program cannot be built, or does not come to the result of the unchecked one.
pub fn measure(kernel: &[u8]) -> Result<(Vec<Figure>, String)> {
    const GROUP: &str = "instrumented programs, time to that of inline checks in full shadow";
    let mut text = String::from(
        "\n### Instrumented programs, in user space\n\nTime of small programs at -O2, relative to \
         the same without checks: the median of turns in which each runs once. *Inline* checks in \
         *full shadow* are stock KASAN's, with all shadow in memory; in the *check shadow* the \
         same code finds one page of zeros mapped for each 32 KiB, as it will where no page is \
         byte-checked. *Calls* are Umbra's checks, from the test kernel's file, and KASAN's \
         outline checks in C (`benches/src/native/instrumented/outline.c`). Memory and shadow are \
         in pages of 4 KiB; Linux maps KASAN's shadow in larger ones where it can. Of the largest \
         set, sort uses 1 MiB, parse 4 MiB and lz 6 MiB.\n",
    );
    let mut figures = Vec::new();
    for compiler in &COMPILERS {
        if Command::new(compiler.name).arg("--version").output().is_err() {
            let skip = umbra_skip::line(
                format_args!("programs by {}", compiler.name),
                format_args!("it is not installed."),
            );
            let _ = writeln!(text, "\n{skip}");
            continue;
        }
        let folder = sources(kernel)?;
        compiler.build(folder.path())?;
        let rows: Vec<_> = WORKLOADS
            .iter()
            .flat_map(|workload| SETS.map(|set| Row::measure(folder.path(), workload, set)))
            .collect::<Result<_>>()?;
        text.push_str(&table(compiler.name, &rows));
        let ratio = geometric_mean(rows.iter().map(|row| row.check_to_full));
        figures.push(
            Figure::new(GROUP, format!("check shadow, {}", compiler.name), ratio, "ratio")
                .limit(LIMIT)
                .note(format!("geometric mean of {} medians", rows.len())),
        );
    }
    Ok((figures, text))
}

fn table(compiler: &str, rows: &[Row]) -> String {
    let mut text = format!("\n| {compiler} |");
    for way in &WAYS[FULL..] {
        let _ = write!(text, " {} |", way.name);
    }
    let _ = writeln!(text, "\n| --- |{}", " ---: |".repeat(WAYS.len() - 1));
    let mean = |way: usize| geometric_mean(rows.iter().map(|row| row.ratios[way]));
    let means = ("geometric mean".to_owned(), std::array::from_fn(mean));
    for (name, ratios) in rows.iter().map(|row| (row.name.clone(), row.ratios)).chain([means]) {
        let _ = write!(text, "| {name} |");
        for ratio in &ratios[FULL..] {
            let _ = write!(text, " {ratio:.2} |");
        }
        text.push('\n');
    }
    text
}
