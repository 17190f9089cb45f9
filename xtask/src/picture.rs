//! `cargo xtask picture`: makes the README's picture of the `--html` page.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::process::{Command, which};
use crate::{demo, guest, setup};

/// The picture, in the workspace.
const PICTURE: &str = "docs/images/report.png";
/// The scenario on it.
const SCENARIO: &str = "scenarios=box_use_after_free";
/// Its size: to the end of the call trace.
const SIZE: &str = "--window-size=1100,1325";
/// For root in a container, without scroll bars, and without the network.
const FLAGS: [&str; 8] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--proxy-server=127.0.0.1:9",
    "--hide-scrollbars",
];

/// Runs one scenario, and lets a browser draw its page.
pub fn run(context: &Context) -> Result<ExitCode> {
    if let Some(problem) = demo::kvm_problem() {
        bail!("{problem}");
    }
    setup::browser(context)?;
    let browser = which("chromium").context("chromium was not found: install it")?;
    guest::build(context)?;
    let folder = context.root.join("target/picture");
    let (page, picture) = (folder.join("page.html"), context.root.join(PICTURE));
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // Remove the page of an earlier run.
    let _ = fs::remove_file(&page);
    context.progress.step("running a scenario");
    // Its exit status is 1: there is a finding.
    context
        .cargo()
        .args(["run", "--quiet", "--release", "--package", "umbra", "--bin", "umbra", "--", "run"])
        .args(["target/guest/umbra-kernel", "--cmdline", SCENARIO, "--keep-going", "--html"])
        .args([&page])
        .run(&context.progress)?;
    if !page.is_file() {
        bail!("the scenario's run wrote no page");
    }
    context.progress.step("drawing its page");
    Command::new(browser, &folder)
        .args(FLAGS)
        .args([format!("--user-data-dir={}", folder.join("profile").display())])
        .args([SIZE.to_owned(), format!("--screenshot={}", picture.display())])
        .args([format!("file://{}", page.display())])
        .run_or_fail(&context.progress)?;
    context.progress.finish();
    println!("{}", picture.display());
    Ok(ExitCode::SUCCESS)
}
