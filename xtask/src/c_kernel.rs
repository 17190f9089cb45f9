//! Builds the C test kernel with each available compiler.

use anyhow::Result;

use crate::context::Context;
use crate::process::Command;
use crate::{guest, setup};

/// The compilers. Their Debian packages have the same names.
const COMPILERS: [&str; 2] = ["gcc", "clang"];

/// `cargo xtask guest --c`.
pub fn run(context: &Context) -> Result<()> {
    let built = build(context)?;
    context.progress.finish();
    for kernel in built {
        println!("{kernel}");
    }
    Ok(())
}

/// Builds the runtime and, with every compiler that is available or can be installed,
/// `target/guest/c-kernel-COMPILER`, and `c-kernel-COMPILER-inline` with inline checks. Returns the
/// kernels, and prints which compilers are missing.
pub fn build(context: &Context) -> Result<Vec<String>> {
    let folder = guest::build_library(context)?;
    let mut built = Vec::new();
    for compiler in COMPILERS {
        if !setup::programs(context, &[compiler, "make"])? {
            context.progress.say(&format!(
                "not built: the C test kernel by {compiler}: install {compiler} and make \
                 (`apt-get install {compiler} make`)"
            ));
            continue;
        }
        for (checks, suffix) in [("outline", ""), ("inline", "-inline")] {
            let what = format!("building the C test kernel with {compiler}, checks {checks}");
            context.progress.step(&what);
            let kernel = folder.join(format!("c-kernel-{compiler}{suffix}"));
            let out = folder.join(format!("c-{compiler}{suffix}"));
            let variables = [("UMBRA", &folder), ("OUT", &out), ("KERNEL", &kernel)];
            Command::new("make", &context.root)
                .args(["-f", "guest/c/kernel/Makefile", &format!("CC={compiler}")])
                .args([format!("UMBRA_CHECKS={checks}")])
                .args(variables.map(|(name, path)| format!("{name}={}", path.display())))
                .run_or_fail(&context.progress)?;
            built.push(kernel.display().to_string());
        }
    }
    Ok(built)
}
