//! Runs the tests on both kinds of host: this machine, and the nested host with SVM.
//!
//! The two run side by side. Each has counts of its own, and the names of the nested host's tests
//! begin with `svm::`. What runs on which host is said to the tests by [`umbra_skip::HOST`]; the
//! tests themselves know what they need.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::demo;
use crate::nested::{self, Ended, Host, Job};
use crate::summary::Summary;

/// What names of tests on the nested host begin with.
const PREFIX: &str = "svm::";
/// Packages whose tests boot guests.
const WITH_GUESTS: [&str; 4] = ["umbra", "umbra-machine", "umbra-tests", "umbra-benches"];
/// Unit tests that stay on the machine: completed instructions are compared with what its CPU does,
/// and QEMU's is wrong in some.
const COMPLETION: [&str; 2] = ["complete::", "completion::"];
/// The nested host's memory. Some tests give a guest a few GiB and use little of them.
const MEMORY_MIB: u32 = 6144;
/// All tests in the nested host together take minutes.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Which tests to run.
pub struct Selection {
    /// Only those whose names contain this.
    pub name: Option<String>,
    /// Those too that take very long.
    pub all: bool,
}

/// Counts of a host.
pub struct Count {
    /// `machine` or `svm`.
    pub host: &'static str,
    /// What came of its tests.
    pub summary: Summary,
}

/// A test program that cargo built.
struct Binary {
    name: String,
    package: PathBuf,
    executable: PathBuf,
    /// It holds unit tests.
    is_libtest: bool,
}

/// Runs the tests on both hosts. Of a name that begins with the nested host's prefix, only there.
pub fn run(context: &Context, selection: &Selection) -> Result<Vec<Count>> {
    let named = selection.name.as_deref();
    let only_nested = named.and_then(|name| name.strip_prefix(PREFIX));
    let binaries = build(context)?;
    let has_kvm = match demo::kvm_problem() {
        None => true,
        Some(problem) => {
            let where_then = "tests that boot guests run in the nested host only";
            context.progress.say(&format!("{where_then}: {problem}"));
            false
        }
    };
    let host = Host::prepare(context);
    if let Err(error) = &host {
        context.progress.say(&umbra_skip::line("the nested host", format_args!("{error:#}")));
    }
    context.progress.step("running the tests, on this machine and in the nested host");
    context.progress.finish();
    let filter = only_nested.or(named);
    Ok(std::thread::scope(|scope| {
        let nested = host.ok().map(|host| {
            let role = if has_kvm { Role::Nested } else { Role::NestedAlone };
            let script = script(&binaries, filter, role, selection.all);
            scope.spawn(move || in_nested_host(context, &host, script))
        });
        let with_nested = nested.is_some();
        let mut counts = Vec::new();
        if only_nested.is_none() {
            let role = match (has_kvm, with_nested) {
                (_, false) => Role::Alone,
                (true, true) => Role::Machine,
                (false, true) => Role::WithoutKvm,
            };
            let summary = here(context, filter, role, selection.all);
            counts.push(Count { host: "machine", summary });
        }
        let summary = match nested.map(std::thread::ScopedJoinHandle::join) {
            Some(Ok(summary)) => summary,
            // Its output says why.
            Some(Err(_)) => Summary::of(0, 1, 0),
            None => Summary::of(0, 0, 1),
        };
        counts.push(Count { host: "svm", summary });
        counts
    }))
}

/// Builds all tests and returns their programs.
fn build(context: &Context) -> Result<Vec<Binary>> {
    context.progress.step("building the tests");
    let mut command = context.cargo();
    command.args(["test", "--workspace", "--release", "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    let output = command.run_or_fail(&context.progress)?;
    let messages = output.lines().filter(|line| line.starts_with('{'));
    Ok(messages.filter_map(|line| binary(&serde_json::from_str(line).ok()?)).collect())
}

/// The test program in a message of cargo's, if there is one that boots guests.
fn binary(message: &serde_json::Value) -> Option<Binary> {
    let text = |pointer: &str| message.pointer(pointer)?.as_str().map(str::to_owned);
    let is_test = message.pointer("/profile/test")?.as_bool()?;
    let executable = PathBuf::from(text("/executable")?);
    let package = PathBuf::from(text("/manifest_path")?).parent()?.to_owned();
    let kinds = message.pointer("/target/kind")?.as_array()?;
    let is_bench = kinds.iter().any(|kind| kind == "bench");
    let is_harness = message.pointer("/target/test")?.as_bool()?;
    // `path+file:///folder#name@version`, or without the name where the folder has it.
    let id = text("/package_id")?;
    let is_package =
        |name: &&str| id.contains(&format!("#{name}@")) || id.contains(&format!("/{name}#"));
    let boots_guests = WITH_GUESTS.iter().any(is_package);
    (is_test && is_harness && !is_bench && boots_guests).then_some(Binary {
        name: text("/target/name")?,
        package,
        executable,
        is_libtest: kinds.iter().any(|kind| kind == "lib"),
    })
}

/// On this machine, with documentation tests. Without KVM, only what boots no guest.
fn here(context: &Context, filter: Option<&str>, role: Role, all: bool) -> Summary {
    let mut summary = Summary::default();
    let mut success = true;
    for arguments in cargo_arguments(role) {
        let mut command = context.cargo();
        command.args(["test", "--release", "--no-fail-fast"]).args(arguments);
        // What passing tests print is needed for the reasons of those that skip themselves.
        command.args(["--", "--show-output"]).args(filter);
        for (name, value) in variables(role, all) {
            command.env(name, value);
        }
        let finished = command.stream(|line| {
            if summary.line(line) {
                println!("{line}");
            }
        });
        match finished {
            Ok(finished) => success &= finished.success,
            Err(error) => {
                eprintln!("error: {error:#}");
                success = false;
            }
        }
    }
    summary.end(success);
    summary
}

/// What cargo is told for the tests on this machine, for each call of it.
fn cargo_arguments(role: Role) -> Vec<Vec<&'static str>> {
    if role != Role::WithoutKvm {
        return vec![vec!["--workspace"]];
    }
    let mut others = vec!["--workspace"];
    others.extend(WITH_GUESTS.iter().flat_map(|name| ["--exclude", *name]));
    // Its filter is a second one: libtest runs what matches any.
    vec![others, vec!["--package", "umbra-machine", "--lib", COMPLETION[0]]]
}

/// What part of the tests a host runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// All that it can: there is no other.
    Alone,
    /// This machine, beside the nested host.
    Machine,
    /// This machine, beside the nested host, which alone has KVM.
    WithoutKvm,
    /// The nested host, beside this machine.
    Nested,
    /// The nested host, which alone has KVM.
    NestedAlone,
}

/// Variables for the tests. With `all` no host leaves anything to the other.
fn variables(role: Role, all: bool) -> Vec<(&'static str, &'static str)> {
    let mut variables = Vec::new();
    match role {
        Role::Machine if !all => variables.push((umbra_skip::HOST, "machine")),
        Role::Nested if !all => variables.push((umbra_skip::HOST, "svm")),
        Role::NestedAlone if !all => variables.push((umbra_skip::HOST, "svm-alone")),
        _ => {}
    }
    if all {
        variables.push(("UMBRA_LONG_TESTS", "1"));
    }
    variables
}

/// A script that runs test programs one after the other, and ends with 1 if one of them fails.
fn script(binaries: &[Binary], filter: Option<&str>, role: Role, all: bool) -> Vec<u8> {
    let mut script = String::from("failed=0\nexport TMPDIR=/tmp\n");
    for (name, value) in variables(role, all) {
        let _ = writeln!(script, "export {name}={value}");
    }
    // Cargo names a program again if it was built before.
    let mut seen = BTreeSet::new();
    for binary in binaries.iter().filter(|binary| seen.insert(&binary.executable)) {
        let word = |text: &std::ffi::OsStr| nested::quoted(text);
        let program = word(binary.executable.as_os_str());
        let _ = writeln!(script, "echo '     Running {PREFIX}{}'", binary.name);
        let _ = write!(script, "cd {} && ", word(binary.package.as_os_str()));
        let _ = write!(script, "{program} --show-output --test-threads=1");
        if let Some(filter) = filter {
            let _ = write!(script, " {}", word(filter.as_ref()));
        }
        if binary.is_libtest {
            let _ = write!(script, " --skip {}", COMPLETION.join(" --skip "));
        }
        let _ = writeln!(script, " 2>&1 || failed=1");
    }
    script.push_str("exit $failed\n");
    nested::with_this_environment(script.as_bytes())
}

/// In the nested host.
fn in_nested_host(context: &Context, host: &Host, script: Vec<u8>) -> Summary {
    let mut summary = Summary::default();
    let mut on_line = |line: &str| {
        if summary.line(line) {
            let mut out = std::io::stdout().lock();
            // Who does not read it does not want it; the counts at the end are written, too.
            let _ = writeln!(out, "{}", with_prefix(line));
        }
    };
    let job = Job { script, icount: false, memory_mib: MEMORY_MIB, timeout: TIMEOUT };
    let ended = host.run(&job, &context.progress, nested::Output::Lines(&mut on_line));
    let success = match ended.context("the nested host does not start") {
        Ok(Ended::Exit(status)) => status == 0,
        Ok(Ended::Trouble(reason)) => {
            eprintln!("error: {reason}");
            false
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            false
        }
    };
    summary.end(success);
    summary
}

/// A line of a harness with the host in the test's name.
fn with_prefix(line: &str) -> String {
    if let Some(said) = umbra_skip::said(line) {
        return line.replacen(said, &format!("{PREFIX}{said}"), 1);
    }
    for start in ["test ", "---- "] {
        if let Some(rest) = line.strip_prefix(start).filter(|rest| !rest.starts_with("result:")) {
            return format!("{start}{PREFIX}{rest}");
        }
    }
    line.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_where_a_test_runs() {
        assert_eq!(with_prefix("test a::b ... ok"), "test svm::a::b ... ok");
        assert_eq!(with_prefix("---- a stdout ----"), "---- svm::a stdout ----");
        let skipped = umbra_skip::line("a", "no such CPU");
        assert_eq!(with_prefix(&skipped), umbra_skip::line("svm::a", "no such CPU"));
        assert_eq!(with_prefix("test result: ok. 1 passed"), "test result: ok. 1 passed");
    }

    #[test]
    fn test_programs_are_found_in_what_cargo_says() {
        let message = |id: &str, kind: &str| {
            serde_json::json!({
                "reason": "compiler-artifact", "package_id": id,
                "manifest_path": "/u/tests/Cargo.toml",
                "target": {"name": "cli", "kind": [kind], "test": true}, "profile": {"test": true},
                "executable": "/u/target/release/deps/cli-1"
            })
        };
        let found = binary(&message("path+file:///u/tests#umbra-tests@0.1.0", "test")).unwrap();
        assert_eq!((found.name.as_str(), found.package.to_str()), ("cli", Some("/u/tests")));
        assert!(binary(&message("path+file:///u/xtask#0.1.0", "bin")).is_none());
        assert!(binary(&message("path+file:///u/shadow#umbra-shadow@0.1.0", "lib")).is_none());
        assert!(binary(&message("path+file:///u/benches#umbra-benches@0.1.0", "bench")).is_none());
        assert!(
            !binary(&message("path+file:///u/tests#umbra-tests@0.1.0", "test")).unwrap().is_libtest
        );
        assert!(binary(&serde_json::json!({"reason": "build-finished"})).is_none());
    }

    #[test]
    fn the_script_fails_if_a_program_does() {
        let binaries = ["true", "false", "true"].map(|name| Binary {
            name: name.into(),
            package: "/".into(),
            executable: format!("/bin/{name}").into(),
            is_libtest: true,
        });
        let run = |binaries: &[Binary]| {
            let script =
                String::from_utf8(script(binaries, Some("it's"), Role::Nested, false)).unwrap();
            let output = std::process::Command::new("/bin/sh").args(["-c", &script]).output();
            output.unwrap().status.code()
        };
        assert_eq!(run(&binaries), Some(1));
        assert_eq!(run(&binaries[..1]), Some(0));
    }
}
