use super::super::finding::tests::finding;
use super::super::frame::StackVariable;
use super::super::{Added, Findings, Names, Variable};
use super::*;

const IP: u64 = 0xffff_ffff_8000_1000;

fn frame(ip: u64, name: &str, inlined: bool) -> Frame {
    let (offset, size) = if inlined { (0, 0) } else { (0x10, 0x40) };
    Frame { ip, symbol: Some(name.into()), offset, size, inlined, ..Frame::default() }
}

/// An access in the first function. Each is called by the next, and inlined into it if its name
/// begins with `~`.
fn access(stack: &[&str]) -> Finding {
    let mut ip = IP;
    let mut frames = Vec::new();
    for name in stack {
        match name.strip_prefix('~') {
            Some(inlined) => frames.push(frame(ip, inlined, true)),
            None => {
                frames.push(frame(ip, name, false));
                ip += 0x1000;
            }
        }
    }
    Finding { ip: IP, frames, ..finding() }
}

fn functions_of(stack: &[&str]) -> Vec<String> {
    access(stack).identity().functions
}

#[test]
fn functions_are_the_first_that_are_no_tools() {
    assert_eq!(
        functions_of(&["~core::ptr::read_volatile::<u8>", "~kernel::peek", "kernel::a", "b", "c"]),
        ["kernel::peek", "kernel::a", "b"]
    );
    assert_eq!(
        functions_of(&[
            "<umbra_guest::Checked<kernel::Heap> as core::alloc::global::GlobalAlloc>::dealloc",
            "__rustc::__rust_dealloc",
            "~<alloc::alloc::Global as core::alloc::Allocator>::deallocate",
            "core::ptr::drop_in_place::<alloc::boxed::Box<kernel::A>>",
            "kernel::release",
        ]),
        ["kernel::release"]
    );
    assert_eq!(
        functions_of(&["memcpy", "copy_name.isra.0", "sys_open"]),
        ["copy_name", "sys_open"]
    );
    // Some debug information has only the end of the name of an inlined function.
    let mut short = access(&["~memchr_naive", "~check", "kernel::find"]);
    short.frames[0].file = Some("src/slice/memchr.rs".into());
    short.frames[0].path = Some("/rust/library/core/src/slice/memchr.rs".into());
    short.frames[1].file = Some("guest/rust/src/lib.rs".into());
    assert_eq!(short.identity().functions, ["kernel::find"]);
    // A recursion of any depth.
    assert_eq!(functions_of(&["walk", "walk", "walk", "start", "main"]), ["walk", "start", "main"]);
}

/// A free is the caller's, whatever the allocator does before it finds out.
#[test]
fn what_an_allocator_does_inside_is_left_out() {
    let free = |stack: &[&str]| Finding { access: AccessKind::Free, ..access(stack) };
    let inside = ["~check_slot", "free_in_slab", "kfree", "kernel::release", "main"];
    let functions = |finding: Finding| finding.identity().functions;
    assert_eq!(functions(free(&inside)), ["kernel::release", "main"]);
    assert_eq!(functions(access(&inside)), ["check_slot", "free_in_slab", "kernel::release"]);
    // Without a function that is known to belong to an allocator, all counts.
    assert_eq!(
        functions(free(&["free_in_slab", "pool_free", "f"])),
        ["free_in_slab", "pool_free", "f"]
    );
    // An allocation far out made the kernel free something else.
    let reclaim = ["pool_free", "a", "b", "c", "d", "e", "f", "g", "kmalloc", "h"];
    assert_eq!(functions(free(&reclaim)), ["pool_free", "a", "b"]);
    let mut one = access(&["f"]);
    let track = one.allocated.as_mut().expect("the fixture has one");
    track.frames =
        vec![frame(1, "take_slot", true), frame(1, "kmalloc", false), frame(2, "g", false)];
    assert_eq!(one.identity().origin.as_deref(), Some("g"));
}

#[test]
fn a_stack_of_tools_has_their_names() {
    assert_eq!(functions_of(&["memcpy", "kmemdup"]), ["memcpy", "kmemdup"]);
    let one = access(&["~memset", "__memset", "memcpy"]);
    assert_eq!(
        one.headline(Names::Demangled),
        "BUG: KASAN: slab-out-of-bounds in __memset+0x10/0x40"
    );
    assert_eq!(access(&[]).identity().functions, [""; 0]);
}

#[test]
fn the_headline_names_the_first_function() {
    let headline = |stack: &[&str]| access(stack).headline(Names::Demangled);
    let kernel = "BUG: KASAN: slab-out-of-bounds in kernel::f";
    assert_eq!(
        headline(&["core::ptr::read_volatile::<u8>", "kernel::f"]),
        format!("{kernel}+0x10/0x40")
    );
    assert_eq!(
        headline(&["~core::ptr::read_volatile::<u8>", "kernel::f"]),
        format!("{kernel}+0x10/0x40")
    );
    let shim = "core::ops::function::FnOnce::call_once::{shim:vtable#0}";
    assert_eq!(headline(&["~kernel::f", shim, "main"]), kernel);
    let both = format!("{kernel}, inlined into kernel::g+0x10/0x40");
    assert_eq!(headline(&["~kernel::f", "~kernel::m", "kernel::g"]), both);
    // Tools that know the ELF get a function of it.
    assert!(access(&["~f", "g", "main"]).headline(Names::Linkage).ends_with(" in g+0x10/0x40"));
    assert_eq!(access(&["~f", "g"]).identity().title(), "slab-out-of-bounds Write in f");
    let free = Finding { kind: "double-free", access: AccessKind::Free, ..access(&["kfree", "f"]) };
    assert_eq!(free.identity().title(), "double-free in f");
}

#[test]
fn two_builds_have_one_fingerprint() {
    let old = access(&["~core::ptr::read_volatile::<u8>", "~kernel::peek", "kernel::f", "main"]);
    // Another compiler inlines nothing, moves all, and adds its suffixes.
    let mut new = access(&[
        "core::ptr::read_volatile::<u8>",
        "kernel::peek.llvm.77",
        "kernel::f::h0123456789abcdef",
        "main.cold",
    ]);
    for frame in &mut new.frames {
        (frame.ip, frame.offset) = (frame.ip + 0x12345, 3);
        (frame.file, frame.line) = (Some("elsewhere.rs".into()), Some(999));
    }
    (new.ip, new.address, new.size) = (new.ip + 0x12345, 0x1234, 8);
    (new.cpu, new.task.id) = (7, 1000);
    assert_eq!(old.identity(), new.identity());
    assert_eq!(old.fingerprint(), new.fingerprint());
}

#[test]
fn the_fingerprint_is_the_documented_hash() {
    // printf '%s\n' slab-out-of-bounds write thread_main kernel::kmalloc_oob_right thread_main,
    // hashed by another implementation of FNV-1a.
    assert_eq!(finding().fingerprint().to_string(), "d9b81c7c09687433");
    let mut hash = Fnv::default();
    hash.add(b"foobar");
    assert_eq!(hash.0, 0x8594_4171_f739_67e8, "the test vector of FNV's authors");
}

#[test]
fn two_bugs_through_one_accessor_are_two_findings() {
    let mut findings = Findings::default();
    let bug = |name| access(&["core::ptr::read_volatile::<u8>", name, "kernel::main"]);
    assert_eq!(findings.add(bug("kernel::first")), Added::New(0));
    assert_eq!(findings.add(bug("kernel::second")), Added::New(1));
    assert_eq!(findings.add(bug("kernel::first")), Added::Repeat(0, 2));
    // And through an accessor of the kernel's own.
    let bug = |name| access(&["kernel::peek", name, "kernel::main"]);
    assert_eq!(findings.add(bug("kernel::first")), Added::New(2));
    assert_eq!(findings.add(bug("kernel::second")), Added::New(3));
}

#[test]
fn an_unrolled_loop_is_one_finding() {
    let mut findings = Findings::default();
    for copy in 0..8 {
        let mut one = access(&["~core::ptr::write_volatile::<u8>", "kernel::fill", "main"]);
        one.ip += 9 * copy;
        for frame in one.frames.iter_mut().filter(|frame| frame.ip == IP) {
            frame.ip = one.ip;
        }
        one.frames[1].offset += 9 * copy;
        let object = one.object.as_mut().expect("the fixture has one");
        object.offset += copy.cast_signed();
        (one.size, one.address) = (1 << (copy % 4), one.address + copy);
        let expected = if copy == 0 { Added::New(0) } else { Added::Repeat(0, copy + 1) };
        assert_eq!(findings.add(one), expected);
    }
}

#[test]
fn the_origin_tells_bugs_apart() {
    let allocated_by = |name: &str| {
        let mut one = access(&["kernel::use_it"]);
        let track = one.allocated.as_mut().expect("the fixture has one");
        track.frames = vec![frame(1, "__kmalloc", false), frame(2, name, false)];
        one
    };
    let origin = |one: &Finding| one.identity().origin;
    assert_eq!(origin(&allocated_by("kernel::new")).as_deref(), Some("kernel::new"));
    assert_ne!(allocated_by("kernel::new").fingerprint(), allocated_by("other").fingerprint());
    let mut one = access(&["kernel::use_it"]);
    one.allocated = None;
    assert_eq!(origin(&one), None);
    one.variable = Some(Variable { name: "TABLE.7".into(), ..Variable::default() });
    assert_eq!(origin(&one).as_deref(), Some("TABLE"));
    let variable =
        |offset, name: &str| StackVariable { offset, size: 8, name: name.into(), line: None };
    let at = |offset| StackFrame {
        offset,
        current: true,
        function: Some("kernel::f+0x12/0x90".into()),
        variables: vec![variable(16, ""), variable(32, "a"), variable(64, "b")],
    };
    one.variable = None;
    for (offset, name) in [(0, "a"), (31, "a"), (40, "a"), (63, "a"), (64, "b"), (500, "b")] {
        one.stack_frame = Some(at(offset));
        assert_eq!(origin(&one), Some(format!("kernel::f: {name}")), "{offset}");
    }
}

#[test]
fn without_symbols_the_place_in_the_image_counts() {
    let at = |start: u64| {
        let ip = start + 0x1234;
        let frames = [ip, start + 0x2000, 7].map(Frame::unknown).to_vec();
        Finding { ip, frames, image: start..start + 0x10000, allocated: None, ..finding() }
    };
    let one = at(0xffff_ffff_8000_0000);
    assert_eq!(one.identity().functions, ["+0x1234", "+0x2000", "0x7"]);
    assert_eq!(one.fingerprint(), at(0xffff_ffff_a000_0000).fingerprint(), "another address");
    assert_eq!(one.identity().title(), "slab-out-of-bounds Write in <no symbol>");
    // Inlined frames without a name are no functions.
    let mut named = access(&["f", "g"]);
    named.frames.insert(0, Frame { inlined: true, ..Frame::unknown(IP) });
    assert_eq!(named.identity().functions, ["f", "g"]);
}

/// Names as compilers make them, read back from an ELF.
#[test]
fn mangled_names_are_read() {
    let plain = |raw: &str| plain(&super::super::symbols::demangle(raw));
    assert_eq!(plain("_ZN6kernel4peek17h0123456789abcdefE"), "kernel::peek");
    assert_eq!(plain("_RNvCs1234_6kernel4peek"), "kernel::peek");
    assert_eq!(plain("_RNCNvCs1234_6kernel4peek0B3_"), "kernel::peek::{closure}");
    assert_eq!(plain("_RNvCs1234_6kernel4peek.llvm.123"), "kernel::peek");
    let read = "_RINvNtCs1234_4core3ptr13read_volatilehECs5678_6kernel";
    assert_eq!(plain(read), "core::ptr::read_volatile");
    assert!(is_tool(&plain(read), None));
    let dealloc =
        "_RNvXs_Cs1_11umbra_guestNtB4_7CheckedNtNtNtCs2_4core5alloc6global11GlobalAlloc7dealloc";
    assert_eq!(
        plain(dealloc),
        "<umbra_guest::Checked as core::alloc::global::GlobalAlloc>::dealloc"
    );
    assert!(is_tool(&plain(dealloc), None));
}
