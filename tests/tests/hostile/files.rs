//! Kernels whose files are made to harm: symbols and debug information that forge output, or that
//! are too long, too slow or too large to read.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use iced_x86::code_asm::*;
use umbra_shadow::abi::{Access, CallNumber, ExitReason, PORT};
use umbra_tests::program::{Run, Umbra, children};

use super::guest::{CODE, FREE, Guest};
use super::{PROGRAM, run_file};

pub const ALL: &[(&str, fn())] = &[
    ("a_name_that_forges_the_outcome", a_name_that_forges_the_outcome),
    ("a_path_of_a_megabyte", a_path_of_a_megabyte),
    ("lines_without_end", lines_without_end),
    ("a_worker_that_hangs", a_worker_that_hangs),
    ("paths_to_a_secret", paths_to_a_secret),
];

/// A title, a cleared screen, a line of the program's own, and text from right to left.
const FORGED: &str = "f\x1b]0;title\x07\x1b[2J\u{9b}2J\numbra: clean; no findings\u{202e}\u{200b}";

/// Each outcome that names a place in the code.
fn a_name_that_forges_the_outcome() {
    type Body = fn(&mut Guest) -> Result<(), IcedError>;
    let fault: Body = |g| g.call(CallNumber::Exit, [ExitReason::Fault.into(), 14, CODE + 1, 0]);
    let spin: Body = |g| {
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        g.asm.jmp(again)
    };
    let unknown: Body = |g| {
        // `getsec`, which no guest has.
        g.asm.db(&[0x0f, 0x37])
    };
    for (body, args) in [(fault, ""), (spin, "--timeout 300ms"), (unknown, ""), (Guest::halt, "")] {
        let kernel = Guest::new(body).builder().function(FORGED, CODE, 4096).build();
        let run = run_file(&kernel, args);
        let bad = run.stderr.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(bad, None, "{:?}", run.stderr);
        assert!(!run.stderr.contains(['\u{202e}', '\u{200b}']), "{}", run.tail());
        assert!(run.stderr.lines().all(|line| !line.starts_with("umbra: clean")), "{}", run.tail());
    }
    let kernel = Guest::new(fault).builder().function(FORGED, CODE, 4096).build();
    let run = run_file(&kernel, "");
    run.expect(3);
    let shown =
        r"in f\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}2J\u{a}umbra: clean; no findings\u{202e}\u{200b}+";
    assert!(run.stderr.contains(shown), "{}", run.stderr);
}

/// Bytes that the functions and lines of these kernels cover.
const COVERED: u64 = 1 << 20;

/// Sections of debug information with one file, whose first line is all code. `more` comes in front
/// of it in the table of lines.
fn debug_information(path: &[u8], more: &[u8]) -> [(&'static str, Vec<u8>); 3] {
    // A unit with a range and a table of lines (DWARF 4).
    let abbreviations = [1, 0x11, 0, 0x11, 1, 0x12, 7, 0x10, 0x17, 0, 0, 0].to_vec();
    let mut unit = vec![4, 0, 0, 0, 0, 0, 8, 1];
    unit.extend([CODE, COVERED].map(u64::to_le_bytes).concat());
    unit.extend([0; 4]);
    let mut header = vec![1, 1, 1, 0xfb, 14, 13, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0];
    header.extend([path, &[0, 0, 0, 0, 0]].concat());
    let set_address = |to: u64| [&[0, 9, 2][..], &to.to_le_bytes()].concat();
    let end_of_sequence = [0, 1, 1];
    let mut program = Vec::new();
    if !more.is_empty() {
        program.extend([&set_address(CODE + COVERED), more, &end_of_sequence].concat());
    }
    // A row, and on by 1 MiB.
    program.extend([&set_address(CODE), &[1, 2, 0x80, 0x80, 0x40][..], &end_of_sequence].concat());
    let mut table = vec![4, 0];
    table.extend((header.len() as u32).to_le_bytes());
    table.extend(header);
    table.extend(program);
    let section =
        |contents: Vec<u8>| [&(contents.len() as u32).to_le_bytes()[..], &contents].concat();
    [
        (".debug_abbrev", abbreviations),
        (".debug_info", section(unit)),
        (".debug_line", section(table)),
    ]
}

/// A kernel with this debug information.
fn with_lines(mut guest: Guest, path: &[u8], more: &[u8]) -> Vec<u8> {
    let sections = debug_information(path, more);
    let add = |elf: umbra_tests::elf::ElfBuilder, (name, contents)| elf.section(name, contents);
    sections.into_iter().fold(guest.builder(), add).build()
}

/// A guest that makes so many reports, each from another place in its code; then `end`.
fn reports(count: u32, end: fn(&mut Guest) -> Result<(), IcedError>) -> Guest {
    Guest::new(|g| {
        g.region()?;
        let mut again = g.asm.create_label();
        g.asm.mov(r8, CODE + 16)?;
        g.asm.mov(ebx, count)?;
        g.asm.set_label(&mut again)?;
        g.asm.mov(rdi, FREE)?;
        g.asm.mov(esi, 1)?;
        g.asm.mov(ecx, u64::from(Access::Write) as u32)?;
        g.asm.mov(edx, u32::from(PORT))?;
        g.asm.mov(eax, u32::from(CallNumber::Report))?;
        g.asm.out(dx, eax)?;
        g.asm.add(r8, 16)?;
        g.asm.dec(ebx)?;
        g.asm.jnz(again)?;
        end(g)
    })
}

/// Each frame would have it.
fn a_path_of_a_megabyte() {
    const FINDINGS: u32 = 200;
    let path = [&[b'a'; 1 << 20][..], b".c"].concat();
    let run = run_file(&with_lines(reports(FINDINGS, Guest::done), &path, &[]), "--keep-going");
    run.expect(1);
    assert_eq!(run.findings.len(), FINDINGS as usize);
    assert!(run.stderr.len() < FINDINGS as usize * 2048, "{} bytes", run.stderr.len());
    let file = run.findings[0]["frames"][0]["file"].as_str().expect("a file");
    assert!(file.len() <= 256 && file.contains('…') && file.ends_with(".c"), "{file}");
    assert!(run.stderr.contains(&format!("    at {file}:1\n")), "{}", run.tail());
}

/// Rows of lines that do not fit into the memory of whoever reads them, or take too long. The
/// finding has its name nevertheless.
fn lines_without_end() {
    let elf = with_lines(reports(1, Guest::done), b"a.c", &vec![0x20; 40 << 20]);
    let run = Umbra::new(PROGRAM, "run").file(&elf).collect().run();
    run.assert_no_panic();
    run.expect(1);
    assert_eq!(run.findings.len(), 1);
    let notes = run.findings[0]["notes"].to_string();
    assert!(notes.contains("died") || notes.contains("takes too long"), "{notes}");
    assert!(run.figure("/host/rss_peak_bytes") < 512 << 20, "none of it is here");
}

/// Whoever reads the symbols does not answer any more: the run ends as it should.
fn a_worker_that_hangs() {
    let spin = |g: &mut Guest| {
        let mut again = g.asm.create_label();
        g.asm.set_label(&mut again)?;
        g.asm.jmp(again)
    };
    let elf = with_lines(reports(u32::MAX, spin), b"a.c", &[]);
    for signal in [None, Some(libc::SIGINT)] {
        let umbra = Umbra::new(PROGRAM, "run").file(&elf).args("--keep-going").collect();
        let timeout = if signal.is_some() { "--timeout 60s" } else { "--timeout 3s" };
        let mut started = umbra.args(timeout).start();
        started.wait_for("stderr", "BUG: KASAN");
        let workers = children(started.pid());
        assert_eq!(workers.len(), 1, "one reads the symbols");
        for worker in workers {
            // SAFETY: a process that this test has started.
            unsafe { libc::kill(worker, libc::SIGSTOP) };
        }
        if let Some(signal) = signal {
            started.signal(signal);
        }
        let run: Run = started.wait();
        run.expect(if signal.is_some() { 130 } else { 4 });
        assert!(!run.findings.is_empty());
        // In good order: with its figures, and the summary at the end.
        let outcome = if signal.is_some() { "interrupted" } else { "time-limit" };
        assert_eq!(run.outcome(), outcome);
        let last = run.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("umbra: ") && last.contains(" findings; "), "{last}");
    }
}

/// Files of the host that a page must not show, and that one it may.
fn paths_to_a_secret() {
    let folder = tempfile::tempdir().expect("a folder");
    let top = folder.path().canonicalize().expect("it is there");
    let root = top.join("root");
    fs::create_dir_all(root.join(".git")).expect("a folder");
    let secret = top.join("secret.c");
    fs::write(&secret, "the secret line\n").expect("a file");
    symlink(&secret, root.join("link.c")).expect("a link");
    fs::write(root.join("good.c"), "the good line\n").expect("a file");
    let page = top.join("page.html");
    let shown = |path: &Path, args: &[&Path]| {
        let path = path.to_str().expect("UTF-8").as_bytes();
        let elf = with_lines(reports(1, Guest::done), path, &[]);
        let mut umbra = Umbra::new(PROGRAM, "run").file(&elf).arg("--html").arg(&page);
        umbra.command().current_dir(&root);
        let roots = |umbra: Umbra, root: &&Path| umbra.arg("--source-root").arg(root);
        args.iter().fold(umbra, roots).run().expect(1);
        fs::read_to_string(&page).expect("a page")
    };
    for path in [
        secret.clone(),
        root.join("link.c"),
        root.join("../secret.c"),
        "/proc/self/cwd/link.c".into(),
        "/proc/self/cwd/good.c".into(),
        "link.c".into(),
        "../secret.c".into(),
    ] {
        let page = shown(&path, &[]);
        let shows = ["the secret line", "the good line"].map(|line| page.contains(line));
        assert_eq!(shows, [false, false], "{}", path.display());
        assert!(page.contains("--source-root"), "{}", path.display());
    }
    for path in [root.join("good.c"), "good.c".into(), root.join("none/../good.c")] {
        assert!(shown(&path, &[]).contains("the good line"), "{}", path.display());
    }
    // Where the user names its folder, it is no secret.
    assert!(shown(&secret, &[&root, &top]).contains("the secret line"));
    assert!(!shown(&root.join("good.c"), &[&root.join(".git")]).contains("the good line"));
    let none = Umbra::new(PROGRAM, "run").file(b"").args("--html /dev/null --source-root none");
    none.run().expect_refusal(&["--source-root none", "No such file"]);
}
