//! The debug information of a module: finds its `.ko` file, and gives the addresses in it the
//! values that they have in the guest.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use object::{
    Object as _, ObjectKind, ObjectSection as _, ObjectSymbol as _, RelocationKind,
    RelocationTarget, SectionIndex, SymbolKind,
};

/// Most entries of folders that are looked at, and how deep folders are searched.
const ENTRIES_MAX: usize = if cfg!(test) { 1 << 10 } else { 1 << 17 };
const DEPTH_MAX: usize = 16;
/// Largest module, in bytes.
const FILE_MAX: u64 = 256 << 20;

/// The files of modules in `folder` and below it, by the modules' names. Links are not followed.
/// The guest's name of a module only chooses among them.
pub(super) fn index(folder: &Path) -> HashMap<String, PathBuf> {
    let (mut files, mut entries) = (HashMap::new(), 0);
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            entries += 1;
            if entries > ENTRIES_MAX {
                return files;
            }
            let Ok(kind) = entry.file_type() else { continue };
            let path = entry.path();
            if kind.is_dir() && depth < DEPTH_MAX {
                folders.push((path, depth + 1));
            } else if let Some(name) = module_name(&path).filter(|_| kind.is_file()) {
                files.entry(name).or_insert(path);
            }
        }
    }
    files
}

/// The name of the module whose file this is. The kernel has `_` where the file may have `-`.
fn module_name(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_str()?;
    (path.extension()? == "ko").then(|| stem.replace('-', "_"))
}

/// Reads a module's file.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(FILE_MAX + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= FILE_MAX).then_some(bytes)
}

/// The file with relocated debug information. `address_of` gives the guest's address of a function
/// or a variable of the module. None if the file is no module, or none of its symbols is known.
pub(super) fn relocated(
    mut file: Vec<u8>,
    address_of: &dyn Fn(&str) -> Option<u64>,
) -> Option<Vec<u8>> {
    for (at, bytes, value) in values(&file, address_of)? {
        if let Some(to) = file.get_mut(at..).and_then(|rest| rest.get_mut(..bytes)) {
            to.copy_from_slice(value.to_le_bytes().get(..bytes)?);
        }
    }
    Some(file)
}

/// Offset in the file, bytes and value of each relocation of debug information.
fn values(
    file: &[u8],
    address_of: &dyn Fn(&str) -> Option<u64>,
) -> Option<Vec<(usize, usize, u64)>> {
    let elf = object::File::parse(file).ok()?;
    if elf.kind() != ObjectKind::Relocatable {
        return None;
    }
    // Sections lie where one of their symbols is.
    let mut bases: HashMap<SectionIndex, u64> = HashMap::new();
    for symbol in elf.symbols() {
        if let (SymbolKind::Text | SymbolKind::Data, Some(section), Ok(name)) =
            (symbol.kind(), symbol.section_index(), symbol.name())
            && !bases.contains_key(&section)
            && let Some(address) = address_of(name)
        {
            bases.insert(section, address.wrapping_sub(symbol.address()));
        }
    }
    if bases.is_empty() {
        return None;
    }
    let mut values = Vec::new();
    for section in elf.sections() {
        let Some((start, size)) = section.file_range() else { continue };
        if !section.name().is_ok_and(|name| name.starts_with(".debug_")) {
            continue;
        }
        for (offset, relocation) in section.relocations() {
            let RelocationTarget::Symbol(target) = relocation.target() else { continue };
            let bytes = usize::from(relocation.size() / 8);
            let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= size);
            if relocation.kind() != RelocationKind::Absolute || !fits || bytes > 8 {
                continue;
            }
            let Ok(symbol) = elf.symbol_by_index(target) else { continue };
            let base = symbol.section_index().and_then(|index| bases.get(&index));
            let value = symbol
                .address()
                .wrapping_add(base.copied().unwrap_or_default())
                .wrapping_add_signed(relocation.addend());
            values.push((usize::try_from(start.checked_add(offset)?).ok()?, bytes, value));
        }
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::{Position, Symbols};
    use super::*;

    #[test]
    fn a_module_is_found_by_name_and_nothing_else_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let deep = folder.path().join("kernel/drivers");
        fs::create_dir_all(&deep).expect("folders");
        fs::write(deep.join("my-driver.ko"), b"x").expect("a file");
        std::os::unix::fs::symlink("/etc/passwd", deep.join("other.ko")).expect("a link");
        let files = index(folder.path());
        assert_eq!(files.get("my_driver"), Some(&deep.join("my-driver.ko")));
        for other in ["my_drive", "other", "../my_driver", "", "kernel/drivers/my-driver"] {
            assert_eq!(files.get(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_searched_and_read_is_bounded() {
        let folder = tempfile::tempdir().expect("a folder");
        let level = |depth: usize| folder.path().join("d/".repeat(depth));
        fs::create_dir_all(level(DEPTH_MAX + 1)).expect("folders");
        fs::write(level(DEPTH_MAX).join("deep.ko"), b"x").expect("a file");
        fs::write(level(DEPTH_MAX + 1).join("deeper.ko"), b"x").expect("a file");
        let files = index(folder.path());
        assert!(files.contains_key("deep") && !files.contains_key("deeper"), "{files:?}");

        let many = tempfile::tempdir().expect("a folder");
        for i in 0..2 * ENTRIES_MAX {
            fs::write(many.path().join(format!("{i}.ko")), b"").expect("a file");
        }
        assert_eq!(index(many.path()).len(), ENTRIES_MAX);

        let file = many.path().join("large.ko");
        let sparse = File::create(&file).expect("a file");
        for (bytes, is_read) in [(FILE_MAX, true), (FILE_MAX + 1, false)] {
            sparse.set_len(bytes).expect("a sparse file");
            assert_eq!(read(&file).is_some(), is_read);
        }
    }

    #[test]
    fn lines_of_a_relocatable_file_are_found_at_its_addresses() {
        let folder = tempfile::tempdir().expect("a folder");
        let (source, file) = (folder.path().join("a.c"), folder.path().join("a.o"));
        fs::write(&source, "int one(int x)\n{\n\treturn x + 1;\n}\n").expect("a file");
        let mut compiler = Command::new("cc");
        compiler.args(["-g", "-O1", "-c", "-o"]).arg(&file).arg(&source);
        if !compiler.status().is_ok_and(|status| status.success()) {
            umbra_skip::skip!("there is no C compiler");
        }
        let bytes = read(&file).expect("it was compiled");
        assert!(relocated(bytes.clone(), &|_| None).is_none(), "no symbol is known");
        let at = 0xffff_ffff_c000_1000;
        let relocated = relocated(bytes, &|name| (name == "one").then_some(at)).expect("a module");
        let frames = Symbols::from_elf(relocated).frames(at, Position::Instruction);
        let frame = frames.last().expect("there is always one");
        assert!(matches!(frame.line, Some(2 | 3)), "{frames:?}");
        assert!(frame.file.as_deref().is_some_and(|file| file.ends_with("a.c")), "{frames:?}");
    }

    #[test]
    fn damaged_files_are_no_modules() {
        assert!(relocated(Vec::new(), &|_| Some(0)).is_none());
        assert!(relocated(vec![0x7f; 4096], &|_| Some(0)).is_none());
        let own = fs::read("/proc/self/exe").expect("this program");
        assert!(relocated(own, &|_| Some(0)).is_none(), "not relocatable");
    }
}
