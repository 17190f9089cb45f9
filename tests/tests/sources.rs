//! No line of a source, a configuration or a document is wider than 100 columns.

use std::fs;
use std::path::{Path, PathBuf};

const COLUMNS: usize = 100;

/// Generated files, data, and patches of others' sources.
const EXEMPT: [&str; 9] = [
    "Cargo.lock",
    "BENCHMARKS.md",
    "benches/results/",
    "fuzz/seeds/",
    "guest/linux/patches/",
    "proptest-regressions/",
    ".json",
    ".svg",
    ".zst",
];

/// Files and folders that are no sources.
fn is_left_out(path: &str, name: &str) -> bool {
    name == "target" || name == ".git" || EXEMPT.iter().any(|part| path.contains(part))
}

/// The files below `folder`, with their paths from there.
fn files(folder: &Path, below: &str, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        let folder = if path.is_dir() { "/" } else { "" };
        let shown = format!("{below}{name}{folder}");
        if is_left_out(&shown, &name) {
            continue;
        }
        if path.is_dir() {
            files(&path, &shown, found);
        } else {
            found.push((shown, path));
        }
    }
}

/// The width of a line, with tab stops of 8 columns.
fn width(line: &str) -> usize {
    line.chars().fold(0, |at, c| if c == '\t' { (at / 8 + 1) * 8 } else { at + 1 })
}

/// Whether a line cannot be broken: a row of a table, or a link alone.
fn is_whole(line: &str) -> bool {
    let text = line.trim_start_matches([' ', '/', '!', '-', '*']);
    let link = text.contains("://") || text.starts_with('[') && text.ends_with(')');
    text.starts_with('|') || link && !text.contains(' ')
}

/// The numbers of the lines in the text of file `name` that are too wide.
fn too_wide(name: &str, text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    // Whether the line is in a block of a document that shows the output of a program.
    let mut output = false;
    for (line, number) in text.lines().zip(1..) {
        if name.ends_with(".md")
            && let Some(language) = line.trim_start().strip_prefix("```")
        {
            output = ["console", "text"].contains(&language);
        }
        let value = name.ends_with(".config") && !line.starts_with("# ");
        if width(line) > COLUMNS && !output && !value && !is_whole(line) {
            found.push(number);
        }
    }
    found
}

#[test]
fn lines_fit_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (mut all, mut wide) = (Vec::new(), Vec::new());
    files(&root, "", &mut all);
    assert!(all.iter().any(|(name, _)| name == "Cargo.toml"), "{all:?}");
    for (name, path) in all {
        // Pictures are no text.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        wide.extend(too_wide(&name, &text).iter().map(|line| format!("{name}:{line}")));
    }
    wide.sort();
    assert!(wide.is_empty(), "wider than {COLUMNS} columns:\n{}", wide.join("\n"));
}

#[test]
fn wide_lines_are_found() {
    let fits = "é".repeat(COLUMNS);
    let wide = format!("{fits}x");
    assert_eq!(too_wide("a.rs", &format!("{fits}\n{wide}\n")), [2]);
    assert_eq!(too_wide("a.c", &format!("\t{}\n\t{}", &fits[..184], &fits[..186])), [2]);
    assert_eq!(too_wide("a.md", &format!("| {wide} |\n```text\n{wide}\n```\n{wide}")), [5]);
    assert_eq!(too_wide("a.md", &format!("```diff\n+{wide}\n```")), [2]);
    assert_eq!(too_wide("a.md", &format!("- https://example.org/{wide}\nhttp://x {wide}")), [2]);
    assert_eq!(too_wide("a.config", &format!("CONFIG_CMDLINE=\"{wide}\"\n# {wide}")), [2]);
}
