//! What is read out of the kernel's file, and the files of its modules, as questions and answers.
//! All parsing of these files is here and below, and nothing else uses it: so it can happen in
//! another process ([`worker`](crate::worker)).

use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use object::ReadCache;
use serde::{Deserialize, Serialize};

use super::contents::{Blocks, Contents, Cursor};
use super::dwarf::{Dwarf, Found};
use super::names::{names, shorten};
use super::reader::Limits;
use super::relocate;
use super::table::{Elf, Entry, Tables};
use super::variables::Variables;
use crate::bounds::{PATH_MAX, SHOWN_PATH_MAX};
use crate::printable::cut;

/// Longest name in the symbol table that is read, in bytes; demangled it may be longer or shorter.
const SYMBOL_MAX: usize = 64 << 10;
/// Most files of modules that are kept in memory.
const MODULE_FILES_MAX: usize = 8;
/// Most notes that are kept.
pub(super) const NOTES_MAX: usize = 8;

/// The note on debug information that makes its parser panic.
pub(super) const CORRUPT: &str =
    "the debug information is corrupt: frames may have no source lines";

/// The note on a file that is not the one that runs.
pub(super) const CHANGED: &str =
    "the kernel's file was written to since the run began: names and lines may be wrong";

/// A question.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Question {
    /// What is at an address of code?
    Code {
        address: u64,
        /// From the debug information, too.
        lines: bool,
        /// The module that the address belongs to, if it is of one.
        module: Option<String>,
    },
    /// Which variable is at this address, or before it?
    Data { address: u64 },
    /// Where is the variable declared that begins at this address?
    Declaration { address: u64 },
    /// Where is the kernel's image?
    Image,
    /// No question: the addresses of a module's functions and variables.
    Module { name: String, symbols: Vec<(Arc<str>, u64)> },
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Code(Code),
    Data(Symbol),
    Declaration { file: String, line: Option<u32> },
    Image { start: u64, end: u64 },
}

/// What is known, and what is new about the file's state.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub answer: Option<Answer>,
    /// The parts that the lookups so far did not find because the file lacks them or is damaged,
    /// one sentence each.
    pub notes: Vec<String>,
    /// There was no time for all of the answer: later there may be.
    #[serde(skip)]
    pub late: bool,
}

/// What is at an address of code.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Code {
    /// The function of the symbol table.
    pub symbol: Option<Symbol>,
    /// From the debug information, innermost first; the last is the function that the others were
    /// inlined into.
    pub sources: Vec<Source>,
    /// Start and bytes of that last function.
    pub function: Option<(u64, u64)>,
}

/// A name in the source, and the one in the ELF where that is another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Name {
    pub name: String,
    pub linkage: Option<String>,
}

/// An entry of the symbol table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Symbol {
    pub name: Name,
    pub start: u64,
    pub size: u64,
}

/// A place in the source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Source {
    pub function: Option<Name>,
    /// The path when it was compiled.
    pub path: Option<String>,
    /// The part of it that is shown.
    pub file: Option<String>,
    pub line: Option<u32>,
}

impl Name {
    fn of(raw: String) -> Self {
        let (name, linkage) = names(raw);
        Self { name, linkage }
    }
}

impl Source {
    fn of(source: super::dwarf::Source, directory: Option<&str>) -> Self {
        let file = source.file.as_deref().map(|file| shown_path(file, directory));
        Self {
            function: source.function.map(Name::of),
            file,
            // A part of a path would name another file.
            path: source.file.filter(|path| path.len() <= PATH_MAX),
            // DWARF has 0 for code without a line.
            line: source.line.filter(|line| *line > 0),
        }
    }
}

fn shown_path(path: &str, directory: Option<&str>) -> String {
    cut(shorten(path, directory), SHOWN_PATH_MAX).into_owned()
}

/// The debug information that lines come from.
#[derive(Default)]
pub(super) enum Lines {
    /// Not opened yet, or closed because it had grown.
    #[default]
    Closed,
    /// There is none.
    Missing,
    /// Open.
    Open(Box<Dwarf>),
}

/// The kernel's file.
struct File {
    contents: Arc<Contents>,
    blocks: Arc<Blocks>,
    symbols: Tables,
    limits: Arc<Limits>,
    lines: Lines,
    /// Opened once it was needed; then none if there are none.
    variables: Option<Option<Variables>>,
}

/// Answers questions.
pub(crate) struct Answers {
    /// None if it cannot be read.
    file: Option<File>,
    /// Where the files of modules are.
    modules_folder: Option<PathBuf>,
    /// These files, by the modules' names, once one was needed.
    module_paths: Option<HashMap<String, PathBuf>>,
    /// Addresses by the names of modules and of what is in them.
    modules: HashMap<String, HashMap<Arc<str>, u64>>,
    /// The debug information of modules, once it was needed; none where there is no file.
    module_files: HashMap<String, Option<Box<Self>>>,
    notes: Vec<String>,
}

impl Answers {
    /// Answers from a file. Looks for those of modules in a folder.
    pub(crate) fn new(file: io::Result<Contents>, modules_folder: Option<PathBuf>) -> Self {
        let mut answers = Self {
            file: None,
            modules_folder,
            module_paths: None,
            modules: HashMap::new(),
            module_files: HashMap::new(),
            notes: Vec::new(),
        };
        match file {
            Ok(contents) => answers.open(contents),
            Err(error) => answers.note(format!("the kernel's file cannot be read: {error}")),
        }
        answers
    }

    /// Answers a question.
    pub(crate) fn reply(&mut self, question: Question) -> Reply {
        let answer = match question {
            Question::Code { address, lines, module } => {
                Some(Answer::Code(self.code(address, lines, module.as_deref())))
            }
            Question::Data { address } => self.data(address).map(Answer::Data),
            Question::Declaration { address } => self.declaration(address),
            Question::Image => self.file.as_ref().map(|file| Answer::Image {
                start: file.symbols.image.start,
                end: file.symbols.image.end,
            }),
            Question::Module { name, symbols } => {
                self.module_files.remove(&name);
                // The first of several symbols of one name counts.
                let symbols = symbols.into_iter().rev().collect();
                self.modules.insert(name, symbols);
                None
            }
        };
        Reply { answer, notes: self.notes.clone(), late: false }
    }

    fn note(&mut self, note: String) {
        if self.notes.len() < NOTES_MAX && !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn open(&mut self, contents: Contents) {
        let contents = Arc::new(contents);
        let blocks = Arc::new(Blocks::new(contents.clone()));
        let limits = Arc::new(Limits::new(blocks.clone()));
        let (symbols, lines, variables) = match parse(&contents, Tables::read) {
            Ok(symbols) => (symbols, Lines::Closed, None),
            Err(error) => {
                self.note(format!("the kernel's file is no complete 64-bit ELF: {error}"));
                self.file = Some(File {
                    contents,
                    blocks,
                    symbols: Tables::default(),
                    limits,
                    lines: Lines::Missing,
                    variables: Some(None),
                });
                return;
            }
        };
        if symbols.functions.is_empty() {
            self.note(
                "the kernel has no symbol table (it is stripped): frames have addresses only"
                    .into(),
            );
        }
        self.file = Some(File { contents, blocks, symbols, limits, lines, variables });
    }

    fn code(&mut self, address: u64, lines: bool, module: Option<&str>) -> Code {
        if self.file.as_ref().is_some_and(|file| file.contents.changed()) {
            self.note(CHANGED.into());
        }
        let symbol = match (&self.file, module) {
            (Some(file), None) => file.function(address),
            _ => None,
        };
        if !lines {
            return Code { symbol, ..Code::default() };
        }
        let found = self.sources(address, module);
        let directory = found.directory.as_deref();
        let sources = found.sources.into_iter().map(|source| Source::of(source, directory));
        Code { symbol, sources: sources.collect(), function: found.function }
    }

    fn data(&self, address: u64) -> Option<Symbol> {
        let file = self.file.as_ref()?;
        file.symbol(file.symbols.variables.nearest(address)?)
    }

    fn declaration(&mut self, address: u64) -> Option<Answer> {
        let variables = self.variables()?;
        // As for frames: a panic must not cost the finding.
        let found = catch_unwind(AssertUnwindSafe(|| variables.find(address)));
        let found = found.unwrap_or_else(|_| {
            self.note(CORRUPT.into());
            None
        })?;
        let file = shown_path(&found.file, found.directory.as_deref());
        Some(Answer::Declaration { file, line: found.line.filter(|line| *line > 0) })
    }

    /// The debug information of an address.
    fn sources(&mut self, address: u64, module: Option<&str>) -> Found {
        if let Some(module) = module {
            return self.sources_in_module(module, address);
        }
        // There is no code at the last address, and addr2line computes the one after it.
        let Some(file) = self.file.as_mut().filter(|_| address < u64::MAX) else {
            return Found::default();
        };
        if matches!(&file.lines, Lines::Open(dwarf) if dwarf.has_grown()) {
            file.lines = Lines::Closed;
        }
        let mut error = None;
        if matches!(file.lines, Lines::Closed) {
            file.lines = match file.open_dwarf() {
                Ok(dwarf) => Lines::Open(Box::new(dwarf)),
                Err(why) => {
                    error = why;
                    Lines::Missing
                }
            };
        }
        let mut found = Found { error, ..Found::default() };
        let mut exhausted = false;
        if let Lines::Open(dwarf) = &file.lines {
            // The parser is made for hostile input, but a panic in it must not cost the finding.
            found = catch_unwind(AssertUnwindSafe(|| dwarf.find(address))).unwrap_or_else(|_| {
                let error = Some(CORRUPT.into());
                Found { error, ..Found::default() }
            });
            exhausted = dwarf.exhausted();
        }
        if exhausted {
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
    fn sources_in_module(&mut self, module: &str, address: u64) -> Found {
        if self.module_files.len() >= MODULE_FILES_MAX && !self.module_files.contains_key(module) {
            self.module_files.clear();
        }
        if !self.module_files.contains_key(module) {
            let file = self.open_module(module);
            self.module_files.insert(module.to_owned(), file);
        }
        let file = self.module_files.get_mut(module).and_then(Option::as_mut);
        file.map_or_else(Found::default, |file| file.sources(address, None))
    }

    fn open_module(&mut self, module: &str) -> Option<Box<Self>> {
        let folder = self.modules_folder.as_deref()?;
        let paths = self.module_paths.get_or_insert_with(|| relocate::index(folder));
        let (path, symbols) = (paths.get(module)?, self.modules.get(module)?);
        let address_of = |name: &str| symbols.get(name).copied();
        let open = || relocate::relocated(relocate::read(path)?, &address_of);
        // As for the kernel's file: a panic must not cost the finding.
        let bytes = catch_unwind(AssertUnwindSafe(open)).ok().flatten()?;
        Some(Box::new(Self::new(Ok(bytes.into()), None)))
    }

    /// The frames, which each finding has, add the note on a damaged file.
    fn variables(&mut self) -> Option<&Variables> {
        let file = self.file.as_mut()?;
        let (contents, blocks) = (&file.contents, &file.blocks);
        let open = || parse(contents, |elf| Variables::open(blocks, elf)).ok()?.ok();
        let open = || catch_unwind(AssertUnwindSafe(open)).ok().flatten();
        file.variables.get_or_insert_with(open).as_ref()
    }

    /// Lookups in the debug information since it was opened; none if it is not open.
    #[cfg(test)]
    pub(super) fn lookups(&self) -> Option<u32> {
        match &self.file.as_ref()?.lines {
            Lines::Open(dwarf) => Some(dwarf.lookups()),
            Lines::Closed | Lines::Missing => None,
        }
    }
}

impl File {
    /// The function that holds `address`.
    fn function(&self, address: u64) -> Option<Symbol> {
        self.symbol(self.symbols.functions.holding(address)?)
    }

    fn symbol(&self, entry: Entry) -> Option<Symbol> {
        let at = self.symbols.names.checked_add(entry.name.into())?;
        let name = self.blocks.string(usize::try_from(at).ok()?, SYMBOL_MAX)?;
        let name = Name::of(String::from_utf8_lossy(&name).into_owned());
        Some(Symbol { name, start: entry.start, size: entry.size })
    }

    /// # Errors
    /// The reason why there are no lines, as a sentence, unless it is known already.
    fn open_dwarf(&self) -> Result<Dwarf, Option<String>> {
        let open = || {
            parse(&self.contents, |elf| Dwarf::open(self.limits.clone(), &self.blocks, elf)).ok()
        };
        let opened =
            catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| Some(Err(CORRUPT.into())));
        opened.ok_or(None)?.map_err(Some)
    }
}

/// Parses an ELF file as far as `read` looks at it; nothing of it is kept.
fn parse<T>(contents: &Contents, read: impl FnOnce(&Elf) -> T) -> Result<T, object::Error> {
    let cache = ReadCache::new(Cursor { contents, at: 0 });
    Ok(read(&Elf::parse(&cache)?))
}
