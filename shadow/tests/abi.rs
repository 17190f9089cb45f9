//! Compares the ABI's types with their copies in C: the constants and structures of
//! `guest/c/umbra.h` and of the Linux patches.

use std::collections::BTreeMap;
use std::fs;
use std::mem::offset_of;
use std::path::Path;

use umbra_shadow::abi::{
    self, Access, Actor, CPUID_SIGNATURE, CallNumber, Features, GuestFlags, MemoryUse, NameKind,
    Owner, PackedRecord, RECORD_BYTES, RECORD_FRAMES, RecordKind, Redzone, RingHeader,
};
use umbra_shadow::codes;
use umbra_shadow::runtime::{Offer, Trap};

/// Constants in C, by name.
type Constants = BTreeMap<String, u64>;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The lines that all Linux patches add, in order.
fn added_to_linux() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/linux/patches");
    let mut patches: Vec<_> = fs::read_dir(folder)
        .expect("the patches")
        .map(|entry| entry.expect("a patch").path())
        .collect();
    patches.sort();
    let text = patches.iter().map(|path| fs::read_to_string(path).expect("a patch"));
    let added = |text: String| {
        text.lines()
            .filter_map(|line| line.strip_prefix('+'))
            .map(|line| format!("{line}\n"))
            .collect()
    };
    text.map::<String, _>(added).collect()
}

/// The value of a constant's expression: a number, `BIT(n)`, or `(1 << n)`.
fn value(expression: &str) -> Option<u64> {
    let number = |text: &str| {
        let text = text.trim().trim_end_matches(['u', 'U', 'l', 'L']);
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    };
    let inner = |open: &str| expression.strip_prefix(open)?.strip_suffix(')');
    if let Some(bit) = inner("BIT(") {
        return Some(1 << number(bit)?);
    }
    match inner("(").and_then(|shift| shift.split_once("<<")) {
        Some((base, bits)) => Some(number(base)? << number(bits)?),
        None => number(expression),
    }
}

/// The constants named `UMBRA_*` that a text defines with `#define` or in an `enum`. Leaves out
/// those without a value of their own, and other kinds of expressions.
fn constants(text: &str) -> Constants {
    let mut all = Constants::new();
    for line in text.lines() {
        let line = line.split("/*").next().unwrap_or_default().trim();
        let split = match line.strip_prefix("#define ") {
            Some(define) => define.split_once(char::is_whitespace),
            None => line.trim_end_matches(',').split_once('='),
        };
        let Some((name, expression)) = split.map(|(a, b)| (a.trim(), b.trim())) else { continue };
        if let (true, Some(value)) = (name.starts_with("UMBRA_"), value(expression)) {
            all.insert(name.to_owned(), value);
        }
    }
    all
}

/// Fails unless `found` is `expected` and the names in `own`, which have no counterpart here.
#[track_caller]
fn same(mut found: Constants, expected: &[(&str, u64)], own: &[&str]) {
    for name in own {
        assert!(found.remove(*name).is_some(), "{name} is not defined any more");
    }
    let expected = expected.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    assert_eq!(found, expected);
}

#[test]
fn umbra_h_has_these_constants() {
    let expected = [
        ("UMBRA_VERSION", abi::VERSION.into()),
        ("UMBRA_PER_PAGE", Features::PER_PAGE.bits().into()),
        ("UMBRA_FULL", Features::FULL.bits().into()),
        ("UMBRA_RING", Features::RING.bits().into()),
        ("UMBRA_SYNC", Features::SYNC.bits().into()),
        ("UMBRA_FREE_PAGE", codes::FREE_PAGE.into()),
        ("UMBRA_LARGE_REDZONE", codes::LARGE_REDZONE.into()),
        ("UMBRA_SLAB_REDZONE", codes::SLAB_REDZONE.into()),
        ("UMBRA_SLAB_FREE", codes::SLAB_FREE.into()),
        ("UMBRA_VMALLOC_INVALID", codes::VMALLOC_INVALID.into()),
        ("UMBRA_STACK_GUARD", codes::STACK_LEFT.into()),
        ("UMBRA_PAGE_SHIFT", codes::PAGE_SHIFT.into()),
        ("UMBRA_GRANULE_SHIFT", codes::GRANULE_SHIFT.into()),
        ("UMBRA_NAME_MAX", abi::NAME_MAX),
    ];
    same(constants(&read("guest/c/umbra.h")), &expected, &[]);
}

#[test]
fn umbra_h_has_these_structures() {
    // The header asserts these sizes and offsets of its own structures.
    let expected = [
        ("sizeof(struct umbra_offer)", size_of::<Offer>()),
        ("offsetof(struct umbra_offer, version)", offset_of!(Offer, version)),
        ("offsetof(struct umbra_offer, page_window)", offset_of!(Offer, page_window)),
        ("offsetof(struct umbra_offer, page_window_bytes)", offset_of!(Offer, page_window_bytes)),
        ("offsetof(struct umbra_offer, byte_window)", offset_of!(Offer, byte_window)),
        ("offsetof(struct umbra_offer, byte_window_bytes)", offset_of!(Offer, byte_window_bytes)),
        ("offsetof(struct umbra_offer, virtual_bytes)", offset_of!(Offer, virtual_bytes)),
        ("sizeof(struct umbra_ring_header)", size_of::<RingHeader>()),
        ("sizeof(struct umbra_trap)", size_of::<Trap>()),
        ("offsetof(struct umbra_trap, rsi)", offset_of!(Trap, rsi)),
        ("offsetof(struct umbra_trap, rbp)", offset_of!(Trap, rbp)),
        ("offsetof(struct umbra_trap, rip)", offset_of!(Trap, rip)),
        ("offsetof(struct umbra_trap, rsp)", offset_of!(Trap, rsp)),
    ];
    let header = read("guest/c/umbra.h");
    let asserted: Vec<(&str, usize)> = header
        .lines()
        .filter_map(|line| {
            line.strip_prefix("UMBRA_ASSERT(")?.split(", \"").next()?.split_once(" == ")
        })
        .map(|(what, value)| (what, value.parse().expect("a number")))
        .collect();
    assert_eq!(asserted, expected);
}

#[test]
fn the_linux_patches_have_these_constants() {
    let number = |call: CallNumber| u64::from(call);
    let expected = [
        ("UMBRA_PAGE_VALID", codes::PAGE_VALID.into()),
        ("UMBRA_PAGE_BYTES", codes::PAGE_BYTES.into()),
        ("UMBRA_PAGE_BUSY", codes::PAGE_BUSY.into()),
        ("UMBRA_VERSION", abi::VERSION.into()),
        ("UMBRA_LEAF_FEATURES", abi::CPUID_LEAF_FEATURES.into()),
        ("UMBRA_LEAF_PAGE_WINDOW", abi::CPUID_LEAF_PAGE_WINDOW.into()),
        ("UMBRA_LEAF_BYTE_WINDOW", abi::CPUID_LEAF_BYTE_WINDOW.into()),
        ("UMBRA_LEAF_VIRTUAL", abi::CPUID_LEAF_VIRTUAL.into()),
        ("UMBRA_LEAF_SETTINGS", abi::CPUID_LEAF_SETTINGS.into()),
        ("UMBRA_PORT", abi::PORT.into()),
        ("UMBRA_DOORBELL_PORT", abi::DOORBELL_PORT.into()),
        ("UMBRA_DOORBELL", Features::DOORBELL.bits().into()),
        ("UMBRA_DOORBELL_RECORDS", abi::doorbell_interval(abi::RING_MAX_RECORDS)),
        ("UMBRA_PER_PAGE", Features::PER_PAGE.bits().into()),
        ("UMBRA_FULL", Features::FULL.bits().into()),
        ("UMBRA_RING", Features::RING.bits().into()),
        ("UMBRA_STAMPS_TSC", Features::STAMPS_TSC.bits().into()),
        ("UMBRA_STAMPS_FENCED", Features::STAMPS_FENCED.bits().into()),
        ("UMBRA_SYNC", Features::SYNC.bits().into()),
        ("UMBRA_HELLO", number(CallNumber::Hello)),
        ("UMBRA_REGION_ADD", number(CallNumber::RegionAdd)),
        ("UMBRA_RING_SETUP", number(CallNumber::RingSetup)),
        ("UMBRA_RING_DRAIN", number(CallNumber::RingDrain)),
        ("UMBRA_POISON", number(CallNumber::Poison)),
        ("UMBRA_UNPOISON", number(CallNumber::Unpoison)),
        ("UMBRA_ALLOCATED", number(CallNumber::Allocated)),
        ("UMBRA_FREED", number(CallNumber::Freed)),
        ("UMBRA_REPORT", number(CallNumber::Report)),
        ("UMBRA_NAME", number(CallNumber::Name)),
        ("UMBRA_GLOBALS", number(CallNumber::Globals)),
        ("UMBRA_VIRTUAL_ADD", number(CallNumber::VirtualAdd)),
        ("UMBRA_MODULE", number(CallNumber::Module)),
        ("UMBRA_FREE_PAGES_UNUSED", GuestFlags::FREE_PAGES_UNUSED.bits()),
        ("UMBRA_QUARANTINE_UNUSED", GuestFlags::QUARANTINE_UNUSED.bits()),
        ("UMBRA_MEMORY_AS_BEFORE", MemoryUse::Unchanged.into()),
        ("UMBRA_MEMORY_STACK", MemoryUse::Stack.into()),
        ("UMBRA_NAME_CACHE", NameKind::Cache.into()),
        ("UMBRA_NAME_TASK", NameKind::Task.into()),
        ("UMBRA_NAME_MAX", abi::NAME_MAX),
        ("UMBRA_ACCESS_READ", Access::Read.into()),
        ("UMBRA_ACCESS_WRITE", Access::Write.into()),
        ("UMBRA_DOUBLE_FREE", Access::DoubleFree.into()),
        ("UMBRA_INVALID_FREE", Access::InvalidFree.into()),
        ("UMBRA_RECORD_ALLOCATED", u8::from(RecordKind::Allocated).into()),
        ("UMBRA_RECORD_FREED", u8::from(RecordKind::Freed).into()),
        ("UMBRA_RECORD_CACHE", u8::from(RecordKind::Cache).into()),
        ("UMBRA_RECORD_TASK", u8::from(RecordKind::Task).into()),
        ("UMBRA_RECORD_FRAMES", RECORD_FRAMES as u64),
        ("UMBRA_RING_SPARE", abi::RING_SPARE),
        ("UMBRA_REDZONE_ADAPTIVE", Redzone::Adaptive.to_register().into()),
    ];
    // Constants of its tables, its quarantine, and its part of the virtual range.
    let own = [
        "UMBRA_CPUS",
        "UMBRA_FRAME_MAX",
        "UMBRA_FRACTION",
        "UMBRA_AT_ONCE",
        "UMBRA_SPARES",
        "UMBRA_SPARES_LOW",
        "UMBRA_VMALLOC_MOST",
    ];
    let added = added_to_linux();
    same(constants(&added), &expected, &own);
    let signature: Vec<u8> = CPUID_SIGNATURE.iter().flat_map(|word| word.to_le_bytes()).collect();
    let line = format!("#define UMBRA_SIGNATURE\t\t\"{}\"\n", String::from_utf8_lossy(&signature));
    assert!(added.contains(&line), "{line}");
    // In units of the same size.
    assert_eq!(abi::VIRTUAL_UNIT, 4096 << 12);
    assert!(added.contains("#define UMBRA_UNIT\t\t(PAGE_SIZE << PAGE_SHIFT)\n"));
}

/// Fields of a structure of the Linux patches, with the offset of each. Unions are one field.
fn fields(text: &str, structure: &str) -> BTreeMap<String, usize> {
    let start = text.find(&format!("struct {structure} {{\n")).expect("the structure");
    let mut offset = 0;
    let mut fields = BTreeMap::new();
    for line in text[start..].lines().skip(1).map(|line| line.trim().trim_end_matches(';')) {
        let Some((kind, name)) = line.split_once(' ') else { break };
        let bytes = match kind {
            "u8" => 1,
            "u16" => 2,
            "u32" => 4,
            "u64" => 8,
            "union" => {
                fields.insert("frames".to_owned(), offset);
                break;
            }
            other => panic!("a field of type {other}"),
        };
        fields.insert(name.to_owned(), offset);
        offset += bytes;
    }
    fields
}

#[test]
fn the_linux_patches_have_this_record() {
    const STAMP: u64 = 0x1020_3040_5566_7788;
    let fields = fields(&added_to_linux(), "umbra_record");
    let owner = Owner { allocator: 0x11, note: 0x22 };
    let packed = PackedRecord::quarantined(owner, 0x3344_5566);
    let actor = Actor { cpu: 0x7788, task: 0x99aa_bbcc };
    let bytes = packed.record(7, actor.to_register(0), 0xddee_ff00_1122_3344, STAMP).to_bytes();
    let at = |name: &str, bytes_of_field: usize| {
        let field = &bytes[fields[name]..][..bytes_of_field];
        field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    assert_eq!(at("kind", 1), u64::from(u8::from(RecordKind::Freed)));
    assert_eq!(at("depth", 1), 7);
    assert_eq!(at("cache", 2), owner.to_bits().into());
    assert_eq!(at("task", 4), actor.task.into());
    assert_eq!(at("address", 8), 0xddee_ff00_1122_3344);
    assert_eq!(at("size", 4), 0x3344_5566);
    assert_eq!(at("stamp_low", 4) | at("stamp_high", 4) << 32, STAMP);
    assert_eq!(fields["frames"] + 4 * RECORD_FRAMES, RECORD_BYTES as usize);
    assert_eq!(fields.len(), 9);
}

#[test]
fn every_number_is_that_of_one_variant() {
    for number in 0..=300 {
        let call = CallNumber::ALL.iter().find(|call| u32::from(**call) == number);
        assert_eq!(CallNumber::try_from(number).ok(), call.copied());
        let access = Access::ALL.iter().find(|access| u32::from(u16::from(**access)) == number);
        assert_eq!(Access::try_from(number as u16).ok(), access.copied());
    }
    assert_eq!(CallNumber::try_from(1 << 16 | 1), Err(1 << 16 | 1));
    for redzone in [Redzone::Off, Redzone::Adaptive, Redzone::Bytes(16), Redzone::Bytes(4096)] {
        assert_eq!(Redzone::from_register(redzone.to_register()), redzone);
    }
    for (bytes, expected) in [(9, 16), (4097, 4096), (u32::MAX, 4096)] {
        assert_eq!(Redzone::Bytes(bytes).to_register(), expected);
    }
    assert_eq!(Redzone::from_register(u32::MAX), Redzone::Bytes(4096));
}
