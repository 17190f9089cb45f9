//! All sources of this workspace skip by `umbra_skip`, whose lines are counted, and no test ends
//! early without a reason.

use std::fs;
use std::path::{Path, PathBuf};

/// Sources that may hold the word: the helper and its tests, and the reader of its lines.
const MAY: [&str; 2] = ["tests/skip", "xtask/src/summary"];

/// The faults of a source, by line. `may`: it may hold the word.
fn faults(text: &str, may: bool) -> Vec<(usize, &'static str)> {
    let mut faults = Vec::new();
    // The last line of the test around a line.
    let mut end = None;
    let mut after_attribute = false;
    for (line, number) in text.lines().zip(1..) {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        if code.starts_with("//") {
            continue;
        }
        if !may && code.contains("SKIPPED") {
            faults.push((number, "it is `umbra_skip` that says what is skipped"));
        }
        if end.is_some() && ["return;", "return }"].iter().any(|early| code.contains(early)) {
            faults.push((number, "a test that ends early says so: `umbra_skip::skip!`"));
        }
        if after_attribute && code.starts_with("fn ") {
            end = Some(format!("{indent}}}"));
        } else if end.as_deref() == Some(line) {
            end = None;
        }
        after_attribute = code == "#[test]" || after_attribute && code.starts_with("#[");
    }
    faults
}

/// The Rust sources below `folder`, without built ones.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("it is read").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

#[test]
fn there_is_one_way_to_skip() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (mut paths, mut said) = (Vec::new(), Vec::new());
    sources(&root, &mut paths);
    // All but this one, whose text is partly an example.
    let all = paths.len();
    paths.retain(|path| !path.ends_with(file!()));
    assert_eq!(paths.len(), all - 1, "{paths:?}");
    for path in paths {
        let shown = path.strip_prefix(&root).expect("below the root");
        let may = MAY.iter().any(|allowed| shown.to_string_lossy().starts_with(allowed));
        let text = fs::read_to_string(&path).expect("it is text");
        for (line, fault) in faults(&text, may) {
            said.push(format!("{}:{line}: {fault}", shown.display()));
        }
    }
    assert!(said.is_empty(), "\n{}", said.join("\n"));
}

/// An example: the first of two tests has another way to skip, and ends early.
const OTHER_WAYS: &str = "
// SKIPPED is but a word here.
fn not_a_test() {
    return;
}
#[test]
#[cfg(unix)]
fn boots() {
    let Ok(kvm) = Kvm::open() else { return };
    println!(\"SKIPPED: boots: no KVM\");
    if kvm {
        return;
    }
}
fn neither() {
    return;
}
    #[test]
    fn this_does() {
        umbra_skip::skip!(\"for a reason\");
    }
";

#[test]
fn other_ways_are_found() {
    let lines = |may| faults(OTHER_WAYS, may).into_iter().map(|(line, _)| line).collect::<Vec<_>>();
    assert_eq!(lines(false), [9, 10, 12]);
    assert_eq!(lines(true), [9, 12]);
}
