//! Files that are no kernels or do not fit, and bad command lines.

use super::*;

pub fn files_that_are_no_kernels() {
    umbra()
        .arg("/nonexistent/kernel")
        .run()
        .expect_refusal(&["/nonexistent/kernel", "No such file"]);
    umbra().arg("/").run().expect_refusal(&["/", "not a regular file"]);
    umbra().arg("/dev/zero").run().expect_refusal(&["not a regular file"]);
    umbra().arg("").run().expect_usage(&["KERNEL"]);
    umbra().arg("x".repeat(5000)).run().expect(2);
}

pub fn images_that_are_no_kernels() {
    refused(b"", &["empty"]);
    refused(b"#!/bin/sh\n", &["neither an ELF file nor a bzImage"]);
    refused(&[0; 4096], &["neither an ELF file nor a bzImage"]);
    refused(&[0x1f, 0x8b, 8, 0], &["gzip"]);
    refused(b"\x7fELF", &["cut off"]);
    let elf = || kernel(&HALT);
    refused(&ElfBuilder { class: 1, ..elf() }.build(), &["32-bit"]);
    refused(&ElfBuilder { endian: 2, ..elf() }.build(), &["big-endian"]);
    refused(&ElfBuilder { machine: 183, ..elf() }.build(), &["183", "x86_64"]);
    refused(&ElfBuilder { machine: 0xffff, ..elf() }.build(), &["x86_64"]);
    refused(&ElfBuilder { kind: 1, ..elf() }.build(), &["cannot be booted"]);
    refused(&ElfBuilder { kind: 4, ..elf() }.build(), &["cannot be booted"]);
    refused(&ElfBuilder::new(BASE).build(), &["no segment"]);
    refused(&ElfBuilder { entry: 0, ..elf() }.build(), &["entry point"]);
    refused(&ElfBuilder { entry: u64::MAX, ..elf() }.build(), &["entry point"]);
}

pub fn segments_that_do_not_fit() {
    let memory = 256 << 20;
    let at = |gpa| ElfBuilder::new(gpa).segment(gpa, HALT).build();
    refused(&at(0), &["segment 0", "0x100000"]);
    refused(&at(BASE - 1), &["segment 0"]);
    refused(&at(memory), &["needs", "guest memory"]);
    refused(&at(0xd000_0000), &["outside of guest memory"]);
    refused(&at(1 << 50), &["outside of guest memory"]);
    refused(&at(u64::MAX), &["wraps around"]);
    let with = |change: fn(&mut umbra_tests::elf::Segment)| kernel(&HALT).with(change).build();
    refused(&with(|s| s.memory_size = Some(u64::MAX)), &["wraps around"]);
    refused(&with(|s| s.memory_size = Some(u64::MAX - BASE)), &["outside of guest memory"]);
    refused(&with(|s| s.memory_size = Some(1 << 40)), &["outside of guest memory"]);
    refused(&with(|s| s.memory_size = Some(0)), &["more than its 0x0 bytes"]);
    refused(
        &with(|s| (s.file_size, s.memory_size) = (Some(u64::MAX), Some(u64::MAX))),
        &["cut off"],
    );
    refused(&with(|s| s.file_size = Some(1 << 40)), &["cut off"]);
    refused(&with(|s| s.offset = Some(u64::MAX)), &["cut off"]);
    refused(&with(|s| s.offset = Some(1 << 32)), &["cut off"]);
    let overlapping = kernel(&[0xf4; 100]).segment(BASE + 99, HALT).build();
    refused(&overlapping, &["segments 0 and 1 overlap"]);
    let twice = kernel(&HALT).segment(BASE, HALT).build();
    refused(&twice, &["overlap"]);
    // Side by side is fine.
    umbra().file(&kernel(&HALT).segment(BASE + 1, HALT).build()).run().expect(0);
}

/// Cut off anywhere, a kernel is refused; whole, it runs.
pub fn kernels_cut_off_anywhere() {
    let image = kernel(&[0xf4; 40]).segment(BASE + 0x1000, [1; 40]).build();
    let headers = HEADER + 2 * PROGRAM_HEADER;
    let lengths =
        [1, 3, 4, 15, 16, 40, HEADER - 1, HEADER, HEADER + 1, headers - 1, headers, headers + 40];
    for length in lengths.into_iter().chain([image.len() - 1]) {
        let run = umbra().file(&image[..length]).run();
        run.expect_refusal(&[]);
    }
    umbra().file(&image).run().expect(0);
}

/// The test kernel, cut off.
pub fn the_test_kernel_cut_off() {
    let image = test_kernel().expect("checked before");
    for length in [100, 1000, 64 << 10, image.len() / 2] {
        let run = umbra().file(&image[..length]).args("--timeout 20s").run();
        // The end of the file holds symbols and lines, without which it still runs.
        if run.code() == Some(2) {
            run.expect_refusal(&["cut off"]);
        } else {
            run.assert_no_panic();
        }
    }
}

// Arguments.

pub fn memory_sizes() {
    let run = |memory: &str| umbra().file(&good()).arg(format!("--memory={memory}")).run();
    for (memory, word) in [
        ("0", "too small"),
        ("1", "too small"),
        ("1M", "too small"),
        ("65G", "too large"),
        ("4097K", "not a multiple of 4096"),
        ("5000001", "not a multiple of 4096"),
    ] {
        run(memory).expect_refusal(&[word]);
    }
    for memory in ["15E", "18446744073709551615", "5000T"] {
        run(memory).expect_refusal(&["too large"]);
    }
    for memory in ["", "lots", "-1", "1e400", "99999999999999999999999", "0x", "16X"] {
        run(memory).expect_usage(&["--memory"]);
    }
    run("2M").expect(0);
    umbra()
        .file(&kernel(&HALT).with(|s| s.memory_size = Some(8 << 20)).build())
        .args("--memory 4M")
        .run()
        .expect_refusal(&["needs", "bytes of guest memory"]);
}

pub fn wrong_arguments() {
    let run = |args: &str| umbra().file(&good()).args(args).run();
    run("--no-such-flag").expect_usage(&["--no-such-flag"]);
    run("--shadow maybe").expect_usage(&["maybe", "per-page"]);
    run("--notify never").expect_usage(&["never", "ring"]);
    run("--timeout 0").expect_usage(&["--timeout"]);
    run("--timeout 0s").expect_usage(&["--timeout", "90s"]);
    run("--timeout soon").expect_usage(&["soon"]);
    run("--timeout -5s").expect_usage(&[]);
    run("--timeout 99999999999999999999s").expect_usage(&["--timeout"]);
    run("--stop-at 0").expect_usage(&["--stop-at"]);
    run("--stop-at many").expect_usage(&["many"]);
    run("--stop-at 2 --keep-going").expect_usage(&["--keep-going"]);
    for cpus in ["0", "65", "256", "-1", "two"] {
        run(&format!("--cpus={cpus}")).expect_usage(&["--cpus", cpus]);
    }
    run("--shadow-limit much").expect_usage(&["much"]);
    run("second-kernel").expect_usage(&["second-kernel"]);
    // An enormous limit is no limit.
    run("--timeout 1000000years").expect(0);
    run("--timeout none --shadow-limit 15E").expect(0);
}

pub fn command_lines() {
    let run = |cmdline: String| umbra().file(&good()).arg(format!("--cmdline={cmdline}")).run();
    run("x".repeat(2047)).expect(0);
    run("x".repeat(2048)).expect_refusal(&["2048", "2047"]);
    run("x".repeat(100_000)).expect_refusal(&["100000"]);
    run("--looks-like=a flag \u{1b}[31m é".into()).expect(0);
}
