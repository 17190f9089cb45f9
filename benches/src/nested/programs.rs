//! What programs cost a whole host on the compared kernels: gcc compiles, md5sum reads files. They
//! are those of the machine that measures, with their libraries, in an initrd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use umbra_testkit::cpio::Archive;
use umbra_tests::linux::kernel;

use super::cost::run;
use super::linux::{KERNELS, at_mark};
use crate::figure::Measured;

/// The part of a run.
pub(super) const PROGRAMS: &str = "Linux: programs";
/// A program that is compiled again and again.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/programs/init.c");
/// Files that are read, and bytes of each: 20 MB together.
const FILES: usize = 72;
const FILE_BYTES: usize = 280_000;
/// What the guest says before and after.
const POINTS: [&str; 2] = ["programs: begin", "programs: end"];
/// The guest's first program.
const INIT: &str = "#!/bin/sh -e
export PATH=/usr/bin:/bin
mount -t proc none /proc
echo programs: begin
i=0
while [ $i -lt 8 ]; do
    gcc -O1 -c /source.i -o /tmp/$i.o
    i=$((i + 1))
done
md5sum /data/* > /tmp/sums
echo programs: end
echo b > /proc/sysrq-trigger
";

/// Measures them.
pub(super) fn figures(program: &Path, tick: impl Fn(&str)) -> Result<Vec<Measured>> {
    let folder = TempDir::new().context("no temporary folder")?;
    let initrd = folder.path().join("initrd");
    write_initrd(&initrd).context("no initrd with gcc and md5sum")?;
    let initrd = format!("--initrd={}", initrd.display());
    let mut all = Vec::new();
    for (name, file, shadow) in KERNELS {
        tick(&format!("programs on Linux, {name}"));
        let shadow = format!("--shadow={shadow}");
        let marks = POINTS.map(|point| format!("--mark={point}"));
        let mut arguments = vec!["--memory=1G", &shadow, &initrd, "--cmdline=quiet kunit.enable=0"];
        arguments.extend(marks.iter().map(String::as_str));
        let cost = run(program, &kernel(file), &arguments)?;
        let [begin, end] = POINTS.map(|point| at_mark(&cost, point, "cpu_seconds"));
        all.push(Measured::new(PROGRAMS, name.into(), (end? - begin?) * 1e9));
    }
    Ok(all)
}

/// An initrd with the programs and what they need.
fn write_initrd(to: &Path) -> Result<()> {
    let file = fs::File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    let mut archive = Archive::new(std::io::BufWriter::new(file));
    for folder in ["dev", "proc", "tmp"] {
        archive.folder(folder)?;
    }
    archive.file("init", true, INIT.as_bytes())?;
    let gcc = |arguments: &[&str]| output(Command::new("gcc").args(arguments));
    archive.file("source.i", false, &gcc(&["-E", SOURCE])?)?;
    let mut compiler = Vec::new();
    for name in ["/bin/sh", "mount", "gcc", "cc1", "as", "md5sum"] {
        let own = String::from_utf8(gcc(&[&format!("-print-prog-name={name}")])?)?;
        let path = match own.trim() {
            path if path.starts_with('/') => PathBuf::from(path),
            _ => in_path(name).with_context(|| format!("there is no {name}"))?,
        };
        let contents = add(&mut archive, &path)?;
        if name == "cc1" {
            compiler = contents;
        }
        for library in libraries(&path)? {
            add(&mut archive, &library)?;
        }
    }
    ensure!(!compiler.is_empty(), "the compiler is empty");
    let mut data = compiler.iter().copied().cycle();
    for i in 0..FILES {
        let contents: Vec<u8> = data.by_ref().take(FILE_BYTES).collect();
        archive.file(&format!("data/{i}"), false, &contents)?;
    }
    Ok(archive.finish()?)
}

/// Adds a file under its own name. Returns its contents.
fn add<W: std::io::Write>(archive: &mut Archive<W>, path: &Path) -> Result<Vec<u8>> {
    let contents = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = path.to_str().context("a name is no UTF-8")?.trim_start_matches('/');
    archive.file(name, true, &contents)?;
    Ok(contents)
}

/// A program's file.
fn in_path(name: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    let mut files = std::env::split_paths(&folders).map(|folder| folder.join(name));
    files.find(|file| file.is_file())
}

/// The libraries that a program needs, and what loads them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let text = String::from_utf8(output(Command::new("ldd").arg(program))?)?;
    let paths = text.split_ascii_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?} ended with {}", output.status);
    Ok(output.stdout)
}
