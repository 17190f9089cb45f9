//! Tells `src/kernel.rs` where the test kernel is that it embeds: the file that `UMBRA_KERNEL`
//! names, else what `cargo xtask guest` made of this workspace. Without either, Umbra is built
//! without a test kernel.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(umbra_kernel)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=UMBRA_KERNEL");
    let kernel = match std::env::var_os("UMBRA_KERNEL") {
        Some(named) => PathBuf::from(named),
        None => built_here(),
    };
    println!("cargo::rerun-if-changed={}", kernel.display());
    // An empty file is one that waits to be built.
    let there = kernel.metadata().is_ok_and(|data| data.is_file() && data.len() > 0);
    match std::path::absolute(&kernel) {
        Ok(kernel) if there => {
            println!("cargo::rustc-cfg=umbra_kernel");
            println!("cargo::rustc-env=UMBRA_KERNEL_FILE={}", kernel.display());
        }
        _ if std::env::var_os("UMBRA_KERNEL").is_some() => {
            println!("cargo::warning=UMBRA_KERNEL: no kernel at {}", kernel.display());
        }
        _ => {}
    }
}

/// Where `cargo xtask guest` puts the test kernel.
fn built_here() -> PathBuf {
    // Asked for at run time: a target folder that was copied has a build script of another
    // checkout.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let workspace = Path::new(&manifest);
    let workspace = workspace.parent().unwrap_or(workspace);
    let kernel = workspace.join("target/guest/umbra-kernel");
    // Cargo takes a file that is not there for changed, each time, and would always compile this
    // crate anew. An empty one in its place is as good to wait for. If it cannot be made, only time
    // is lost.
    if !kernel.exists() && workspace.join("guest/kernel").is_dir() {
        let made = kernel.parent().map(std::fs::create_dir_all);
        if matches!(made, Some(Ok(())))
            && let Ok(file) = std::fs::File::create_new(&kernel)
        {
            // Older than this run, or the next one would take it for changed.
            let _ = file.set_modified(std::time::SystemTime::UNIX_EPOCH);
        }
    }
    kernel
}
