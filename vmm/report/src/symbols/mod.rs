//! Names and source lines of guest addresses, from the kernel's ELF and DWARF.
//!
//! The file is a user's, so nothing in it is trusted: a stripped, truncated or corrupt one gives
//! frames with addresses and a note that says why ([`Symbols::notes`]). All of it is read in a
//! process of its own if the program offers that ([`symbol_worker`](crate::symbol_worker)), with
//! time limits (`access.rs`); and the work on it is bounded (`reader.rs`). Nothing is read before
//! the first lookup, since most runs have no finding.
//!
//! Addresses are those that the kernel was linked at.

mod access;
pub(crate) mod answers;
mod contents;
mod deadline;
mod dwarf;
mod modules;
mod names;
mod reader;
mod relocate;
mod table;
mod variables;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use self::access::Access;
use self::answers::{Answer, Code, Name, Question, Reply, Source};
pub use self::contents::Contents;
pub use self::deadline::Deadline;
use self::modules::Modules;
pub use self::modules::{Module, ModuleSymbol};
pub use self::names::demangle;
use super::{Frame, Variable};

/// Frames that are cached, since the stacks of a run are much alike.
const CACHED_MAX: usize = 16 << 10;
/// Bytes of names and paths that frames share.
const SHARED_MAX: usize = 4 << 20;
/// Most notes that are kept.
const NOTES_MAX: usize = 12;
/// Most inlined functions of one address.
const DEPTH_MAX: usize = 64;

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

/// The symbols and the debug information of one kernel.
pub struct Symbols {
    access: RefCell<Access>,
    modules: RefCell<Modules>,
    cached: RefCell<HashMap<(u64, Position), Vec<Frame>>>,
    /// Frames in `cached`.
    cached_frames: Cell<usize>,
    shared: RefCell<HashSet<Arc<str>>>,
    /// Bytes of `shared`.
    shared_bytes: Cell<usize>,
    notes: RefCell<Vec<String>>,
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
        Self::with_access(Access::new(Box::new(move || load().map(Into::into))))
    }

    /// The symbols of a file that another process reads. It answers at the other end of `socket` as
    /// a [`symbol_worker`](crate::symbol_worker) does, and is not trusted either. If it does not
    /// answer, the symbols are lost: no other process is started.
    pub fn answered_over(socket: UnixStream) -> Self {
        Self::with_access(Access::connected(socket))
    }

    fn with_access(access: Access) -> Self {
        Self {
            access: RefCell::new(access),
            modules: RefCell::default(),
            cached: RefCell::default(),
            cached_frames: Cell::default(),
            shared: RefCell::default(),
            shared_bytes: Cell::default(),
            notes: RefCell::default(),
        }
    }

    /// Looks for the debug information of modules in `.ko` files in this folder, and in those below
    /// it.
    #[must_use]
    pub fn with_modules_in(self, folder: Option<PathBuf>) -> Self {
        self.access.borrow_mut().set_modules_folder(folder);
        self
    }

    /// Lets no lookup go on after this deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Deadline) -> Self {
        self.access.borrow_mut().set_deadline(deadline);
        self
    }

    /// Begins the lookups of another finding, or of something else that is told of: they have some
    /// seconds together, of which those before took none. What is not found in time lacks names or
    /// lines, and a note says so.
    pub fn begin(&self) {
        self.access.borrow_mut().begin();
    }

    /// Adds a module of the kernel. It takes the place of those that were in its memory.
    pub fn add_module(&self, module: Module) {
        self.access.borrow_mut().forget_module(module.name());
        self.modules.borrow_mut().add(module);
        self.cached.borrow_mut().clear();
        self.cached_frames.set(0);
    }

    /// The function that holds `address`.
    pub fn lookup(&self, address: u64) -> Option<Symbol> {
        if let Some(symbol) = self.modules.borrow().lookup(address) {
            return Some(symbol);
        }
        let question = Question::Code { address, lines: false, module: None };
        match self.ask(question) {
            Some(Answer::Code(Code { symbol: Some(symbol), .. })) => Some(self.symbol(&symbol)),
            _ => None,
        }
    }

    /// The global variable that holds `address`, or else the last one before it in its section,
    /// since an overrun lands behind the variable.
    pub fn lookup_data(&self, address: u64) -> Option<Variable> {
        if let Some(variable) = self.modules.borrow().lookup_data(address) {
            return Some(variable);
        }
        let Some(Answer::Data(symbol)) = self.ask(Question::Data { address }) else { return None };
        Some(Variable {
            name: symbol.name.name,
            start: symbol.start,
            size: symbol.size,
            ..Variable::default()
        })
    }

    /// Adds the place of declaration to `variable`, if the debug information has it. A compiler's
    /// own description of globals may have it, too, but with the path on its command line.
    pub fn declare(&self, variable: &mut Variable) {
        let answer = self.ask(Question::Declaration { address: variable.start });
        let Some(Answer::Declaration { file, line }) = answer else { return };
        variable.file = Some(self.share(&file));
        variable.line = line;
    }

    /// The frames of one address: the functions inlined there, innermost first, and last the
    /// function of the ELF that holds it. There is always that last one, if only with its address.
    pub fn frames(&self, ip: u64, position: Position) -> Vec<Frame> {
        if let Some(frames) = self.cached.borrow().get(&(ip, position)) {
            return frames.clone();
        }
        let (frames, complete) = self.find_frames(ip, position);
        let all = self.cached_frames.get() + frames.len();
        if complete && all <= CACHED_MAX {
            self.cached_frames.set(all);
            self.cached.borrow_mut().insert((ip, position), frames.clone());
        }
        frames
    }

    /// The frames of a stack of return addresses.
    pub fn stack(&self, ips: &[u64]) -> Vec<Frame> {
        ips.iter().flat_map(|ip| self.frames(*ip, Position::Return)).collect()
    }

    /// The addresses of the kernel's image; empty if the file does not tell them.
    pub fn image(&self) -> Range<u64> {
        match self.ask(Question::Image) {
            Some(Answer::Image { start, end }) => start..end,
            _ => 0..0,
        }
    }

    /// The parts that the lookups so far did not find because the file lacks them, is damaged or
    /// takes too long to read, one sentence each.
    pub fn notes(&self) -> Vec<String> {
        self.notes.borrow().clone()
    }

    fn ask(&self, question: Question) -> Option<Answer> {
        let reply = self.access.borrow_mut().ask(question);
        self.take(reply)
    }

    /// The answer; the notes are kept.
    fn take(&self, reply: Reply) -> Option<Answer> {
        let mut notes = self.notes.borrow_mut();
        for note in reply.notes {
            if notes.len() < NOTES_MAX && !notes.contains(&note) {
                notes.push(note);
            }
        }
        reply.answer
    }

    /// The frames of an address, and whether there was time for all that is known of them.
    fn find_frames(&self, ip: u64, position: Position) -> (Vec<Frame>, bool) {
        let probe = match position {
            Position::Instruction => ip,
            Position::Return => ip.saturating_sub(1),
        };
        let modules = self.modules.borrow();
        let reply = self.access.borrow_mut().code(probe, modules.holding(probe));
        let (complete, of_module) = (!reply.late, modules.lookup(probe));
        drop(modules);
        let code = match self.take(reply) {
            Some(Answer::Code(code)) => code,
            _ => Code::default(),
        };
        let mut last = Frame::unknown(ip);
        if let Some(symbol) = of_module.or_else(|| Some(self.symbol(code.symbol.as_ref()?))) {
            last.symbol = Some(symbol.name);
            last.linkage = symbol.linkage;
            last.module = symbol.module;
            last.offset = ip.saturating_sub(symbol.start);
            last.size = symbol.size;
        }
        let mut sources = code.sources;
        sources.truncate(DEPTH_MAX);
        if let Some(source) = sources.pop() {
            self.locate(&mut last, &source);
            // A kernel may have debug information and no symbol table.
            if let (None, Some(name), Some((start, size))) =
                (&last.symbol, &source.function, code.function)
            {
                (last.symbol, last.linkage) = self.name(name);
                (last.offset, last.size) = (ip.saturating_sub(start), size);
            }
        }
        let inlined = sources.iter().map(|source| {
            let named = source.function.as_ref().map(|name| self.name(name));
            let (symbol, linkage) = named.unwrap_or_default();
            let mut frame = Frame { symbol, linkage, inlined: true, ..Frame::unknown(ip) };
            self.locate(&mut frame, source);
            frame
        });
        (inlined.chain([last.clone()]).collect(), complete)
    }

    fn symbol(&self, symbol: &answers::Symbol) -> Symbol {
        let (name, linkage) = (self.share(&symbol.name.name), symbol.name.linkage.as_deref());
        let linkage = linkage.map(|linkage| self.share(linkage));
        Symbol { name, linkage, start: symbol.start, size: symbol.size, module: None }
    }

    fn name(&self, name: &Name) -> (Option<Arc<str>>, Option<Arc<str>>) {
        let linkage = name.linkage.as_deref().map(|linkage| self.share(linkage));
        (Some(self.share(&name.name)), linkage)
    }

    fn locate(&self, frame: &mut Frame, source: &Source) {
        frame.file = source.file.as_deref().map(|file| self.share(file));
        frame.path = source.path.as_deref().map(|path| self.share(path));
        frame.line = source.line;
    }

    fn share(&self, text: &str) -> Arc<str> {
        let mut shared = self.shared.borrow_mut();
        if let Some(text) = shared.get(text) {
            return text.clone();
        }
        let text: Arc<str> = text.into();
        let all = self.shared_bytes.get() + text.len();
        if all <= SHARED_MAX {
            self.shared_bytes.set(all);
            shared.insert(text.clone());
        }
        text
    }
}

#[cfg(test)]
mod tests;
