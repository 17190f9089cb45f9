//! Kernels, initrds and command lines that are refused, with one sentence and exit status 2. And
//! the program's boot protocols, with small guests.

use std::process::ExitCode;

use umbra_tests::elf::ElfBuilder;
use umbra_tests::linux::{kernel as linux_kernel, need};
use umbra_tests::program::{Run, Umbra};
use umbra_tests::suite::{Need, Suite};

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_umbra-under-test");
const BASE: u64 = 1 << 20;
const MIB: usize = 1 << 20;

fn umbra() -> Umbra {
    Umbra::new(PROGRAM, "run")
}

/// A guest with this code.
fn guest(code: &[u8]) -> Vec<u8> {
    ElfBuilder::new(BASE).segment(BASE, code).build()
}

fn good() -> Vec<u8> {
    guest(&[0xf4]) // hlt
}

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(linux_kernel(name)).expect("checked before")
}

/// Runs a file that is refused. The message holds these words.
#[track_caller]
fn refused(image: &[u8], args: &str, words: &[&str]) {
    umbra().file(image).args(args).run().expect_refusal(words);
}

fn broken_bzimages() {
    let image = bytes("small/bzImage");
    let args = "--memory 64M";
    refused(&image[..0x210], args, &["cut off", "setup header"]);
    refused(&image[..image.len() / 2], args, &["cut off", "the kernel's code"]);
    // Less than a paragraph may be missing.
    refused(&image[..image.len() - 16], args, &["cut off"]);
    for at in [image.len() / 2, image.len() - 1, 0x300] {
        let mut damaged = image.clone();
        damaged[at] ^= 0x10;
        refused(&damaged, args, &["bzImage is damaged", "checksum"]);
    }
    let with = |at: usize, value: u8| {
        let mut changed = image.clone();
        changed[at] = value;
        changed
    };
    refused(&with(0x207, 1), args, &["boot protocol 0x10f", "0x20c"]);
    refused(&with(0x236, 0), args, &["32-bit", "64-bit one is needed"]);
    refused(&with(0x211, 0), args, &["zImage"]);
    refused(&image, "--memory 16M", &["needs", "guest memory"]);
    refused(&image, "--boot elf --memory 64M", &["not an ELF file", "bzImage"]);
}

fn kernels_for_other_machines() {
    let mut arm64 = vec![0; 4096];
    arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
    refused(&arm64, "", &["arm64"]);
    refused(
        &ElfBuilder { machine: 183, ..ElfBuilder::new(BASE).segment(BASE, [0xf4]) }.build(),
        "",
        &["183", "x86_64"],
    );
    refused(
        &ElfBuilder { class: 1, ..ElfBuilder::new(BASE).segment(BASE, [0xf4]) }.build(),
        "",
        &["32-bit"],
    );
}

fn elf_files_without_a_usable_entry() {
    refused(
        &ElfBuilder { entry: 8 * BASE, ..ElfBuilder::new(BASE).segment(BASE, [0xf4]) }.build(),
        "",
        &["entry point"],
    );
    refused(&good(), "--boot pvh", &["no PVH note"]);
    refused(&good(), "--boot bzimage", &["not a bzImage", "ELF"]);
    umbra().file(&good()).args("--boot floppy").run().expect_usage(&["floppy", "bzimage"]);
}

fn initrds() {
    umbra()
        .file(&good())
        .args("--initrd /nonexistent")
        .run()
        .expect_refusal(&["initrd", "/nonexistent"]);
    umbra()
        .file(&good())
        .args("--initrd /")
        .run()
        .expect_refusal(&["initrd", "not a regular file"]);
    umbra().file(&good()).arg("--initrd").file(b"").run().expect_refusal(&["initrd is empty"]);
    let large = umbra().file(&good()).args("--memory 4M --initrd").file(&vec![1; 4 * MIB]).run();
    large.expect_refusal(&["initrd of 4194304 bytes", "does not fit", "free"]);
    umbra().file(&good()).args("--memory 4M --initrd").file(&vec![1; 2 * MIB]).run().expect(0);
}

fn command_lines() {
    let run = |bytes: usize| umbra().file(&good()).arg("--cmdline").arg("x".repeat(bytes)).run();
    run(2047).expect(0);
    run(2048).expect_refusal(&["command line", "2048", "2047"]);
}

fn a_linux_command_line_has_room_for_the_defaults_or_is_refused() {
    let run =
        umbra().arg(linux_kernel("small/vmlinux")).arg("--cmdline").arg("x".repeat(2040)).run();
    run.expect_refusal(&["command line", "2047"]);
}

/// Gigabytes of memory are only reserved.
fn much_memory_costs_little() {
    let run: Run = umbra().file(&good()).args("--memory 64G --shadow off").collect().run();
    run.expect(0);
    assert!(run.figure("/host/rss_peak_bytes") < 64 << 20, "{}", run.stats);
    umbra().file(&good()).args("--memory 65G").run().expect_refusal(&["too large", "64 GiB"]);
    umbra().file(&good()).args("--memory 32M").run().expect(0);
}

fn cpuid_bits_that_the_host_does_not_take_are_told_once() {
    // With figures, which need a probe guest.
    let mut umbra = umbra().file(&good()).collect();
    umbra.command().env("RUST_LOG", "info");
    let run = umbra.run();
    run.expect(0);
    let told = run.stderr.matches("the host's KVM did not take all CPUID bits").count();
    // Where ring 3 runs natively it sees the features of the host's CPU.
    let emulated = run.stats.pointer("/guest/instructions").is_some_and(|count| count.is_number());
    assert!(told == 1 || told == 0 && !emulated, "{told} times:\n{}", run.tail());
}

fn pvh_starts_in_32_bit_mode() {
    // mov al, [ebx]; mov dx, 0x3f8; out dx, al; mov al, 10; out dx, al; hlt: the first byte of
    // hvm_start_info's magic.
    let code = [0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xb0, 0x0a, 0xee, 0xf4];
    let note: Vec<u8> = [4u32, 4, 18]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain(*b"Xen\0")
        .chain((BASE as u32).to_le_bytes())
        .collect();
    let image = ElfBuilder::new(BASE)
        .segment(BASE, code)
        .segment(0, note)
        .with(|note| note.kind = 4)
        .build();
    for boot in ["auto", "pvh"] {
        let run = umbra().file(&image).args("--boot").arg(boot).run();
        run.expect(0);
        assert_eq!(run.stdout, b"x\n", "{boot}: {}", run.tail());
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let kvm = Need::kvm();
    suite.add("broken_bzimages", &need("small/bzImage"), broken_bzimages);
    suite.add("kernels_for_other_machines", &kvm, kernels_for_other_machines);
    suite.add("elf_files_without_a_usable_entry", &kvm, elf_files_without_a_usable_entry);
    suite.add("initrds", &kvm, initrds);
    suite.add("command_lines", &kvm, command_lines);
    suite.add(
        "a_linux_command_line_has_room_for_the_defaults_or_is_refused",
        &need("small/vmlinux"),
        a_linux_command_line_has_room_for_the_defaults_or_is_refused,
    );
    suite.add("much_memory_costs_little", &kvm, much_memory_costs_little);
    suite.add(
        "cpuid_bits_that_the_host_does_not_take_are_told_once",
        &kvm,
        cpuid_bits_that_the_host_does_not_take_are_told_once,
    );
    suite.add("pvh_starts_in_32_bit_mode", &kvm, pvh_starts_in_32_bit_mode);
    suite.run()
}
