//! The symbol table: which function or variable holds an address.

use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, SectionKind, SymbolIndex, SymbolKind};

/// The kernel's ELF file.
pub(super) type Elf<'a> = ElfFile64<'a, LittleEndian>;

/// Symbols looked at before an address: overlapping ones are aliases, and few.
const BACK: usize = 32;

/// A symbol; its name stays in the file, where [`Entry::index`] finds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub start: u64,
    /// Bytes; where the ELF gives none, those up to the next symbol.
    pub size: u64,
    /// Where its section ends.
    limit: u64,
    pub index: SymbolIndex,
    /// Of several symbols at one address, the one with the highest rank gives its name.
    rank: u8,
}

/// The symbols of a kind, by address.
#[derive(Default)]
pub(super) struct Table(Vec<Entry>);

impl Table {
    /// The functions and the variables of `elf`.
    pub(super) fn read(elf: &Elf) -> (Self, Self) {
        let (mut functions, mut variables) = (Vec::new(), Vec::new());
        for symbol in elf.symbols() {
            let Some(section) = symbol.section_index().and_then(|at| elf.section_by_index(at).ok()) else {
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
            if !symbol.name_bytes().is_ok_and(|name| !name.is_empty() && !name.starts_with(b".L")) {
                continue;
            }
            let typed = matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Data);
            table.push(Entry {
                start: symbol.address(),
                size: symbol.size(),
                limit: section.address().saturating_add(section.size()),
                index: symbol.index(),
                rank: u8::from(symbol.size() > 0) << 2 | u8::from(typed) << 1 | u8::from(symbol.is_global()),
            });
        }
        (Self::sorted(functions), Self::sorted(variables))
    }

    fn sorted(mut entries: Vec<Entry>) -> Self {
        // Among equals the first of the file wins, so that a name does not depend on the sort.
        entries.sort_by_key(|entry| (entry.start, entry.rank, std::cmp::Reverse(entry.index.0)));
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
        self.holding(address).or_else(|| self.before(address).next().filter(|entry| address < entry.limit))
    }

    /// Some entries that begin at or below `address`, nearest first.
    fn before(&self, address: u64) -> impl Iterator<Item = Entry> {
        let end = self.0.partition_point(|entry| entry.start <= address);
        self.0.iter().take(end).rev().take(BACK).copied()
    }
}
