//! The dependencies between the crates of the workspace. A new one needs a line in this table, so
//! that it is a decision.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Each crate of the workspace, and its dependencies in the workspace.
const LAYERS: &[(&str, &[&str])] = &[
    ("umbra-shadow", &[]),
    ("umbra-machine", &[]),
    ("umbra-provenance", &["umbra-shadow"]),
    ("umbra-report", &["umbra-shadow"]),
    ("umbra", &["umbra-machine", "umbra-provenance", "umbra-report", "umbra-shadow"]),
    ("umbra-runtime", &["umbra-shadow"]),
    ("umbra-guest", &["umbra-shadow"]),
    ("umbra-kernel", &["umbra-guest"]),
    ("umbra-kernel-memory", &["umbra-guest"]),
    ("umbra-skip", &[]),
    ("umbra-testkit", &[]),
    ("umbra-tests", &["umbra", "umbra-shadow", "umbra-skip", "umbra-testkit"]),
    (
        "umbra-benches",
        &["umbra", "umbra-runtime", "umbra-shadow", "umbra-skip", "umbra-testkit", "umbra-tests"],
    ),
    ("umbra-fuzz", &["umbra", "umbra-shadow", "umbra-testkit"]),
    ("xtask", &["umbra-skip", "umbra-testkit"]),
];

/// Libraries of others that only some crates may use.
const OUTSIDE: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["umbra-machine"]),
    ("kvm-bindings", &["umbra-fuzz", "umbra-machine"]),
    ("clap", &["umbra", "umbra-benches", "xtask"]),
];

/// The normal dependencies of each crate in the workspace, without those of its tests.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo, which has built this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON from cargo");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let normal = |package: &Value| {
        let all = package["dependencies"].as_array().expect("dependencies");
        all.iter().filter(|one| one["kind"].is_null()).map(name).collect()
    };
    packages.iter().map(|package| (name(package), normal(package))).collect()
}

#[test]
fn the_arrows_between_crates_are_these() {
    let arrows = arrows();
    let ours: BTreeSet<&str> = arrows.keys().map(String::as_str).collect();
    let listed: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(ours, listed, "each crate of the workspace has its line in LAYERS");
    for (name, allowed) in LAYERS {
        let used: BTreeSet<&str> =
            arrows[*name].iter().map(String::as_str).filter(|used| ours.contains(used)).collect();
        assert_eq!(used, allowed.iter().copied().collect(), "what {name} depends on");
    }
}

#[test]
fn kvm_and_the_command_line_have_their_places() {
    for (library, allowed) in OUTSIDE {
        let users = arrows();
        let users: BTreeSet<&str> = users
            .iter()
            .filter(|(_, used)| used.contains(*library))
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(users, allowed.iter().copied().collect(), "who depends on {library}");
    }
}
