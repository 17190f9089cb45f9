//! Linux as a guest: the kernels of `cargo xtask linux`, and initrds with one small program.

use std::path::PathBuf;

use umbra_testkit::cpio::Archive;
use umbra_testkit::elf::{ElfBuilder, HEADER, PROGRAM_HEADER};

use crate::suite::Need;

/// The load address of an initrd's program.
const PROGRAM: u64 = 0x40_0000;

/// One of the kernels: `small/vmlinux`, `small/bzImage`, `acpi/vmlinux`, `debian/bzImage`.
pub fn kernel(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/linux")).join(name)
}

/// Needs KVM and a kernel.
pub fn need(name: &str) -> Need {
    let command = match name.split('/').next() {
        Some("acpi" | "umbra-vmalloc") => "cargo xtask test --all",
        _ => "cargo xtask linux",
    };
    let missing = (!kernel(name).exists())
        .then(|| format!("there is no target/linux/{name}: `{command}` builds it"));
    Need::kvm().and(&Need::unless(missing))
}

/// An initrd with one small program, `/init`. `code` is position-independent and starts at its
/// beginning.
pub fn initrd(code: &[u8]) -> Vec<u8> {
    let at = PROGRAM + (HEADER + PROGRAM_HEADER) as u64;
    with_program(&ElfBuilder::new(at).segment(at, code).build())
}

/// An initrd with one program, `/init`: a static ELF file.
pub fn with_program(program: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    let mut write = || {
        archive.folder("dev")?;
        archive.file("init", true, program)
    };
    write().and_then(|()| archive.finish()).expect("writing to memory does not fail");
    bytes
}
