//! Files that are no kernels or do not fit, and bad command lines.

use super::*;

pub fn files_that_are_no_kernels() {
    umbra()
        .arg("/nonexistent/kernel")
        .run()
        .expect_refusal(&["/nonexistent/kernel", "No such file"]);
    umbra().arg("/").run().expect_refusal(&["/", "not a regular file"]);
    umbra().arg("/dev/zero").run().expect_refusal(&["not a regular file"]);
    umbra().arg("-").run().expect_refusal(&["kernel", "standard input", "file"]);
    umbra().file(&good()).args("--initrd -").run().expect_refusal(&["initrd", "standard input"]);
    umbra().arg("/dev/stdin").run().expect_refusal(&["not a regular file"]);
    umbra().arg("/dev/tty0").run().expect(2);
    umbra().arg("/proc/self/cwd").run().expect_refusal(&["a directory"]);
    umbra().arg("/proc/self/fd/0").run().expect_refusal(&["not a regular file"]);
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

/// A kernel whose program headers all name the same bytes of the file: `count` of `kind`, each of
/// the whole file, which is made `bytes` large. A loader that looks at the bytes of each would take
/// minutes.
fn with_headers(count: u16, kind: u32, bytes: u64) -> (tempfile::TempDir, std::path::PathBuf) {
    let mut image = kernel(&HALT).build();
    let table = image.len() as u64;
    image.extend_from_within(HEADER..HEADER + PROGRAM_HEADER);
    let mut put = |at: usize, field: &[u8]| image[at..at + field.len()].copy_from_slice(field);
    put(32, &table.to_le_bytes());
    put(56, &count.to_le_bytes());
    let mut header = vec![0; PROGRAM_HEADER];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    for (at, field) in [(16, BASE), (24, BASE), (32, bytes), (40, bytes)] {
        header[at..at + 8].copy_from_slice(&field.to_le_bytes());
    }
    (1..count).for_each(|_| image.extend_from_slice(&header));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kernel");
    fs::write(&path, image).expect("a file");
    let file = fs::File::options().write(true).open(&path).expect("it is there");
    file.set_len(bytes).expect("a sparse file");
    (folder, path)
}

pub fn headers_that_name_the_same_bytes() {
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    let run = |count, kind, bytes| {
        let (_folder, path) = with_headers(count, kind, bytes);
        umbra().arg(path).args("--timeout 60s --memory 4G").collect().run()
    };
    for kind in [LOAD, NOTE] {
        run(u16::MAX, kind, 64 << 20).expect_refusal(&["65535 program headers", "64"]);
        run(65, kind, 64 << 20).expect_refusal(&["65 program headers"]);
    }
    run(64, LOAD, 64 << 20).expect_refusal(&["overlap"]);
    // Notes are looked at as far as notes go.
    let notes = run(64, NOTE, 2 << 30);
    notes.expect(0);
    assert!(notes.figure("/host/rss_peak_bytes") < 64 << 20, "{}", notes.stats);
}

/// Two GiB, of which nothing is loaded; and one that says so of all of it.
pub fn a_sparse_kernel_costs_what_it_loads() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kernel");
    fs::write(&path, good()).expect("a file");
    let file = fs::File::options().write(true).open(&path).expect("it is there");
    file.set_len(2 << 30).expect("a sparse file");
    let run = umbra().arg(&path).collect().run();
    run.expect(0);
    assert!(run.figure("/host/rss_peak_bytes") < 64 << 20, "{}", run.stats);
    let run = umbra().file(&good()).arg("--initrd").arg(&path).run();
    run.expect_refusal(&["initrd", "does not fit"]);
    file.set_len(1 << 40).expect("a sparse file");
    umbra().arg(&path).run().expect_refusal(&["larger than 4294967296 bytes"]);
    umbra().file(&good()).arg("--initrd").arg(&path).run().expect_refusal(&["larger than"]);
}

/// Section headers are for symbols and for a warning: whatever they say, the kernel runs.
pub fn sections_that_lie() {
    let section = |kind: u32, offset: u64, bytes: u64, link: u32| {
        let mut header = vec![0; 64];
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&6u64.to_le_bytes());
        for (at, field) in [(24, offset), (32, bytes)] {
            header[at..at + 8].copy_from_slice(&field.to_le_bytes());
        }
        header[40..44].copy_from_slice(&link.to_le_bytes());
        header
    };
    for (first, count, others) in [
        // 2^32 sections, in the first one's size.
        (section(0, 0, 1 << 32, 1), 0u16, section(1, 0, u64::MAX, 0)),
        (section(0, 0, u64::MAX, u32::MAX), 0, section(2, 0, 1 << 40, 1)),
        (section(2, 0, 1 << 30, 1), u16::MAX, section(3, 0, 1 << 30, 1)),
        (section(2, u64::MAX, u64::MAX, 1), 8, section(1, u64::MAX - 1, 2, u32::MAX)),
    ] {
        let mut image = kernel(&CRASH).build();
        let table = image.len() as u64;
        image[40..48].copy_from_slice(&table.to_le_bytes());
        image[58..60].copy_from_slice(&64u16.to_le_bytes());
        image[60..62].copy_from_slice(&count.to_le_bytes());
        image[62..64].copy_from_slice(&1u16.to_le_bytes());
        image.extend(first);
        (0..8).for_each(|_| image.extend(&others));
        let run = umbra().file(&image).args("--timeout 60s").collect().run();
        run.expect(3);
        assert!(run.figure("/host/rss_peak_bytes") < 64 << 20, "{}", run.stats);
    }
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
