//! What `--findings` and `--sarif` write: the schema, fingerprints, and the script of docs/ci.md
//! that compares them with a baseline.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use umbra_tests::program::{Run, Umbra};
use umbra_tests::schema;
use umbra_tests::suite::{Need, has_program};

use super::{good, scenarios, umbra};

/// A file in `docs`.
fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    fs::read_to_string(path).expect("the document")
}

/// Findings with all optional parts: variables, stack frames, earlier objects, queued work.
const ALL_PARTS: &str = "kmalloc_uaf,kasan_global_oob_right,kmem_cache_double_free,\
                         kasan_stack_oob,stale_pointer_to_reused,queued_work_uaf,null_pointer";

pub fn findings_match_their_schema() {
    let schema: Value = serde_json::from_str(&document("findings.schema.json")).expect("JSON");
    let run = scenarios(ALL_PARTS).arg("--keep-going").collect().run();
    run.expect(1);
    assert_eq!(run.findings.len(), 7);
    for finding in &run.findings {
        schema::check(&schema, finding).unwrap_or_else(|error| panic!("{error}"));
    }
    for part in ["variable", "stack_frame", "previous", "related_work", "freed", "object"] {
        let has_it = |finding: &Value| finding.get(part).is_some_and(|part| !part.is_null());
        assert!(run.findings.iter().any(has_it), "no {part}");
    }
}

/// The hash as the schema describes it.
fn fingerprint(finding: &Value) -> String {
    let identity = &finding["identity"];
    let functions = identity["functions"].as_array().expect("functions");
    let mut texts = vec![&finding["kind"], &finding["access"], &identity["origin"]];
    texts.extend(functions);
    let text: String =
        texts.iter().map(|text| text.as_str().unwrap_or_default().to_owned() + "\n").collect();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn fingerprints(run: &Run) -> BTreeSet<&str> {
    run.findings.iter().map(|f| f["fingerprint"].as_str().expect("a fingerprint")).collect()
}

/// The same bugs in another run have the same fingerprints, wherever their memory lies.
pub fn fingerprints_stay_the_same() {
    let run = |options: &str| {
        let run = scenarios(ALL_PARTS).args("--keep-going").args(options).collect().run();
        run.expect(1);
        run
    };
    let (one, other) = (run(""), run("--memory 64M --quarantine 128K --shadow full"));
    assert_eq!((fingerprints(&one), fingerprints(&one).len()), (fingerprints(&other), 7));
    for finding in &one.findings {
        assert_eq!(finding["fingerprint"], fingerprint(finding), "{finding}");
        let name = finding["task"]["name"].as_str().expect("a name");
        let functions = finding["identity"]["functions"].to_string();
        assert!(functions.contains(name), "no {name} in {functions}");
        let (title, kind) = (&finding["title"], finding["kind"].as_str().expect("a kind"));
        assert!(title.as_str().is_some_and(|title| title.starts_with(kind)), "{title}");
    }
}

pub fn a_log_of_each_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("umbra.sarif");
    let log = |umbra: Umbra, status: i32| {
        umbra.arg("--sarif").arg(&path).run().expect(status);
        let text = fs::read_to_string(&path).expect("a log");
        let log: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(log["version"], "2.1.0");
        let mut runs = log["runs"].as_array().expect("runs").clone();
        assert_eq!((runs.len(), &runs[0]["invocations"][0]["exitCode"]), (1, &status.into()));
        runs.remove(0)
    };
    let clean = log(scenarios("exact_fit"), 0);
    assert_eq!(clean["results"], Value::Array(Vec::new()));
    assert_eq!(log(umbra().file(&good()), 0)["results"], Value::Array(Vec::new()));
    let found = log(scenarios("kmalloc_uaf,kmalloc_uaf").arg("--keep-going"), 1);
    let [result] = &found["results"].as_array().expect("results")[..] else { panic!("{found}") };
    let place = |location: &Value| {
        let physical = &location["physicalLocation"];
        let line = physical["region"]["startLine"].as_u64();
        (physical["artifactLocation"]["uri"].as_str().map(str::to_owned), line > Some(1))
    };
    // The function that reads for the scenarios is inlined into them.
    let file = Some("guest/kernel/src/scenarios/mod.rs".to_owned());
    assert_eq!(place(&result["locations"][0]), (file, true), "{result}");
    assert_eq!(
        (&result["ruleId"], &result["occurrenceCount"]),
        (&"slab-use-after-free".into(), &2.into())
    );
    assert_eq!(result["relatedLocations"].as_array().map(Vec::len), Some(2), "{result}");
    let rules = &found["tool"]["driver"]["rules"];
    assert_eq!(rules[0]["id"], "slab-use-after-free");
}

/// Two outputs into one file would leave one of them.
pub fn one_file_for_two_outputs() {
    for (first, second) in [("--html", "--sarif"), ("--findings", "--stats")] {
        let umbra = umbra().file(&good());
        let path = umbra.path("same");
        let run = umbra.arg(first).arg(&path).arg(second).arg(&path).run();
        run.expect_refusal(&[first, second, "the same file"]);
    }
}

/// The programs that the script needs.
pub fn jq() -> Need {
    Need::unless((!has_program("jq")).then(|| "jq is not installed".into()))
}

/// The shell block of docs/ci.md that contains `text`.
fn block(text: &str) -> String {
    let document = document("ci.md");
    let mut blocks = document.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.find(|block| block.contains(text)).expect("a block").to_owned()
}

/// The script lets known bugs pass, and fails on others.
pub fn the_script_finds_new_bugs() {
    let folder = tempfile::tempdir().expect("a folder");
    let findings = folder.path().join("findings.jsonl");
    let run = |names: &str| {
        let umbra = scenarios(names).args("--keep-going --findings").arg(&findings);
        umbra.run().expect(1);
    };
    let shell = |script: &str| {
        let output = Command::new("sh")
            .args(["-c", script, "new-findings.sh", "findings.jsonl", "umbra-baseline.txt"])
            .current_dir(&folder)
            .output()
            .expect("a shell");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let new = block("new-findings.sh FINDINGS BASELINE");
    run("kmalloc_uaf,kasan_stack_oob");
    assert_eq!(shell(&new).0, Some(2), "there is no baseline");
    fs::write(folder.path().join("umbra-baseline.txt"), "").expect("a file");
    let (status, text) = shell(&new);
    assert_eq!((status, text.lines().count()), (Some(1), 3), "{text}");
    assert_eq!(shell(&block("> umbra-baseline.txt")), (Some(0), String::new()));
    assert_eq!(shell(&new), (Some(0), String::new()), "all are known");
    run("kmalloc_uaf,kmalloc_oob_left");
    let (status, text) = shell(&new);
    assert_eq!((status, text.lines().count()), (Some(1), 2), "{text}");
    assert!(text.contains("slab-out-of-bounds read in ") && text.contains("kmalloc_oob_left"));
    fs::write(&findings, "").expect("a file");
    assert_eq!(shell(&new), (Some(0), String::new()), "a clean run");
}
