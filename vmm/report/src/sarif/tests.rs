use serde_json::Value;

use super::super::finding::tests::finding;
use super::super::html::tests::run;
use super::super::{Findings, Picture};
use super::*;

const ROOT: &str = "/home/me/project";

fn log(findings: &Findings) -> Value {
    let picture = Picture::default();
    let run = run("stopped", findings, &picture);
    let log = Log { kernel: "target/kernel.elf", root: Some(ROOT.as_ref()), run: &run };
    let mut out = Vec::new();
    write(&mut out, &log).expect("a Vec takes everything");
    // It is what the standard's schema describes.
    serde_json::from_slice::<Sarif>(&out).expect("a SARIF log");
    serde_json::from_slice(&out).expect("JSON")
}

fn one(finding: Finding) -> Value {
    let mut findings = Findings::default();
    findings.add(finding);
    log(&findings)["runs"][0]["results"][0].take()
}

#[test]
fn a_run_without_findings_has_a_log() {
    let log = log(&Findings::default());
    assert_eq!((&log["version"], &log["$schema"]), (&"2.1.0".into(), &SCHEMA_URL.into()));
    let run = &log["runs"][0];
    assert_eq!(run["tool"]["driver"]["name"], "Umbra");
    assert_eq!(run["results"], Value::Array(Vec::new()), "not left out: it was looked for");
    assert_eq!(run["invocations"][0]["executionSuccessful"], true);
    assert_eq!(run["invocations"][0]["exitCode"], 0);
}

#[test]
fn a_finding_is_a_result_of_its_rule() {
    let mut findings = Findings::default();
    findings.add(finding());
    findings.add(finding());
    findings.add(Finding { kind: "use-after-free", ..finding() });
    findings.add(Finding { access: AccessKind::Read, ..finding() });
    let log = log(&findings);
    let run = &log["runs"][0];
    let rules = run["tool"]["driver"]["rules"].as_array().expect("rules");
    let ids: Vec<_> = rules.iter().map(|rule| rule["id"].as_str().expect("an id")).collect();
    assert_eq!(ids, ["slab-out-of-bounds", "use-after-free"]);
    let results = run["results"].as_array().expect("results");
    let rules: Vec<_> = results.iter().map(|r| (r["ruleIndex"].as_u64(), &r["ruleId"])).collect();
    assert_eq!(
        rules,
        [(Some(0), &ids[0].into()), (Some(1), &ids[1].into()), (Some(0), &ids[0].into())]
    );
    let result = &results[0];
    assert_eq!((&result["level"], &result["occurrenceCount"]), (&"error".into(), &2.into()));
    assert_eq!(
        result["message"]["text"],
        "slab-out-of-bounds Write in kernel::kmalloc_oob_right. Write of size 1. It is 0 bytes to \
         the right of an object of 115 bytes. It was [allocated](1) in thread_main."
    );
    let fingerprint = finding().fingerprint().to_string();
    assert_eq!(result["partialFingerprints"]["umbraFinding/v1"], fingerprint);
    assert_eq!(
        result["partialFingerprints"]["primaryLocationLineHash"],
        format!("{fingerprint}:1")
    );
    let location = &result["locations"][0];
    assert_eq!(
        location["physicalLocation"]["artifactLocation"]["uri"], "kernel/src/oob.rs",
        "{location}"
    );
    assert_eq!(location["physicalLocation"]["artifactLocation"]["uriBaseId"], "%SRCROOT%");
    assert_eq!(location["physicalLocation"]["region"]["startLine"], 21);
    assert_eq!(location["logicalLocations"][0]["fullyQualifiedName"], "kernel::kmalloc_oob_right");
    let related = &result["relatedLocations"][0];
    assert_eq!(
        (&related["id"], related["physicalLocation"]["region"]["startLine"].as_u64()),
        (&1.into(), Some(7))
    );
}

/// The place of the access in [`finding`], whose function is in this file.
fn place(path: Option<&str>, file: Option<&str>) -> (String, Value, u64) {
    let mut one_finding = finding();
    let culprit = &mut one_finding.frames[1];
    (culprit.path, culprit.file) = (path.map(Into::into), file.map(Into::into));
    one_finding.frames[2].file = None;
    let result = one(one_finding);
    let physical = &result["locations"][0]["physicalLocation"];
    (
        physical["artifactLocation"]["uri"].as_str().expect("always there").to_owned(),
        physical["artifactLocation"]["uriBaseId"].clone(),
        physical["region"]["startLine"].as_u64().expect("always there"),
    )
}

#[test]
fn paths_are_relative_to_the_sources() {
    let relative = |uri: &str, line| (uri.to_owned(), Value::from(SOURCE_ROOT), line);
    let absolute = |uri: &str, line| (uri.to_owned(), Value::Null, line);
    for (path, file, expected) in [
        (Some("/home/me/project/k/src/a.rs"), Some("src/a.rs"), relative("k/src/a.rs", 21)),
        (Some("/home/me/project/./k/../k/a b.c"), None, relative("k/a%20b.c", 21)),
        (Some("/home/me/project2/k/a.c"), Some("k/a.c"), relative("k/a.c", 21)),
        (Some("/build/k/a.c"), Some("./k/a.c"), relative("k/a.c", 21)),
        (Some("/build/k/a.c"), Some("/build/k/a.c"), absolute("file:///build/k/a.c", 21)),
        (None, Some("C:/k/a.c"), relative("C%3A/k/a.c", 21)),
        (None, Some("../../etc/passwd"), relative("kernel.elf", 1)),
        (Some("/home/me/project/../../../../x"), None, relative("kernel.elf", 1)),
        (Some("/home/me/project"), None, relative("kernel.elf", 1)),
        (None, None, relative("kernel.elf", 1)),
        (None, Some("a\n\u{202e}b.c"), relative("a%5Cu%7Ba%7D%5Cu%7B202e%7Db.c", 21)),
        (Some(&"/home/me/project/k".repeat(100)), None, relative("kernel.elf", 1)),
    ] {
        assert_eq!(place(path, file), expected, "{path:?} {file:?}");
    }
}

/// A function of a library or a macro's expansion: the caller in the sources is more use.
#[test]
fn the_first_line_below_the_root_is_the_place() {
    let mut called = finding();
    called.frames[1].path = Some("/registry/spin/mutex.rs".into());
    called.frames[2].path = Some(format!("{ROOT}/src/main.rs").into());
    let result = one(called);
    let physical = &result["locations"][0]["physicalLocation"];
    assert_eq!(physical["artifactLocation"]["uri"], "src/main.rs");
    assert_eq!(physical["region"]["startLine"], 7);
}

#[test]
fn a_name_cannot_make_a_link() {
    let mut evil = finding();
    evil.frames[1].symbol = Some("x [a](https://example)\n\x1b[31m \\".into());
    let result = one(evil);
    let text = result["message"]["text"].as_str().expect("a text");
    assert!(text.contains(r"in x \[a\](https://example)\\u{a}"), "{text}");
    assert!(!text.contains('\n') && !text.contains('\x1b'), "{text}");
}
