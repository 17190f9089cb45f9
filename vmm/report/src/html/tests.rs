//! Pages of made-up runs: hostile, empty, large.

use std::time::Duration;

use super::super::finding::tests::finding;
use super::super::{DEFAULT_LIMIT, Distinct, Findings, Frame};
use super::*;
use crate::{PageCounts, PageMap, Picture, Sample, ShadowSummary};

fn picture() -> Picture {
    let cells = vec![PageCounts { valid: 4, free: 4, ..PageCounts::default() }; 8192];
    let samples = (0..512)
        .map(|i| Sample { at: Duration::from_millis(i), used: i, ..Sample::default() })
        .collect();
    let total = PageCounts { valid: 32768, free: 32768, ..PageCounts::default() };
    let pages = Some(PageMap { pages_per_cell: 8, cells, total });
    Picture { samples, pages, console: b"hello\n".to_vec() }
}

pub(crate) fn run<'a>(
    outcome: &str,
    findings: &'a Findings,
    picture: &'a Picture,
) -> RunSummary<'a> {
    RunSummary {
        kernel_bytes: 100,
        cmdline: "a=1",
        memory_bytes: 256 << 20,
        shadow: Some(ShadowSummary {
            mode: "per-page",
            notify: "ring",
            limit_bytes: None,
            peak_bytes: 65536,
        }),
        timeout: Some(Duration::from_secs(60)),
        stop_at: Some(1),
        outcome: outcome.into(),
        status: u8::from(!findings.is_empty()),
        findings,
        allocations: 0,
        frees: 0,
        exits: 0,
        seconds: 0.0,
        figures: serde_json::json!({ "exits": { "total": 7, "completed": { "movdqa": 7 } } }),
        picture: Some(picture),
    }
}

pub(crate) fn render(run: &RunSummary, kernel: &str, verdicts: Vec<Verdict>) -> String {
    let mut out = Vec::new();
    let roots = SourceRoots::default();
    let names = Names::Demangled;
    let page = Page { kernel, file: None, roots: &roots, run, names, verdicts };
    write(&mut out, &page).expect("a Vec takes everything");
    let text = String::from_utf8(out).expect("UTF-8");
    well_formed(&text);
    text
}

/// Panics unless all elements are closed in the right order, and the page cannot fetch or run
/// anything.
#[track_caller]
fn well_formed(page: &str) {
    const EMPTY: [&str; 5] = ["!DOCTYPE", "meta", "link", "path", "br"];
    // HTML closes these by itself.
    const OPTIONAL: [&str; 4] = ["td", "th", "li", "tr"];
    let body = page.replace(STYLE, "");
    let mut open: Vec<&str> = Vec::new();
    for tag in body.split('<').skip(1) {
        let (tag, text) =
            tag.split_once('>').unwrap_or_else(|| panic!("a tag does not end: {tag:.80}"));
        assert!(!text.contains('>'), "stray >: {text:.80}");
        let name = tag.split([' ', '/']).find(|part| !part.is_empty()).unwrap_or_default();
        if EMPTY.contains(&name) || OPTIONAL.contains(&name) {
            continue;
        }
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "closed in the wrong order");
        } else {
            open.push(name);
        }
        assert!(
            !matches!(name, "script" | "iframe" | "img" | "object" | "embed" | "base" | "form"),
            "{name}"
        );
        assert!(!tag.contains(" on"), "a handler: {tag}");
    }
    assert!(open.is_empty(), "left open: {open:?}");
    assert!(
        !body.contains("http:")
            && !body.contains("https:")
            && !STYLE.contains("url(")
            && !STYLE.contains("@import")
    );
}

#[test]
fn a_clean_run_says_so() {
    let (none, picture) = (Findings::default(), picture());
    let page = render(&run("the guest is done", &none, &picture), "kernel.elf", Vec::new());
    for text in [
        "No findings",
        "The guest is done.",
        "kernel.elf",
        "a=1",
        "256 MiB",
        "time limit 1m",
        "movdqa",
        "hello",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(page.contains("class=cells") && page.contains("class=s-used"));
    assert!(page.len() < 120 << 10, "{} bytes", page.len());
}

#[test]
fn a_finding_has_all_its_parts() {
    let mut findings = Findings::default();
    for _ in 0..3 {
        findings.add(finding());
    }
    let page = render(&run("stopped", &findings, &picture()), "k", Vec::new());
    for text in [
        "1 finding",
        "slab-out-of-bounds",
        "kernel::kmalloc_oob_right",
        "write of 1 byte · seen 3×",
        "just behind the end of 115 bytes",
        "kmalloc-128",
        "Allocated by task kmalloc_oob_right (12)",
        "class='part obj bad'",
        "<code>fc</code> slab redzone",
        "BUG: KASAN: slab-out-of-bounds in kernel::kmalloc_oob_right+0x1d/0x80",
        "kernel/src/slab.rs:50",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert_eq!(page.matches("first bad</span>").count(), 1);
}

#[test]
fn a_hostile_guest_writes_no_markup() {
    const EVIL: &str =
        "\"'><script src=//x>alert(1)</script><img src=x onerror=y>\u{202e}\x1b[31m</style></pre>";
    let mut bad = finding();
    bad.task.name = EVIL.into();
    for frame in &mut bad.frames {
        *frame = Frame {
            symbol: Some(EVIL.into()),
            linkage: None,
            file: Some(EVIL.into()),
            path: Some(EVIL.into()),
            ..frame.clone()
        };
    }
    bad.notes.push(EVIL.into());
    if let Some(object) = &mut bad.object {
        object.cache = Some(EVIL.into());
    }
    bad.variable = Some(super::super::Variable {
        name: EVIL.into(),
        start: 0,
        size: 1,
        module: Some(EVIL.into()),
        file: Some(EVIL.into()),
        line: Some(1),
    });
    bad.allocated.iter_mut().for_each(|event| event.task.name = EVIL.into());
    let mut findings = Findings::default();
    findings.add(bad.clone());
    bad.kind = "another";
    findings.add(bad);
    let console = [EVIL.as_bytes(), b"\xff\xfe\0"].concat();
    let picture = Picture { console, ..picture() };
    let run = RunSummary { cmdline: EVIL, ..run(EVIL, &findings, &picture) };
    let verdict =
        Verdict { name: EVIL.into(), expected: EVIL.into(), found: EVIL.into(), good: false };
    let page = render(&run, EVIL, vec![verdict]);
    for bad in ["<script", "<img", "onerror=y>", "\u{202e}", "\x1b"] {
        assert!(!page.contains(bad), "{bad}");
    }
    assert!(page.matches("&lt;script src=//x&gt;").count() > 20);
}

#[test]
fn a_thousand_findings_are_a_page_too() {
    let mut findings = Findings::new(Distinct::Places, DEFAULT_LIMIT);
    for offset in 0..1200 {
        let mut one = finding();
        one.frames[1].offset = offset;
        findings.add(one);
    }
    let page = render(&run("the time limit is over", &findings, &picture()), "k", Vec::new());
    assert!(page.contains("id=\"finding-1000\"") && page.contains("200 more of other kinds"));
    assert!(page.contains("The time limit is over."));
    assert!(page.len() < 16 << 20, "{} bytes", page.len());
}

#[test]
fn without_a_shadow_there_is_a_page_without_pictures() {
    let (none, picture) = (Findings::default(), Picture::default());
    let run = RunSummary { shadow: None, ..run("the guest panicked", &none, &picture) };
    let page = render(&run, "k", Vec::new());
    assert!(
        page.contains("Unchecked")
            && page.contains("The guest panicked.")
            && !page.contains("<path class=s-used")
    );
}
