use std::fs;
use std::os::unix::fs::symlink;
use std::time::SystemTime;

use super::*;

fn place(path: &str, line: u32) -> Place {
    Place { path: path.to_owned(), file: None, line }
}

/// The number of the first line, how many there are, and the first one.
fn brief(shown: Shown) -> Option<(u32, usize, String, bool)> {
    match shown {
        Shown::Lines(e) => Some((e.first, e.lines.len(), e.lines[0].clone(), e.changed)),
        _ => None,
    }
}

fn numbered() -> String {
    (1..=20).map(|i| format!("line {i}\n")).collect()
}

#[test]
fn only_source_files_that_fit_are_shown() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let root = folder.path().canonicalize().expect("it is there");
    fs::create_dir(root.join("d.rs")).expect("a directory");
    fs::create_dir(root.join("build")).expect("a directory");
    for name in ["a.rs", "secret", "secret.txt"] {
        fs::write(root.join(name), numbered()).expect("a file");
    }
    fs::write(root.join("dos.c"), numbered().replace('\n', "\r\n")).expect("a file");
    fs::write(root.join("large.rs"), vec![b'\n'; 1 << 20]).expect("a file");
    fs::write(root.join("binary.c"), "a\0b\n").expect("a file");
    fs::write(root.join("empty.c"), "").expect("a file");
    fs::write(root.join("long.c"), "é".repeat(1000)).expect("a file");
    let mut files = SourceFiles::new(std::slice::from_ref(&root), Some(SystemTime::UNIX_EPOCH));
    let mut shown = |path: &str, line| brief(files.show(&place(path, line)));
    assert_eq!(shown("a.rs", 10), Some((7, 7, "line 7".into(), true)));
    assert_eq!(shown("dos.c", 10), Some((7, 7, "line 7".into(), true)));
    assert_eq!(shown("./a.rs", 1), Some((1, 4, "line 1".into(), true)));
    assert_eq!(shown("build/../a.rs", 20), Some((17, 4, "line 17".into(), true)));
    assert_eq!(shown("long.c", 1).map(|(_, _, line, _)| line.chars().count()), Some(LINE_MAX));
    let absolute = root.join("a.rs");
    assert_eq!(shown(absolute.to_str().expect("UTF-8"), 2).map(|e| e.0), Some(1));
    for (path, line) in [
        ("a.rs", 21),
        ("a.rs", 0),
        ("a.rs", u32::MAX),
        ("secret", 1),
        ("secret.txt", 1),
        ("large.rs", 1),
        ("binary.c", 1),
        ("empty.c", 1),
        ("d.rs", 1),
        ("none.rs", 1),
        ("../a.rs", 1),
        ("/dev/zero", 1),
        ("", 1),
    ] {
        assert_eq!(shown(path, line), None, "{path}:{line}");
    }
}

/// A secret beside the folder, and every way there that a name in the debug information may take.
#[test]
fn nothing_outside_of_the_folders_is_opened() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let top = folder.path().canonicalize().expect("it is there");
    let root = top.join("root");
    fs::create_dir_all(root.join("sub")).expect("a directory");
    let secret = top.join("secret.rs");
    fs::write(&secret, "secret\n").expect("a file");
    fs::write(root.join("good.rs"), "good\n").expect("a file");
    symlink(&secret, root.join("link.rs")).expect("a link");
    symlink("../../secret.rs", root.join("sub/link.rs")).expect("a link");
    symlink("good.rs", root.join("inside.rs")).expect("a link");
    symlink(&top, root.join("up")).expect("a link");
    symlink("/proc/self/cwd", root.join("cwd")).expect("a link");
    rustix::fs::mknodat(
        CWD,
        root.join("fifo.rs"),
        rustix::fs::FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .expect("a pipe");
    let mut files = SourceFiles::new(std::slice::from_ref(&root), None);
    let [root, top] = [&root, &top].map(|path| path.to_str().expect("UTF-8"));
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    assert!(own.exists(), "the next ones could be opened");
    for path in [
        secret.to_str().expect("UTF-8"),
        own.to_str().expect("UTF-8"),
        "/proc/self/cwd/src/lib.rs",
        "/proc/self/root/etc/passwd.rs",
        &format!("{root}/../secret.rs"),
        &format!("{root}/sub/../../secret.rs"),
        &format!("{root}/link.rs"),
        &format!("{root}/sub/link.rs"),
        &format!("{root}/up/secret.rs"),
        &format!("{root}/cwd/src/lib.rs"),
        &format!("{root}-other/secret.rs"),
        &format!("{root}/fifo.rs"),
        // Not even a link to a file inside.
        &format!("{root}/inside.rs"),
        &format!("/proc/self/root{root}/good.rs"),
        &format!("{top}/secret.rs"),
        "../secret.rs",
        "link.rs",
        "up/secret.rs",
        "cwd/src/lib.rs",
    ] {
        assert_eq!(files.show(&place(path, 1)), Shown::Outside, "{path}");
        let stripped = Place { file: Some(path.to_owned()), ..place("/nowhere/a.rs", 1) };
        assert_eq!(files.show(&stripped), Shown::Outside, "{path}");
    }
    let good = brief(files.show(&place(&format!("{root}/sub/../good.rs"), 1)));
    assert_eq!(good.map(|(_, _, line, _)| line).as_deref(), Some("good"));
    // Compiled elsewhere, in a folder whose contents are those of the root.
    let moved = Place { file: Some("good.rs".to_owned()), ..place("/build/good.rs", 1) };
    assert!(matches!(files.show(&moved), Shown::Lines(_)));
    let mut none = SourceFiles::new(&[], None);
    assert_eq!(none.show(&place("good.rs", 1)), Shown::Outside);
}

#[test]
fn excerpts_are_bounded() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let root = folder.path().canonicalize().expect("it is there");
    fs::write(root.join("a.c"), "x".repeat(150) + "\n").expect("a file");
    let (mut files, mut bytes) = (SourceFiles::new(&[root], None), 0);
    while let Shown::Lines(excerpt) = files.show(&place("a.c", 1)) {
        bytes += excerpt.lines[0].len();
    }
    assert!(bytes <= EXCERPTS_MAX && bytes > EXCERPTS_MAX - LINE_MAX);
    assert_eq!(files.show(&place("a.c", 1)), Shown::Exhausted);
    assert_eq!(files.files, 1, "it was read once");
}

#[test]
fn names_and_files_and_bytes_are_bounded() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let root = folder.path().canonicalize().expect("it is there");
    let new = || SourceFiles::new(std::slice::from_ref(&root), None);
    for i in 0..=FILES_MAX {
        fs::write(root.join(format!("{i}.c")), "x\n").expect("a file");
    }
    let mut files = new();
    for i in 0..FILES_MAX {
        assert!(matches!(files.show(&place(&format!("{i}.c"), 1)), Shown::Lines(_)), "{i}");
    }
    let last = place(&format!("{FILES_MAX}.c"), 1);
    assert_eq!(files.show(&last), Shown::Exhausted);
    let mut files = new();
    for i in 0..NAMES_MAX {
        assert_eq!(files.show(&place(&format!("none{i}.c"), 1)), Shown::Outside);
    }
    assert_eq!(files.show(&last), Shown::Exhausted);
    let large = vec![b'\n'; FILE_MAX as usize - 1];
    let many = READ_MAX / (FILE_MAX - 1) + 1;
    for i in 0..many {
        fs::write(root.join(format!("{i}.c")), &large).expect("a file");
    }
    let mut files = new();
    for i in 0..many {
        assert!(matches!(files.show(&place(&format!("{i}.c"), 9)), Shown::Lines(_)), "{i}");
    }
    assert_eq!(files.show(&last), Shown::Exhausted);
    assert!(files.bytes < READ_MAX + FILE_MAX);
}

#[test]
fn sources_are_those_of_the_git_tree() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let top = folder.path().canonicalize().expect("it is there");
    let deep = top.join("tree/a/b");
    fs::create_dir_all(&deep).expect("folders");
    // Temporary directories are in no tree, one hopes.
    let found = default_root(&deep).expect("it can be read");
    assert!(found == Some(deep.clone()) || found.is_some_and(|root| !root.starts_with(&top)));
    // A worktree has a file of this name.
    fs::write(top.join("tree/.git"), "gitdir: elsewhere\n").expect("a file");
    assert_eq!(default_root(&deep).expect("it can be read"), Some(top.join("tree")));
    assert_eq!(default_root(Path::new("/")).expect("it can be read"), None);
    assert!(default_root(&top.join("none")).is_err());
}
