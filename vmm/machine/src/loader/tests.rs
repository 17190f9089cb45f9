//! Tests of the loader: it refuses every broken file, and a good one is in memory as it should be.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::super::tests::elf;
use super::*;

const BASE: u64 = layout::KERNEL_START;

fn ram() -> Ram {
    Ram::new(4 << 20).unwrap()
}

/// A small valid kernel with `change` applied to its bytes.
fn broken(change: impl FnOnce(&mut Vec<u8>)) -> LoadError {
    let mut image =
        elf(BASE + 4, &[(BASE, BASE, &[0x90; 64], 128), (BASE + 0x1000, 0, &[1; 16], 16)]);
    super::elf::check(&ram(), Source::from(&image)).expect("valid before the change");
    change(&mut image);
    super::elf::check(&ram(), Source::from(&image)).expect_err("not valid after it")
}

fn put(at: usize, bytes: impl AsRef<[u8]>) -> impl FnOnce(&mut Vec<u8>) {
    move |image| image[at..at + bytes.as_ref().len()].copy_from_slice(bytes.as_ref())
}

fn put64(at: usize, value: u64) -> impl FnOnce(&mut Vec<u8>) {
    put(at, value.to_le_bytes())
}

#[test]
fn every_broken_image_is_refused() {
    use LoadError as E;
    assert!(matches!(broken(Vec::clear), E::NotElf(_)));
    assert!(matches!(load(&ram(), &Boot::new(&[0; 0], "")), Err(E::Empty)));
    assert!(matches!(broken(put(0, b"#!/b")), E::NotElf(_)));
    assert!(matches!(broken(|i| i.truncate(63)), E::HeaderCutOff(63)));
    assert!(matches!(broken(put(4, [1])), E::Not64Bit));
    assert!(matches!(broken(put(5, [2])), E::BigEndian));
    assert!(matches!(broken(put(18, [183, 0])), E::ForeignMachine(183)));
    assert!(matches!(broken(put(16, [1, 0])), E::NotExecutable(1)));
    assert!(matches!(broken(put(54, [55])), E::BadProgramHeaders { .. }));
    assert!(matches!(broken(put64(32, 0)), E::BadProgramHeaders { .. }));
    assert!(matches!(broken(put64(32, u64::MAX)), E::CutOff { .. }));
    assert!(matches!(broken(put(56, [64, 0])), E::CutOff { .. }));
    assert!(matches!(broken(put(56, [65, 0])), E::ManyProgramHeaders(65)));
    assert!(matches!(broken(put(56, [255, 255])), E::ManyProgramHeaders(0xffff)));
    assert!(matches!(broken(put(56, [0, 0])), E::NoSegment));
    assert!(matches!(broken(|i| (put(64, [6])(i), put(120, [6])(i)).0), E::NoSegment));
    assert!(matches!(broken(put64(64 + 8, u64::MAX)), E::CutOff { .. }), "p_offset");
    assert!(matches!(broken(|i| i.truncate(i.len() - 1)), E::CutOff { .. }));
    assert!(matches!(
        broken(put64(64 + 40, 63)),
        E::FileLargerThanMemory { file: 64, memory: 63, .. }
    ));
    assert!(matches!(broken(put64(64 + 24, u64::MAX - 8)), E::Wraps { .. }));
    assert!(matches!(broken(put64(64 + 40, u64::MAX)), E::Wraps { .. }));
    assert!(matches!(broken(put64(64 + 24, BASE - 1)), E::BootArea { index: 0, .. }));
    assert!(matches!(broken(put64(64 + 24, 0)), E::BootArea { .. }));
    assert!(matches!(broken(put64(64 + 24, (4 << 20) - 127)), E::MemoryTooSmall { need, .. }
        if need == (4 << 20) + 1));
    assert!(matches!(broken(put64(64 + 40, 1 << 40)), E::OutsideMemory { index: 0, .. }));
    assert!(matches!(broken(put64(120 + 24, BASE + 127)), E::Overlap { first: 0, second: 1 }));
    assert!(matches!(broken(put64(24, BASE + 128)), E::EntryOutside(_)));
    // The second segment's virtual address is 0.
    assert!(matches!(broken(put64(24, u64::MAX)), E::EntryOutside(_)));
    // A note outside of the file, or garbage.
    assert!(matches!(
        broken(|i| (put(120, [4])(i), put64(120 + 8, 1 << 40)(i)).0),
        E::CutOff { .. }
    ));
}

#[test]
fn no_bytes_make_it_panic() {
    let image = elf(BASE, &[(BASE, BASE, &[0x90; 64], 128)]);
    let ram = ram();
    for at in 0..image.len() {
        for value in [0, 1, 4, 0x7f, 0x80, 0xff] {
            let mut image = image.clone();
            image[at] = value;
            let _ = load(&ram, &Boot::new(&image, ""));
        }
        let _ = load(&ram, &Boot::new(&image[..at], ""));
    }
}

#[test]
fn a_virtual_entry_point_is_translated() {
    let high = 0xffff_ffff_8010_0000;
    let image = elf(high + 8, &[(BASE, high, &[0x90; 64], 64)]);
    let kernel = super::elf::check(&ram(), Source::from(&image)).unwrap().kernel;
    assert_eq!(kernel.entry, GuestAddress(BASE + 8));
    assert_eq!((kernel.start.0, kernel.end.0), (BASE, BASE + 64));
}

#[test]
fn boot_structures() {
    let ram = Ram::new(layout::HOLE_START + (8 << 20)).unwrap();
    let image = elf(BASE, &[(BASE, BASE, b"code", 4)]);
    load(&ram, &Boot::new(&image, "a=b")).unwrap();
    let mut text = [0; 4];
    ram.read(GuestAddress(BASE), &mut text).unwrap();
    assert_eq!(&text, b"code");
    ram.read(GuestAddress(layout::CMDLINE), &mut text).unwrap();
    assert_eq!(&text, b"a=b\0");
    let mut page = [0; 4096];
    ram.read(GuestAddress(layout::BOOT_PARAMS), &mut page).unwrap();
    assert_eq!(page[0x1e8], 4, "E820 entries");
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(u32_at(&page, 0x228), layout::CMDLINE as u32);
    let entry = |i: usize| {
        (u64_at(&page, 0x2d0 + 20 * i), u64_at(&page, 0x2d8 + 20 * i), page[0x2e0 + 20 * i])
    };
    assert_eq!(entry(0), (0, 0x9_fc00, 1));
    assert_eq!(entry(1), (0x9_fc00, 0x6_0400, 2));
    assert_eq!(entry(2), (BASE, layout::HOLE_START - BASE, 1));
    assert_eq!(entry(3), (layout::HOLE_END, 8 << 20, 1));
}

#[test]
fn command_lines() {
    let image = elf(BASE, &[(BASE, BASE, &[0], 1)]);
    let fits = "x".repeat(2047);
    load(&ram(), &Boot::new(&image, &fits)).unwrap();
    let error = load(&ram(), &Boot::new(&image, &(fits + "x"))).unwrap_err();
    assert!(matches!(error, LoadError::CmdlineTooLong { have: 2048, max: 2047 }));
    assert!(matches!(load(&ram(), &Boot::new(&image, "a\0b")), Err(LoadError::CmdlineNul)));
}

#[test]
fn only_regular_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| DiskFile::open("kernel", path).map(|_| ()).unwrap_err();
    let missing = open(&dir.path().join("none")).to_string();
    assert!(missing.starts_with("cannot read kernel"), "{missing}");
    let fifo = dir.path().join("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a string that ends with a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&fifo, &link).unwrap();
    for (path, kind) in [
        (dir.path(), "a directory"),
        (&fifo, "a pipe"),
        (&link, "a pipe"),
        (&socket, "a socket"),
        (Path::new("/dev/zero"), "a device"),
    ] {
        let error = open(path);
        assert!(matches!(error, LoadError::NotAFile { found, .. } if found == kind), "{error}");
    }
    assert!(matches!(open(Path::new("-")), LoadError::StandardInput { .. }));
    let loop_ = dir.path().join("loop");
    std::os::unix::fs::symlink(&loop_, &loop_).unwrap();
    assert!(matches!(open(&loop_), LoadError::Read { .. }));
    let large = dir.path().join("large");
    File::create(&large).unwrap().set_len(MAX_IMAGE + 1).unwrap();
    assert!(matches!(open(&large), LoadError::TooLarge { bytes, .. } if bytes == MAX_IMAGE + 1));
}

/// `image` on disk.
fn on_disk(image: &[u8]) -> (File, DiskFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image).unwrap();
    let opened = DiskFile::open("kernel", file.path()).unwrap();
    (file.into_file(), opened)
}

#[test]
fn files_on_disk_are_loaded_as_those_in_memory() {
    let elf = elf(BASE + 4, &[(BASE, BASE, &[0x90; 5000], 6000), (BASE + 0x4000, 0, &[1; 16], 16)]);
    for image in [elf, bzimage(|_| {}), packed(|_| {}), pvh(BASE + 8, |_| {})] {
        let initrd = vec![7; 10_000];
        let loaded = [true, false].map(|disk| {
            let (ram, files) = (ram(), [&image, &initrd].map(|bytes| on_disk(bytes).1));
            let [kernel, initrd]: [Source; 2] = if disk {
                files.each_ref().map(Source::from)
            } else {
                [&image, &initrd].map(Source::from)
            };
            let boot = Boot { initrd: Some(initrd), unpack: true, ..Boot::new(&[0; 0], "a=b") };
            let kernel = load(&ram, &Boot { image: kernel, ..boot }).unwrap();
            let mut all = vec![0; 4 << 20];
            ram.read(GuestAddress(0), &mut all).unwrap();
            (kernel, all)
        });
        assert!(loaded[0] == loaded[1]);
    }
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    let image = elf(BASE, &[(BASE, BASE, &[0x90; 9000], 9000)]);
    let (file, opened) = on_disk(&image);
    load(&ram(), &Boot::new(&opened, "")).unwrap();
    file.set_len(4096).unwrap();
    for error in [
        load(&ram(), &Boot::new(&opened, "")).unwrap_err(),
        load(&ram(), &Boot { initrd: Some((&opened).into()), ..Boot::new(&image, "") })
            .unwrap_err(),
        opened.try_clone().unwrap_err(),
    ] {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        assert!(source.is_some_and(|source| source.contains("changed")), "{error}");
    }
}

/// Every byte that is looked at or copied is looked at or copied once, whatever the headers say.
#[test]
fn headers_that_share_the_files_bytes_are_refused() {
    let mut image = elf(BASE, &[(BASE, BASE, &[0x90; 64], 64)]);
    let table = image.len() as u64;
    let header = |kind: u32, gpa: u64, bytes: u64| {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend(5u32.to_le_bytes());
        for field in [0, gpa, gpa, bytes, bytes, 1] {
            header.extend(field.to_le_bytes());
        }
        header
    };
    put64(32, table)(&mut image);
    put(56, [64, 0])(&mut image);
    let bytes = 1 << 16;
    let with = |gpa: fn(u64) -> u64| {
        let mut image = image.clone();
        (0..64).for_each(|i| image.extend(header(1, gpa(i), bytes)));
        image.resize(bytes as usize, 0);
        image
    };
    let load = |image: &[u8]| load(&ram(), &Boot::new(image, ""));
    assert!(matches!(load(&with(|_| BASE)), Err(LoadError::Overlap { .. })));
    let more_than_memory = load(&with(|i| BASE + (i << 16)));
    assert!(matches!(more_than_memory, Err(LoadError::MemoryTooSmall { .. })));
}

#[test]
fn loading_ends_when_it_is_to() {
    let image = elf(BASE, &[(BASE, BASE, &[0x90; 64], 64)]);
    let stop = AtomicBool::new(true);
    let stopped = Limit { stop: Some(&stop), deadline: None };
    let late = Limit { stop: None, deadline: Some(Instant::now()) };
    for image in [&image, &bzimage(|_| {})] {
        let load = |limit| load(&ram(), &Boot { limit, ..Boot::new(image, "") });
        assert!(matches!(load(stopped), Err(LoadError::Interrupted)));
        assert!(matches!(load(late), Err(LoadError::TimeLimit)));
    }
    assert!(is_linux(&ram(), Source::from(&image), &stopped).is_err());
}

/// A bzImage of one setup sector and 64 paragraphs of code, for 2 MiB at 1 MiB, with its checksum.
fn bzimage(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = vec![0; 1024 + 1024];
    put(0x1f1, [1])(&mut image);
    put(0x1f4, 64u32.to_le_bytes())(&mut image);
    put(0x201, [0x6a])(&mut image);
    put(0x202, b"HdrS")(&mut image);
    put(0x206, 0x20fu16.to_le_bytes())(&mut image);
    put(0x211, [1])(&mut image);
    put(0x22c, 0x7fff_ffffu32.to_le_bytes())(&mut image);
    put(0x230, 0x20_0000u32.to_le_bytes())(&mut image);
    put(0x236, [1, 0])(&mut image);
    put64(0x258, BASE)(&mut image);
    put(0x260, (2u32 << 20).to_le_bytes())(&mut image);
    put(1024 + 0x200, b"entry")(&mut image);
    change(&mut image);
    if let Some(end) = image.len().checked_sub(4) {
        let checksum = !crc32fast::hash(&image[..end]);
        put(end, checksum.to_le_bytes())(&mut image);
    }
    image
}

#[test]
fn a_bzimage_is_loaded_as_it_asks() {
    let ram = ram();
    let image = bzimage(|_| {});
    let kernel =
        load(&ram, &Boot { initrd: Some((b"initrd").into()), ..Boot::new(&image, "a=b") }).unwrap();
    assert_eq!(kernel.entry, GuestAddress(BASE + 0x200));
    assert_eq!((kernel.start.0, kernel.end.0), (BASE, BASE + (2 << 20)));
    assert_eq!(kernel.state, StartState::Linux64);
    let mut text = [0; 5];
    ram.read(kernel.entry, &mut text).unwrap();
    assert_eq!(&text, b"entry");
    let mut page = [0; 4096];
    ram.read(GuestAddress(layout::BOOT_PARAMS), &mut page).unwrap();
    assert_eq!((u16_at(&page, 0x206), page[0x210], page[0x211]), (0x20f, 0xff, 1));
    assert_eq!(u64_at(&page, 0x258), BASE, "the file's own header");
    let (at, bytes) = (u32_at(&page, 0x218), u32_at(&page, 0x21c));
    assert_eq!((at, bytes), ((4 << 20) - 4096, 6), "an initrd at the end of memory");
    ram.read(GuestAddress(at.into()), &mut text).unwrap();
    assert_eq!(&text, b"initr");
    assert!(is_linux(&ram, Source::from(&image), &Limit::default()).unwrap());
}

/// As that of memtest86+: boot loaders take such a file.
#[test]
fn the_last_paragraph_of_a_bzimage_may_be_cut_off() {
    let image = bzimage(|image| image.truncate(2048 - 15));
    let kernel = load(&ram(), &Boot::new(&image, "")).unwrap();
    assert_eq!(kernel.entry, GuestAddress(BASE + 0x200));
}

/// memtest86+ looks for the end of its command line in so many bytes, and OSTD for its NUL.
#[test]
fn a_bzimage_says_how_long_its_command_line_may_be() {
    let ram = ram();
    let told = |image: &[u8]| {
        load(&ram, &Boot::new(image, "a=b")).unwrap();
        let mut page = [0; 4096];
        ram.read(GuestAddress(layout::BOOT_PARAMS), &mut page).unwrap();
        u32_at(&page, 0x238)
    };
    assert_eq!(told(&bzimage(put(0x238, 255u32.to_le_bytes()))), 255);
    assert_eq!(told(&bzimage(|_| {})), 4, "it does not say");
    assert_eq!(told(&elf(BASE + 4, &[(BASE, BASE, &[0x90; 64], 128)])), 4, "an ELF file");
}

/// A bzImage with a kernel packed by LZ4: an ELF file of 64 bytes of code at 1 MiB.
fn packed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let elf = elf(BASE + 4, &[(BASE, BASE, &[0x90; 64], 128)]);
    let block = lz4_flex::block::compress(&elf);
    let mut payload = 0x184c_2102u32.to_le_bytes().to_vec();
    payload.extend((block.len() as u32).to_le_bytes());
    payload.extend(&block);
    payload.extend((elf.len() as u32).to_le_bytes());
    change(&mut payload);
    bzimage(|image| {
        put(0x248, 0x210u32.to_le_bytes())(image);
        put(0x24c, (payload.len() as u32).to_le_bytes())(image);
        assert!(payload.len() < 0x1e0);
        put(1024 + 0x210, payload)(image);
    })
}

#[test]
fn a_packed_kernel_is_unpacked_if_asked_for() {
    let ram = ram();
    let load = |image: &[u8], unpack, protocol| {
        load(&ram, &Boot { unpack, protocol, ..Boot::new(image, "a=b") }).unwrap()
    };
    let (image, own) = (packed(|_| {}), BASE + 0x200);
    let kernel = load(&image, true, Protocol::Auto);
    assert_eq!(
        (kernel.entry.0, kernel.end.0, kernel.state),
        (BASE + 4, BASE + 128, StartState::Linux64)
    );
    let mut code = [0; 2];
    ram.read(GuestAddress(BASE + 63), &mut code).unwrap();
    assert_eq!(code, [0x90, 0]);
    let mut page = [0; 4096];
    ram.read(GuestAddress(layout::BOOT_PARAMS), &mut page).unwrap();
    assert_eq!(u64_at(&page, 0x258), BASE, "the file's own header");
    assert_eq!(load(&image, false, Protocol::Auto).entry.0, own);
    assert_eq!(load(&image, true, Protocol::BzImage).entry.0, own);
    // If the packed kernel is not as its header says, its own code unpacks it.
    let broken: [fn(&mut Vec<u8>); 6] = [
        |p| p.clear(),
        |p| p.truncate(9),
        |p| p[0] ^= 1,
        |p| p[4] ^= 1,
        |p| *p.last_mut().unwrap() = 0xff,
        |p| p[12] ^= 0xff,
    ];
    for (i, broken) in broken.into_iter().enumerate() {
        assert_eq!(load(&packed(broken), true, Protocol::Auto).entry.0, own, "{i}");
    }
    for at in 0..packed(|_| {}).len() - 1536 {
        for value in [0, 1, 0x7f, 0xff] {
            load(
                &packed(|p| {
                    if let Some(byte) = p.get_mut(at) {
                        *byte = value
                    }
                }),
                true,
                Protocol::Auto,
            );
        }
    }
}

#[test]
fn every_broken_bzimage_is_refused() {
    use LoadError as E;
    let broken = |change: fn(&mut Vec<u8>)| {
        let image = bzimage(change);
        load(&ram(), &Boot { protocol: Protocol::BzImage, ..Boot::new(&image, "") })
            .expect_err("not valid")
    };
    assert!(matches!(broken(|i| put(0x202, b"hdrs")(i)), E::NotBzImage(_)));
    assert!(matches!(broken(|i| i.truncate(0x210)), E::CutOff { .. }));
    assert!(matches!(broken(|i| i.truncate(2032)), E::CutOff { need: 2048, have: 2032, .. }));
    assert!(matches!(broken(|i| put(0x206, [0x0b, 2])(i)), E::OldProtocol(0x20b)));
    assert!(matches!(broken(|i| put(0x201, [0x40])(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put(0x211, [0])(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put(0x236, [0])(i)), E::Not64Bit));
    assert!(matches!(broken(|i| put(0x1f4, [0xff; 4])(i)), E::CutOff { .. }));
    assert!(matches!(broken(|i| put(0x1f4, [0; 4])(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put(0x260, [0; 4])(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put64(0x258, 0)(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put64(0x258, BASE + 1)(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put64(0x258, u64::MAX - 4095)(i)), E::BadHeader(_)));
    assert!(matches!(broken(|i| put(0x260, [0xff; 4])(i)), E::BadHeader(_)));
    let too_large = broken(|i| put(0x260, (4u32 << 20).to_le_bytes())(i));
    assert!(matches!(too_large, E::MemoryTooSmall { need, .. } if need == 5 << 20));
    // Any other byte that is wrong shows in the checksum, unless there is a signature behind it.
    let mut image = bzimage(|_| {});
    image[1500] ^= 1;
    assert!(matches!(load(&ram(), &Boot::new(&image, "")), Err(E::Checksum)));
    image.extend(b"signature");
    load(&ram(), &Boot::new(&image, "")).unwrap();
}

#[test]
fn no_bytes_of_a_bzimage_make_it_panic() {
    let (image, ram) = (bzimage(|_| {}), ram());
    for at in (0x1f1..0x26c).chain([0, 511, 512, 1023]) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = image.clone();
            image[at] = value;
            let _ = bzimage::check(&ram, Source::from(&image), &Limit::default());
        }
        let _ = load(&ram, &Boot::new(&image[..at], ""));
    }
}

/// An ELF kernel with a PVH note.
fn pvh(entry: u64, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut notes = Vec::new();
    for (owner, kind, bytes) in [
        (&b"GNU\0"[..], 18, &[0u8; 5][..]),
        (b"Xen\0", 6, b"linux"),
        (b"Xen\0", 18, &entry.to_le_bytes()),
    ] {
        for word in [owner.len() as u32, bytes.len() as u32, kind] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(owner);
        notes.extend(bytes);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    let mut image =
        elf(BASE, &[(BASE, BASE, &[0x90; 64], 128), (0, 0, &notes, notes.len() as u64)]);
    put(120, [4])(&mut image);
    change(&mut image);
    image
}

#[test]
fn a_pvh_note_is_taken_if_it_is_not_linux_or_if_told() {
    let (image, ram) = (pvh(BASE + 8, |_| {}), ram());
    let kernel =
        load(&ram, &Boot { initrd: Some((b"x").into()), ..Boot::new(&image, "a=b") }).unwrap();
    assert_eq!((kernel.entry.0, kernel.state), (BASE + 8, StartState::Pvh));
    let mut page = [0; 4096];
    ram.read(GuestAddress(layout::BOOT_PARAMS), &mut page).unwrap();
    assert_eq!([0, 4, 8, 12].map(|at| u32_at(&page, at)), [0x336e_c578, 1, 0, 1]);
    let at = |address: u64| (address - layout::BOOT_PARAMS) as usize;
    let (modules, map) = (at(u64_at(&page, 16)), at(u64_at(&page, 40)));
    assert_eq!((u64_at(&page, 24), u32_at(&page, 48)), (layout::CMDLINE, 3));
    assert_eq!((u64_at(&page, modules), u64_at(&page, modules + 8)), ((4 << 20) - 4096, 1));
    assert_eq!((u64_at(&page, map + 48), u32_at(&page, map + 64)), (BASE, 1));
    let elf_entry = load(&ram, &Boot { protocol: Protocol::Elf, ..Boot::new(&image, "") }).unwrap();
    assert_eq!((elf_entry.entry.0, elf_entry.state), (BASE, StartState::Linux64));

    let linux = pvh(BASE + 8, |image| {
        let code = image.len() - 64;
        let at = image.windows(64).position(|bytes| bytes == [0x90; 64]).unwrap_or(code);
        put(at + 20, b"Linux version 6")(image);
    });
    let is_linux = |image| is_linux(&ram, Source::from(image), &Limit::default()).unwrap();
    assert!(is_linux(&linux) && !is_linux(&image));
    assert_eq!(load(&ram, &Boot::new(&linux, "")).unwrap().state, StartState::Linux64);
    let forced = load(&ram, &Boot { protocol: Protocol::Pvh, ..Boot::new(&linux, "") }).unwrap();
    assert_eq!(forced.state, StartState::Pvh);
}

#[test]
fn bad_pvh_notes() {
    let load =
        |image: &[u8]| load(&ram(), &Boot { protocol: Protocol::Pvh, ..Boot::new(image, "") });
    assert!(matches!(load(&pvh(BASE + 128, |_| {})), Err(LoadError::EntryOutside(_))));
    assert!(matches!(load(&pvh(1 << 33, |_| {})), Err(LoadError::EntryOutside(_))));
    let plain = elf(BASE, &[(BASE, BASE, &[0x90; 64], 128)]);
    assert!(matches!(load(&plain), Err(LoadError::NoPvhNote)));
    let image = pvh(BASE, |_| {});
    for at in 64..image.len() {
        for value in [0, 1, 3, 0x7f, 0xff] {
            let mut image = image.clone();
            image[at] = value;
            let _ = load(&image);
        }
    }
}

#[test]
fn initrds_lie_above_the_kernel_and_below_the_hole() {
    let image = elf(BASE, &[(BASE, BASE, b"code", 5000)]);
    let load = |ram: &Ram, initrd: &[u8]| {
        load(ram, &Boot { initrd: Some(initrd.into()), ..Boot::new(&image, "") })
    };
    assert!(matches!(load(&ram(), b""), Err(LoadError::EmptyInitrd)));
    let free = (3 << 20) - 8192;
    load(&ram(), &vec![1; free]).unwrap();
    let error = load(&ram(), &vec![1; free + 1]).unwrap_err();
    assert!(
        matches!(error, LoadError::InitrdTooLarge { bytes, free: have } if bytes == have + 1),
        "{error}"
    );
    let large = Ram::new(layout::HOLE_START + (8 << 20)).unwrap();
    load(&large, b"x").unwrap();
    let mut place = [0; 8];
    large.read(GuestAddress(layout::BOOT_PARAMS + 0x218), &mut place).unwrap();
    assert_eq!(u64::from(u32_at(&place, 0)), layout::HOLE_START - 4096);
}

#[test]
fn other_formats_are_named() {
    let refused = |image: &[u8], protocol| {
        let refused = load(&ram(), &Boot { protocol, ..Boot::new(image, "") }).unwrap_err();
        refused.to_string()
    };
    let mut arm64 = vec![0; 64];
    put(0x38, b"ARM\x64")(&mut arm64);
    assert!(refused(&arm64, Protocol::Auto).contains("arm64"));
    assert!(refused(&[0x1f, 0x8b, 8], Protocol::Auto).contains("gzip"));
    assert!(refused(b"#!/bin/sh", Protocol::Auto).contains("23 21 2f 62"));
    assert!(refused(&bzimage(|_| {}), Protocol::Elf).contains("bzImage"));
    assert!(refused(&elf(BASE, &[]), Protocol::BzImage).contains("ELF"));
}
