//! Linux as a guest: the kernels that `cargo xtask linux` left, and initrds with one small program.

use std::path::PathBuf;

use crate::elf::{ElfBuilder, HEADER, PROGRAM_HEADER};
use crate::suite::Need;

/// Where the program of an initrd is loaded.
const PROGRAM: u64 = 0x40_0000;

/// One of the kernels: `small/vmlinux`, `small/bzImage`, `acpi/vmlinux`, `debian/bzImage`.
pub fn kernel(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/linux")).join(name)
}

/// Needs KVM and a kernel.
pub fn need(name: &str) -> Need {
    let missing = (!kernel(name).exists())
        .then(|| format!("there is no target/linux/{name}: `cargo xtask linux`"));
    Need::kvm().and(&Need::unless(missing))
}

/// One entry of an archive as the kernel takes it (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let pad = |archive: &mut Vec<u8>| archive.resize(archive.len().next_multiple_of(4), 0);
    let (bytes, name_bytes) = (contents.len() as u32, name.len() as u32 + 1);
    archive.extend(b"070701");
    for field in [1, mode, 0, 0, 1, 0, bytes, 0, 0, 0, 0, name_bytes, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    pad(archive);
    archive.extend(contents);
    pad(archive);
}

/// An initrd with one small program, `/init`. `code` is position-independent and starts at its
/// beginning.
pub fn initrd(code: &[u8]) -> Vec<u8> {
    let at = PROGRAM + (HEADER + PROGRAM_HEADER) as u64;
    with_program(&ElfBuilder::new(at).segment(at, code).build())
}

/// An initrd with one program, `/init`: a static ELF file.
pub fn with_program(program: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "dev", 0o040_755, &[]);
    entry(&mut archive, "init", 0o100_755, program);
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}
