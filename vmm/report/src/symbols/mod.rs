//! Names and source lines of guest addresses, from the kernel's ELF and DWARF.
//!
//! The file is a user's, so nothing in it is trusted: a stripped, truncated or corrupt one gives
//! frames with addresses and a note that says why ([`Symbols::notes`]), and the work on it is
//! bounded (see `reader.rs`). Nothing is read before the first lookup, since most runs have no
//! finding.
//!
//! Addresses are those that the kernel was linked at.

mod contents;
mod dwarf;
mod modules;
mod reader;
mod relocate;
mod table;
mod variables;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use object::ReadCache;

pub use self::contents::Contents;
use self::contents::{Blocks, Cursor};
use self::dwarf::{Dwarf, Found, Source};
use self::modules::Modules;
pub use self::modules::{Module, ModuleSymbol};
use self::reader::Limits;
use self::table::{Elf, Entry, Tables};
use self::variables::Variables;
use super::{Frame, Variable};

/// Addresses whose frames are cached, since the stacks of a run are much alike.
const CACHED_MAX: usize = 4096;
/// Names and paths that frames share.
const SHARED_MAX: usize = 4 * CACHED_MAX;
/// Longest name that is printed, in bytes.
const NAME_MAX: usize = 1024;
/// Longest name in the symbol table that is read, in bytes; demangled it may be longer or shorter.
const SYMBOL_MAX: usize = 64 << 10;
/// Most files of modules that are kept in memory.
const MODULE_FILES_MAX: usize = 8;
/// Most notes that are kept.
const NOTES_MAX: usize = 8;

/// The note on debug information that makes its parser panic.
const CORRUPT: &str = "the debug information is corrupt: frames may have no source lines";

/// The meaning of an address of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Position {
    /// The instruction itself, as in a fault.
    Instruction,
    /// The address after a call or an access. Name and line are those of the byte before, which
    /// matters where a call is the last instruction of a function.
    Return,
}

/// A function of the ELF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name, demangled and without the compiler's hash.
    pub name: Arc<str>,
    /// Its name as the ELF has it, where that differs.
    pub linkage: Option<Arc<str>>,
    /// Its address.
    pub start: u64,
    /// Its bytes.
    pub size: u64,
    /// The kernel's module that it belongs to, if it is of one.
    pub module: Option<Arc<str>>,
}

type Load = Box<dyn FnOnce() -> io::Result<Contents> + Send>;

/// The symbols and the debug information of one kernel.
pub struct Symbols {
    load: Cell<Option<Load>>,
    file: OnceCell<Option<File>>,
    modules: RefCell<Modules>,
    /// Where the files of modules are.
    modules_folder: Option<PathBuf>,
    /// These files, by the modules' names, once one was needed.
    module_paths: OnceCell<HashMap<String, PathBuf>>,
    /// The debug information of modules, once it was needed; none where there is no file.
    module_files: RefCell<HashMap<Arc<str>, Option<Box<Symbols>>>>,
    cached: RefCell<HashMap<(u64, Position), Vec<Frame>>>,
    shared: RefCell<HashSet<Arc<str>>>,
    notes: RefCell<Vec<String>>,
}

/// The debug information that lines come from.
#[derive(Default)]
enum Lines {
    /// Not opened yet, or closed because it had grown.
    #[default]
    Closed,
    /// There is none.
    Missing,
    /// Open.
    Open(Box<Dwarf>),
}

/// The kernel's file, once it was needed.
struct File {
    contents: Arc<Contents>,
    blocks: Arc<Blocks>,
    symbols: Tables,
    limits: Arc<Limits>,
    dwarf: RefCell<Lines>,
    variables: OnceCell<Option<Variables>>,
}

impl Symbols {
    /// The symbols of an ELF file in memory.
    pub fn from_elf(bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes: Arc<[u8]> = bytes.into();
        Self::lazy(move || Ok(bytes))
    }

    /// The symbols of an ELF file that `load` opens or reads at the first lookup. If it fails,
    /// there are no symbols and a note says why.
    pub fn lazy<C: Into<Contents>>(load: impl FnOnce() -> io::Result<C> + Send + 'static) -> Self {
        Self {
            load: Cell::new(Some(Box::new(move || load().map(Into::into)))),
            file: OnceCell::new(),
            modules: RefCell::default(),
            modules_folder: None,
            module_paths: OnceCell::new(),
            module_files: RefCell::default(),
            cached: RefCell::default(),
            shared: RefCell::default(),
            notes: RefCell::default(),
        }
    }

    /// Looks for the debug information of modules in `.ko` files in this folder, and in those below
    /// it.
    #[must_use]
    pub fn with_modules_in(self, folder: Option<PathBuf>) -> Self {
        Self { modules_folder: folder, ..self }
    }

    /// Adds a module of the kernel. It takes the place of those that were in its memory.
    pub fn add_module(&self, module: Module) {
        self.module_files.borrow_mut().remove(module.name());
        self.modules.borrow_mut().add(module);
        self.cached.borrow_mut().clear();
    }

    /// The function that holds `address`.
    pub fn lookup(&self, address: u64) -> Option<Symbol> {
        if let Some(symbol) = self.modules.borrow().lookup(address) {
            return Some(symbol);
        }
        let file = self.file()?;
        let entry = file.symbols.functions.holding(address)?;
        let (name, linkage) = self.names(file.name(entry)?);
        Some(Symbol { name, linkage, start: entry.start, size: entry.size, module: None })
    }

    /// The global variable that holds `address`, or else the last one before it in its section,
    /// since an overrun lands behind the variable.
    pub fn lookup_data(&self, address: u64) -> Option<Variable> {
        if let Some(variable) = self.modules.borrow().lookup_data(address) {
            return Some(variable);
        }
        let file = self.file()?;
        let entry = file.symbols.variables.nearest(address)?;
        Some(Variable {
            name: names(file.name(entry)?).0,
            start: entry.start,
            size: entry.size,
            ..Variable::default()
        })
    }

    /// Adds the place of declaration to `variable`, if the debug information has it. A compiler's
    /// own description of globals may have it, too, but with the path on its command line.
    pub fn declare(&self, variable: &mut Variable) {
        let find = || self.variables()?.find(variable.start);
        // As for frames: a panic must not cost the finding.
        let found = catch_unwind(AssertUnwindSafe(find)).unwrap_or_else(|_| {
            self.note(CORRUPT.into());
            None
        });
        let Some(found) = found else { return };
        variable.file = Some(self.share(shorten(&found.file, found.directory.as_deref())));
        variable.line = found.line.filter(|line| *line > 0);
    }

    /// The frames of one address: the functions inlined there, innermost first, and last the
    /// function of the ELF that holds it. There is always that last one, if only with its address.
    pub fn frames(&self, ip: u64, position: Position) -> Vec<Frame> {
        if let Some(frames) = self.cached.borrow().get(&(ip, position)) {
            return frames.clone();
        }
        let frames = self.find_frames(ip, position);
        let mut cached = self.cached.borrow_mut();
        if cached.len() < CACHED_MAX {
            cached.insert((ip, position), frames.clone());
        }
        frames
    }

    /// The frames of a stack of return addresses.
    pub fn stack(&self, ips: &[u64]) -> Vec<Frame> {
        ips.iter().flat_map(|ip| self.frames(*ip, Position::Return)).collect()
    }

    /// The addresses of the kernel's image; empty if the file does not tell them.
    pub fn image(&self) -> Range<u64> {
        self.file().map(|file| file.symbols.image.clone()).unwrap_or_default()
    }

    /// The parts that the lookups so far did not find because the file lacks them or is damaged,
    /// one sentence each.
    pub fn notes(&self) -> Vec<String> {
        self.notes.borrow().clone()
    }

    fn note(&self, note: String) {
        let mut notes = self.notes.borrow_mut();
        if notes.len() < NOTES_MAX && !notes.contains(&note) {
            notes.push(note);
        }
    }

    fn find_frames(&self, ip: u64, position: Position) -> Vec<Frame> {
        if self.file().is_some_and(|file| file.contents.changed()) {
            self.note(
                "the kernel's file was written to since the run began: names and lines may be \
                 wrong"
                    .into(),
            );
        }
        let probe = match position {
            Position::Instruction => ip,
            Position::Return => ip.saturating_sub(1),
        };
        let mut last = Frame::unknown(ip);
        if let Some(symbol) = self.lookup(probe) {
            last.symbol = Some(symbol.name);
            last.linkage = symbol.linkage;
            last.module = symbol.module;
            last.offset = ip.saturating_sub(symbol.start);
            last.size = symbol.size;
        }
        let mut found = self.find_sources(probe);
        let directory = found.directory.as_deref();
        if let Some(source) = found.sources.pop() {
            self.locate(&mut last, &source, directory);
            // A kernel may have debug information and no symbol table.
            if let (None, Some(name), Some((start, size))) =
                (&last.symbol, &source.function, found.function)
            {
                let (name, linkage) = self.names(name.clone());
                last = Frame {
                    symbol: Some(name),
                    linkage,
                    offset: ip.saturating_sub(start),
                    size,
                    ..last
                };
            }
        }
        let inlined = found.sources.iter().map(|source| {
            let named = source.function.clone().map(|name| self.names(name));
            let (symbol, linkage) =
                named.map_or((None, None), |(name, linkage)| (Some(name), linkage));
            let mut frame = Frame { symbol, linkage, inlined: true, ..Frame::unknown(ip) };
            self.locate(&mut frame, source, directory);
            frame
        });
        inlined.chain([last.clone()]).collect()
    }

    /// [`names`], shared with the frames that have the same.
    fn names(&self, raw: String) -> (Arc<str>, Option<Arc<str>>) {
        let (name, linkage) = names(raw);
        (self.share(&name), linkage.map(|linkage| self.share(&linkage)))
    }

    fn locate(&self, frame: &mut Frame, source: &Source, directory: Option<&str>) {
        frame.file = source.file.as_deref().map(|file| self.share(shorten(file, directory)));
        frame.path = source.file.as_deref().map(|file| self.share(file));
        // DWARF has 0 for code without a line.
        frame.line = source.line.filter(|line| *line > 0);
    }

    fn share(&self, text: &str) -> Arc<str> {
        let mut shared = self.shared.borrow_mut();
        if let Some(text) = shared.get(text) {
            return text.clone();
        }
        let text: Arc<str> = text.into();
        if shared.len() < SHARED_MAX {
            shared.insert(text.clone());
        }
        text
    }

    fn find_sources(&self, probe: u64) -> Found {
        if let Some(module) = self.modules.borrow().holding(probe) {
            return self.find_in_module(module, probe);
        }
        // There is no code at the last address, and addr2line computes the one after it.
        let Some(file) = self.file().filter(|_| probe < u64::MAX) else { return Found::default() };
        let mut lines = file.dwarf.borrow_mut();
        if matches!(&*lines, Lines::Open(dwarf) if dwarf.has_grown()) {
            *lines = Lines::Closed;
        }
        if matches!(*lines, Lines::Closed) {
            *lines =
                self.open_dwarf(file).map_or(Lines::Missing, |dwarf| Lines::Open(Box::new(dwarf)));
        }
        let Lines::Open(dwarf) = &*lines else { return Found::default() };
        // The parser is made for hostile input, but a panic in it must not cost the finding.
        let mut found = catch_unwind(AssertUnwindSafe(|| dwarf.find(probe))).unwrap_or_else(|_| {
            let error = Some(CORRUPT.into());
            Found { error, ..Found::default() }
        });
        if dwarf.exhausted() {
            self.note(
                "the debug information takes too long to read: frames may have no source lines"
                    .into(),
            );
        } else if let Some(error) = found.error.take() {
            self.note(error);
        }
        found
    }

    /// The debug information of an address in a module, if its file is known.
    fn find_in_module(&self, module: &Module, probe: u64) -> Found {
        let mut files = self.module_files.borrow_mut();
        if files.len() >= MODULE_FILES_MAX && !files.contains_key(module.name()) {
            files.clear();
        }
        let open = || {
            let folder = self.modules_folder.as_deref()?;
            let paths = self.module_paths.get_or_init(|| relocate::index(folder));
            let path = paths.get(module.name())?;
            let address_of = |name: &str| module.address_of(name);
            let open = || relocate::relocated(relocate::read(path)?, &address_of);
            // As for the kernel's file: a panic must not cost the finding.
            let bytes = catch_unwind(AssertUnwindSafe(open)).ok().flatten()?;
            Some(Box::new(Self::from_elf(bytes)))
        };
        let file = files.entry(module.name().into()).or_insert_with(open);
        file.as_ref().map_or_else(Found::default, |file| file.find_sources(probe))
    }

    fn file(&self) -> Option<&File> {
        let open = || match self.load.take()?() {
            Ok(contents) => Some(self.open(contents)),
            Err(error) => {
                self.note(format!("the kernel's file cannot be read: {error}"));
                None
            }
        };
        self.file.get_or_init(open).as_ref()
    }

    fn open(&self, contents: Contents) -> File {
        let contents = Arc::new(contents);
        let blocks = Arc::new(Blocks::new(contents.clone()));
        let limits = Arc::new(Limits::new(blocks.clone()));
        let (symbols, dwarf) = match parse(&contents, Tables::read) {
            Ok(symbols) => (symbols, RefCell::default()),
            Err(error) => {
                self.note(format!("the kernel's file is no complete 64-bit ELF: {error}"));
                let (symbols, dwarf) = (Tables::default(), Lines::Missing.into());
                return File { contents, blocks, symbols, limits, dwarf, variables: None.into() };
            }
        };
        if symbols.functions.is_empty() {
            self.note(
                "the kernel has no symbol table (it is stripped): frames have addresses only"
                    .into(),
            );
        }
        File { contents, blocks, symbols, limits, dwarf, variables: OnceCell::new() }
    }

    /// The frames, which each finding has, add the note on a damaged file.
    fn variables(&self) -> Option<&Variables> {
        let file = self.file()?;
        let open = || parse(&file.contents, |elf| Variables::open(&file.blocks, elf)).ok()?.ok();
        let open = || catch_unwind(AssertUnwindSafe(open)).ok().flatten();
        file.variables.get_or_init(open).as_ref()
    }

    fn open_dwarf(&self, file: &File) -> Option<Dwarf> {
        let open = || {
            parse(&file.contents, |elf| Dwarf::open(file.limits.clone(), &file.blocks, elf)).ok()
        };
        let opened =
            catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| Some(Err(CORRUPT.into())))?;
        opened.map_err(|why| self.note(why)).ok()
    }
}

/// Parses an ELF file as far as `read` looks at it; nothing of it is kept.
fn parse<T>(contents: &Contents, read: impl FnOnce(&Elf) -> T) -> Result<T, object::Error> {
    let cache = ReadCache::new(Cursor { contents, at: 0 });
    Ok(read(&Elf::parse(&cache)?))
}

impl File {
    /// The name of a symbol in the file.
    fn name(&self, entry: Entry) -> Option<String> {
        let at = self.symbols.names.checked_add(entry.name.into())?;
        let name = self.blocks.string(usize::try_from(at).ok()?, SYMBOL_MAX)?;
        Some(String::from_utf8_lossy(&name).into_owned())
    }
}

/// The name in the source, if `raw` is a mangled one; bounded.
pub fn demangle(raw: &str) -> String {
    names(raw.to_owned()).0
}

/// The name in the source, and the name in the ELF if that is another.
fn names(mut raw: String) -> (String, Option<String>) {
    let demangled = rustc_demangle::try_demangle(&raw).ok().map(|name| format!("{name:#}"));
    shorten_name(&mut raw);
    match demangled {
        Some(mut name) if name != raw => {
            shorten_name(&mut name);
            (name, Some(raw))
        }
        _ => (raw, None),
    }
}

fn shorten_name(name: &mut String) {
    if name.len() > NAME_MAX {
        name.truncate(name.floor_char_boundary(NAME_MAX));
        name.push_str("...");
    }
}

/// The part of a path that identifies the file: without the folder of the standard library, of
/// Cargo's downloads, or of the compiler's current directory.
fn shorten<'a>(path: &'a str, directory: Option<&str>) -> &'a str {
    let after = |mark: &str, names: usize| {
        let (_, mut rest) = path.split_once(mark)?;
        for _ in 0..names {
            rest = rest.split_once('/')?.1;
        }
        Some(rest)
    };
    let inside = || {
        let directory = directory?.trim_end_matches('/');
        path.strip_prefix(directory)?.strip_prefix('/').filter(|rest| !rest.is_empty())
    };
    let rustc = || path.strip_prefix("/rustc/")?.split_once('/').map(|(_, rest)| rest);
    let short = rustc()
        .or_else(|| after("/lib/rustlib/src/rust/", 0))
        .or_else(|| after("/registry/src/", 1))
        .or_else(|| after("/git/checkouts/", 0))
        .or_else(inside);
    short.unwrap_or(path)
}

#[cfg(test)]
mod tests;
