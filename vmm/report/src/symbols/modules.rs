//! Symbols of a kernel's modules, which the guest reports when it loads them.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Symbol;
use super::answers::Question;
use crate::Variable;

/// Most modules that are kept. The oldest go first.
const MODULES_MAX: usize = 256;

/// A function or a variable of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSymbol {
    /// Its name.
    pub name: Arc<str>,
    /// Its virtual address.
    pub start: u64,
    /// Its bytes; may be 0.
    pub size: u64,
    /// Whether it is a function.
    pub code: bool,
}

/// A module of the kernel.
#[derive(Clone, Debug)]
pub struct Module {
    name: Arc<str>,
    /// Virtual starts and bytes of its memory, and of what it needs only at its start.
    parts: [(u64, u64); 2],
    /// By address.
    symbols: Vec<ModuleSymbol>,
}

impl Module {
    /// A module in memory at these virtual starts, of so many bytes each. Symbols that lie
    /// elsewhere are left out.
    pub fn new(name: String, parts: [(u64, u64); 2], symbols: Vec<ModuleSymbol>) -> Self {
        let mut module = Self { name: name.into(), parts, symbols };
        let mut symbols = std::mem::take(&mut module.symbols);
        symbols.retain(|symbol| module.contains(symbol.start));
        symbols.sort_by_key(|symbol| symbol.start);
        module.symbols = symbols;
        module
    }

    /// Whether `address` is in its memory.
    pub fn contains(&self, address: u64) -> bool {
        let within = |&(start, bytes): &(u64, u64)| address.wrapping_sub(start) < bytes;
        self.parts.iter().any(within)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is told of it to whoever reads its file.
    pub(super) fn question(&self) -> Question {
        let symbols = self.symbols.iter().map(|symbol| (symbol.name.clone(), symbol.start));
        Question::Module { name: self.name.to_string(), symbols: symbols.collect() }
    }

    /// The last function or variable that begins at or below `address`.
    fn before(&self, address: u64, code: bool) -> Option<&ModuleSymbol> {
        let end = self.symbols.partition_point(|symbol| symbol.start <= address);
        self.symbols.get(..end)?.iter().rev().take(64).find(|symbol| symbol.code == code)
    }

    /// What is left of it when another module comes: none if that is where its own memory was. What
    /// it needed only at its start was given back then, and may be there.
    fn beside(mut self, other: &Self) -> Option<Self> {
        let overlap = |(a, m): (u64, u64), (b, n): (u64, u64)| {
            m > 0 && n > 0 && (a.wrapping_sub(b) < n || b.wrapping_sub(a) < m)
        };
        let [own, start] = self.parts.map(|one| other.parts.iter().any(|two| overlap(one, *two)));
        if own {
            return None;
        }
        if start {
            self.parts[1] = (0, 0);
            let mut symbols = std::mem::take(&mut self.symbols);
            symbols.retain(|symbol| self.contains(symbol.start));
            self.symbols = symbols;
        }
        Some(self)
    }
}

/// The modules of a kernel, those that are gone included.
#[derive(Debug, Default)]
pub(super) struct Modules(VecDeque<Module>);

impl Modules {
    /// Adds a module in the place of those that were in its memory.
    pub(super) fn add(&mut self, module: Module) {
        let known = std::mem::take(&mut self.0);
        self.0 = known.into_iter().filter_map(|old| old.beside(&module)).collect();
        if self.0.len() >= MODULES_MAX {
            self.0.pop_front();
        }
        self.0.push_back(module);
    }

    /// The module that holds `address`.
    pub(super) fn holding(&self, address: u64) -> Option<&Module> {
        self.0.iter().find(|module| module.contains(address))
    }

    /// The function that holds `address`.
    pub(super) fn lookup(&self, address: u64) -> Option<Symbol> {
        let module = self.holding(address)?;
        let symbol = module.before(address, true)?;
        if symbol.size > 0 && address - symbol.start >= symbol.size {
            return None;
        }
        Some(Symbol {
            name: symbol.name.clone(),
            linkage: None,
            start: symbol.start,
            size: symbol.size,
            module: Some(module.name.clone()),
        })
    }

    /// The variable that holds `address`, or else the last one before it.
    pub(super) fn lookup_data(&self, address: u64) -> Option<Variable> {
        let module = self.holding(address)?;
        let symbol = module.before(address, false)?;
        Some(Variable {
            name: symbol.name.to_string(),
            start: symbol.start,
            size: symbol.size,
            module: Some(module.name.to_string()),
            ..Variable::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, start: u64) -> Module {
        let symbols = [
            ("two", 0x20, 0x10, true),
            ("one", 0x10, 0x10, true),
            ("data", 0x800, 8, false),
            ("elsewhere", 0x9000, 8, true),
        ];
        let symbols = symbols.map(|(name, offset, size, code)| ModuleSymbol {
            name: name.into(),
            start: start + offset,
            size,
            code,
        });
        Module::new(name.into(), [(start, 0x1000), (start + 0x8000, 0)], symbols.into())
    }

    #[test]
    fn addresses_are_found_in_the_module_that_is_there() {
        let mut modules = Modules::default();
        modules.add(module("a", 0x10_0000));
        modules.add(module("b", 0x20_0000));
        let found = |modules: &Modules, address| {
            let symbol = modules.lookup(address)?;
            Some((symbol.module?.to_string(), symbol.name.to_string(), symbol.start))
        };
        assert_eq!(found(&modules, 0x10_001f), Some(("a".into(), "one".into(), 0x10_0010)));
        assert_eq!(found(&modules, 0x20_0020), Some(("b".into(), "two".into(), 0x20_0020)));
        for nowhere in [0x10_000f, 0x10_0030, 0x10_1000, 0x10_9000, 0, u64::MAX] {
            assert_eq!(found(&modules, nowhere), None, "{nowhere:#x}");
        }
        let data = modules.lookup_data(0x20_0810).expect("behind a variable");
        assert_eq!((data.name.as_str(), data.size, data.module.as_deref()), ("data", 8, Some("b")));
        // Another module comes to where the first one was.
        modules.add(module("c", 0x10_0800));
        assert_eq!(found(&modules, 0x10_001f), None);
        assert_eq!(found(&modules, 0x10_0810), Some(("c".into(), "one".into(), 0x10_0810)));
        // Another comes to where one had what it needed at its start.
        let started = ModuleSymbol { name: "start".into(), start: 0x30_8000, size: 8, code: true };
        let mut early = module("early", 0x30_0000);
        early.parts[1].1 = 0x1000;
        early.symbols.push(started);
        modules.add(early);
        assert_eq!(found(&modules, 0x30_8000), Some(("early".into(), "start".into(), 0x30_8000)));
        modules.add(module("late", 0x30_8000));
        assert_eq!(found(&modules, 0x30_0010), Some(("early".into(), "one".into(), 0x30_0010)));
        assert_eq!(found(&modules, 0x30_8000), None);
        assert_eq!(found(&modules, 0x30_8010), Some(("late".into(), "one".into(), 0x30_8010)));
        for i in 0..2 * MODULES_MAX as u64 {
            modules.add(module("many", 0x100_0000 + i * 0x1_0000));
        }
        assert_eq!(modules.0.len(), MODULES_MAX);
    }
}
