//! Linux as a guest: the kernels of `cargo xtask linux`, and initrds with one small program.

use std::path::PathBuf;

use umbra_testkit::cpio::Archive;
use umbra_testkit::elf::{ElfBuilder, HEADER, PROGRAM_HEADER};

use crate::suite::Need;

/// The load address of an initrd's program.
const PROGRAM: u64 = 0x40_0000;

/// The first program of guests (`tests/programs/init.c`), which `cargo xtask test` builds.
pub fn first_program() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest/programs/init"))
}

/// Needs programs in guests, and that one.
pub fn need_first_program() -> Need {
    let program = first_program();
    let missing = (!program.is_file()).then(|| {
        format!("there is no {}: `cargo xtask test` builds it with gcc", program.display())
    });
    Need::programs().and(&Need::unless(missing))
}

/// One of the kernels: `small/vmlinux`, `small/bzImage`, `acpi/vmlinux`, `debian/bzImage`.
pub fn kernel(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/linux")).join(name)
}

/// Needs KVM and a kernel.
pub fn need(name: &str) -> Need {
    let command = match name.split('/').next() {
        Some("acpi" | "umbra-modules" | "umbra-vmalloc") => "cargo xtask test --all",
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
    with_files(program, &[])
}

/// The same with other files beside it: names and contents.
pub fn with_files(program: &[u8], files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    let mut write = || {
        archive.folder("dev")?;
        for (name, contents) in files {
            archive.file(name, false, contents)?;
        }
        archive.file("init", true, program)
    };
    write().and_then(|()| archive.finish()).expect("writing to memory does not fail");
    bytes
}
