//! Looks for a kernel that has Umbra's runtime but was not compiled as it must be.
//!
//! Such a kernel runs, and its bugs are missed in silence: all of them if no file was compiled with
//! the sanitizer, and those of copies if the code calls a `memcpy` of its own.

use std::collections::HashMap;

use object::read::elf::{ElfFile64, Sym as _};
use object::{LittleEndian, Object as _, ObjectSection as _, ObjectSymbol as _, SectionKind};

/// Most bytes of code that are looked at.
const CODE_MAX: usize = 16 << 20;
/// Most bytes of a name that are looked at: more than any that matters has.
const NAME_MAX: usize = 64;
/// Most symbols that are looked at.
const SYMBOLS_MAX: usize = 1 << 20;
/// Opcodes of a call and a jump with a distance of four bytes.
const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;

/// A kernel's ELF file.
type Elf<'a> = ElfFile64<'a, LittleEndian>;

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

/// What may be wrong with how a kernel was compiled: a sentence each. None for a kernel without the
/// runtime, and for a file that is no ELF file.
pub(super) fn warnings(kernel: &[u8]) -> Vec<&'static str> {
    let Ok(elf) = Elf::parse(kernel) else { return Vec::new() };
    let strings = elf.section_by_index(elf.elf_symbol_table().string_section());
    let strings = strings.and_then(|section| section.data()).unwrap_or_default();
    let mut targets = HashMap::new();
    let mut has_runtime = false;
    for symbol in elf.symbols().take(SYMBOLS_MAX) {
        let name = name(strings, symbol.elf_symbol().st_name(LittleEndian));
        has_runtime |= name == b"umbra_activate";
        if let Some(target) = target(name) {
            // One address may have several names; the runtime's says more.
            let known = targets.entry(symbol.address()).or_insert(target);
            *known = target.max(*known);
        }
    }
    if !has_runtime {
        return Vec::new();
    }
    let Some(calls) = calls(&elf, &targets) else { return Vec::new() };
    let count = |target| calls.get(&target).copied().unwrap_or_default();
    let mut warnings = Vec::new();
    if count(Target::Check) == 0 {
        warnings.push(
            "no code of this kernel is checked, though Umbra's runtime is linked: compile it with \
             the flags of umbra.mk or umbra.toml, after `make clean` or `cargo clean`",
        );
    } else if count(Target::CheckedCopy) == 0 && count(Target::PlainCopy) > 0 {
        warnings.push(
            "this kernel's copies are not checked: its code calls a memcpy or memset that is not \
             the runtime's (docs/your-kernel.md)",
        );
    }
    warnings
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

/// How often code calls or jumps to the targets. None if there is too much code to look at.
fn calls(elf: &Elf, targets: &HashMap<u64, Target>) -> Option<HashMap<Target, u64>> {
    let mut counts = HashMap::new();
    let mut left = CODE_MAX;
    for section in elf.sections() {
        if section.kind() != SectionKind::Text {
            continue;
        }
        let Ok(code) = section.data() else { continue };
        left = left.checked_sub(code.len())?;
        for (at, five) in (0u64..).zip(code.windows(5)) {
            let [CALL | JUMP, distance @ ..] = five else { continue };
            let Ok(distance) = distance.try_into().map(i32::from_le_bytes) else { continue };
            let next = section.address().wrapping_add(at + 5);
            let to = next.wrapping_add_signed(distance.into());
            if let Some(target) = targets.get(&to) {
                *counts.entry(*target).or_default() += 1;
            }
        }
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

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
