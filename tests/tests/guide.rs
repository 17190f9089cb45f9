//! Follows `docs/your-kernel.md`: in a folder outside of the workspace this runs its commands and
//! applies its changes. The findings that it shows must be in the output of `umbra`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use tempfile::TempDir;
use umbra_tests::suite::{Need, Suite};

/// The guide promises fewer lines of change than this.
const LINES: usize = 50;
/// Seconds for all commands of a section.
const LIMIT: &str = "900";

/// The root of the workspace.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

/// A fenced block of the guide.
struct Block {
    kind: String,
    text: String,
}

/// The blocks of one section.
struct Section(Vec<Block>);

impl Section {
    /// Reads the guide's section of that title.
    fn new(title: &str) -> Self {
        let guide = fs::read_to_string(workspace().join("docs/your-kernel.md")).expect("the guide");
        let start =
            guide.find(&format!("\n## {title}\n")).unwrap_or_else(|| panic!("no section {title}"));
        let section = &guide[start + 1..];
        let section = section.find("\n## ").map_or(section, |end| &section[..end]);
        let mut blocks = Vec::new();
        let mut open: Option<Block> = None;
        for line in section.lines() {
            match (line.strip_prefix("```"), open.take()) {
                (Some(kind), None) => open = Some(Block { kind: kind.into(), text: String::new() }),
                (Some(_), Some(block)) => blocks.push(block),
                (None, Some(mut block)) => {
                    block.text.push_str(line);
                    block.text.push('\n');
                    open = Some(block);
                }
                (None, None) => {}
            }
        }
        Self(blocks)
    }

    fn of(&self, kind: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |block| block.kind == kind).map(|block| block.text.as_str())
    }

    /// Lines that its changes add and remove.
    fn lines_of_change(&self) -> usize {
        let changed = |line: &&str| {
            line.starts_with(['+', '-']) && !line.starts_with("+++ ") && !line.starts_with("--- ")
        };
        self.of("diff").flat_map(str::lines).filter(changed).count()
    }

    /// Its commands.
    fn commands(&self) -> impl Iterator<Item = &str> {
        self.of("console").flat_map(str::lines).filter_map(|line| line.strip_prefix("$ "))
    }
}

/// A folder with `umbra` in it, where a reader of the guide would be.
struct Workplace(TempDir);

impl Workplace {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        symlink(workspace(), folder.path().join("umbra")).expect("a link");
        Self(folder)
    }

    /// Runs a script there as a user would: with a plain environment, and `umbra` on the path.
    fn run(&self, script: &str) -> (Option<i32>, String) {
        let program = Path::new(env!("CARGO_BIN_EXE_umbra-under-test")).parent().expect("a folder");
        let programs = self.0.path().join("programs");
        if !programs.exists() {
            fs::create_dir(&programs).expect("a folder");
            symlink(program.join("umbra-under-test"), programs.join("umbra")).expect("a link");
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([programs].into_iter().chain(std::env::split_paths(&path)));
        let kept = ["HOME", "CARGO_HOME", "RUSTUP_HOME", "http_proxy", "https_proxy", "LANG"];
        let Output { status, stdout, stderr } = Command::new("timeout")
            .args([LIMIT, "sh", "-e", "-c", script])
            .current_dir(self.0.path())
            .env_clear()
            .envs(kept.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .env("PATH", path.expect("a path"))
            .output()
            .expect("a shell");
        let text =
            [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        (status.code(), text)
    }
}

/// Drops what differs between compilers and runs: addresses, offsets and sizes of functions, times.
fn plain(line: &str) -> String {
    let is_time = |word: &str| {
        let digits = word.strip_suffix("s:").unwrap_or_default().split_once('.');
        digits.is_some_and(|(seconds, micros)| {
            micros.len() == 6 && (seconds.to_owned() + micros).bytes().all(|b| b.is_ascii_digit())
        })
    };
    let hex = |word: &str| word.len() >= 16 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let words = line.split_inclusive([' ', '+', '/', '[', ',', ')']);
    words
        .map(|word| {
            let bare = word.trim_end_matches([' ', '+', '/', '[', ',', ')']);
            if hex(bare) || bare.starts_with("0x") || is_time(bare) {
                word.replacen(bare, "#", 1)
            } else {
                word.into()
            }
        })
        .collect()
}

/// Fails unless the lines of `shown` are in `output`, in this order.
#[track_caller]
fn shows(shown: &str, output: &str) {
    let mut lines = output.lines().map(plain);
    for line in shown.lines().map(plain) {
        assert!(
            lines.any(|other| other == line),
            "{line:?} is not there, or not behind the line before:\n{output}"
        );
    }
}

/// Follows a section. `changed` is what the test does differently from it.
fn done_as_it_says(title: &str, changed: fn(&str) -> String) {
    let section = Section::new(title);
    let place = Workplace::new();
    let mut script = String::new();
    for (i, block) in section.0.iter().enumerate() {
        match block.kind.as_str() {
            "console" => {
                let commands = block.text.lines().filter_map(|line| line.strip_prefix("$ "));
                commands.for_each(|command| script += &format!("{}\n", changed(command)));
            }
            "diff" => {
                let patch = place.0.path().join(format!("{i}.patch"));
                fs::write(&patch, &block.text).expect("a file");
                script += &format!("patch --batch --fuzz=0 -p1 < {}\n", patch.display());
            }
            _ => {}
        }
    }
    let (status, output) = place.run(&script);
    let shown = section.of("text").next().expect("the guide shows the finding");
    shows(shown, &output);
    assert_eq!(status, Some(1), "{output}");
    // The same kernel where the VMM writes the shadow, with KASAN's layout, and unchecked.
    let last = section.commands().last().expect("a command").to_owned();
    for (options, found) in
        [("--notify sync", true), ("--shadow full", true), ("--shadow off", false)]
    {
        let again = last.replacen("umbra run", &format!("umbra run {options}"), 1);
        let (status, output) = place.run(&format!("cd kernel\n{again}"));
        assert_eq!(status, Some(i32::from(found)), "{options}\n{output}");
        if found {
            shows(shown, &output);
        }
    }
}

/// The kernel in C before any change, as an ordinary kernel.
fn the_kernel_before() {
    let section = Section::new("A kernel in C");
    let commands: Vec<_> = section.commands().collect();
    let (status, output) = Workplace::new().run(&commands.join("\n"));
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("1 times") && output.contains("the guest ran unchecked"), "{output}");
}

fn the_changes_are_short() {
    let guide = fs::read_to_string(workspace().join("docs/your-kernel.md")).expect("the guide");
    let [rust, c] =
        ["A kernel in Rust", "A kernel in C"].map(|title| Section::new(title).lines_of_change());
    assert!(rust < LINES && c < LINES, "{rust} in Rust, {c} in C");
    let promise = format!("{rust} lines of change in Rust, {c} in C");
    assert!(guide.contains(&promise), "the guide does not say: {promise}");
}

/// The results of the guide's first part.
fn library() -> Need {
    let folder = workspace().join("target/guest");
    let missing = ["libumbra_rt.a", "umbra.h", "umbra.mk", "umbra.toml"]
        .iter()
        .find(|name| !folder.join(name).is_file());
    Need::unless(
        missing.map(|name| format!("{name} was not built: `cargo xtask guest --lib` does")),
    )
}

/// The programs that the commands need.
fn programs(names: &[&str]) -> Need {
    let there = |name: &&&str| {
        std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
        })
    };
    let missing = names.iter().find(|name| !there(name));
    Need::unless(missing.map(|name| format!("{name} is not installed")))
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let need = Need::kvm().and(&library()).and(&Need::machine());
    suite.add("rust", &need.and(&programs(&["cargo", "patch"])), || {
        done_as_it_says("A kernel in Rust", str::to_owned);
    });
    suite.add("c: gcc", &need.and(&programs(&["gcc", "make", "patch"])), || {
        done_as_it_says("A kernel in C", str::to_owned);
    });
    suite.add("c: clang", &need.and(&programs(&["clang", "make", "patch"])), || {
        done_as_it_says("A kernel in C", |command| command.replace("CC=gcc", "CC=clang"));
    });
    suite.add("c: before any change", &need.and(&programs(&["gcc", "make"])), the_kernel_before);
    suite.add("the changes are short", &Need::There, the_changes_are_short);
    suite.run()
}
