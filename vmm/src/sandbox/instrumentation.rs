//! Looks for a kernel that has Umbra's runtime but was not compiled as it must be.
//!
//! Such a kernel runs, and its bugs are missed in silence: all of them if no file was compiled with
//! the sanitizer, and those of copies if the code calls a `memcpy` of its own.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use umbra_machine::loader::{Limit, LoadError, Source};

/// Most sections that are looked at.
const SECTIONS_MAX: u64 = 1 << 12;
/// Most bytes of code that are looked at.
const CODE_MAX: u64 = 16 << 20;
/// Most bytes of a name that are looked at: more than any that matters has.
const NAME_MAX: usize = 64;
/// Most symbols that are looked at.
const SYMBOLS_MAX: u64 = 1 << 20;
/// Most bytes of all names.
const STRINGS_MAX: u64 = 64 << 20;
/// Most addresses of functions that matter; some twenty do.
const TARGETS_MAX: usize = 1 << 10;
/// Opcodes of a call and a jump with a distance of four bytes.
const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;

/// What a function is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Target {
    /// A memory function that checks nothing.
    PlainCopy,
    /// A checked memory function of the runtime.
    CheckedCopy,
    /// A check of an access.
    Check,
}

/// The addresses of functions that matter, and whether the kernel has Umbra's runtime.
type Targets = (HashMap<u64, Target>, bool);

/// What may be wrong with how a kernel was compiled: a sentence each. None for a kernel without the
/// runtime, for a file that is no ELF file, and for one that is too large to look at. Only the
/// symbols, their names, and the code are read.
///
/// # Errors
/// The file cannot be read, or the time is over.
pub fn warnings(kernel: Source, limit: &Limit) -> Result<Vec<&'static str>, LoadError> {
    let sections = sections(kernel)?;
    let Some((targets, true)) = targets(kernel, &sections, limit)? else { return Ok(Vec::new()) };
    let Some(calls) = calls(kernel, &sections, &targets, limit)? else { return Ok(Vec::new()) };
    let mut warnings = Vec::new();
    if !calls.contains(&Target::Check) {
        warnings.push(
            "no code of this kernel is checked, though Umbra's runtime is linked: compile it with \
             the flags of umbra.mk or umbra.toml, after `make clean` or `cargo clean`",
        );
    } else if !calls.contains(&Target::CheckedCopy) && calls.contains(&Target::PlainCopy) {
        warnings.push(
            "this kernel's copies are not checked: its code calls a memcpy or memset that is not \
             the runtime's (docs/your-kernel.md)",
        );
    }
    Ok(warnings)
}

/// A section's header.
struct Section {
    kind: u32,
    flags: u64,
    address: u64,
    /// Its bytes in the file.
    range: Range<u64>,
    link: u32,
}

/// The headers of the sections whose contents are in the file; none for other files.
fn sections(kernel: Source) -> Result<Vec<Section>, LoadError> {
    const HEADER: usize = 64;
    let mut header = [0; HEADER];
    if kernel.bytes() < HEADER as u64 {
        return Ok(Vec::new());
    }
    kernel.read(0, &mut header)?;
    // A 64-bit little-endian file.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(Vec::new());
    }
    let (start, count) = (number(&header, 40, 8), number(&header, 60, 2));
    let bytes = count * HEADER as u64;
    let in_file = |start: u64, bytes: u64| {
        start.checked_add(bytes).filter(|end| *end <= kernel.bytes()).map(|end| start..end)
    };
    if count > SECTIONS_MAX || number(&header, 58, 2) != HEADER as u64 {
        return Ok(Vec::new());
    }
    let Some(range) = in_file(start, bytes) else { return Ok(Vec::new()) };
    let mut table = vec![0; bytes as usize];
    kernel.read(range.start, &mut table)?;
    let section = |header: &[u8]| {
        // One without contents may name any place.
        let range = in_file(number(header, 24, 8), number(header, 32, 8)).unwrap_or_default();
        Section {
            kind: number(header, 4, 4) as u32,
            flags: number(header, 8, 8),
            address: number(header, 16, 8),
            range,
            link: number(header, 40, 4) as u32,
        }
    };
    Ok(table.chunks_exact(HEADER).map(section).collect())
}

/// The little-endian number of `bytes` bytes (8 at most) at `at`.
fn number(from: &[u8], at: usize, bytes: usize) -> u64 {
    let mut number = [0; 8];
    if let Some(part) = from.get(at..at + bytes) {
        number[..bytes].copy_from_slice(part);
    }
    u64::from_le_bytes(number)
}

/// What the symbols say. None if there are none, or too many.
fn targets(
    kernel: Source,
    sections: &[Section],
    limit: &Limit,
) -> Result<Option<Targets>, LoadError> {
    const SYMTAB: u32 = 2;
    const SYMBOL: usize = 24;
    let Some(table) = sections.iter().find(|section| section.kind == SYMTAB) else {
        return Ok(None);
    };
    let Some(names) = sections.get(table.link as usize) else { return Ok(None) };
    let bytes = names.range.end - names.range.start;
    if bytes > STRINGS_MAX {
        return Ok(None);
    }
    let mut strings = vec![0; bytes as usize];
    kernel.read(names.range.start, &mut strings)?;
    let (mut targets, mut has_runtime) = (HashMap::new(), false);
    let start = table.range.start;
    let end = table.range.end.min(start.saturating_add(SYMBOLS_MAX * SYMBOL as u64));
    // A symbol may lie across the end of a block.
    let mut rest = Vec::new();
    kernel.blocks(start..end, 0, limit, |block| {
        rest.extend_from_slice(block);
        let (symbols, cut_off) = rest.as_chunks::<SYMBOL>();
        for symbol in symbols {
            let name = name(&strings, number(symbol, 0, 4) as u32);
            has_runtime |= name == b"umbra_activate";
            if let Some(target) = target(name)
                && targets.len() < TARGETS_MAX
            {
                // One address may have several names; the runtime's says more.
                let known = targets.entry(number(symbol, 8, 8)).or_insert(target);
                *known = target.max(*known);
            }
        }
        rest = cut_off.to_vec();
        true
    })?;
    Ok(Some((targets, has_runtime)))
}

/// The name at an offset, as far as it matters here: the work on each symbol is bounded.
fn name(strings: &[u8], offset: u32) -> &[u8] {
    let rest = strings.get(offset as usize..).unwrap_or_default();
    let start = rest.get(..NAME_MAX).unwrap_or(rest);
    start.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn target(name: &[u8]) -> Option<Target> {
    match name {
        b"memcpy" | b"memmove" | b"memset" => Some(Target::PlainCopy),
        b"__asan_memcpy"
        | b"__asan_memmove"
        | b"__asan_memset"
        | b"umbra_checked_memcpy"
        | b"umbra_checked_memmove"
        | b"umbra_checked_memset" => Some(Target::CheckedCopy),
        _ if name.starts_with(b"__asan_load") || name.starts_with(b"__asan_store") => {
            Some(Target::Check)
        }
        _ => None,
    }
}

/// Which targets code calls or jumps to, until nothing can be missing any more. None if there is
/// too much code to look at.
fn calls(
    kernel: Source,
    sections: &[Section],
    targets: &HashMap<u64, Target>,
    limit: &Limit,
) -> Result<Option<HashSet<Target>>, LoadError> {
    const PROGBITS: u32 = 1;
    /// Memory of the program, and instructions in it.
    const CODE: u64 = 2 | 4;
    /// Bytes of a call or jump.
    const BYTES: usize = 5;
    let mut found = HashSet::new();
    let mut left = CODE_MAX;
    for section in sections {
        if section.kind != PROGBITS || section.flags & CODE != CODE {
            continue;
        }
        let Some(less) = left.checked_sub(section.range.end - section.range.start) else {
            return Ok(None);
        };
        left = less;
        if is_complete(&found) {
            continue;
        }
        let mut address = section.address;
        kernel.blocks(section.range.clone(), BYTES - 1, limit, |block| {
            for (at, bytes) in (0u64..).zip(block.windows(BYTES)) {
                let [CALL | JUMP, distance @ ..] = bytes else { continue };
                let Ok(distance) = distance.try_into().map(i32::from_le_bytes) else { continue };
                let next = address.wrapping_add(at + BYTES as u64);
                let to = next.wrapping_add_signed(distance.into());
                found.extend(targets.get(&to).copied());
            }
            // The next block repeats the end of this one.
            let repeated = block.len().min(BYTES - 1);
            address = address.wrapping_add((block.len() - repeated) as u64);
            !is_complete(&found)
        })?;
    }
    Ok(Some(found))
}

/// Whether a kernel that has these calls gets no warning.
fn is_complete(found: &HashSet<Target>) -> bool {
    found.contains(&Target::Check) && found.contains(&Target::CheckedCopy)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The warnings about a file in memory.
    fn warnings(kernel: &[u8]) -> Vec<&'static str> {
        super::warnings(kernel.into(), &Limit::default()).unwrap()
    }

    #[test]
    fn functions_are_known_by_name() {
        assert_eq!(target(b"memcpy"), Some(Target::PlainCopy));
        assert_eq!(target(b"__asan_memcpy"), Some(Target::CheckedCopy));
        assert_eq!(target(b"__asan_load8_noabort"), Some(Target::Check));
        assert_eq!(target(b"__asan_register_globals"), None);
        assert_eq!(target(b"memcmp"), None);
    }

    #[test]
    fn names_are_bounded() {
        let mut strings = b"\0memcpy\0".to_vec();
        strings.extend([b'x'; 4096]);
        assert_eq!(name(&strings, 1), b"memcpy");
        assert_eq!(name(&strings, 8).len(), NAME_MAX);
        assert_eq!(name(&strings, u32::MAX), b"");
    }

    #[test]
    fn other_files_are_passed_over() {
        assert!(warnings(b"no ELF file").is_empty());
        let own = std::fs::read("/proc/self/exe").expect("this program");
        assert!(warnings(&own).is_empty(), "it has no runtime");
    }

    /// Whatever its fields say, no more is read than is looked at.
    #[test]
    fn no_bytes_make_it_panic_or_read_much() {
        let elf = umbra_testkit::elf::with_section(".text", &[CALL; 64]);
        for at in 0..elf.len() {
            for value in [0, 1, 2, 0x7f, 0xff] {
                let mut changed = elf.clone();
                changed[at] = value;
                warnings(&changed);
            }
            warnings(&elf[..at]);
        }
    }

    /// Part of a file.
    fn section(kind: u32, range: Range<u64>) -> Section {
        Section { kind, flags: 2 | 4, address: 0, range, link: 1 }
    }

    #[test]
    fn no_more_symbols_are_looked_at_than_a_limit() {
        let names = b"\0umbra_activate\0";
        let known = |symbols: u64| {
            // The last symbol has the name.
            let table = symbols * 24;
            let mut file = vec![0; table as usize];
            file[table as usize - 24] = 1;
            file.extend(names);
            let end = file.len() as u64;
            let sections = [section(2, 0..table), section(3, table..end)];
            targets(file.as_slice().into(), &sections, &Limit::default()).unwrap().unwrap().1
        };
        assert!(known(SYMBOLS_MAX));
        assert!(!known(SYMBOLS_MAX + 1));
    }

    #[test]
    fn too_many_names_sections_and_bytes_of_code_are_not_looked_at() {
        let file = vec![0; STRINGS_MAX as usize + 1];
        let (file, limit) = (file.as_slice(), Limit::default());
        for (names, is_read) in [(STRINGS_MAX, true), (STRINGS_MAX + 1, false)] {
            let sections = [section(2, 0..24), section(3, 0..names)];
            assert_eq!(targets(file.into(), &sections, &limit).unwrap().is_some(), is_read);
        }
        for (code, is_read) in [(CODE_MAX, true), (CODE_MAX + 1, false)] {
            // In all sections together.
            let sections = [section(1, 0..16), section(1, 0..code - 16)];
            let calls = calls(file.into(), &sections, &HashMap::new(), &limit).unwrap();
            assert_eq!(calls.is_some(), is_read);
        }
        for (count, there) in [(SECTIONS_MAX, SECTIONS_MAX), (SECTIONS_MAX + 1, 0)] {
            let mut elf = vec![0; 64 + 64 * count as usize];
            elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
            elf[40] = 64;
            elf[58] = 64;
            elf[60..62].copy_from_slice(&(count as u16).to_le_bytes());
            assert_eq!(sections(elf.as_slice().into()).unwrap().len() as u64, there);
        }
    }

    /// The test kernel, with other names of functions of the same length.
    fn renamed(names: &[(&[u8], &[u8])]) -> Option<Vec<u8>> {
        let mut kernel = crate::kernel::test_kernel()?.to_vec();
        for (from, to) in names {
            let windows = kernel.windows(from.len()).enumerate();
            let places: Vec<_> =
                windows.filter(|(_, bytes)| bytes == from).map(|(at, _)| at).collect();
            assert!(!places.is_empty(), "{}", String::from_utf8_lossy(from));
            for at in places {
                kernel[at..at + to.len()].copy_from_slice(to);
            }
        }
        Some(kernel)
    }

    #[test]
    fn what_is_missing_is_told() {
        let unchecked =
            renamed(&[(b"__asan_load", b"__none_load"), (b"__asan_store", b"__none_store")]);
        let copies = renamed(&[(b"__asan_mem", b"__none_mem")]);
        let (Some(unchecked), Some(copies)) = (unchecked, copies) else {
            umbra_skip::skip!("the test kernel is not built");
        };
        let told = warnings(&unchecked);
        assert!(matches!(told.as_slice(), [one] if one.starts_with("no code")), "{told:?}");
        let told = warnings(&copies);
        assert!(matches!(told.as_slice(), [one] if one.contains("copies")), "{told:?}");
    }

    #[test]
    fn the_test_kernel_is_compiled_as_it_must_be() {
        let Some(kernel) = crate::kernel::test_kernel() else {
            umbra_skip::skip!("the test kernel is not built");
        };
        assert_eq!(warnings(kernel), [""; 0]);
    }
}
