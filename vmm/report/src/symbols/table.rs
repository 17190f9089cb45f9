//! The symbol table: finds the function or variable that holds an address.

use std::ops::Range;

use object::elf::Sym64;
use object::read::elf::{ElfFile64, Sym as _};
use object::{
    LittleEndian, Object, ObjectSection, ObjectSegment, ObjectSymbol, ReadCache, SectionKind,
    SymbolKind,
};

use super::contents::Cursor;

/// The kernel's ELF file.
pub(super) type Elf<'a> = ElfFile64<'a, LittleEndian, &'a ReadCache<Cursor<'a>>>;

/// Symbols looked at before an address: overlapping ones are aliases, and few.
const BACK: usize = 32;

/// A symbol; its name stays in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub start: u64,
    /// Bytes; where the ELF gives none, those up to the next symbol.
    pub size: u64,
    /// The end of its section.
    limit: u64,
    /// Offset of its name from the start of [`Tables::names`].
    pub name: u32,
    /// Of several symbols at one address, the one with the highest rank gives its name.
    rank: u8,
}

/// All symbols.
#[derive(Default)]
pub(super) struct Tables {
    pub functions: Table,
    pub variables: Table,
    /// Offset of their names in the file.
    pub names: u64,
    /// The addresses from the lowest to the highest segment that is loaded; empty if there is none.
    pub image: Range<u64>,
}

impl Tables {
    /// The functions and the variables of `elf`.
    pub(super) fn read(elf: &Elf) -> Self {
        let strings = elf.section_by_index(elf.elf_symbol_table().string_section()).ok();
        let names =
            strings.as_ref().and_then(|section| Some(section.file_range()?.0)).unwrap_or_default();
        let strings = strings.and_then(|section| section.data().ok()).unwrap_or_default();
        let (mut functions, mut variables) = (Vec::new(), Vec::new());
        for symbol in elf.symbols() {
            let Some(section) = symbol.section_index().and_then(|at| elf.section_by_index(at).ok())
            else {
                continue;
            };
            let code = section.kind() == SectionKind::Text;
            let table = match symbol.kind() {
                SymbolKind::Text => &mut functions,
                // Assembly often leaves the type out.
                SymbolKind::Label | SymbolKind::Unknown if code => &mut functions,
                SymbolKind::Data => &mut variables,
                _ => continue,
            };
            let raw: &Sym64<LittleEndian> = symbol.elf_symbol();
            let name = raw.st_name(LittleEndian);
            let start = strings.get(name as usize..).unwrap_or_default();
            if matches!(start, [] | [0, ..] | [b'.', b'L', ..]) {
                continue;
            }
            let typed = matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Data);
            table.push(Entry {
                start: symbol.address(),
                size: symbol.size(),
                limit: section.address().saturating_add(section.size()),
                name,
                rank: u8::from(symbol.size() > 0) << 2
                    | u8::from(typed) << 1
                    | u8::from(symbol.is_global()),
            });
        }
        Self {
            functions: Table::sorted(functions),
            variables: Table::sorted(variables),
            names,
            image: image(elf),
        }
    }
}

/// The addresses of all segments that are loaded and not empty.
fn image(elf: &Elf) -> Range<u64> {
    let segments = || elf.segments().filter(|segment| segment.size() > 0);
    let start = segments().map(|segment| segment.address()).min();
    let end = segments().map(|segment| segment.address().saturating_add(segment.size())).max();
    start.unwrap_or_default()..end.unwrap_or_default()
}

/// The symbols of a kind, by address.
#[derive(Default)]
pub(super) struct Table(Vec<Entry>);

impl Table {
    fn sorted(mut entries: Vec<Entry>) -> Self {
        // Among equals the first of the file wins: it comes last, and the sort is stable.
        entries.reverse();
        entries.sort_by_key(|entry| (entry.start, entry.rank));
        let mut next = u64::MAX;
        let mut above = u64::MAX;
        for entry in entries.iter_mut().rev() {
            if entry.start != next {
                (above, next) = (next, entry.start);
            }
            if entry.size == 0 {
                entry.size = above.min(entry.limit).saturating_sub(entry.start);
            }
        }
        entries.shrink_to_fit();
        Self(entries)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The nearest symbol that holds `address`.
    pub(super) fn holding(&self, address: u64) -> Option<Entry> {
        self.before(address).find(|entry| address - entry.start < entry.size)
    }

    /// The symbol that holds `address`, or else the last one before it in its section.
    pub(super) fn nearest(&self, address: u64) -> Option<Entry> {
        self.holding(address)
            .or_else(|| self.before(address).next().filter(|entry| address < entry.limit))
    }

    /// Some entries that begin at or below `address`, nearest first.
    fn before(&self, address: u64) -> impl Iterator<Item = Entry> {
        let end = self.0.partition_point(|entry| entry.start <= address);
        self.0.iter().take(end).rev().take(BACK).copied()
    }
}
