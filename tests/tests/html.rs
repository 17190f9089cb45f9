//! The page about a run (`--html`), looked at in a real browser.
//!
//! A page of this test holds it in a frame as wide as a screen, measures it, and writes the answers
//! where `--dump-dom` shows them.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use libtest_mimic::Failed;
use tempfile::TempDir;
use umbra_tests::suite::{Need, Suite};

const CHROMIUM: &str = "chromium";
/// Options for root in a container and for no use of the network.
const FLAGS: [&str; 13] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=127.0.0.1:9",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
];

/// The page that asks the browser; `WIDTH` is replaced. Answers are lines `name=value`.
const PROBE: &str = "<!DOCTYPE html><title>probe</title><pre id=answers></pre>\
<iframe id=page src=page.html style='width:WIDTHpx;height:900px;border:0'></iframe><script>\
onload = () => { \
  const w = page.contentWindow, d = w.document, answers = {}; \
  const all = s => [...d.querySelectorAll(s)]; \
  answers.findings = all('article.finding').length; \
  all('details').forEach(e => e.open = true); \
  d.documentElement.style.contentVisibility = 'visible'; \
  const visible = b => b.width > 4 && b.height > 4; \
  const seen = s => all(s).filter(e => visible(e.getBoundingClientRect())).length; \
  answers.cells = seen('svg.cells'); answers.lines = seen('.chart svg'); \
  answers.shadows = seen('table.shadow'); answers.bad = seen('table.shadow td.bad'); \
  answers.sources = seen('pre.src'); \
  answers.map = all('svg.cells path').length; \
  answers.series = all('.chart path:not(.grid)').length; \
  answers.overflow = Math.max(0, d.documentElement.scrollWidth - WIDTH); \
  answers.requests = w.performance.getEntriesByType('resource').length; \
  answers.scripts = d.scripts.length; \
  answers.focusable = all('summary,a[href],[tabindex]').every(e => e.tabIndex >= 0) ? 1 : 0; \
  answers.title = d.title; \
  const lines = Object.entries(answers).map(([k, v]) => k + '=' + v); \
  document.getElementById('answers').textContent = lines.join('\\n'); \
};</script>";

type Tested = Result<(), Failed>;

fn umbra(args: &[&str], html: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umbra-under-test"))
        .args(args)
        .arg("--html")
        .arg(html)
        .stdin(Stdio::null())
        // The page shows lines of sources, whose paths begin here.
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("the program starts")
}

/// Runs chromium on a file of `folder`; returns standard output and standard error.
fn browse(folder: &Path, file: &str, more: &[&str]) -> Result<(String, String), Failed> {
    let profile = TempDir::new()?;
    let output = Command::new("timeout")
        .args(["60", CHROMIUM])
        .args(FLAGS)
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(more)
        .arg(format!("file://{}/{file}", folder.display()))
        .stdin(Stdio::null())
        .output()?;
    let [out, err] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    check(output.status.success(), || format!("chromium failed: {err}"))?;
    Ok((out, err))
}

fn check(good: bool, why: impl FnOnce() -> String) -> Tested {
    if good { Ok(()) } else { Err(why().into()) }
}

/// Asks the browser about `page.html` in `folder`, on a screen `width` pixels wide.
fn probe(folder: &Path, width: u32) -> Result<impl Fn(&str) -> String, Failed> {
    fs::write(folder.join("probe.html"), PROBE.replace("WIDTH", &width.to_string()))?;
    let (dom, log) = browse(folder, "probe.html", &["--dump-dom"])?;
    check(!log.contains("CONSOLE"), || format!("messages in the browser's console:\n{log}"))?;
    let answers =
        dom.split_once("<pre id=\"answers\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let answers = answers.map(|(answers, _)| answers.to_owned()).unwrap_or_default();
    check(answers.contains("title="), || {
        format!("no answers from the browser: {dom:.2000}\n{log}")
    })?;
    Ok(move |name: &str| {
        let value = answers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or("nothing").to_owned()
    })
}

fn expect(answer: &impl Fn(&str) -> String, expected: &[(&str, &str)]) -> Tested {
    for (name, value) in expected {
        check(answer(name) == *value, || format!("{name}: {} and not {value}", answer(name)))?;
    }
    Ok(())
}

/// Whether something is painted: a page of one colour is a small picture.
fn screenshot(folder: &Path, more: &[&str]) -> Tested {
    let picture = folder.join("page.png");
    let argument = format!("--screenshot={}", picture.display());
    browse(folder, "page.html", &[&[argument.as_str()], more].concat())?;
    let bytes = fs::metadata(&picture)?.len();
    check(bytes > 20_000, || format!("the picture has {bytes} bytes: is it empty?"))
}

const EVERYWHERE: [(&str, &str); 4] =
    [("overflow", "0"), ("requests", "0"), ("scripts", "0"), ("focusable", "1")];

fn a_run_with_findings() -> Tested {
    let folder = TempDir::new()?;
    let page = folder.path().join("page.html");
    let output =
        umbra(&["demo", "-q", "kmalloc_oob_right", "kmalloc_uaf", "kasan_stack_oob"], &page);
    check(output.status.code() == Some(0), || format!("{output:?}"))?;
    for width in [360, 1200] {
        let answer = probe(folder.path(), width)?;
        expect(&answer, &EVERYWHERE)?;
        expect(
            &answer,
            &[
                ("findings", "5"),
                ("shadows", "5"),
                ("bad", "5"),
                ("cells", "1"),
                ("lines", "1"),
                ("series", "4"),
            ],
        )?;
        check(answer("title").contains("5 findings"), || answer("title"))?;
        check(answer("sources").parse::<u32>().is_ok_and(|shown| shown >= 5), || {
            "no source lines".into()
        })?;
        check(answer("map").parse::<u32>().is_ok_and(|paths| paths >= 3), || {
            "the page map is empty".into()
        })?;
    }
    screenshot(folder.path(), &["--window-size=1200,1600"])?;
    screenshot(
        folder.path(),
        &["--window-size=500,1600", "--blink-settings=preferredColorScheme=0"],
    )
}

fn a_clean_run() -> Tested {
    let folder = TempDir::new()?;
    let output = umbra(&["demo", "-q", "exact_fit"], &folder.path().join("page.html"));
    check(output.status.code() == Some(0), || format!("{output:?}"))?;
    let answer = probe(folder.path(), 360)?;
    expect(&answer, &EVERYWHERE)?;
    expect(&answer, &[("findings", "0"), ("cells", "1"), ("lines", "1")])?;
    check(answer("title").contains("no findings"), || answer("title"))
}

fn a_run_that_takes_too_long() -> Tested {
    let folder = TempDir::new()?;
    let kernel = folder.path().join("<kernel>&amp;");
    fs::write(&kernel, umbra::kernel::test_kernel().unwrap_or_default())?;
    let args = [
        "run",
        kernel.to_str().unwrap_or_default(),
        "--timeout",
        "2s",
        "--cmdline",
        "scenarios=huge_churn churn=100000000",
    ];
    let output = umbra(&args, &folder.path().join("page.html"));
    check(output.status.code() == Some(4), || format!("{output:?}"))?;
    let answer = probe(folder.path(), 1200)?;
    expect(&answer, &EVERYWHERE)?;
    // A text with markup, as the browser's DOM shows it.
    check(answer("title").contains("&lt;kernel&gt;&amp;amp;"), || answer("title"))
}

fn a_path_that_cannot_be_written() -> Tested {
    let folder = TempDir::new()?;
    let output = umbra(&["demo", "exact_fit"], &folder.path().join("none/page.html"));
    check(output.status.code() == Some(2) && output.stdout.is_empty(), || format!("{output:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    check(error.contains("cannot write") && error.contains("none/page.html"), || error.clone())
}

type Test = fn() -> Tested;

fn main() -> ExitCode {
    let browser = Command::new(CHROMIUM)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    let browser = Need::unless((!browser).then(|| "chromium is not installed".to_owned()));
    let kernel = Need::test_kernel();
    let both = browser.and(&kernel).and(&Need::fast_cpu());
    let tests: [(&str, &Need, Test); 4] = [
        ("a_run_with_findings", &both, a_run_with_findings),
        ("a_clean_run", &both, a_clean_run),
        ("a_run_that_takes_too_long", &both, a_run_that_takes_too_long),
        ("a_path_that_cannot_be_written", &kernel, a_path_that_cannot_be_written),
    ];
    let mut suite = Suite::default();
    for (name, need, test) in tests {
        suite.add(name, need, move || {
            if let Err(failed) = test() {
                panic!("{}", failed.message().unwrap_or("without a message"));
            }
        });
    }
    suite.run()
}
