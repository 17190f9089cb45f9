//! How the kernel's file is read: in a process of its own if there can be one, else here; and what
//! happens when that takes too long or fails.
//!
//! Debug information is what takes time and breaks. So where an answer fails, the same is asked
//! again without it: the symbol table gives the names, and findings keep their identity.

use std::collections::HashSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answers::{Answers, CHANGED, Question, Reply};
use super::contents::Contents;
use super::deadline::Deadline;
use super::modules::Module;
use crate::worker::{self, Client, Failure, Request, Response, Setup};

/// Longest wait for the debug information of one finding.
const LINES_TIME: Duration = Duration::from_secs(6);
/// Longest wait for all lookups of one finding.
const TIME: Duration = Duration::from_secs(8);
/// Failures after which no more debug information is read.
const LINE_FAILURES_MAX: u32 = 3;
/// Failures after which nothing is read any more.
const FAILURES_MAX: u32 = 6;

const LATE: &str = "the kernel's file takes too long to read: frames may have no names or lines";
const DIED: &str = "the process that reads the kernel's file died: frames may have no names or \
                    lines";
const NO_LINES: &str = "the debug information is not read any more, after several failures: frames \
                        have no source lines";
const NOTHING: &str = "the kernel's file is not read any more, after several failures: frames have \
                       addresses only";

pub(super) type Load = Box<dyn FnOnce() -> io::Result<Contents> + Send>;

/// Access to the kernel's file.
pub(super) struct Access {
    state: State,
    /// Where the files of modules are.
    modules_folder: Option<PathBuf>,
    /// The modules that the present process was told of.
    told: HashSet<Arc<str>>,
    failures: u32,
    /// When the lookups of the present finding began.
    began: Instant,
    deadline: Deadline,
}

/// Who reads.
enum State {
    /// Nobody yet.
    Unopened(Option<Load>),
    /// This process.
    Here(Box<Answers>),
    /// Another process. The file is kept to see whether it changes.
    Worker(Box<Client>, Contents),
}

impl Access {
    /// Access to the file that `load` opens at the first question.
    pub(super) fn new(load: Load) -> Self {
        Self {
            state: State::Unopened(Some(load)),
            modules_folder: None,
            told: HashSet::new(),
            failures: 0,
            began: Instant::now(),
            deadline: Deadline::default(),
        }
    }

    /// Access to a file that the process at the other end of `socket` reads.
    pub(super) fn connected(socket: UnixStream) -> Self {
        let mut access = Self::new(Box::new(|| Err(io::ErrorKind::NotFound.into())));
        let nothing = Contents::Memory(Arc::default());
        access.state = State::Worker(Box::new(Client::connected(socket)), nothing);
        access
    }

    /// Looks for the files of modules in this folder.
    pub(super) fn set_modules_folder(&mut self, folder: Option<PathBuf>) {
        // The process that reads them may run in another directory.
        self.modules_folder = folder.map(|folder| folder.canonicalize().unwrap_or(folder));
    }

    /// Lets no question take longer than until this deadline.
    pub(super) fn set_deadline(&mut self, deadline: Deadline) {
        self.deadline = deadline;
    }

    /// Begins the time of another finding.
    pub(super) fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// What was told of a module holds no longer.
    pub(super) fn forget_module(&mut self, name: &str) {
        self.told.remove(name);
    }

    /// What is at an address of code, `module` being the one that the address belongs to.
    pub(super) fn code(&mut self, address: u64, module: Option<&Module>) -> Reply {
        // Without its file there are no lines of a module.
        let lines = module.is_none() || self.modules_folder.is_some();
        if let Some(module) = module.filter(|module| lines && !self.told.contains(module.name())) {
            if let Err(why) = self.try_to_ask(module.question()) {
                return note(why);
            }
            self.told.insert(module.name().into());
        }
        let module = module.map(|module| module.name().to_owned());
        self.ask(Question::Code { address, lines, module })
    }

    /// Asks; without debug information if there is no answer with it. What is missing is in the
    /// notes.
    pub(super) fn ask(&mut self, question: Question) -> Reply {
        let mut why = NO_LINES;
        if self.failures < LINE_FAILURES_MAX || !question.wants_lines() {
            match self.try_to_ask(question.clone()) {
                Ok(reply) => return reply,
                Err(failure) => why = failure,
            }
        }
        let Some(names) = question.without_lines() else { return note(why) };
        let mut reply = self.try_to_ask(names).unwrap_or_else(note);
        reply.notes.push(why.to_owned());
        reply.late = why == LATE;
        reply
    }

    fn try_to_ask(&mut self, question: Question) -> Result<Reply, &'static str> {
        if self.failures >= FAILURES_MAX {
            return Err(NOTHING);
        }
        let time = if question.wants_lines() { LINES_TIME } else { TIME };
        let (began, deadline) = (self.began, self.deadline.clone());
        let left = move || deadline.left(time.checked_sub(began.elapsed())?);
        if left().is_none() {
            return Err(LATE);
        }
        let modules = &self.modules_folder;
        if let State::Unopened(load) = &mut self.state {
            let load =
                load.take().map_or_else(|| Err(io::ErrorKind::NotFound.into()), |load| load());
            self.state = State::of(load, modules.clone());
        }
        let failure = match &mut self.state {
            State::Here(answers) => return Ok(answers.reply(question)),
            State::Unopened(_) => return Err(NOTHING),
            State::Worker(client, file) => match client.ask(Request::Symbols(question), &left) {
                Ok(Response::Symbols(mut reply)) => {
                    reply.notes.extend(file.changed().then(|| CHANGED.to_owned()));
                    return Ok(reply);
                }
                Ok(Response::Source(_)) => Failure::Died,
                Err(failure) => failure,
            },
        };
        // The next question starts another process.
        self.told.clear();
        let in_time = self.deadline.left(Duration::MAX).is_some();
        match failure {
            Failure::Start(_) => {
                self.failures = FAILURES_MAX;
                Err("the process that reads the kernel's file cannot be started: frames have \
                     addresses only")
            }
            Failure::Died => {
                self.failures += 1;
                Err(DIED)
            }
            Failure::Late => {
                // It is not the file's fault if the run ends meanwhile.
                self.failures += u32::from(in_time);
                Err(LATE)
            }
        }
    }

    /// The answers of this process.
    #[cfg(test)]
    pub(super) fn answers(&self) -> Option<&Answers> {
        match &self.state {
            State::Here(answers) => Some(answers),
            State::Unopened(_) | State::Worker(..) => None,
        }
    }
}

impl State {
    fn of(file: io::Result<Contents>, modules: Option<PathBuf>) -> Self {
        let file = match file {
            Ok(contents) if worker::is_offered() => contents.into_file(),
            here => return Self::Here(Box::new(Answers::new(here, modules))),
        };
        let both = file.and_then(|file| Ok((file.to_file()?, file)));
        match both {
            Ok((for_worker, file)) => {
                let setup = Setup { kernel: true, modules, ..Setup::default() };
                Self::Worker(Box::new(Client::new(setup, Some(for_worker))), file)
            }
            Err(error) => Self::Here(Box::new(Answers::new(Err(error), modules))),
        }
    }
}

impl Question {
    fn wants_lines(&self) -> bool {
        match self {
            Self::Code { lines, .. } => *lines,
            Self::Declaration { .. } => true,
            Self::Data { .. } | Self::Image | Self::Module { .. } => false,
        }
    }

    /// The same question without debug information, if that can be asked.
    fn without_lines(&self) -> Option<Self> {
        match self {
            Self::Code { address, lines: true, module: None } => {
                Some(Self::Code { address: *address, lines: false, module: None })
            }
            _ => None,
        }
    }
}

fn note(why: &str) -> Reply {
    Reply { answer: None, notes: vec![why.to_owned()], late: why == LATE }
}
