//! Builds the program `umbra`, and the first program of the Linux guests that tests boot.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::process::Command;
use crate::{guest, setup};

/// cargo's arguments for the program `umbra`.
pub const UMBRA: [&str; 5] = ["--release", "--package", "umbra", "--bin", "umbra"];

/// Builds the test kernel, and Umbra with it. Returns the path of `umbra`.
pub fn umbra(context: &Context) -> Result<PathBuf> {
    guest::build(context)?;
    context.progress.step("building Umbra");
    context.cargo().args(["build"]).args(UMBRA).run_or_fail(&context.progress)?;
    Ok(context.root.join("target/release/umbra"))
}

/// Source of the first program, and the library that it is linked with.
const SOURCE: &str = "tests/programs/init.c";
const LIBRARY: (&str, &str) = ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev");

/// Builds `target/guest/programs/init`, linked statically. Without a compiler, prints that it is
/// missing; the tests that need the program are then skipped.
pub fn build(context: &Context) -> Result<()> {
    let needed = [("gcc", "gcc"), LIBRARY];
    let missing = setup::packages(context, &needed, "programs for guests are built with them")?;
    if !missing.is_empty() {
        let missing = missing.join(" ");
        let advice = format!("install {missing} (`apt-get install {missing}`)");
        context.progress.say(&format!("not built: the programs for guests: {advice}"));
        return Ok(());
    }
    let folder = context.root.join("target/guest/programs");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    context.progress.step("building the first program of guests");
    let mut gcc = Command::new("gcc", &context.root);
    gcc.args(["-static", "-O1", "-Wall", "-Wextra", "-Werror", SOURCE, "-o"]);
    gcc.args([folder.join("init")]).run_or_fail(&context.progress)?;
    Ok(())
}
